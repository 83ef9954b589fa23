"""A workdir on an object store (s3://, gs://), without a mount: a local directory that is copied there as it grows.

Every process of a run works in a local directory of its own (in the cache of `data/object_store.py`). That of process 0 is
the workdir, and a thread copies what changes in it: every few seconds what is written once (checkpoints, whose
`digests.json` goes last and tells that they are complete), logs each `LOG_SECONDS` and at the end. A checkpoint that the
run removes is removed there too, its `digests.json` first. The others copy their part of the ledger alone;
`checkpoint_exchange.py` brings their arrays into the checkpoints.

When a run starts, what is there is fetched: logs, the newest checkpoints, and of older ones what tells whether they are
the best. So a run that was killed goes on from what was copied, on any machines. `store_lease.py` keeps a second run out.
"""

import contextlib
import hashlib
import json
import logging
import pathlib
import secrets
import shutil
import threading
import time
from collections.abc import Iterator

from transxssm_jax.data import object_store
from transxssm_jax.parallel import processes
from transxssm_jax.training import checkpoint_files, lease, ledger
from transxssm_jax.training.checkpoint_exchange import PLACE, CheckpointExchange
from transxssm_jax.training.checkpoint_files import CheckpointError
from transxssm_jax.training.store_lease import StoreLease

SCAN_SECONDS = 2.0  # between looks for something new
LOG_SECONDS = 30.0  # between copies of logs
FULL_CHECKPOINTS = 2  # newest ones that are fetched whole, the second in case that the first is damaged

_LAST = 'digests.json'
_SMALL = (_LAST, 'config.json', 'data.json', 'metrics.json')
_LOCAL = (lease.NAME, 'compiled', 'profile', PLACE)  # of this machine, or of no run that is under way

log = logging.getLogger(__name__)


@contextlib.contextmanager
def local(place: str) -> Iterator[tuple[pathlib.Path, CheckpointExchange | None]]:
    """The directory that this process works in: the path itself, or of a URL a local one that is copied there. Beside it
    what hands checkpoints from process to process, where a run of several processes has no directory in common.

    All processes enter it, at the same place.

    Raises:
      CheckpointError: the URL is held by another run; what is in it cannot be read; or, at the end, something could not
        be copied. The message is one line.
      StoreError: the store refuses.
    """
    if not object_store.is_url(place):
        yield pathlib.Path(place), None
        return
    workdir = RemoteWorkdir(place)
    if processes.is_coordinator():
        workdir.open()
    processes.broadcast_from_0('the lease is held')
    if not processes.is_coordinator():
        workdir.open()
    try:
        yield workdir.directory, workdir.exchange() if processes.is_multiprocess() else None
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
        index = processes.process_index()
        # Processes of one host have one cache.
        self.directory = object_store.cache_of(self.url) / f'process-{index}' / self.url.rpartition('/')[2]
        self._own = f'{ledger.DIRECTORY}/process-{index}.jsonl' if index else ''  # '': all is
        self._files = object_store.Files(self.url)
        self._lease = StoreLease(self._files)
        self._sent: dict[str, tuple[int, int]] = {}  # name -> (bytes, time) of what was copied or fetched
        self._problem = ''  # of the last attempt to copy
        self._stop = threading.Event()
        self._copying = threading.Lock()
        self._thread = threading.Thread(target=self._work, name=f'copy to {self.url}', daemon=True)

    def open(self) -> None:
        """Takes the lease, fetches what is there, and begins to copy; process 0 comes first. Raises as `local`."""
        if not self._own:
            self._lease.acquire()
        try:
            self._fetch()
        except BaseException:
            self._give_back()
            raise
        self._thread.start()

    def _fetch(self) -> None:
        if not self._own:
            self.exchange().clear()
        names = self._files.names()
        steps = complete_steps(names)
        self._set_aside(steps[-1] if steps else -1)
        self.directory.mkdir(parents=True)
        whole = {f'checkpoints/{step}' for step in steps[-FULL_CHECKPOINTS:]}
        for name in names:
            folder, _, file = name.rpartition('/')
            if name.partition('/')[0] in _LOCAL or self._own not in ('', name):
                continue
            step = _step_of(name)
            if step is not None and (step not in steps or (f'checkpoints/{step}' not in whole and file not in _SMALL)):
                continue
            self._files.fetch(name, self.directory / name)
            self._sent[name] = _stamp(self.directory / name)

    def _set_aside(self, newest: int) -> None:
        """Clears the local directory; what an earlier run could not copy, checkpoints after step `newest`, stays beside it."""
        if any(step > newest for step in checkpoint_files.steps_in(self.directory / 'checkpoints')):
            aside = self.directory.with_name(f'not-copied-{secrets.token_hex(4)}')
            self.directory.rename(aside)
            log.warning('checkpoints of an earlier run that were not copied to %s are in %s', self.url, aside)
        shutil.rmtree(self.directory, ignore_errors=True)

    def exchange(self) -> CheckpointExchange:
        """What hands checkpoints from process to process."""
        return CheckpointExchange(self._files, lambda: self._copy(with_logs=False))

    def close(self) -> str:
        """Copies the rest and gives the lease back. Returns what could not be done, '' where all was."""
        self._stop.set()
        self._thread.join()
        self._copy(with_logs=True)
        if not self._lease.lost and not self._problem:
            self._give_back()
            return ''
        self._lease.end()
        if self._lease.lost:
            return (
                f'--workdir={self.url} was taken over by a run on {self._lease.lost}; what this one saved is in '
                f'{self.directory}'
            )
        return f'{self._problem}; what was not copied is in {self.directory}'

    def _give_back(self) -> None:
        if not self._own:
            self._lease.release()

    def _work(self) -> None:
        logs_at = time.monotonic()
        while not self._stop.wait(SCAN_SECONDS):
            with_logs = time.monotonic() - logs_at >= LOG_SECONDS
            logs_at = time.monotonic() if with_logs else logs_at
            self._copy(with_logs)

    def _copy(self, with_logs: bool) -> str:
        """Copies what has changed. Returns why that could not be done, '' where it was."""
        with self._copying:
            before, self._problem = self._problem, ''
            try:
                if not self._lease.lost:
                    self._send(with_logs)
            except (object_store.StoreError, OSError) as error:
                self._problem = checkpoint_files.first_line(error)
                if not before:
                    log.warning('%s; it is tried again', self._problem)
            return self._problem

    def _send(self, with_logs: bool) -> None:
        steps = checkpoint_files.steps_in(self.directory / 'checkpoints')
        found = {}
        for path in self.directory.rglob('*'):
            name = path.relative_to(self.directory).as_posix()
            parts = name.split('/')
            if parts[0] in _LOCAL or path.name.startswith('.') or not path.is_file() or self._own not in ('', name):
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
            if self._lease.lost:
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
