"""Which checkpoint of which run: RUN, RUN@STEP, RUN@best or RUN@latest, wherever a command takes a trained run."""

import logging
import math
import pathlib

from transxssm_jax.data import object_store
from transxssm_jax.training import checkpoint_files as files
from transxssm_jax.training import digest, remote_workdir
from transxssm_jax.training.checkpoint_files import CheckpointError

NEWEST = -1  # as a step: the newest checkpoint that can be read

log = logging.getLogger(__name__)


def resolve(run: pathlib.Path | str, step: int = NEWEST, flag: str = '--workdir') -> tuple[pathlib.Path, int]:
    """The workdir and the step that a reference names.

    Args:
      run: a workdir, alone or with @STEP, @best (the lowest evaluation loss) or @latest behind it. A directory whose own
        name ends so is taken as it is. Of one on an object store the checkpoint is fetched, and a local workdir returned.
      step: of a flag beside it; NEWEST: none is given.
      flag: what errors call the reference.

    Returns:
      (workdir, step or NEWEST). Neither needs to exist, unless @best is asked for.

    Raises:
      CheckpointError: the word behind @ is none of these, a step is given twice, or no checkpoint has an evaluation loss.
    """
    if object_store.is_url(run):
        return remote_workdir.fetch_checkpoint(str(run), step)
    base, at, word = str(run).rpartition('@')
    if not at or not base or pathlib.Path(run).is_dir() or not pathlib.Path(base).is_dir():
        return pathlib.Path(run), step
    if word not in ('best', 'latest') and not (word.isascii() and word.isdigit()):
        raise CheckpointError(f'{flag}={run}: what follows @ must be a step, best or latest')
    if step != NEWEST:
        raise CheckpointError(f'{flag}={run} and --step={step} both name a checkpoint; leave one out')
    workdir = pathlib.Path(base)
    if word == 'best':
        return workdir, best_step(workdir, f'{flag}={run}')
    return workdir, NEWEST if word == 'latest' else int(word)


def best_step(workdir: pathlib.Path, name: str) -> int:
    """The step of the checkpoint with the lowest evaluation loss, the earliest of equal ones.

    Raises:
      CheckpointError: no checkpoint has one; `name` is what the message calls the run.
    """
    directory, losses = workdir / 'checkpoints', {}
    for step in files.steps_in(directory):
        try:
            loss = float(digest.read_json(directory / str(step) / 'metrics.json')['eval_loss'])
            if math.isfinite(loss):
                losses[step] = loss
        except FileNotFoundError:
            continue
        except Exception as error:  # a damaged file is no evaluation
            log.warning(
                'checkpoint %s does not count among the best: %s', directory / str(step), files.first_line(error)
            )
    if not losses:
        raise CheckpointError(
            f'{name}: no checkpoint there has an evaluation loss, so none is the best; give @STEP or @latest'
        )
    return min(losses, key=losses.get)
