"""What becomes of a run whose data cannot be read in the midst of it: its state is good, and is saved."""

import contextlib
import functools
from collections.abc import Callable, Iterator

from transxssm_jax.data.manifest import DataError
from transxssm_jax.parallel import processes
from transxssm_jax.training.checkpoint_files import CheckpointError
from transxssm_jax.training.health import NotFiniteError
from transxssm_jax.training.spikes import RollBack


@contextlib.contextmanager
def saved_if_data_fails(run, save: Callable) -> Iterator[None]:
    """Data that cannot be read within ends the run, and costs nothing of what was trained, which is saved before.

    Args:
      run: a `loop.Run`.
      save: starts writing a checkpoint of a run.

    Raises:
      DataError: that of within, of its class; it also tells what is saved, or why it is not.
    """
    try:
        yield
    except DataError as error:
        raise type(error)(f'{error}; {_save(run, save)}') from error


def _save(run, save: Callable) -> str:
    """Saves the run where that is possible. Returns what is saved now, as a sentence."""
    newest = max(run.checkpoints.steps(), default=0)
    kept = f'the newest checkpoint is of step {newest}' if newest else 'there is no checkpoint yet'
    if run.step == newest or not run.step:
        return kept
    if processes.is_multiprocess():
        return f'step {run.step} is not saved, because the other processes may have begun the next one; {kept}'
    try:
        save(run)
        run.checkpoints.wait(functools.partial(save, run))
    except (CheckpointError, NotFiniteError, RollBack) as error:
        return f'step {run.step} is not saved ({error}); {kept}'
    return f'step {run.step} is saved, and the same command goes on from there'
