"""Multi-query associative recall (MQAR): python -m transxssm_jax.evals.mqar --config=configs/recall.py [--pattern=attention,ssd].

A row shows pairs of a key and its value, then asks for every key once, among
noise: where a key appears the second time, its value is to be predicted (the task of
Zoology, arXiv:2312.04927). The answer is not shown, so that the values left over
do not give the last ones away. The task needs exact recall of many things at once, which
is hard for a state of fixed size and easy for attention.

    tokens   k1 v1 k2 v2 k3 v3 k2  . k3  .  . k1  .  .      . is noise
    targets                    v2    v3       v1

Trains a model of each pattern with the project's own step and optimizer on rows
that never repeat, prints accuracy as it goes, and ends with a table. The length
of a row is data.seq_len, tokens are of model.vocab_size.

Exit codes: 0 finished; 2 wrong input; 3 the loss is not finite.

Shape legend: B batch, L length, D model, V vocabulary, P pairs, S positions after the pairs.
"""

from transxssm_jax import cli

if __name__ == '__main__':
    cli.start('transxssm_jax.evals.mqar')

import dataclasses
import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from transxssm_jax import config as config_lib
from transxssm_jax.cli import Flag
from transxssm_jax.config import Config, ConfigError
from transxssm_jax.evals import results as results_lib
from transxssm_jax.model import parameters
from transxssm_jax.model.language_model import to_logits
from transxssm_jax.model.loss import IGNORED
from transxssm_jax.parallel import mesh
from transxssm_jax.training import step as step_lib
from transxssm_jax.training.health import NotFiniteError

TRAIN, EVAL, FINAL = 0, 1, 2  # independent streams of rows

# The settings of model.* that each pattern changes; 'hybrid' is the config's own.
PATTERNS = {
    'hybrid': {},
    'attention': {'pattern': 'attention'},
    'ssd': {'pattern': 'ssd'},
    'mamba2': {'pattern': 'mamba2'},
}

COMMAND = cli.Command(
    'transxssm_jax.evals.mqar',
    __doc__,
    [
        Flag(
            'pattern',
            ('hybrid',),
            "Patterns to train: 'hybrid', 'attention', 'ssd', 'mamba2'.",
            choices=tuple(PATTERNS),
        ),
        Flag('pairs', 0, 'Keys per row; 0: an eighth of data.seq_len.', minimum=0),
        Flag('target', 0.995, 'Accuracy that ends a training; above 1: none does.'),
        Flag('output', '', 'New JSON file; empty: none.', is_path=True),
    ],
    settings=config_lib.describe,
)


@dataclasses.dataclass(frozen=True)
class Task:
    """How rows are made.

    Keys are drawn from 1 .. vocab_size/2 - 1, values and noise from the upper
    half, so that a key appears twice in a row and nothing else looks like a key.

    Attributes:
      vocab_size: V.
      length: L, tokens per row.
      pairs: P, keys per row, each asked for once.
      alpha: skews queries towards the pairs: the s-th position after them is drawn in proportion to s^(alpha - 1).

    Raises:
      ConfigError: the row is too short for its pairs, or the vocabulary for its keys.
    """

    vocab_size: int
    length: int
    pairs: int
    alpha: float = 0.1

    def __post_init__(self):
        if self.pairs < 1:
            raise ConfigError(
                f'--pairs={self.pairs} must be at least 1; data.seq_len={self.length} holds {self.length // 4}'
            )
        if 3 * self.pairs > self.length:
            raise ConfigError(
                f'data.seq_len={self.length} is too short for --pairs={self.pairs}, of three tokens each; '
                f'try data.seq_len={4 * self.pairs} or --pairs={self.length // 4}'
            )
        if self.pairs > self.vocab_size // 2 - 1:
            raise ConfigError(
                f'model.vocab_size={self.vocab_size} has {self.vocab_size // 2 - 1} keys, fewer than '
                f'--pairs={self.pairs}; try model.vocab_size={2 * self.pairs + 2}'
            )

    def batch(self, rows: int, *, seed: int, stream: int, step: int) -> dict[str, np.ndarray]:
        """Rows of one step: a pure function of its arguments.

        Returns:
          tokens, targets, segment_ids, positions: int32 [B, L], as a train step
          takes them; targets are IGNORED except where a key is asked for, P times per row.
        """
        rng = np.random.default_rng([seed, stream, step])
        half, pairs = self.vocab_size // 2, self.pairs
        keys_BP = 1 + _largest(rng, rng.random((rows, half - 1), np.float32), pairs)
        values_BP = rng.integers(half, self.vocab_size, (rows, pairs))
        weight_S = np.arange(1, self.length - 2 * pairs + 1) ** (self.alpha - 1)
        # The largest of u^(1/weight) are a weighted sample without replacement (Efraimidis and Spirakis 2006).
        at_BP = 2 * pairs + _largest(rng, np.log(rng.random((rows, len(weight_S)))) / weight_S, pairs)

        tokens_BL = rng.integers(half, self.vocab_size, (rows, self.length))
        tokens_BL[:, 0 : 2 * pairs : 2], tokens_BL[:, 1 : 2 * pairs : 2] = keys_BP, values_BP
        np.put_along_axis(tokens_BL, at_BP, keys_BP, axis=1)
        targets_BL = np.full((rows, self.length), IGNORED)
        np.put_along_axis(targets_BL, at_BP, values_BP, axis=1)
        batch = dict(
            tokens=tokens_BL,
            targets=targets_BL,
            segment_ids=np.ones_like(tokens_BL),
            positions=np.broadcast_to(np.arange(self.length), tokens_BL.shape),
        )
        return {name: np.ascontiguousarray(value, np.int32) for name, value in batch.items()}


def _largest(rng, x_BS, count):
    """int [B, count]: indices of each row's largest values, in random order, so that any key may be asked for first."""
    return rng.permuted(np.argpartition(x_BS, -count, axis=1)[:, -count:], axis=1)


def with_pattern(config: Config, pattern: str) -> Config:
    """The config with the mixers of one of PATTERNS.

    Raises:
      ConfigError: no such pattern, or 'hybrid' of a config with only one kind of layer.
    """
    if pattern not in PATTERNS:
        raise ConfigError(f'--pattern={pattern} must be one of {", ".join(PATTERNS)}, or several with commas')
    changed = config_lib.replace(config, {f'model.{name}': value for name, value in PATTERNS[pattern].items()})
    if pattern == 'hybrid' and len(set(changed.model.layer_pattern)) == 1:
        raise ConfigError(
            f'--pattern=hybrid needs two kinds of layers, but those of the config are {changed.model.layer_pattern[0]} only'
        )
    return changed


def accuracy_step(config: Config):
    """The function (params, batch, at_BP) -> accuracy, float32: the share of targets whose logit is the highest.

    at_BP is where the P targets of each row are, int32.
    """
    graph, _ = parameters.split_model(config.model)

    def of_block(params, batch, at_BP):
        model = nnx.merge(graph, params)
        hidden_BLD = model(batch['tokens'], segment_ids_BL=batch['segment_ids'], positions_BL=batch['positions'])
        hidden_BPD = jnp.take_along_axis(hidden_BLD, at_BP[..., None], axis=1)
        logits_BPV = to_logits(hidden_BPD, model.head_VD, config.model.logit_soft_cap)
        return jnp.argmax(logits_BPV, axis=-1) == jnp.take_along_axis(batch['targets'], at_BP, axis=1)

    rows = ('batch', None)  # whole, because a target may be anywhere in its row
    batch_axes = dict.fromkeys(('tokens', 'targets', 'segment_ids', 'positions'), rows)
    is_right_BP = parameters.on_shards(of_block, config.model, (batch_axes, rows), rows)
    return lambda params, batch, at_BP: jnp.mean(is_right_BP(params, batch, at_BP))


def train(config: Config, task: Task, *, target: float, report=print) -> dict:
    """Trains a model on the task until an evaluation reaches the target accuracy, or for train.steps.

    Args:
      config: model, optimizer and rows per step; evaluates every train.eval_every_steps
        on train.eval_batches batches (0: one) that are never trained on.
      target: accuracy that ends the training; above 1: none does.
      report: called with one line for every evaluation.

    Returns:
      'layers' (e.g. 'ssd attention'), 'parameters', 'steps', 'seconds' (with
      compilation), 'accuracy' and 'rows' (of a last evaluation on rows of its own), and
      'curve': a list of {'step', 'loss' (of the step, in nats per target), 'accuracy'}.

    Raises:
      NotFiniteError: naming the step.
    """
    device_mesh = mesh.build(config)
    batch_sharding = step_lib.batch_sharding(device_mesh)
    rows, seed, settings = config.data.global_batch, config.data.seed, config.train
    eval_batches = max(settings.eval_batches, 1)
    started, curve = time.perf_counter(), []

    def batch(stream, step):
        return task.batch(rows, seed=seed, stream=stream, step=step)

    with jax.set_mesh(device_mesh):
        state = step_lib.create_state(config, device_mesh)
        train_step = jax.jit(step_lib.train_step(config), donate_argnums=0)
        of_batch = jax.jit(accuracy_step(config))

        def accuracy(stream, first):
            total = 0.0
            for i in range(eval_batches):
                held_out = batch(stream, first + i)
                at_BP = np.nonzero(held_out['targets'] != IGNORED)[1].reshape(rows, task.pairs).astype(np.int32)
                total += float(of_batch(state['params'], *jax.device_put((held_out, at_BP), batch_sharding)))
            return total / eval_batches

        bar = tqdm(
            total=settings.steps,
            unit='step',
            file=sys.stderr,
            leave=False,
            disable=not (settings.progress and sys.stderr.isatty()),
        )
        with bar:
            metrics = {}
            for step in range(1, settings.steps + 1):
                pending_metrics = metrics
                state, metrics = train_step(state, jax.device_put(batch(TRAIN, step), batch_sharding))
                jax.copy_to_host_async((metrics['loss'], metrics['grad_norm']))  # see `metrics.PendingMetrics.push`
                _check_finite(step - 1, pending_metrics)  # waits for the step before, so that few are in flight
                bar.update()
                if step < settings.steps and not (settings.eval_every_steps and step % settings.eval_every_steps == 0):
                    continue
                _check_finite(step, metrics)
                curve.append(
                    {'step': step, 'loss': float(metrics['loss']), 'accuracy': accuracy(EVAL, step * eval_batches)}
                )
                bar.clear()
                report(
                    f'step {step:6d}   loss {curve[-1]["loss"]:7.4f}   accuracy {curve[-1]["accuracy"]:7.2%}   '
                    f'{time.perf_counter() - started:6.1f} s'
                )
                if curve[-1]['accuracy'] >= target:
                    break
        final = accuracy(FINAL, 0)
    return {
        'layers': ' '.join(config.model.layer_pattern * (config.model.num_layers // len(config.model.layer_pattern))),
        'parameters': parameters.count_params(config.model),
        'steps': step,
        'seconds': time.perf_counter() - started,
        'accuracy': final,
        'rows': rows * eval_batches,
        'curve': curve,
    }


def _check_finite(step: int, metrics: dict) -> None:
    values = {name: float(metrics[name]) for name in ('loss', 'grad_norm') if name in metrics}
    if not all(map(math.isfinite, values.values())):
        raise NotFiniteError(
            f'step {step}: loss {values["loss"]:.6g}, gradient norm {values["grad_norm"]:.4g}; '
            'lower optimizer.learning_rate'
        )


def table(results: dict[str, dict]) -> str:
    """Results by pattern, one line each."""
    lines = [f'{"pattern":10s} {"parameters":>12s} {"steps":>7s} {"seconds":>8s} {"accuracy":>9s}']
    lines += [
        f'{pattern:10s} {result["parameters"]:12,d} {result["steps"]:7d} {result["seconds"]:8.1f} '
        f'{result["accuracy"]:9.2%}'
        for pattern, result in results.items()
    ]
    return '\n'.join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command; see the module's docstring. Returns its exit code."""
    return cli.run(COMMAND, _compare, argv)


def _compare(flags) -> None:
    config = config_lib.from_flags(flags)
    task = Task(config.model.vocab_size, config.data.seq_len, flags.pairs or config.data.seq_len // 8)
    configs = {name: with_pattern(config, name) for name in flags.pattern}
    path = results_lib.choose_output(flags.output, None, 'mqar') if flags.output else None
    print(
        f'{len(configs)} patterns, at most {config.train.steps:,} steps each: '
        f'{task.pairs} pairs in rows of {task.length} tokens, {task.vocab_size} words; '
        f'a guess is right {2 / task.vocab_size:.2%} of the time, one of the values shown {1 / task.pairs:.2%}'
    )
    results = {}
    for name, changed in configs.items():
        print(f'{name}: {" ".join(changed.model.layer_pattern)}', flush=True)
        results[name] = train(changed, task, target=flags.target, report=lambda line: print(line, flush=True))
    print(table(results))
    if path:
        record = {
            **results_lib.of_command(config, COMMAND.module, flags.argv),
            'task': dataclasses.asdict(task),
            'results': results,
            'config': dataclasses.asdict(config),
        }
        results_lib.write_json(path, record)
        print(f'results written to {path}')
