"""One run per workdir, on any number of hosts and on file systems without locks.

The run's process 0 holds WORKDIR/lease.json: who it is, a random token, and a
counter that a thread renews every few seconds. A second run is refused. A stale
lease is taken over: on the same host when the process is gone, on another host
when the counter has not changed for a while; clocks of hosts are not compared.

- A lease is created under its name by a hard link, which succeeds for one process only.
- Of several runs that find the same stale lease, the one that creates the claim named
  after its token may replace it, and only while the lease is still that one.
- A holder that finds another token in the file has lost the lease (it was suspended,
  say, and thought dead) and ends its run without writing anything more.
"""

import contextlib
import errno
import json
import logging
import os
import pathlib
import secrets
import socket
import threading
import time

import psutil
import xxhash

from transxssm_jax import cli
from transxssm_jax.parallel import processes
from transxssm_jax.training.checkpoint_files import CheckpointError

NAME = 'lease.json'
# Exit code of a run that lost its lease: another run has the workdir now, so that a restart would not help.
LOST = cli.ExitCode.WRONG_INPUT

_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EMLINK, errno.EXDEV}

log = logging.getLogger(__name__)


class LeaseError(CheckpointError):
    """Another run holds the workdir; the message is one line."""


@contextlib.contextmanager
def hold(workdir: pathlib.Path, **options):
    """Holds the lease of a workdir in process 0 while the block runs. Arguments and errors as those of Lease."""
    lease = Lease(workdir, **options) if processes.is_coordinator() else None
    try:
        yield lease
    finally:
        if lease:
            lease.release()


class Lease:
    """The lease of a workdir, held from construction to `release`.

    Args:
      workdir: is made where it does not exist.
      on_lost: called with a line, from a thread, when another run has taken the lease.
      renew_seconds: between renewals.
      patience_seconds: how long another host's lease is watched before it counts as stale; several times renew_seconds.
      sleep: waits between two looks at a lease.

    Raises:
      LeaseError: another run holds the workdir.
      CheckpointError: the lease cannot be written.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        on_lost=lambda message: processes.end_all(LOST, message),
        renew_seconds: float = 3.0,
        patience_seconds: float = 30.0,
        sleep=time.sleep,
    ):
        self.path = pathlib.Path(workdir) / NAME
        self._workdir, self._on_lost, self._sleep = workdir, on_lost, sleep
        self._renew_seconds, self._looks = renew_seconds, max(2, round(patience_seconds / renew_seconds))
        self._token, self._renewals = secrets.token_hex(16), 0
        self._who = own_identity() | {'token': self._token}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._acquire()
        except OSError as error:
            raise CheckpointError(
                f'--workdir={workdir} cannot be written ({error.strerror or error}); choose another'
            ) from error
        self._directory = _opened(workdir)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name='renew the lease', daemon=True)
        self._thread.start()

    def renew(self) -> bool:
        """Changes the counter. Returns whether the lease is still held; raises OSError where that cannot be known now, or
        FileNotFoundError where the workdir is no more, or is another directory."""
        self._renewals += 1
        try:
            # In place: it needs no free space, and never replaces a lease that another run has put there meanwhile.
            with self.path.open('r+b') as file:
                if self._token.encode() not in file.read():
                    return False
                file.seek(0)
                file.write(self._content())
        except FileNotFoundError:
            if not self._has_workdir():
                raise
            return self._create(self.path)
        return True

    def release(self) -> None:
        self._stop.set()
        self._thread.join(5)
        with contextlib.suppress(OSError):
            if self._token.encode() in self.path.read_bytes():
                self.path.unlink()
        if self._directory is not None:
            os.close(self._directory)
            self._directory = None

    def _has_workdir(self) -> bool:
        """Whether the workdir is the directory that the lease was acquired in. One that was removed can come back empty,
        because a checkpoint that is being written makes the directories that it needs."""
        try:
            found = os.stat(self._workdir)
            return self._directory is None or os.path.samestat(found, os.fstat(self._directory))
        except OSError:  # it is gone, or the file server no longer knows the directory that is open
            return False

    def _keep_renewing(self) -> None:
        while not self._stop.wait(self._renew_seconds):
            try:
                held = self.renew()
            except FileNotFoundError:
                if self._stop.is_set() or self._has_workdir():
                    continue
                return self._on_lost(
                    f'--workdir={self._workdir} was removed under the run, which ends here; its checkpoints are gone, unless '
                    'they are put back from a copy'
                )
            except OSError:  # it may pass; another run that takes the lease meanwhile is seen afterwards
                continue
            if not held and not self._stop.is_set():
                return self._on_lost(
                    f'--workdir={self._workdir} was taken over by another run{described(self._read())}, because this '
                    'one did not answer; it ends here and writes nothing more'
                )

    def _content(self) -> bytes:
        # Of the same length at every renewal, so that one written over another is whole.
        return (json.dumps({**self._who, 'renewals': f'{self._renewals:012}'}) + '\n').encode()

    def _read(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    def _acquire(self) -> None:
        while not self._create(self.path):
            found = self._read()
            if found is None:
                continue  # released in between
            if not self._is_stale(found):
                if (holder := self._read()) is None:
                    continue
                self._refuse(holder)
            if self._take_over(found):
                log.warning('the lease of %s is taken over: its run%s is gone', self._workdir, described(found))
                break
        held = self._read()
        if held is None or self._token.encode() not in held:
            self._refuse(held)

    def _refuse(self, holder: bytes | None) -> None:
        raise LeaseError(
            f'--workdir={self._workdir} is in use by another run{described(holder)}; end that one first, or use another '
            '--workdir'
        )

    def _is_stale(self, found: bytes) -> bool:
        if (lives := is_alive(parsed(found))) is not None:
            return not lives
        log.warning('waiting to see whether the run%s that holds %s is alive', described(found), self._workdir)
        return not self._changes(found)

    def _changes(self, found: bytes) -> bool:
        """Watches the lease until it is not as it was found, or patience is at its end."""
        for _ in range(self._looks):
            self._sleep(self._renew_seconds)
            if self._read() != found:
                return True
        return False

    def _take_over(self, stale: bytes) -> bool:
        """Replaces a stale lease; False where it changed or another run was first, and it must be looked at again."""
        claim = self.path.with_name(f'{NAME}.claim-{xxhash.xxh3_128_hexdigest(stale)}')
        if not self._create(claim):
            if not self._changes(stale):  # who claimed it has died, too
                claim.unlink(missing_ok=True)
            return False
        try:
            if self._read() != stale:
                return False
            os.replace(self._written_aside(), self.path)
            return True
        finally:
            claim.unlink(missing_ok=True)

    def _create(self, path: pathlib.Path) -> bool:
        """Writes own content under a name that nobody has; whether that succeeded."""
        aside = self._written_aside()
        try:
            os.link(aside, path)
        except FileExistsError:
            # A file server may have made the link and lost its answer.
            return self._token.encode() in (path.read_bytes() if path.exists() else b'')
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            try:
                with path.open('xb') as file:
                    file.write(self._content())
            except FileExistsError:
                return False
        finally:
            aside.unlink(missing_ok=True)
        return True

    def _written_aside(self) -> pathlib.Path:
        aside = self.path.with_name(f'{NAME}.{self._token}')
        aside.write_bytes(self._content())
        return aside


def own_identity() -> dict:
    """Who this process is, as a lease tells of its holder."""
    return {
        'host': socket.gethostname(),
        'process': os.getpid(),
        'process_start': _start_of(os.getpid()),
        'host_identity': _host_identity(),
        'since': time.time(),  # for messages only
    }


def is_alive(holder: dict) -> bool | None:
    """Whether the process lives that `own_identity` told of; None where it is not seen from here."""
    if holder.get('host_identity') != _host_identity():
        return None
    return _is_alive(holder.get('process'), holder.get('process_start'))


def _opened(directory: pathlib.Path) -> int | None:
    """A descriptor of a directory: while it is open, no other directory gets the same inode number. None where the file
    system opens no directories."""
    try:
        return os.open(directory, os.O_RDONLY | getattr(os, 'O_DIRECTORY', 0))
    except OSError:
        return None


def parsed(content: bytes | None) -> dict:
    """What a lease tells of its holder; {} where it is none."""
    try:
        holder = json.loads(content or b'')
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def described(content: bytes | None) -> str:
    """' (process 7 on host a, for 3 min)', or '' where the lease does not tell."""
    holder = parsed(content)
    try:
        minutes = max(0, int(time.time() - holder['since'])) // 60
        age = f'{minutes // 60} h {minutes % 60} min' if minutes >= 60 else f'{minutes} min'
        return f' (process {holder["process"]} on host {holder["host"]}, for {age})'
    except (KeyError, TypeError, ValueError, OverflowError):
        return ''


def _host_identity() -> str:
    """Alike in two processes only where they see each other by process id."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink('/proc/self/ns/pid'))
    return ' '.join(parts)


def _start_of(process: int) -> str:
    """What tells a process from a later one with the same id; '' where it cannot be read."""
    try:
        return (
            pathlib.Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[19]
        )  # clock ticks since boot
    except (OSError, IndexError):
        with contextlib.suppress(psutil.Error):
            return f'{psutil.Process(process).create_time():.0f}'
    return ''


def _is_alive(process, start) -> bool:
    if not isinstance(process, int) or process <= 0:
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # of another user
    with contextlib.suppress(psutil.Error):
        if psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
            return False  # ended, and its parent has not noticed
    found = _start_of(process)
    return not found or not start or found == start
