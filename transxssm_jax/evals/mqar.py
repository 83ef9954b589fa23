"""Multi-query associative recall: python -m transxssm_jax.evals.mqar --config=configs/recall.py [--pattern=attention,ssd].

A row shows pairs of a key and its value, then asks for every key once, among
noise: where a key comes the second time its value is to be predicted (the task of
Zoology, arXiv:2312.04927). The answer is not shown, so that the values left over
do not give the last ones away. It takes exact recall of many things at once, which
is what a state of fixed size finds hard and attention does not.

    tokens   k1 v1 k2 v2 k3 v3 k2  . k3  .  . k1  .  .      . is noise
    targets                    v2    v3       v1

Trains a model of each pattern with the project's own step and optimizer on rows
that never repeat, prints accuracy as it goes, and ends with a table. The length
of a row is data.seq_len, tokens are of model.vocab_size.

Exit codes: 0 finished; 2 wrong input; 3 the loss is not finite.

Shape legend: B batch, L length, D model, V vocabulary, P pairs, S places after the pairs.
"""

import dataclasses
import json
import math
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from tqdm import tqdm

from transxssm_jax import config as config_lib
from transxssm_jax.config import Config, ConfigError
from transxssm_jax.model import parameters
from transxssm_jax.model.loss import IGNORED
from transxssm_jax.parallel import mesh
from transxssm_jax.training import step as step_lib

FINISHED, WRONG_INPUT, NOT_FINITE = 0, 2, 3

TRAIN, EVAL, FINAL = 0, 1, 2  # streams of rows that share nothing

# What each pattern does to a config; 'hybrid' is the config's own.
PATTERNS = {
    'hybrid': {},
    'attention': {'attention_period': 1, 'attention_offset': 0},
    'ssd': {'attention_period': 0},
}


@dataclasses.dataclass(frozen=True)
class Task:
    """What a row looks like.

    Keys are drawn from 1 .. vocab_size/2 - 1, values and noise from the upper
    half, so that a key occurs twice in a row and nothing else looks like one.

    Attributes:
      vocab_size: V.
      length: L, tokens a row.
      pairs: P, keys a row, each asked for once.
      alpha: queries come soon after the pairs rather than late: the s-th place is chosen in proportion to s^(alpha - 1).

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
          takes them; targets are IGNORED but where a key is asked for, P times a row.
        """
        rng = np.random.default_rng([seed, stream, step])
        half, pairs = self.vocab_size // 2, self.pairs
        keys_BP = 1 + _largest(rng, rng.random((rows, half - 1), np.float32), pairs)
        values_BP = rng.integers(half, self.vocab_size, (rows, pairs))
        weight_S = np.arange(1, self.length - 2 * pairs + 1) ** (self.alpha - 1)
        # The largest of u^(1/weight) are a choice by weight without repetition.
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
    """int [B, count]: where each row is largest, in random order: any key may be asked for first."""
    return rng.permuted(np.argpartition(x_BS, -count, axis=1)[:, -count:], axis=1)


def with_pattern(config: Config, pattern: str) -> Config:
    """The config with the mixers of one of PATTERNS.

    Raises:
      ConfigError: no such pattern, or 'hybrid' of a config that has one kind of layer only.
    """
    if pattern not in PATTERNS:
        raise ConfigError(f'--pattern={pattern} must be one of {", ".join(PATTERNS)}, or several with commas')
    changed = Config(**{field.name: _unlocked(getattr(config, field.name)) for field in dataclasses.fields(config)})
    for name, value in PATTERNS[pattern].items():
        setattr(changed.model, name, value)
    if pattern == 'hybrid' and len(set(changed.model.layer_pattern)) == 1:
        raise ConfigError(
            f'--pattern=hybrid needs both kinds of layers; model.attention_period='
            f'{changed.model.attention_period} has {changed.model.layer_pattern[0]} only'
        )
    return config_lib.resolve(changed)


def _unlocked(section):
    return type(section)(**dataclasses.asdict(section))


def accuracy_step(config: Config):
    """The function (params, batch) -> float32 share of the targets that the highest logit names; P targets a row."""
    graph, _ = parameters.split_model(config.model)

    def step(params, batch, at_BP):
        model = nnx.merge(graph, params)
        hidden_BLD = model(batch['tokens'], segment_ids_BL=batch['segment_ids'], positions_BL=batch['positions'])
        hidden_BPD = jnp.take_along_axis(hidden_BLD, at_BP[..., None], axis=1)
        logits_BPV = jnp.einsum(
            'BPD,VD->BPV', hidden_BPD, model.head_VD.astype(hidden_BPD.dtype), preferred_element_type=jnp.float32
        )
        answers_BP = jnp.take_along_axis(batch['targets'], at_BP, axis=1)
        return jnp.mean(jnp.argmax(logits_BPV, axis=-1) == answers_BP)

    return step


class NotFiniteError(ArithmeticError):
    """The loss of a step is NaN or infinite."""


def train(config: Config, task: Task, *, target: float, say=print) -> dict:
    """Trains a model on the task until an evaluation reaches the target accuracy, or for train.steps.

    Args:
      config: rows a step, optimizer, model; evaluates every train.eval_every_steps
        on train.eval_batches batches (0: one) that are never trained on.
      target: accuracy that ends the training; above 1: none does.
      say: is given a line for every evaluation.

    Returns:
      'layers' (e.g. 'ssd attention'), 'parameters', 'steps', 'seconds' (with
      compilation), 'accuracy' and 'rows' (of a last evaluation on rows of its own), and
      'curve': a list of {'step', 'loss' (of the step, in nats a value), 'accuracy'}.

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
                unsettled = metrics
                state, metrics = train_step(state, jax.device_put(batch(TRAIN, step), batch_sharding))
                _check_finite(step - 1, unsettled)  # waits for the step before, so that few are under way at a time
                bar.update()
                if step < settings.steps and not (settings.eval_every_steps and step % settings.eval_every_steps == 0):
                    continue
                _check_finite(step, metrics)
                curve.append(
                    {'step': step, 'loss': float(metrics['loss']), 'accuracy': accuracy(EVAL, step * eval_batches)}
                )
                bar.clear()
                say(
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
    """Results by pattern, a line each."""
    lines = [f'{"pattern":10s} {"parameters":>12s} {"steps":>7s} {"seconds":>8s} {"accuracy":>9s}']
    lines += [
        f'{pattern:10s} {result["parameters"]:12,d} {result["steps"]:7d} {result["seconds"]:8.1f} '
        f'{result["accuracy"]:9.2%}'
        for pattern, result in results.items()
    ]
    return '\n'.join(lines)


def main(argv: list[str]) -> int:
    if {'--help', '-h'} & set(argv[1:]):
        print(__doc__)
        return FINISHED
    values = flags.FlagValues()
    pattern = flags.DEFINE_list('pattern', ['hybrid'], 'Of hybrid, attention and ssd.', flag_values=values)
    pairs = flags.DEFINE_integer('pairs', 0, 'Keys a row; 0: an eighth of data.seq_len.', flag_values=values)
    target = flags.DEFINE_float('target', 0.995, 'Accuracy that ends a training; above 1: none.', flag_values=values)
    output = flags.DEFINE_string('output', '', 'JSON file to write; empty: none.', flag_values=values)
    try:
        config = config_lib.parse_flags(argv, values)
        task = Task(config.model.vocab_size, config.data.seq_len, pairs.value or config.data.seq_len // 8)
        configs = {name: with_pattern(config, name) for name in pattern.value}
        if output.value and not pathlib.Path(output.value).absolute().parent.is_dir():
            raise ConfigError(f'--output={output.value}: its directory does not exist; make it first')
        print(
            f'{task.pairs} pairs in rows of {task.length} tokens, {task.vocab_size} words; '
            f'a guess is right {2 / task.vocab_size:.2%} of the time, one of the values shown {1 / task.pairs:.2%}'
        )
        results = {}
        for name, changed in configs.items():
            print(f'{name}: {" ".join(changed.model.layer_pattern)}', flush=True)
            results[name] = train(changed, task, target=target.value, say=lambda line: print(line, flush=True))
        print(table(results))
        if output.value:
            record = {'task': dataclasses.asdict(task), 'results': results, 'config': dataclasses.asdict(config)}
            pathlib.Path(output.value).write_text(json.dumps(record, indent=1) + '\n')
    except (ConfigError, OSError) as error:
        return _say_error(error, WRONG_INPUT)
    except NotFiniteError as error:
        return _say_error(error, NOT_FINITE)
    return FINISHED


def _say_error(error, exit_code: int) -> int:
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    return exit_code


if __name__ == '__main__':
    sys.exit(main(sys.argv))
