"""One checkpoint as a directory of files: how it is written and checked; checkpoint.py describes the layout."""

import asyncio
import concurrent.futures
import contextlib
import errno
import itertools
import json
import logging
import math
import os
import pathlib
import re
import secrets
import shutil
import threading
import time

import jax
import orbax.checkpoint as ocp
from etils import epath

from transxssm_jax import cli
from transxssm_jax import config as config_lib
from transxssm_jax.config import Config
from transxssm_jax.parallel import preemption, processes
from transxssm_jax.training import digest

FORMAT = 2  # format 1, which had no number, is not read; every later one is
PARTIAL = '.partial'  # suffix of a checkpoint's directory while it is written

log = logging.getLogger(__name__)

_save_numbers = itertools.count()  # alike in all processes


class CheckpointError(cli.UserError, RuntimeError):
    """A checkpoint cannot be written, read, or used; the message is one line."""


def grouped(state: dict) -> dict[str, dict]:
    """The state in the groups that are stored apart, so that weights are read and checked without the rest."""
    groups = {'params': {}, 'training': {}, 'ema': {}}
    for name, value in state.items():
        groups[name if name in ('params', 'ema') else 'training'][name] = value
    return {group: part for group, part in groups.items() if part}


# ---- reading ---------------------------------------------------------------


def read_digests(path: pathlib.Path) -> dict[str, list]:
    """Digests of the files of a checkpoint.

    Raises:
      digest.DamagedError: there are none, or they are damaged.
      CheckpointError: the checkpoint is of a newer format.
      OSError: they cannot be read.
    """
    try:
        content = digest.read_json(path / 'digests.json')
    except (FileNotFoundError, NotADirectoryError) as error:
        raise digest.DamagedError(
            f'{path} has no digests.json: it is damaged, or of format 1 of an older version, which is no longer read'
        ) from error
    if content['format'] > FORMAT:
        raise CheckpointError(
            f'{path} is of format {content["format"]}, newer than format {FORMAT} of this version; '
            'update transxssm_jax, or use another --workdir'
        )
    return content['files']


def read_config(path: pathlib.Path, digests: dict) -> Config:
    """The config of a checkpoint. CheckpointError: it holds a setting that this version lacks."""
    text = digest.read_checked(path, 'config.json', digests).decode()
    try:
        return config_lib.from_json(text)
    except config_lib.ConfigError as error:
        raise CheckpointError(f'{path}: {error}') from error


def refuse_foreign(path: pathlib.Path) -> None:
    """Raises CheckpointError where a config.json is not of a run: of a published model, say, which would be overwritten."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not {'model', 'data', 'train'} <= content.keys():
        raise CheckpointError(
            f'--workdir={path.parent} holds a config.json that is not of a run, and would be overwritten; use another '
            '--workdir, or delete that file if nothing needs it'
        )


def of_group(digests: dict, group: str) -> dict:
    return {name: value for name, value in digests.items() if name.startswith(f'{group}/')}


def read_group(path: pathlib.Path, group: str, abstract: dict, digests: dict, part: int = 0, parts: int = 1) -> dict:
    """The arrays of a group, read while other threads check the digests of its files.

    Args:
      path: directory of the checkpoint.
      group: of `grouped`.
      abstract: ShapeDtypeStructs with the shardings to restore into.
      digests: of the checkpoint.
      part, parts: which files to check, as for `digest.check`.

    Raises:
      digest.DamagedError, or any other error of Orbax and TensorStore.
    """
    with (
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        contextlib.closing(ocp.StandardCheckpointHandler()) as arrays,
    ):
        checking = pool.submit(digest.check, path, of_group(digests, group), part, parts)
        try:
            read = jax.block_until_ready(arrays.restore(path / group, args=ocp.args.StandardRestore(abstract)))
        except Exception:
            checking.result()  # names the file that is damaged, where one is
            raise
        checking.result()
        return read


# Errors that say nothing about a file: the network, the permissions, the limits or the memory were at fault.
_PASSING = [
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOMEM,
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENFILE,
    errno.EAGAIN,
    errno.EBUSY,
    errno.EINTR,
    errno.ENOLCK,
    errno.ENODEV,
    errno.ENOTCONN,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EHOSTUNREACH,
    errno.EHOSTDOWN,
    errno.ENETUNREACH,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.EPIPE,
    errno.ESHUTDOWN,
]
_PASSING_WORDS = re.compile(
    'PERMISSION_DENIED|UNAVAILABLE|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED|UNAUTHENTICATED|ABORTED|CANCELLED|Connection|'
    + '|'.join(rf'OS error {number}\b|{re.escape(os.strerror(number))}' for number in _PASSING),
)


def may_pass(error: BaseException) -> bool:
    """Whether a failed read says nothing about the files: it, or an error that it came from, is of the kinds above."""
    pending, seen = [error], set()
    while pending:
        error = pending.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        if isinstance(error, MemoryError | ConnectionError | TimeoutError):
            return True
        if isinstance(error, OSError) and error.errno is not None:
            if error.errno in _PASSING:
                return True
        elif _PASSING_WORDS.search(str(error)):
            return True
        pending += [error.__cause__, error.__context__, *getattr(error, 'exceptions', ())]
    return False


def first_line(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    # TensorStore puts the place first and the reason last.
    return text if len(text) <= 300 else f'{text[:100]} ... {text[-200:]}'


# ---- writing ---------------------------------------------------------------


class Save:
    """A checkpoint that is being written; returns from its constructor once the state is copied from the devices.

    Every process creates it, at the same place, and they agree whether all of it was written.

    Args:
      directory: of the checkpoints.
      step, state, data_position, config: what is saved.
      eval_loss: of this step, if it is known; one that is not finite counts as none.
      on_commit: called by process 0 once the checkpoint is complete.
      handler: of Orbax, for the arrays.
      save_args: tree of ocp.SaveArgs like the state.
      exchange: a `checkpoint_exchange.CheckpointExchange` where the processes share no file system; else None.

    Attributes:
      step, eval_loss: as given.
      problem: why it failed, alike in all processes; '' while it has not.
      error: what failed in this process, or None.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        step: int,
        state: dict,
        data_position: dict | None,
        config: Config,
        eval_loss: float | None = None,
        on_commit=lambda: None,
        handler=None,
        save_args: dict | None = None,
        exchange=None,
    ):
        self.step, self.eval_loss, self.problem, self.error = step, _finite(eval_loss), '', None
        self._directory, self._on_commit = directory, on_commit
        self._exchange, self._sends = exchange, exchange is not None and not processes.is_coordinator()
        # A name that no other run uses, not even one that lost the workdir and does not know it yet.
        self._partial = directory / processes.broadcast_from_0(f'{step}-{secrets.token_hex(4)}{PARTIAL}')
        self._handler = handler or ocp.PyTreeCheckpointHandler()
        self._groups, self._futures = grouped(state), []
        self._topic = f'save/{next(_save_numbers)}'
        self._agreement = preemption.PreemptionSync(f'{self._topic}/failed')
        self._thread = threading.Thread(target=self._write_and_agree, name='save a checkpoint')
        eval_loss = self.eval_loss
        texts = {'data.json': json.dumps(data_position), 'config.json': config_lib.to_json(config)}
        problem = own_problem = ''
        if processes.is_coordinator():
            problem = self._attempt(lambda: self._make_directory(texts, eval_loss))
        elif self._sends:
            own_problem = self._attempt(lambda: self._make_directory({}, None))
        self.problem = processes.broadcast_from_0(problem)
        if not self.problem:
            self._copy_problem = own_problem or self._attempt(lambda: self._copy(state, save_args))
            self._thread.start()

    def has_ended(self) -> bool:
        """Whether it is written, or has failed; failures are reported to all processes at the same call.

        It is called before each step by every process, until it returns True.
        """
        if self._thread.is_alive():
            return bool(self._agreement.should_stop(0))
        return not self.problem or bool(self._agreement.should_stop(1))

    def result(self) -> str:
        """Waits until it is written. Returns why it failed, alike in all processes; '' where it did not."""
        if self._thread.ident is not None:
            self._thread.join()
        return self.problem

    def _attempt(self, action) -> str:
        """Why an action failed; '' where it did not."""
        try:
            action()
        except Exception as error:  # Orbax and TensorStore raise many kinds for a failed write.
            self.error = error
            return first_line(error) + processes.process_label()
        return ''

    def _make_directory(self, texts: dict, eval_loss: float | None) -> None:
        self._partial.mkdir()  # without parents: a workdir that was removed under the run is not made anew
        for group in self._groups:
            (self._partial / group).mkdir()
            if self._sends:  # Orbax waits until its process 0 has made this one
                (self._partial / group / 'array_metadatas').mkdir()
        for name, text in texts.items():
            (self._partial / name).write_text(text)
        if eval_loss is not None:
            digest.write_json(self._partial / 'metrics.json', {'eval_loss': float(eval_loss)})

    def _copy(self, state: dict, save_args: dict | None) -> None:
        layouts = grouped(save_args) if save_args else {}
        for group, part in self._groups.items():
            args = ocp.args.PyTreeSave(part, layouts.get(group))
            # In a thread of its own, because a notebook's thread has an event loop that is running already.
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                saving = self._handler.async_save(epath.Path(self._partial / group), args=args)
                self._futures += pool.submit(asyncio.run, saving).result()
        self._groups = dict.fromkeys(self._groups)  # the arrays on the devices are not kept

    def _write_and_agree(self) -> None:
        digests = {}
        problem = self._copy_problem or self._attempt(lambda: digests.update(self._finish_arrays()))
        if problem:
            self._wait_for_writers()
        try:
            written = processes.gather_at_0({'problem': problem, 'digests': digests}, f'{self._topic}/written')
            if self._sends:
                _remove(self._partial)
            if processes.is_coordinator():
                problem = next((one['problem'] for one in written if one['problem']), '')
                of_others = {name: value for one in written[1:] for name, value in one['digests'].items()}
                if self._exchange and not problem:
                    problem = self._attempt(lambda: self._exchange.receive(self._partial, of_others))
                digests |= of_others
                problem = problem or self._attempt(lambda: self._commit(digests))
                if self._exchange:
                    with contextlib.suppress(Exception):  # the next start takes away what is left
                        self._exchange.clear(self._partial)
                if problem:
                    _remove(self._partial)  # its space serves the next attempt
            self.problem = processes.broadcast_from_0(problem, f'{self._topic}/result')
        except jax.errors.JaxRuntimeError as error:  # another process is lost; this one will be ended too
            self.problem = first_line(error)

    def _wait_for_writers(self) -> None:
        """After a failure: none of this process's arrays is written any more once this returns, so that they can be removed."""
        for future in self._futures:
            with contextlib.suppress(Exception):  # one of them is the failure
                future.result()

    def _finish_arrays(self) -> dict[str, list]:
        """Waits for the arrays of this process. Returns their digests, made while the files are in memory."""
        for future in self._futures:
            future.result()
        own = f'process_{jax.process_index() if processes.is_multiprocess() else 0}'
        names = [name for name in _files_in(self._partial) if any(part.endswith(own) for part in name.split('/'))]
        digests = digest.of_files(self._partial, names)
        if self._sends:
            self._exchange.send(self._partial, names)
        return digests

    def _commit(self, digests: dict[str, list]) -> None:
        for group in self._groups:
            self._handler.finalize(epath.Path(self._partial / group))
        rest = [name for name in _files_in(self._partial) if name not in digests and name != 'metrics.json']
        digests |= digest.of_files(self._partial, rest)
        digest.write_json(self._partial / 'digests.json', {'format': FORMAT, 'step': self.step, 'files': digests})
        self._partial.rename(self._directory / str(self.step))
        if problem := self._attempt(self._on_commit):
            log.warning('after checkpoint %s: %s', self._directory / str(self.step), problem)


def _remove(directory: pathlib.Path, attempts: int = 10) -> None:
    """Removes a directory whose last files may still be made."""
    for _ in range(attempts):
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return
        time.sleep(0.1)


def _finite(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None


def steps_in(directory: pathlib.Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first; [] where there is no directory."""
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def _files_in(directory: pathlib.Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob('*') if path.is_file())


def not_written(directory: pathlib.Path, problem: str) -> str:
    return f'a checkpoint could not be written to {directory}: {problem}; the last complete one stays usable'


@contextlib.contextmanager
def one_line_errors(directory: pathlib.Path):
    """Turns the error of a failed write into a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(not_written(directory, first_line(error))) from error
