"""A workdir on an object store (s3://, gs://), without a mount: a local directory that is copied there as it grows.

A run of one process works in a local directory (in the cache of `data/object_store.py`). A thread copies what changes:
every few seconds what is written once (checkpoints, whose `digests.json` goes last and tells that they are complete),
logs each `LOG_SECONDS` and at the end. A checkpoint that the run removes is removed there too, its `digests.json` first.

When a run starts, what is there is fetched: logs, the newest checkpoints, and of older ones what tells whether they are
the best. So a run that was killed goes on from what was copied, on any machine. An object `lease.json` keeps a second run
out while the first renews it; a thread of its own does so, because a large checkpoint may be copied for longer than a lease
lasts.
"""

import contextlib
import hashlib
import json
import logging
import pathlib
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator

from transxssm_jax.data import object_store
from transxssm_jax.parallel import processes
from transxssm_jax.training import checkpoint_files, lease
from transxssm_jax.training.checkpoint_files import CheckpointError

SCAN_SECONDS = 2.0  # between looks for something new
LOG_SECONDS = 30.0  # between copies of logs
RENEW_SECONDS = 30.0  # between renewals of the lease
LEASE_SECONDS = 180.0  # after which a lease that nobody renewed is taken over
FULL_CHECKPOINTS = 2  # newest ones that are fetched whole, the second in case that the first is damaged

LEASE = 'lease.json'
_LAST = 'digests.json'
_SMALL = (_LAST, 'config.json', 'data.json', 'metrics.json')
_LOCAL = (lease.NAME, 'compiled', 'profile')  # of this machine

log = logging.getLogger(__name__)


@contextlib.contextmanager
def local(place: str) -> Iterator[pathlib.Path]:
    """The directory that a run works in: the path itself, or of a URL a local one that is copied there.

    Raises:
      CheckpointError: the URL is held by another run; what is in it cannot be read; several processes; or, at the
        end, something could not be copied. The message is one line.
      StoreError: the store refuses.
    """
    if not object_store.is_url(place):
        yield pathlib.Path(place)
        return
    if processes.is_multiprocess():
        raise CheckpointError(
            f'--workdir={place} takes a run of one process; for several mount the bucket on every host and give the path'
        )
    workdir = RemoteWorkdir(place)
    workdir.open()
    try:
        yield workdir.directory
    except BaseException:
        if problem := workdir.close():
            log.warning('%s', problem)
        raise
    if problem := workdir.close():
        raise CheckpointError(problem)


class RemoteWorkdir:
    """See the module's docstring.

    Attributes:
      directory: the local one; its name, by which charts know the run, is the last of the URL.
    """

    def __init__(self, url: str):
        self.url = url.rstrip('/')
        self.directory = object_store.cache_of(self.url) / 'run' / self.url.rpartition('/')[2]
        self._files = object_store.Files(self.url)
        self._owner = secrets.token_hex(8)
        self._sent: dict[str, tuple[int, int]] = {}  # name -> (bytes, time) of what was copied or fetched
        self._problem = ''  # of the last attempt to copy
        self._lost = ''  # who holds the lease instead
        self._stop, self._released = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name=f'copy to {self.url}', daemon=True)
        self._lease = threading.Thread(target=self._hold, name=f'lease of {self.url}', daemon=True)

    def open(self) -> None:
        """Takes the lease, fetches what is there, and begins to copy. Raises as `local`."""
        if holder := self._holder():
            raise CheckpointError(
                f'--workdir={self.url} is held by a run on {holder}; stop it, or wait {LEASE_SECONDS:.0f} s after it is gone'
            )
        self._renew()
        self._lease.start()
        try:
            self._fetch()
        except BaseException:
            self._release()
            raise
        self._thread.start()

    def _fetch(self) -> None:
        names = self._files.names()
        steps = complete_steps(names)
        self._set_aside(steps[-1] if steps else -1)
        self.directory.mkdir(parents=True)
        whole = {f'checkpoints/{step}' for step in steps[-FULL_CHECKPOINTS:]}
        for name in names:
            folder, _, file = name.rpartition('/')
            if name == LEASE or name.partition('/')[0] in _LOCAL:
                continue
            step = _step_of(name)
            if step is not None and (step not in steps or (f'checkpoints/{step}' not in whole and file not in _SMALL)):
                continue
            self._files.fetch(name, self.directory / name)
            self._sent[name] = _stamp(self.directory / name)

    def _set_aside(self, newest: int) -> None:
        """Clears the local directory; what an earlier run could not copy, checkpoints after step `newest`, stays beside it."""
        if any(step > newest for step in checkpoint_files.steps_in(self.directory / 'checkpoints')):
            aside = self.directory.with_name(f'not-copied-{self._owner}')
            self.directory.rename(aside)
            log.warning('checkpoints of an earlier run that were not copied to %s are in %s', self.url, aside)
        shutil.rmtree(self.directory, ignore_errors=True)

    def close(self) -> str:
        """Copies the rest and gives the lease back. Returns what could not be done, '' where all was."""
        self._stop.set()
        self._thread.join()
        self._copy(with_logs=True)
        if not self._lost and not self._problem:
            self._release()
            return ''
        self._end_lease()
        if self._lost:
            return f'--workdir={self.url} was taken over by a run on {self._lost}; what this one saved is in {self.directory}'
        return f'{self._problem}; what was not copied is in {self.directory}'

    def _end_lease(self) -> None:
        self._released.set()
        self._lease.join()

    def _release(self) -> None:
        """Gives the lease back."""
        self._end_lease()
        if not self._lost:
            with contextlib.suppress(object_store.StoreError, FileNotFoundError):  # it will end by itself
                self._files.remove([LEASE])

    def _hold(self) -> None:
        """Renews the lease until it is given back, or another run has it."""
        while not self._lost and not self._released.wait(RENEW_SECONDS):
            with contextlib.suppress(object_store.StoreError, OSError):  # what is wrong with the store, copying tells
                self._check_lease()

    def _check_lease(self) -> None:
        self._lost = self._lost or self._holder()
        if not self._lost:
            self._renew()

    def _work(self) -> None:
        logs_at = time.monotonic()
        while not self._stop.wait(SCAN_SECONDS):
            with_logs = time.monotonic() - logs_at >= LOG_SECONDS
            logs_at = time.monotonic() if with_logs else logs_at
            self._copy(with_logs)

    def _copy(self, with_logs: bool) -> None:
        before, self._problem = self._problem, ''
        try:
            if with_logs:
                self._check_lease()
            if not self._lost:
                self._send(with_logs)
        except (object_store.StoreError, OSError) as error:
            self._problem = checkpoint_files.first_line(error)
            if not before:
                log.warning('%s; it is tried again', self._problem)

    def _send(self, with_logs: bool) -> None:
        steps = checkpoint_files.steps_in(self.directory / 'checkpoints')
        found = {}
        for path in self.directory.rglob('*'):
            name = path.relative_to(self.directory).as_posix()
            parts = name.split('/')
            if parts[0] in _LOCAL or path.name.startswith('.') or not path.is_file():
                continue
            if parts[0] == 'checkpoints' and _step_of(name) not in steps:
                continue  # being written, or set aside
            if with_logs or parts[0] == 'checkpoints':
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    found[name] = _stamp(path)
        changed = [name for name, stamp in found.items() if self._sent.get(name) != stamp]
        # A checkpoint that was written anew is not complete until all of it is there.
        self._files.remove([name for name in changed if name in self._sent and name.endswith('/' + _LAST)])
        for name in sorted(changed, key=lambda name: (_step_of(name) is not None and name.endswith(_LAST), name)):
            if self._lost:
                return
            try:
                self._files.put(self.directory / name, name)
            except FileNotFoundError:  # removed meanwhile
                continue
            self._sent[name] = found[name]
        gone = {step for name in self._sent if (step := _step_of(name)) is not None} - set(steps)
        for step in gone:
            below = f'checkpoints/{step}/'
            there = [name for name in self._files.names() if name.startswith(below)]
            self._files.remove([name for name in there if name == below + _LAST])
            self._files.remove([name for name in there if name != below + _LAST])
            self._sent = {name: stamp for name, stamp in self._sent.items() if not name.startswith(below)}

    def _holder(self) -> str:
        """The host of another run that holds the lease; '' where none does."""
        try:
            content = json.loads(self._files.read(LEASE))
            is_other = content['owner'] != self._owner and time.time() - float(content['time']) < LEASE_SECONDS
            return str(content['host']) if is_other else ''
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return ''

    def _renew(self) -> None:
        content = {'owner': self._owner, 'host': socket.gethostname(), 'time': time.time()}
        self._files.write(LEASE, json.dumps(content).encode())


def fetch_checkpoint(reference: str, step: int) -> tuple[pathlib.Path, int]:
    """Copies one checkpoint of a run on an object store into the cache, to be read.

    Args:
      reference: URL of a workdir, alone or with @STEP, @best or @latest behind it.
      step: of a flag beside it; -1: none is given.

    Returns:
      (a local workdir that holds this checkpoint alone, its step).

    Raises:
      CheckpointError: there is no such checkpoint. StoreError: the store refuses.
    """
    url, at, word = reference.rpartition('@')
    if not at:
        url, word = reference, str(step) if step != -1 else 'latest'
    elif step != -1:
        raise CheckpointError(f'--workdir={reference} and --step={step} both name a checkpoint; leave one out')
    if word not in ('best', 'latest') and not (word.isascii() and word.isdigit()):
        raise CheckpointError(f'--workdir={reference}: what follows @ must be a step, best or latest')
    files = object_store.Files(url)
    names = files.names()
    steps = complete_steps(names)
    if not steps:
        raise CheckpointError(f'--workdir={url} holds no checkpoint; give the place of a training run that has saved')
    wanted = steps[-1] if word == 'latest' else -1 if word == 'best' else int(word)
    if word == 'best':
        losses = {}
        for other in steps:
            with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
                content = json.loads(files.read(f'checkpoints/{other}/metrics.json'))
                losses[other] = float(content['eval_loss'])
        if not losses:
            raise CheckpointError(
                f'--workdir={reference}: no checkpoint there has an evaluation loss, so none is the best'
            )
        wanted = min(losses, key=losses.get)
    if wanted not in steps:
        raise CheckpointError(
            f'--workdir={url} has no checkpoint of step {wanted}; it has {", ".join(map(str, steps))}'
        )
    # By what it holds: another run may have written there since.
    digests = files.read(f'checkpoints/{wanted}/{_LAST}')
    directory = object_store.cache_of(url) / 'read' / hashlib.sha256(digests).hexdigest()[:16]
    for name in names:
        is_wanted = name.startswith(f'checkpoints/{wanted}/') or name == 'config.json'
        if is_wanted and not (directory / name).exists():
            files.fetch(name, directory / name)
    return directory, wanted


def complete_steps(names: list[str]) -> list[int]:
    """Steps of the complete checkpoints among the names of a workdir's files, oldest first."""
    found = {_step_of(name) for name in names if name.endswith('/' + _LAST) and name.count('/') == 2}
    return sorted(found - {None})


def _step_of(name: str) -> int | None:
    """The step of the checkpoint that a file belongs to; None: of none."""
    parts = name.split('/')
    is_step = len(parts) > 2 and parts[0] == 'checkpoints' and parts[1].isascii() and parts[1].isdigit()
    return int(parts[1]) if is_step else None


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
