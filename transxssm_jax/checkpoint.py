"""Checkpoints of a run: state, data position and config, written by Orbax in the background.

Each checkpoint is a directory `WORKDIR/checkpoints/STEP` that appears under
that name only when it is complete. The state is stored as the plain nested
dict it is; nothing of NNX is in it, so it outlives library upgrades.
"""

import json
import logging
import pathlib

import jax
import orbax.checkpoint as ocp

from transxssm_jax import config as config_lib
from transxssm_jax.config import Config

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read, or used; the message is one line."""


def open_workdir(workdir: pathlib.Path, config: Config) -> None:
    """Makes the workdir or checks that it is a run of the same config, and saves the config in it.

    Raises:
      CheckpointError: the workdir holds a run whose checkpoints this config
        does not fit, or it cannot be written.
    """
    path = workdir / 'config.json'
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _check_fits(f'--workdir={workdir}', config_lib.from_json(path.read_text()), config)
        if jax.process_index() == 0:
            partial = path.with_suffix('.tmp')
            partial.write_text(config_lib.to_json(config))
            partial.replace(path)
    except OSError as error:
        raise CheckpointError(f'--workdir={workdir} cannot be written ({error.strerror}); choose another') from error


def _check_fits(where: str, saved: Config, wanted: Config) -> None:
    unfit = config_lib.unfit_for_checkpoint(saved, wanted)
    if unfit:
        more = f' (and {len(unfit) - 1} more)' if len(unfit) > 1 else ''
        raise CheckpointError(f'{where} holds a run of another config: {unfit[0]}{more}; '
                              'change it back or use another --workdir')


class Checkpoints:
    """Saves and restores the run in one workdir.

    Args:
      workdir: directory of the run.
      config: how many to keep: the newest train.keep_last and the
        train.keep_best with the lowest evaluation loss.
    """

    def __init__(self, workdir: pathlib.Path, config: Config):
        self.config = config
        self.directory = workdir.absolute() / 'checkpoints'
        managers = ocp.checkpoint_managers
        keep = managers.AnyPreservationPolicy([
            managers.LatestN(config.train.keep_last),
            managers.BestN(get_metric_fn=lambda metrics: metrics['eval_loss'], reverse=True, n=config.train.keep_best,
                           keep_checkpoints_without_metrics=False)])
        self._warn_of_incomplete()
        self._manager = ocp.CheckpointManager(
            self.directory, item_names=('state', 'data', 'config'),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True))

    def _warn_of_incomplete(self):
        for path in sorted(self.directory.glob('*')):
            if path.is_dir() and not path.name.isdigit():
                log.warning('skipping incomplete checkpoint %s', path)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: dict, data_position: dict, eval_loss: float | None = None) -> None:
        """Starts writing a checkpoint and returns once the state is copied from the devices.

        Raises:
          CheckpointError: this or the write before it failed (a full disk, say).
        """
        metrics = None if eval_loss is None else {'eval_loss': float(eval_loss)}
        with _one_line_errors(self.directory):
            self._manager.save(step, metrics=metrics, force=True, args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_position),
                config=ocp.args.JsonSave(json.loads(config_lib.to_json(self.config)))))

    def wait(self) -> None:
        """Blocks until what was started is written; raises CheckpointError if it was not."""
        with _one_line_errors(self.directory):
            self._manager.wait_until_finished()

    def restore(self, abstract_state: dict) -> tuple[int, dict, dict] | None:
        """The newest checkpoint that can be read, or None when there is none.

        Args:
          abstract_state: ShapeDtypeStructs with the shardings to restore into;
            they may differ from those it was saved with.

        Returns:
          (step, state, data position).

        Raises:
          CheckpointError: a checkpoint is of another config, or there are
            checkpoints and none can be read.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                meta = self._manager.restore(step, args=ocp.args.Composite(
                    data=ocp.args.JsonRestore(), config=ocp.args.JsonRestore()))
                saved = config_lib.from_json(json.dumps(meta['config']))
                _check_fits(f'checkpoint {self.directory / str(step)}', saved, self.config)
                state = self._manager.restore(step, args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract_state)))['state']
                return step, state, meta['data']
            except CheckpointError:
                raise
            except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file.
                log.warning('skipping unreadable checkpoint %s: %s', self.directory / str(step), _first_line(error))
        if steps:
            raise CheckpointError(f'none of the checkpoints {steps} in {self.directory} can be read; '
                                  'restore one from a backup, or use another --workdir to start anew')
        return None

    def close(self) -> None:
        with _one_line_errors(self.directory):
            self._manager.close()


class _one_line_errors:
    """Turns what a failed write raises, often from a background thread, into a CheckpointError."""

    def __init__(self, directory):
        self.directory = directory

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, Exception) and not isinstance(error, CheckpointError):
            raise CheckpointError(f'a checkpoint could not be written to {self.directory}: {_first_line(error)}; '
                                  'the last complete one stays usable') from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
