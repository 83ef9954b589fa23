"""What a run prints before it starts: what it is, and what changed since its checkpoint."""

import dataclasses

import jax

from transxssm_jax import config as config_lib
from transxssm_jax.config import Config
from transxssm_jax.data.loader import Loader
from transxssm_jax.model import costs, parameters
from transxssm_jax.parallel import processes
from transxssm_jax.training import metrics, optimizer, parameter_groups, splits


def describe(config: Config, device_mesh: jax.sharding.Mesh, loader: Loader, workdir, attended: float) -> list[str]:
    """One screen that describes a run. What a step needs and how long it is expected to take comes with its compilation."""
    changed = config_lib.differences(config, Config())
    lines = ['settings that differ from the defaults:']
    lines += [f'  {name} = {value!r} (default {default!r})' for name, (value, default) in changed.items()]
    devices, train = jax.devices(), config.train
    axes = ' x '.join(f'{name} {size}' for name, size in device_mesh.shape.items())
    several = f', {jax.process_count()} processes' if processes.is_multiprocess() else ''
    table = parameters.parameter_table(config.model)
    total = sum(table.values())
    parts = [f'{name:<20} {count:>15,} {count / total:>6.1%}' for name, count in table.items()]
    whole = train.steps * config.tokens_per_step
    files = ['config.json', f'metrics.jsonl every {train.log_every_steps:,} steps', 'ledger/']
    files += ['tensorboard/'] if train.tensorboard else []
    files += [f'checkpoints/ every {train.checkpoint_every_steps:,} steps (the newest {train.keep_last} stay)']
    idle = []
    if config.optimizer.groups:
        shapes = jax.eval_shape(lambda: parameters.init_params(config.model, 0))
        idle = parameter_groups.without_parameters(config.optimizer, shapes)
    evaluated = ', '.join(splits.eval_splits(config))
    return [
        *lines,
        *_block('devices', [f'{len(devices)} x {devices[0].device_kind} as {axes}{several}']),
        *_block('parameters', [f'{total:,}', *parts]),
        *_block(
            'training',
            [
                f'{train.steps:,} steps of {config.tokens_per_step:,} tokens '
                f'({config.data.global_batch:,} rows of {config.data.seq_len:,}): {whole:,} tokens, '
                f'{whole / max(loader.num_tokens, 1):.3g} times the data',
                f'a token attends to {attended:,.0f} tokens on average, which mfu counts; mfu_packed_rows counts '
                f'{costs.row_attended(config.data.seq_len):,.0f}, as if one document filled every row',
                f'evaluated on {evaluated} every {train.eval_every_steps:,} steps' if evaluated else 'not evaluated',
                *filter(None, [metrics.missing_mfu(devices[0]), _slow_dtype(config, devices[0])]),
                *(f'optimizer.groups: this model has no parameters in {name}' for name in idle),
            ],
        ),
        *_block('data', splits.describe(config, loader)),
        *_block('workdir', [str(workdir), ', '.join(files)]),
    ]


def _slow_dtype(config: Config, device: jax.Device) -> str:
    """What to say of bfloat16 on a CPU, where 30M trained at less than 90 tokens/s in it and at 450 in float32 (two cores)."""
    if device.platform != 'cpu' or config.model.dtype == 'float32':
        return ''
    return f'a CPU is several times as fast with --config.model.dtype=float32 as with {config.model.dtype}'


def _block(title: str, lines: list[str]) -> list[str]:
    """Lines beside their title."""
    return [f'{title if i == 0 else "":<12}{line}' for i, line in enumerate(lines)]


def describe_resumption(saved: Config, config: Config, step: int) -> list[str]:
    """Lines that tell where a run goes on, which settings changed since its checkpoint, and what the schedule makes of it.

    Args:
      saved: the config that the checkpoint was trained with.
      config: the config that the run goes on with.
      step: of the checkpoint.
    """
    lines = [f'resuming from step {step}']
    changed = config_lib.differences(config, saved)
    if not changed:
        return lines
    lines.append(f'changed since the checkpoint of step {step}:')
    lines += [f'  {name} {before!r} -> {now!r}' for name, (now, before) in changed.items()]
    rate, before = (float(optimizer.schedule(c)(step)) for c in (config, saved))
    if abs(rate - before) > 1e-6 * max(rate, before):
        line = f'  the learning rate of the next step is {rate:.4g}; with the settings of the checkpoint it was {before:.4g}'
        of_steps = float(optimizer.schedule(dataclasses.replace(saved, train=config.train))(step))
        if of_steps != before:
            line += (
                f'; train.steps={config.train.steps} moves the {config.optimizer.schedule!r} schedule of '
                f'{saved.train.steps} steps, which alone makes it {of_steps:.4g}'
            )
        lines.append(line)
    return lines
