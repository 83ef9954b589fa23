"""Takes steps of a run again, from a checkpoint, and compares them with the run's ledger. It changes no file.

Every step is taken with the config that its line names, by the functions of the training loop. What is compared of a
step comes in the order in which one follows from another, so that the first difference is the nearest to its cause.
"""

import dataclasses
import itertools
import logging
import math
import pathlib
from collections.abc import Callable

import jax
import numpy as np

from transxssm_jax import config as config_lib
from transxssm_jax.config import Config
from transxssm_jax.data import batch_documents
from transxssm_jax.data.tokenizer import load_tokenizer
from transxssm_jax.parallel import mesh
from transxssm_jax.training import checkpoint, compilation, ledger, splits
from transxssm_jax.training import checkpoint_files as files
from transxssm_jax.training import step as step_lib
from transxssm_jax.training.checkpoint_files import CheckpointError

# Where a difference in each is to be looked for.
CAUSES = {
    'batch': 'the rows of the step are not those that the run read: the data, or their order',
    'learning_rate': 'the schedule or its settings',
    'param_norm': 'the parameters before the step: the checkpoint, or the update of the step before',
    'loss': 'the forward pass: the parameters, the settings of the model, or the code',
    'grad_norm': 'the backward pass: its settings, or the code',
    'update_norm': 'the optimizer: its state, its settings, or the code',
}

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first difference of a replay.

    Attributes:
      step: where it is.
      name: 'batch', or one of ledger.NUMBERS.
      here, there: of the replay, and of the ledger; a number is None where it is not finite.
    """

    step: int
    name: str
    here: str | float | None
    there: str | float | None

    def __str__(self) -> str:
        words = ['not finite' if value is None else str(value) for value in (self.here, self.there)]
        by = f', relative difference {_relative(self.here, self.there):.2g}' if _are_numbers(self) else ''
        return (
            f'step {self.step}: the first difference is in {self.name}: {words[0]} here, {words[1]} in the ledger{by}; '
            f'look at {CAUSES[self.name]}'
        )


def replay(
    workdir: pathlib.Path, step: int, overrides: dict[str, str], tolerance: float, show: Callable[[str], None]
) -> Difference | None:
    """Takes the steps from the nearest checkpoint before `step` up to it again, as far as they are equal.

    Args:
      workdir: of the run, which may be training.
      step: the last to take.
      overrides: dotted name -> value or text of settings that replace those of the run.
      tolerance: largest relative difference of numbers that counts as equal; batches are always compared exactly.
      show: takes lines that tell what is done, and what is not as it was in the run.

    Returns:
      the first difference, or None.

    Raises:
      ledger.LedgerError, checkpoint.CheckpointError, config.ConfigError, DataError: a step has no line, there is no
        checkpoint before it, or the settings or the data are not those that the checkpoint was trained with.
    """
    ledger.read_lines(workdir, step, step)  # what is asked for comes first, whichever checkpoints there are
    start, state, lines = _restore(workdir, step, overrides)
    show(f'from the checkpoint of step {start}: steps {start + 1} to {step}')
    told = set()

    def conditions(item):  # what holds for a stretch of steps: the config, and how many batches were left out before
        number, own = item
        return own[0]['config'], ledger.batch_number(own[0]) - number

    for _, group in itertools.groupby(lines.items(), key=conditions):
        group = dict(group)
        first = min(group)
        config = _config(workdir, group[first][0], overrides)
        device_mesh = mesh.build(config)
        for note in _notes(workdir, group[first][0], config):
            if note not in told:
                show(f'note: {note}')
            told.add(note)
        if first > start + 1:  # the mesh may be another
            state = jax.device_put(state, step_lib.state_shardings(config, device_mesh))
        rows = mesh.rows_of_this_process(device_mesh, config.data.global_batch)
        batch_number = ledger.batch_number(group[first][0])
        with jax.set_mesh(device_mesh), splits.open_train_split(config, device_mesh, batch_number) as loader:
            train_step = compilation.compile_train_step(config, device_mesh)
            for number, own in group.items():
                batch = next(loader)
                if difference := _compare_batch(number, own, batch, rows):
                    return difference
                placed = mesh.global_batch(device_mesh, batch, config.data.global_batch)
                state, metrics = train_step(state, placed, *_limits(config, own[0]))
                if difference := _compare_numbers(number, own[0], metrics, tolerance):
                    return difference
    return None


def _limits(config: Config, line: dict) -> tuple[np.ndarray, ...]:
    """Limits by which a step is skipped where it was skipped in the run, as the compiled step takes them."""
    if config.train.spike_action != 'skip':
        return ()
    return (np.full(2, -np.inf if line.get('skipped') else np.inf, np.float32),)


def describe_documents(workdir: pathlib.Path, step: int, overrides: dict[str, str]) -> list[str]:
    """A line for every document in the batch of a step. Arguments and errors as those of `replay`."""
    [own] = ledger.read_lines(workdir, step, step).values()
    config = _config(workdir, own[0], overrides)
    tokenizer = load_tokenizer(config.data.tokenizer_path)
    number = ledger.batch_number(own[0])
    with splits.open_train_split(config, mesh.build(config), number, num_workers=0) as loader:
        return list(batch_documents.describe(loader, number, tokenizer))


# ---- what the run was --------------------------------------------------------


def _restore(workdir: pathlib.Path, step: int, overrides: dict) -> tuple[int, step_lib.State, dict[int, list[dict]]]:
    """(step of the nearest checkpoint before, its state, the lines from there to `step`)."""
    directory = workdir.absolute() / 'checkpoints'
    steps = files.steps_in(directory)
    for start in reversed([other for other in steps if other < step]):
        path = directory / str(start)
        lines = ledger.read_lines(workdir, start + 1, step)
        config = _config(workdir, lines[start + 1][0], overrides)
        device_mesh = mesh.build(config)
        splits.check_data(config)
        with splits.open_train_split(config, device_mesh, start, num_workers=0) as loader:
            try:
                state, position, _ = checkpoint.read_whole(path, config, step_lib.abstract_state(config, device_mesh))
            except CheckpointError:
                raise
            except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file.
                problem = files.first_line(error)
                if files.may_pass(error):
                    raise CheckpointError(
                        f'checkpoint {path} cannot be read now: {problem}; run the same command again when it can'
                    ) from error
                log.warning('skipping unreadable checkpoint %s: %s', path, problem)
                continue
            splits.check_position(config, loader, start, position, workdir)
        return start, state, lines
    has = f'it has {", ".join(map(str, steps))}' if steps else 'it has none'
    raise CheckpointError(
        f'--workdir={workdir} has no checkpoint before step {step} that can be read ({has}); ask for a later step, or let '
        'runs keep more (train.keep_last)'
    )


def _config(workdir: pathlib.Path, line: dict, overrides: dict[str, str]) -> Config:
    return config_lib.replace(ledger.read_config(workdir, line['config']), overrides)


def _notes(workdir: pathlib.Path, line: dict, config: Config) -> list[str]:
    """What is not as it was when a line was written."""
    was = ledger.read_config(workdir, line['config'])
    notes = [
        f'{name} is {now!r} here and was {before!r} in the run'
        for name, (now, before) in config_lib.differences(config, was).items()
    ]
    here = ledger.circumstances(config)
    notes += [
        f'{name} is {here[name]} here and was {line[name]} in the run'
        for name in ('code', 'jax', 'device')
        if here[name] != line[name]
    ]
    return notes


# ---- comparing ---------------------------------------------------------------


def _compare_batch(step: int, lines: list[dict], batch: dict[str, np.ndarray], rows: np.ndarray) -> Difference | None:
    """Compares the rows that each process of the run read. rows: those of `batch` within the global batch."""
    for line in lines:
        wanted = np.concatenate([np.arange(first, min(stop, rows[-1] + 2)) for first, stop in line['rows']])
        here = (
            ledger.batch_digest(batch, np.searchsorted(rows, wanted)) if np.isin(wanted, rows).all() else 'no such rows'
        )
        if here != line['batch']:
            return Difference(step, 'batch', here, line['batch'])
    return None


def _compare_numbers(step: int, line: dict, metrics: dict, tolerance: float) -> Difference | None:
    found = ledger.numbers(jax.device_get({name: metrics[name] for name in ledger.NUMBERS}))
    for name, here in found.items():
        there = line[name]
        if here != there and (None in (here, there) or _relative(here, there) > tolerance):
            return Difference(step, name, here, there)
    return None


def _are_numbers(difference: Difference) -> bool:
    return isinstance(difference.here, float) and isinstance(difference.there, float)


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b), math.ulp(0.0))
