"""The lease of a workdir on an object store: an object that tells who has it, renewed by a thread.

A run that finds a lease watches it, is refused where it is renewed, and takes it over where it is not, so that a run that was
killed is started again by the same command at once. Clocks of machines are not compared. Stores know no exclusive creation
that all of them share: of two runs that start at the same instant one finds at its next renewal that it has lost.
"""

import contextlib
import json
import logging
import secrets
import threading
import time

from transxssm_jax.data import object_store
from transxssm_jax.training import lease
from transxssm_jax.training.checkpoint_files import CheckpointError

NAME = 'lease.json'
RENEW_SECONDS = 5.0  # between renewals
LOOKS = 12  # at a lease of another host, RENEW_SECONDS apart, until one that does not change is taken over

log = logging.getLogger(__name__)


class StoreLease:
    """A lease, from `acquire` to `end` or `release`.

    Args:
      files: of the workdir's URL.

    Attributes:
      lost: the host of the run that has it instead; '' while it is held.
    """

    def __init__(self, files: object_store.Files):
        self.lost = ''
        self._files, self._renewals = files, 0
        self._who = lease.own_identity() | {'token': secrets.token_hex(8)}
        self._ended = threading.Event()
        # Of its own, because copying a large checkpoint takes minutes.
        self._thread = threading.Thread(target=self._keep_renewing, name=f'renew the lease of {files.url}', daemon=True)

    def acquire(self) -> None:
        """Returns once the lease is held.

        Raises:
          CheckpointError: another run holds it. StoreError: the store refuses.
        """
        found = self._read()
        if found and lease.is_alive(found) is not False:
            self._watch(found)
        self._renew()
        self._thread.start()

    def end(self) -> None:
        """Renews it no more. May be called again."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def release(self) -> None:
        """Gives it back, where it is still held."""
        self.end()
        if not self.lost:
            with contextlib.suppress(object_store.StoreError, FileNotFoundError):  # nobody renews it any more
                self._files.remove([NAME])

    def _watch(self, found: dict) -> None:
        """Returns once nobody holds the lease, or the one that was found is not renewed. Raises as `acquire`."""
        if lease.is_alive(found) is None:
            log.warning(
                'waiting to see whether the run on %s that holds %s is alive', found.get('host'), self._files.url
            )
            for _ in range(LOOKS):
                time.sleep(RENEW_SECONDS)
                now = self._read()
                if not now:
                    return  # it has ended
                if now != found:
                    break
            else:
                log.warning('the lease of %s is taken over: nobody renews it', self._files.url)
                return
        raise CheckpointError(
            f'--workdir={self._files.url} is held by a run on {found.get("host")}; end that one first'
        )

    def _read(self) -> dict:
        """What the lease tells of its holder; {} where there is none."""
        try:
            return lease.parsed(self._files.read(NAME))
        except FileNotFoundError:
            return {}

    def _renew(self) -> None:
        self._renewals += 1
        self._files.write(NAME, json.dumps(self._who | {'renewals': self._renewals}).encode())

    def _keep_renewing(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            with contextlib.suppress(object_store.StoreError, OSError):  # what is wrong with the store, copying tells
                found = self._read()
                if found and found.get('token') != self._who['token']:
                    self.lost = str(found.get('host'))
                    return
                self._renew()
