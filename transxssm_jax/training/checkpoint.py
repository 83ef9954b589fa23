"""Checkpoints of a run: state, data position and config, written by Orbax in the background.

Each checkpoint is a directory `WORKDIR/checkpoints/STEP` that appears under
that name only when it is complete. The state is stored as the plain nested
dict it is; nothing of NNX is in it, so it outlives library upgrades.
"""

import contextlib
import json
import logging
import math
import pathlib
import re
import secrets
import shutil
import time

import jax
import orbax.checkpoint as ocp

from transxssm_jax import config as config_lib
from transxssm_jax.config import Config
from transxssm_jax.parallel import processes
from transxssm_jax.training import step as step_lib

UNREADABLE = '.unreadable'  # suffix of a damaged checkpoint's directory once an older one was used

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read, or used; the message is one line."""


def open_workdir(workdir: pathlib.Path, config: Config) -> None:
    """Makes the workdir or checks that it is a run of the same config, and saves the config in it.

    Raises:
      CheckpointError: the workdir holds a run whose checkpoints this config
        does not fit, or it cannot be written, or the processes of this run do not
        all see the same directory.
    """
    path = workdir / 'config.json'
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # A run that died before its first checkpoint, of a wrong setting perhaps, binds nobody.
        if path.exists() and _steps_in(workdir / 'checkpoints'):
            _check_fits(f'--workdir={workdir}', _read_config(path), config)
        if processes.is_coordinator():
            partial = path.with_suffix('.tmp')
            partial.write_text(config_lib.to_json(config))
            partial.replace(path)
        _check_shared(workdir)
    except OSError as error:
        raise CheckpointError(f'--workdir={workdir} cannot be written ({error.strerror}); choose another') from error


def _check_shared(workdir: pathlib.Path, patience_seconds: float = 20.0) -> None:
    """Raises CheckpointError unless all processes see the directory that process 0 sees."""
    if not processes.is_multiprocess():
        return
    witness = workdir / f'.shared-{secrets.token_hex(8)}'
    if processes.is_coordinator():
        witness.touch()
    witness = workdir / processes.broadcast_from_0(witness.name)
    deadline = time.monotonic() + patience_seconds  # network file systems show a new file late
    while not witness.exists() and time.monotonic() < deadline:
        list(workdir.iterdir())  # makes some of them look again
        time.sleep(0.2)
    blind = [process for process, sees in enumerate(processes.all_gather_json(witness.exists())) if not sees]
    if processes.is_coordinator():
        witness.unlink()
    if blind:
        raise CheckpointError(
            f'--workdir={workdir} of process {blind[0]} is not the directory of process 0; it must be on a '
            'file system that all hosts share (NFS, Lustre, a mounted bucket)'
        )


def _steps_in(directory: pathlib.Path) -> list[int]:
    return [int(path.name) for path in directory.glob('*') if path.name.isdigit()]


def _read_config(path: pathlib.Path) -> Config:
    try:
        return config_lib.from_json(path.read_text())
    except config_lib.ConfigError as error:
        raise CheckpointError(f'{path}: {error}; delete it if its checkpoints are of this config') from error


def _check_fits(where: str, saved: Config, wanted: Config) -> None:
    unfit = config_lib.unfit_for_checkpoint(saved, wanted)
    if unfit:
        more = f' (and {len(unfit) - 1} more)' if len(unfit) > 1 else ''
        raise CheckpointError(
            f'{where} holds a run of another config: {unfit[0]}{more}; change it back or use another --workdir'
        )


def load_trained(workdir: pathlib.Path | str, step: int = -1) -> tuple[dict, Config]:
    """The parameters of a run and its config; see `load_trained_step`."""
    return load_trained_step(workdir, step)[:2]


def load_trained_step(workdir: pathlib.Path | str, step: int = -1) -> tuple[dict, Config, int]:
    """The parameters of a run; its optimizer state is not read.

    Args:
      workdir: directory of the run.
      step: which checkpoint; -1: the newest that can be read.

    Returns:
      (params, config, step): float32 arrays as a nested dict, as `parameters.init_params` makes them, on the
      mesh in use (jax.set_mesh) in the shards of training, or whole on the first device without
      one; the config that the checkpoint was trained with; the step of the checkpoint.

    Raises:
      CheckpointError: no run, no such checkpoint, or it cannot be read; the message is one line.
    """

    def read(path):
        config = _trained_config(path)
        wanted = {'params': step_lib.abstract_params(config)}
        restore = ocp.args.PyTreeRestore(
            wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        params = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(path / 'state', args=restore)['params']
        return params, config, int(path.name)

    return _read_trained(workdir, step, read)


def load_config(workdir: pathlib.Path | str, step: int = -1) -> Config:
    """The config that a checkpoint was trained with. Arguments and errors as `load_trained`."""
    return _read_trained(workdir, step, _trained_config)


def _trained_config(path: pathlib.Path) -> Config:
    return config_lib.from_json(json.dumps(ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(path / 'config')))


def _read_trained(workdir, step, read):
    directory = pathlib.Path(workdir).absolute() / 'checkpoints'
    steps = sorted(_steps_in(directory))
    if not steps:
        what = 'holds no checkpoint' if directory.parent.is_dir() else 'does not exist'
        raise CheckpointError(f'--workdir={workdir} {what}; give the --workdir of a training run that has saved')
    if step != -1 and step not in steps:
        raise CheckpointError(
            f'--workdir={workdir} has no checkpoint of step {step}; it has {", ".join(map(str, steps))}'
        )
    for candidate in reversed(steps) if step == -1 else [step]:
        path = directory / str(candidate)
        try:
            return read(path)
        except config_lib.ConfigError as error:
            raise CheckpointError(f'{path}: {error}') from error
        except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file.
            log.warning('unreadable checkpoint %s: %s', path, _first_line(error))
    raise CheckpointError(
        f'no checkpoint of --workdir={workdir} can be read; restore one from a backup'
        if step == -1
        else f'the checkpoint of step {step} in --workdir={workdir} cannot be read; leave --step out for the newest that can'
    )


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
        self._warn_of_incomplete()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=('state', 'data', 'config'),
            options=ocp.CheckpointManagerOptions(
                create=False,
                multiprocessing_options=_without_the_devices(),
                # Orbax stores metrics only where it is told of a best_fn; what to keep is the policy's to say.
                best_fn=_eval_loss,
                best_mode='min',
                preservation_policy=_Keep(config.train),
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
        )

    def _warn_of_incomplete(self):
        for path in sorted(self.directory.glob('*')) if processes.is_coordinator() else []:
            if path.is_dir() and not path.name.isdigit():
                kind = 'unreadable' if path.suffix == UNREADABLE else 'incomplete'
                log.warning('skipping %s checkpoint %s', kind, path)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: dict, data_position: dict, eval_loss: float | None = None) -> None:
        """Starts writing a checkpoint and returns once the state is copied from the devices.

        Raises:
          CheckpointError: this or the write before it failed (a full disk, say).
        """
        metrics = {} if eval_loss is None else {'eval_loss': float(eval_loss)}
        with _one_line_errors(self.directory):
            self._manager.save(
                step,
                metrics=metrics,
                force=True,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(data_position),
                    config=ocp.args.JsonSave(json.loads(config_lib.to_json(self.config))),
                ),
            )

    def evaluated(self, step: int, eval_loss: float) -> None:
        """Adds the evaluation loss to a checkpoint that was saved without it, so that it counts among the best."""
        path = self.directory / str(step) / 'metrics' / 'metrics'
        if processes.is_coordinator() and path.exists():
            partial = path.with_suffix('.tmp')
            partial.write_text(json.dumps({'eval_loss': float(eval_loss)}))
            partial.replace(path)
        processes.all_gather_json('evaluated')
        self._manager.reload()

    def wait(self) -> None:
        """Blocks until what was started is written; raises CheckpointError if it was not."""
        with _one_line_errors(self.directory):
            self._manager.wait_until_finished()

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
          CheckpointError: a checkpoint is of another config, or there are
            checkpoints and none can be read.
        """
        steps = processes.broadcast_from_0(self.steps())
        for step in reversed(steps):
            restored, problem = None, ''
            try:
                restored = self._restore_step(step, abstract_state)
            except CheckpointError:
                raise
            except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file.
                if _may_pass(error):
                    raise CheckpointError(
                        f'checkpoint {self.directory / str(step)} cannot be read now: {_first_line(error)}; '
                        'run the same command again when it can'
                    ) from error
                problem = _first_line(error)
            # Each process reads its own parts: what is damaged for one is not used by any.
            problems = [
                f'{text} (process {process})' if processes.is_multiprocess() else text
                for process, text in enumerate(processes.all_gather_json(problem))
                if text
            ]
            if not problems:
                self._set_aside([newer for newer in steps if newer > step])
                return step, *restored
            log.warning('skipping unreadable checkpoint %s: %s', self.directory / str(step), problems[0])
        if steps:
            raise CheckpointError(
                f'none of the checkpoints {steps} in {self.directory} can be read; '
                'restore one from a backup, or use another --workdir to start anew'
            )
        return None

    def _restore_step(self, step: int, abstract_state: dict) -> tuple[dict, dict]:
        """(state, data position), read without a word to the other processes, who may fail to read theirs."""
        path = self.directory / str(step)
        closing = contextlib.closing
        with closing(ocp.JsonCheckpointHandler()) as texts, closing(ocp.StandardCheckpointHandler()) as arrays:
            _check_fits(
                f'checkpoint {path}', config_lib.from_json(json.dumps(texts.restore(path / 'config'))), self.config
            )
            state = arrays.restore(path / 'state', args=ocp.args.StandardRestore(abstract_state))
            return jax.block_until_ready(state), texts.restore(path / 'data')

    def _set_aside(self, steps: list[int]) -> None:
        for step in steps if processes.is_coordinator() else []:
            path = self.directory / str(step)
            aside = path.with_suffix(UNREADABLE)
            if aside.exists():
                shutil.rmtree(aside)
            path.rename(aside)
        if steps:
            processes.all_gather_json('set aside')  # so that all see them gone
            self._manager.reload()

    def close(self) -> None:
        with _one_line_errors(self.directory):
            self._manager.close()


def _without_the_devices() -> ocp.options.MultiprocessingOptions:
    """Processes wait for each other by messages, not by collectives, which would meet those of a step under way."""
    if not processes.is_multiprocess():
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(
        active_processes=set(range(jax.process_count())), barrier_sync_key_prefix='transxssm_jax'
    )


def _eval_loss(metrics: dict) -> float:
    return metrics.get('eval_loss', math.inf)


class _Keep:
    """Orbax preservation policy: the newest train.keep_last, and train.keep_best of those with an evaluation loss."""

    def __init__(self, train: config_lib.Train):
        self.keep_last, self.keep_best = train.keep_last, train.keep_best

    def should_preserve(self, checkpoints, *, context):
        newest = sorted(info.step for info in checkpoints)[-self.keep_last :]
        evaluated = [info for info in checkpoints if info.metrics and 'eval_loss' in info.metrics]
        best = sorted(evaluated, key=lambda info: _eval_loss(info.metrics))[: self.keep_best]
        kept = {*newest, *(info.step for info in best)}
        return [info.step in kept for info in checkpoints]


class _one_line_errors:
    """Turns what a failed write raises, often from a background thread, into a CheckpointError."""

    def __init__(self, directory):
        self.directory = directory

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, Exception) and not isinstance(error, CheckpointError):
            raise CheckpointError(
                f'a checkpoint could not be written to {self.directory}: {_first_line(error)}; '
                'the last complete one stays usable'
            ) from error


def _may_pass(error: Exception) -> bool:
    """Whether a failed read says nothing about the file: the network, the permissions or the limits were at fault."""
    words = 'PERMISSION_DENIED|UNAVAILABLE|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED|Permission denied|Too many open files'
    return bool(
        re.search(words + '|Stale file handle|Input/output error|Connection', f'{type(error).__name__}: {error}')
    )


def _first_line(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    # TensorStore puts the place first and the reason last.
    return text if len(text) <= 300 else f'{text[:100]} ... {text[-200:]}'
