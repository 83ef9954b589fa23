"""Measures the speed of a config with random weights and tokens: the one way in which speed is quoted.

  python -m transxssm_jax.bench --config=configs/1p3b.py --config.data.global_batch=8
  python -m transxssm_jax.bench --config=configs/1p3b.py --modes=train,forward,prefill,decode --output=DIR
  python -m transxssm_jax.bench --config=configs/1p3b.py --against=attention --lengths=2048,16384,65536 --tokens=65536
  python -m transxssm_jax.bench --config=1p3b --against=llama3_1p3b,mamba2_1p3b,jamba_1p3b --lengths=1024,8192 --tokens=65536

Rows: with --tokens, as many as make that many tokens over all devices; otherwise data.global_batch, with any length.
--against names configs, to which the settings of the command line apply too, or one of two words: 'attention' is the
config with attention in every layer, 'attention-xla' the same without fused attention. With --peers the same model in
PyTorch is measured too, in training and forward, on one GPU (pip install torch transformers; with mamba_ssm its scan is
Triton's).

Columns: ms is the median time of a call (a training step, a forward pass with the loss, a prefill, one decoded token per
row) over --repeats blocks of --calls calls; least and most are of the blocks. MFU counts the model's own work, HFU also
what the backward pass computes again. GiB is what the compiler counts per device.

--output=DIR writes bench.json (with card, versions, command and date), bench.md and, of several lengths, bench.png; with
--profile also MODEL-MODE-LENGTH.md of train and forward, the ops of one device by their time.

Exit codes: 0 finished; 2 wrong input, with one line; 3 nothing fitted into the memory.
"""

from transxssm_jax import cli

if __name__ == '__main__':
    cli.start('transxssm_jax.bench')

import json
import pathlib
import sys

import jax

from transxssm_jax import config as config_lib
from transxssm_jax import settings
from transxssm_jax.cli import ExitCode, Flag
from transxssm_jax.config import Config, ConfigError
from transxssm_jax.data.manifest import write_file
from transxssm_jax.evals import charts, op_table, pytorch_peer, speed
from transxssm_jax.evals import results as results_lib
from transxssm_jax.evals.decode_speed import transformer_of

AGAINST = {
    'attention': transformer_of,
    'attention-xla': lambda config: config_lib.replace(
        transformer_of(config), {'model.attention_implementation': 'xla'}
    ),
}
PEER = 'pytorch'

COMMAND = cli.Command(
    'transxssm_jax.bench',
    __doc__,
    [
        Flag('modes', ('train',), 'What is measured.', choices=speed.MODES),
        Flag('against', (), f'Other models to measure beside the config: {", ".join(AGAINST)}, or configs.'),
        Flag('peers', False, 'Whether to measure the model in PyTorch too.'),
        Flag('lengths', (0,), 'Tokens per row; 0: data.seq_len.', minimum=0),
        Flag(
            'tokens',
            0,
            'Tokens per call over all devices, from which rows follow; 0: data.global_batch rows.',
            minimum=0,
        ),
        Flag('documents_per_row', 1, 'Documents per row, of equal length.', minimum=1),
        Flag('calls', 8, 'Calls of a timed block.', minimum=1),
        Flag('repeats', 5, 'Timed blocks.', minimum=1),
        Flag('profile', False, 'Whether to write where the time of train and forward goes, op by op.'),
        Flag('output', '', 'Directory to write the results to; empty: none.', is_path=True),
    ],
    settings=config_lib.describe,
)


def main(argv: list[str] | None = None) -> int:
    """The command; see --help. Returns its exit code."""
    return cli.run(COMMAND, _bench, argv)


def cases(config: Config, flags) -> list[speed.Case]:
    """Every case that the flags ask for.

    Raises:
      ConfigError: --tokens is no whole number of rows, a row is shorter than its documents are many, or --against names
        no config.
    """
    models = {'config': config} | {name: _other(name, config, flags.overrides) for name in flags.against}
    found = []
    for mode in flags.modes:
        for length in (length or config.data.seq_len for length in flags.lengths):
            rows = config.data.global_batch
            if flags.tokens:
                rows = flags.tokens // length
                if rows * length != flags.tokens or rows < 1:
                    raise ConfigError(f'--tokens={flags.tokens} must be a multiple of --lengths={length}')
            if length < flags.documents_per_row:
                raise ConfigError(f'--documents_per_row={flags.documents_per_row} must be at most --lengths={length}')
            found += [
                speed.Case(name, model, mode, length, rows, flags.documents_per_row) for name, model in models.items()
            ]
    return found


def _other(name: str, config: Config, overrides: dict) -> Config:
    """A model that --against names."""
    return (
        AGAINST[name](config) if name in AGAINST else config_lib.load(settings.find_file(name, '--against'), overrides)
    )


def _bench(flags) -> int:
    config = config_lib.from_flags(flags)
    output = pathlib.Path(flags.output) if flags.output else None
    if flags.profile and not output:
        raise ConfigError('--profile needs --output, a directory to write to')
    if flags.profile and not {'train', 'forward'} & set(flags.modes):
        raise ConfigError(f'--profile is of train and forward, not of --modes={",".join(flags.modes)}')
    if output:
        output.mkdir(parents=True, exist_ok=True)
    to_measure = cases(config, flags)
    if flags.peers and flags.documents_per_row > 1:
        raise ConfigError(f'--documents_per_row={flags.documents_per_row} must be 1 with --peers, which do not pack')
    # PyTorch first: once JAX has looked at a GPU, most of its memory is JAX's.
    results = _peers(to_measure, flags) if flags.peers else []
    made_by = results_lib.of_command(config, 'transxssm_jax.bench', sys.argv[1:])
    title = f'{jax.device_count()} x {made_by["device"]}, jax {jax.__version__}, {made_by["date"][:10]}'
    print(title, flush=True)
    for case in to_measure:
        results.append(speed.measure(case, flags.calls, flags.repeats, flags.profile))
        print(_line(results[-1]), flush=True)
        if output:  # after every case: a measurement that is stopped keeps what it has
            if ops := results[-1].get('ops'):
                write_file(output / _profile_name(case), op_table.markdown(ops, results[-1]['ms']).encode())
            write_file(output / 'bench.json', (json.dumps(made_by | {'results': results}, indent=2) + '\n').encode())
    table = speed.markdown_table(results)
    print(table)
    lines = [
        f'{mode}, {length:,} tokens per row: {ratio:.2f} times the speed of {other}'
        for other in (*flags.against, *([PEER] if flags.peers else []))
        for mode, length, ratio in speed.ratios(results, 'config', other)
    ]
    for line in lines:
        print(line)
    if output:
        write_file(output / 'bench.md', '\n'.join([title, '', table, '', *lines, '']).encode())
        if len({result['length'] for result in results}) > 1:
            charts.write_pngs(output, [speed.chart(results, title)])
    fitted = any('does_not_fit' not in result for result in results)
    return ExitCode.FINISHED if fitted else ExitCode.DOES_NOT_FIT


def _profile_name(case: speed.Case) -> str:
    """The file of a profile. Of a config that is given by its path the name is the whole path, as others may end alike."""
    model = case.model.removesuffix('.py').strip('./').replace('/', '-')
    return f'{model}-{case.mode}-{case.length}.md'


def _peers(to_measure: list[speed.Case], flags) -> list[dict]:
    """The cases of the config itself that PyTorch can take, measured there."""
    results = []
    for case in to_measure:
        if case.model != 'config' or case.mode not in pytorch_peer.MODES:
            continue
        asked = {'mode': case.mode, 'length': case.length, 'rows': case.rows}
        given = asked | {'config': config_lib.to_json(case.config), 'calls': flags.calls, 'repeats': flags.repeats}
        results.append({'model': PEER, **asked, 'documents': 1, 'devices': 1, **pytorch_peer.measure(given)})
        print(_line(results[-1]), flush=True)
    return results


def _line(result: dict) -> str:
    what = f'{result["model"]} {result["mode"]} {result["rows"]} x {result["length"]:,}'
    if 'does_not_fit' in result:
        return f'{what}: {result["does_not_fit"]}'
    return f'{what}: {result["ms"]:,.2f} ms, {result["tokens_per_second"]:,.0f} tokens/s'
