"""Checkpoints of a run whose processes share no file system: their files pass from process to process by an object store.

While a checkpoint is written, every process has its own arrays in a local directory. The others send theirs below
`PLACE` in the workdir's URL, and process 0, which has the rest, fetches them, checks their digests, completes the
checkpoint as on a shared file system, and takes them away again. What is restored is copied to each process for as long
as it is read. So a process needs room on its disk for one whole checkpoint, process 0 for all that the run keeps.
"""

import concurrent.futures
import contextlib
import pathlib
import shutil
from collections.abc import Callable, Iterator

from transxssm_jax.data import object_store
from transxssm_jax.parallel import processes
from transxssm_jax.training import digest
from transxssm_jax.training.checkpoint_files import CheckpointError

PLACE = 'exchange'  # folder of the URL for files on their way
_TRANSFERS = 8  # at a time


class CheckpointExchange:
    """One process's end of the exchange.

    Args:
      files: of the workdir's URL.
      publish: called by process 0; it copies the complete checkpoints to the URL, and returns why that failed, or ''.
    """

    def __init__(self, files: object_store.Files, publish: Callable[[], str]):
        self._files, self._publish = files, publish

    def send(self, partial: pathlib.Path, names: list[str]) -> None:
        """Copies files of this process in a checkpoint's directory to the store, where process 0 finds them.

        Raises:
          StoreError: the store refuses.
        """
        _for_all(names, lambda name: self._files.put(partial / name, _key(partial, name)))

    def receive(self, partial: pathlib.Path, digests: dict[str, list]) -> None:
        """Brings the files that the others have sent into process 0's directory of the checkpoint.

        Args:
          partial: that directory.
          digests: of these files, as their processes made them.

        Raises:
          digest.DamagedError: a file is not what was sent. StoreError: the store refuses. FileNotFoundError: one is not
          there.
        """
        _for_all(sorted(digests), lambda name: self._files.fetch(_key(partial, name), partial / name))
        digest.check(partial, digests)

    def clear(self, partial: pathlib.Path | None = None) -> None:
        """Takes away what was sent of a checkpoint; None: of all, which killed runs have left. Process 0 calls it.

        Raises:
          StoreError: the store refuses.
        """
        below = f'{PLACE}/' if partial is None else _key(partial, '')
        self._files.remove([name for name in self._files.names() if name.startswith(below)])

    @contextlib.contextmanager
    def brought(self, path: pathlib.Path) -> Iterator[None]:
        """A context in which every process has a checkpoint at this path. All processes enter it, at the same place.

        Raises:
          CheckpointError: it cannot be copied now.
        """
        problem = processes.broadcast_from_0(self._publish() if processes.is_coordinator() else '')
        if problem:
            raise CheckpointError(f'{problem}; run the same command again when it can')
        if processes.is_coordinator():
            yield
            return
        below = f'checkpoints/{path.name}/'
        try:
            names = [name for name in self._files.names() if name.startswith(below)]
            _for_all(names, lambda name: self._files.fetch(name, path / name.removeprefix(below)))
        except (object_store.StoreError, OSError) as error:
            raise CheckpointError(f'checkpoint {path.name} cannot be copied now: {error}') from error
        try:
            yield
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _key(partial: pathlib.Path, name: str) -> str:
    return f'{PLACE}/{partial.name}/{name}'


def _for_all(names: list[str], action: Callable[[str], None]) -> None:
    """Calls an action for every name, several at a time; raises the first error once none is under way."""
    with concurrent.futures.ThreadPoolExecutor(_TRANSFERS) as pool:
        for done in [pool.submit(action, name) for name in names]:
            done.result()
