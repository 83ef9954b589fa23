"""Checkpoints of a run: what is saved, which are kept, and how they are read back.

A checkpoint is a directory WORKDIR/checkpoints/STEP that appears under that name
only when it is complete:

- `params/` and `training/` (the step and the optimizer's state): plain nested dicts
  of arrays, written by Orbax; nothing of NNX is in them, so they outlive library upgrades;
- `ema/`: the average of the parameters, where optimizer.ema_decay keeps one;
- `config.json`: the config of the run; `data.json`: the position in its data;
- `digests.json`: the format number, and the digest of every file above;
- `metrics.json`: the evaluation loss, which may come later.

What is read is checked against its digest. A damaged checkpoint gives way to an older one.
"""

import contextlib
import json
import logging
import math
import pathlib
import shutil

import jax

from transxssm_jax import config as config_lib
from transxssm_jax.config import Config
from transxssm_jax.parallel import processes
from transxssm_jax.training import checkpoint_files as files
from transxssm_jax.training import digest, run_reference
from transxssm_jax.training import step as step_lib
from transxssm_jax.training.checkpoint_files import CheckpointError

UNREADABLE = '.unreadable'  # suffix of a damaged checkpoint's directory once an older one was used
REMOVED = '.removed'  # suffix of a checkpoint's directory while it is deleted
_ATTEMPTS = 20  # to read a checkpoint of a run that meanwhile removes it

log = logging.getLogger(__name__)


def check_fits(where: str, saved: Config, wanted: Config) -> None:
    """Raises CheckpointError where a run of `saved` cannot go on with `wanted`."""
    unfit = config_lib.unfit_for_checkpoint(saved, wanted)
    if unfit:
        more = f' (and {len(unfit) - 1} more)' if len(unfit) > 1 else ''
        raise CheckpointError(
            f'{where} holds a run of another config: {unfit[0]}{more}; change it back or use another --workdir'
        )


# ---- reading what a run has trained ----------------------------------------


WEIGHTS = ('trained', 'ema')  # of a checkpoint: the parameters, or their average


def load_trained(workdir: pathlib.Path | str, step: int = -1, weights: str = 'trained') -> tuple[dict, Config]:
    """The parameters of a run and its config; see `load_trained_step`."""
    return load_trained_step(workdir, step, weights)[:2]


def load_trained_step(
    workdir: pathlib.Path | str, step: int = -1, weights: str = 'trained'
) -> tuple[dict, Config, int]:
    """The parameters of a run; its optimizer state is not read.

    Args:
      workdir: directory of the run, which may be training; @STEP, @best or @latest may follow (run_reference.py).
      step: which checkpoint; -1: the newest that can be read.
      weights: one of WEIGHTS.

    Returns:
      (params, config, step): float32 arrays as a nested dict, as `parameters.init_params` makes them, on the
      mesh in use (jax.set_mesh) in the shards of training, or whole on the first device without
      one; the config that the checkpoint was trained with; the step of the checkpoint.

    Raises:
      CheckpointError: no run, no such checkpoint, or it cannot be read; the message is one line.
    """

    def read(path):
        digests = files.read_digests(path)
        config = files.read_config(path, digests)
        group = _group_of(weights, config, path)
        params = files.read_group(path, group, {group: step_lib.abstract_params(config)}, digests)
        return params[group], config, int(path.name)

    return read_trained(workdir, step, read)


def load_config(workdir: pathlib.Path | str, step: int = -1) -> Config:
    """The config that a checkpoint was trained with. Arguments and errors as `load_trained`."""
    return read_trained(workdir, step, lambda path: files.read_config(path, files.read_digests(path)))


def _group_of(weights: str, config: Config, path: pathlib.Path) -> str:
    if weights == 'ema' and not config.optimizer.ema_decay:
        raise CheckpointError(
            f'checkpoint {path} has no average of the weights: the run had optimizer.ema_decay=0; use --weights=trained'
        )
    return 'ema' if weights == 'ema' else 'params'


def find_params(workdir: pathlib.Path | str, step: int = -1, weights: str = 'trained') -> tuple[pathlib.Path, Config]:
    """(directory of an Orbax tree {its name: ...} whose files were checked, config), to read array by array.

    Arguments and errors as `load_trained`.
    """

    def find(path):
        digests = files.read_digests(path)
        config = files.read_config(path, digests)
        group = _group_of(weights, config, path)
        digest.check(path, files.of_group(digests, group))
        return path / group, config

    return read_trained(workdir, step, find)


def read_trained(workdir, step, read, flag='--workdir'):
    """read(directory of a checkpoint); of the newest that can be read where no step is named.

    Arguments and errors as `load_trained_step`; `flag` is what errors call the workdir.
    """
    workdir, step = run_reference.resolve(workdir, step, flag)
    directory = workdir.absolute() / 'checkpoints'
    damaged, vanished = {}, 0  # step -> what is wrong; how many were removed while they were read
    while vanished < _ATTEMPTS:
        steps = files.steps_in(directory)
        candidates = [step] if step != -1 else [other for other in steps if other not in damaged]
        if not steps:
            what = 'holds no checkpoint' if directory.parent.is_dir() else 'does not exist'
            raise CheckpointError(f'{flag}={workdir} {what}; give the directory of a training run that has saved')
        if step != -1 and step not in steps:
            raise CheckpointError(
                f'{flag}={workdir} has no checkpoint of step {step}; it has {", ".join(map(str, steps))}'
            )
        if not candidates:
            raise CheckpointError(
                f'no checkpoint of {flag}={workdir} can be read; restore one from a backup (the newest: '
                f'{damaged[max(damaged)]})'
            )
        path = directory / str(candidates[-1])
        try:
            return read(path)
        except CheckpointError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file.
            if candidates[-1] not in files.steps_in(directory):
                vanished += 1  # the run has saved a newer one and removed this one
                continue
            problem = files.first_line(error)
            if files.may_pass(error):
                raise CheckpointError(
                    f'checkpoint {path} cannot be read now: {problem}; run the same command again when it can'
                ) from error
            if step != -1:
                raise CheckpointError(
                    f'the checkpoint of step {step} in {flag}={workdir} cannot be read ({problem}); '
                    'leave --step out for the newest that can'
                ) from error
            log.warning('skipping unreadable checkpoint %s: %s', path, problem)
            damaged[candidates[-1]] = problem
    raise CheckpointError(
        f'the run in {flag}={workdir} removes its checkpoints faster than they can be read; try again when it '
        'has ended, or let it keep more (train.keep_last)'
    )


def read_whole(path: pathlib.Path, config: Config, abstract_state: dict) -> tuple[dict, dict, Config]:
    """(state, data position, config) of a checkpoint that a run of `config` goes on from; nothing is changed.

    Args:
      path: of the checkpoint.
      config: raises CheckpointError where the checkpoint is not of it.
      abstract_state: ShapeDtypeStructs with shardings; each process reads its own and checks its share of the files.

    Raises many kinds of errors for a damaged checkpoint, as Orbax and TensorStore do.
    """
    digests = files.read_digests(path)
    saved = files.read_config(path, digests)
    check_fits(f'checkpoint {path}', saved, config)
    position = json.loads(digest.read_checked(path, 'data.json', digests))
    share = (jax.process_index(), jax.process_count()) if processes.is_multiprocess() else (0, 1)
    state = {}
    for group, abstract in files.grouped(abstract_state).items():
        state |= files.read_group(path, group, abstract, digests, *share)
    return state, position, saved


def write_first(
    workdir: pathlib.Path, state: dict, config: Config, handler=None, save_args: dict | None = None
) -> None:
    """Writes a checkpoint of step 0 that stands at no position in any data; it ends when it is written.

    Args:
      workdir: directory of a run without checkpoints.
      state: its leaves are whatever the handler writes.
      config: of the run.
      handler: of Orbax, for the arrays.
      save_args: tree of ocp.SaveArgs like the state.

    Raises:
      CheckpointError: it could not be written; its __cause__ is the first error.
    """
    directory = workdir.absolute() / 'checkpoints'
    with files.one_line_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    save = files.Save(directory, 0, state, None, config, handler=handler, save_args=save_args)
    if problem := save.result():
        raise CheckpointError(files.not_written(directory, problem)) from save.error


# ---- saving and resuming ---------------------------------------------------


class Checkpoints:
    """Saves and restores the run in one workdir.

    Args:
      workdir: directory of the run.
      config: which to keep: the newest train.keep_last, the train.keep_best with
        the lowest evaluation loss, and every multiple of train.keep_every_steps.
      exchange: a `checkpoint_exchange.CheckpointExchange` where the processes share no file system; else None.

    Attributes:
      restored_config: after `restore`, the config that the checkpoint was trained with; None before.
    """

    def __init__(self, workdir: pathlib.Path, config: Config, exchange=None):
        self.config, self._exchange = config, exchange
        self.directory = workdir.absolute() / 'checkpoints'
        self.restored_config = None
        self._save = None  # the Save that was started last
        self._failures = 0  # of saves, in a row
        self._warned = set()
        if processes.is_coordinator():
            self._sweep()
        with files.one_line_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)

    def _sweep(self) -> None:
        """Warns of what is no checkpoint, and deletes what an earlier run began to write or to delete."""
        for path in sorted(self.directory.glob('*')):
            if path.is_dir() and not path.name.isdigit():
                if path.suffix != REMOVED:
                    kind = 'unreadable' if path.suffix == UNREADABLE else 'incomplete'
                    log.warning('skipping %s checkpoint %s', kind, path)
                if path.suffix in (files.PARTIAL, REMOVED):
                    shutil.rmtree(path, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are complete or being written, oldest first."""
        being_written = {self._save.step} if self._save and not self._save.problem else set()
        return sorted({*files.steps_in(self.directory), *being_written})

    def save(self, step: int, state: dict, data_position: dict, eval_loss: float | None = None) -> None:
        """Starts writing a checkpoint and returns once the state is copied from the devices.

        Raises:
          CheckpointError: the write before it failed, and the one before that.
        """
        if problem := self._settle():
            self._warn_of_failure(problem)
        options = {'on_commit': self._remove_old, 'exchange': self._exchange}
        self._save = files.Save(self.directory, step, state, data_position, self.config, eval_loss, **options)

    def check(self, save_again) -> None:
        """To be called before each step, by all processes at the same place: acts on a failed write at once.

        Args:
          save_again: called when a write has failed; it saves the state as it is now.

        Raises:
          CheckpointError: two writes in a row failed (a full disk, say).
        """
        if self._save and self._save.has_ended() and (problem := self._settle()):
            self._warn_of_failure(problem)
            save_again()

    def wait(self, save_again=None) -> None:
        """Blocks until what was started is written.

        Args:
          save_again: called when the write has failed; it saves the state as it is now. None: no second try.

        Raises:
          CheckpointError: it could not be written.
        """
        if problem := self._settle():
            if save_again is None:
                raise CheckpointError(files.not_written(self.directory, problem))
            self._warn_of_failure(problem)
            save_again()
            self.wait()

    def _settle(self) -> str:
        """Waits for the write under way. Returns why it failed; '' where it did not."""
        save, self._save = self._save, None
        problem = save.result() if save else ''
        self._failures = self._failures + 1 if problem else 0
        if self._failures > 1:
            raise CheckpointError(files.not_written(self.directory, problem))
        return problem

    def _warn_of_failure(self, problem: str) -> None:
        log.warning('%s; it is tried once more', files.not_written(self.directory, problem))

    def is_among_best(self, eval_loss: float) -> bool:
        """Whether a checkpoint with this evaluation loss would be one of the train.keep_best; alike in all processes.

        One that is not finite never is.
        """
        keep = self.config.train.keep_best
        losses = self._eval_losses()
        if self._save and not self._save.problem and self._save.eval_loss is not None:
            losses[self._save.step] = self._save.eval_loss  # being written
        best = sorted(losses.values())[:keep]
        is_best = keep > 0 and math.isfinite(eval_loss) and (len(best) < keep or eval_loss < best[-1])
        return processes.broadcast_from_0(is_best)

    def evaluated(self, step: int, eval_loss: float) -> None:
        """Adds the evaluation loss to a checkpoint that was saved without it, so that it counts among the best."""
        path = self.directory / str(step)
        if processes.is_coordinator() and path.exists():
            with files.one_line_errors(self.directory):
                digest.write_json(path / 'metrics.json', {'eval_loss': float(eval_loss)})
        processes.all_gather_json('evaluated')

    def restore(self, abstract_state: dict) -> tuple[int, dict, dict] | None:
        """The newest checkpoint that can be read, or None when there is none.

        Newer ones that cannot are renamed to STEP.unreadable, so that they neither
        count as kept nor stand in the way of the same step when it is reached again.

        Args:
          abstract_state: ShapeDtypeStructs with the shardings to restore into;
            they may differ from those it was saved with.

        Returns:
          (step, state, data position).

        Raises:
          CheckpointError: a checkpoint is of another config or a newer format, or it
            cannot be read now, or there are checkpoints and none can be read.
        """
        steps = processes.broadcast_from_0(self.steps())
        reason = ''
        for step in reversed(steps):
            path, restored, problem = self.directory / str(step), None, ''
            try:
                with self._exchange.brought(path) if self._exchange else contextlib.nullcontext():
                    restored = self._restore_step(path, abstract_state)
            except CheckpointError:
                raise
            except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file.
                problem = files.first_line(error)
                if files.may_pass(error):
                    raise CheckpointError(
                        f'checkpoint {path} cannot be read now: {problem}; run the same command again when it can'
                    ) from error
            # Each process reads its own parts: what is damaged for one is not used by any.
            problems = [
                f'{text} (process {process})' if processes.is_multiprocess() else text
                for process, text in enumerate(processes.all_gather_json(problem))
                if text
            ]
            if not problems:
                self._set_aside([newer for newer in steps if newer > step])
                return step, *restored
            log.warning('skipping unreadable checkpoint %s: %s', path, problems[0])
            reason = reason or problems[0]
        if steps:
            raise CheckpointError(
                f'none of the checkpoints {steps} in {self.directory} can be read; restore one from a backup, or use '
                f'another --workdir to start anew (the newest: {reason})'
            )
        return None

    def forget_after(self, step: int) -> None:
        """Removes the checkpoints of later steps: those that the run takes from here on are others. All processes call it.

        Raises:
          CheckpointError: one cannot be removed.
        """
        self._settle()  # the step that was being written may be one of them
        for later in [other for other in files.steps_in(self.directory) if other > step]:
            if processes.is_coordinator():
                path = self.directory / str(later)
                with files.one_line_errors(self.directory):
                    path.rename(path.with_suffix(REMOVED))
                shutil.rmtree(path.with_suffix(REMOVED), ignore_errors=True)
        processes.all_gather_json('forgotten')

    def _restore_step(self, path: pathlib.Path, abstract_state: dict) -> tuple[dict, dict]:
        """(state, data position), read without a message to the other processes, who may fail to read theirs."""
        state, position, self.restored_config = read_whole(path, self.config, abstract_state)
        return state, position

    def _set_aside(self, steps: list[int]) -> None:
        for step in steps if processes.is_coordinator() else []:
            path = self.directory / str(step)
            aside = path.with_suffix(UNREADABLE)
            with files.one_line_errors(self.directory):
                if aside.exists():
                    shutil.rmtree(aside)
                path.rename(aside)
        if steps:
            processes.all_gather_json('set aside')  # so that all see them gone

    def _remove_old(self) -> None:
        """Deletes all but the newest train.keep_last, the train.keep_best by evaluation loss and train.keep_every_steps."""
        steps, train, losses = files.steps_in(self.directory), self.config.train, self._eval_losses()
        kept = {*steps[-train.keep_last :], *sorted(losses, key=losses.get)[: train.keep_best]}
        if train.keep_every_steps:
            kept |= {step for step in steps if step % train.keep_every_steps == 0}
        if train.spike_action == 'rollback':  # from any step after the newest the run can go back
            kept |= set([step for step in steps if step <= steps[-1] - train.rollback_steps][-1:])
        for step in set(steps) - kept:
            path = self.directory / str(step)
            aside = path.with_suffix(REMOVED)
            try:
                path.rename(aside)  # at once, so that nobody reads a half of it
                shutil.rmtree(aside)
            except OSError as error:
                log.warning('checkpoint %s could not be removed: %s', path, error)

    def _eval_losses(self) -> dict[int, float]:
        """The finite evaluation losses of the complete checkpoints, by step."""
        losses = {step: self._eval_loss(step) for step in files.steps_in(self.directory)}
        return {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}

    def _eval_loss(self, step: int) -> float | None:
        path = self.directory / str(step) / 'metrics.json'
        try:
            return float(digest.read_json(path)['eval_loss'])
        except FileNotFoundError:
            return None
        except Exception as error:
            if step not in self._warned:
                log.warning('checkpoint %s does not count among the best: %s', path.parent, files.first_line(error))
            self._warned.add(step)
            return None

    def close(self) -> None:
        """Waits for the write under way. Raises CheckpointError if it failed."""
        self.wait()
