"""How a request to stop that reached one process of a run reaches all of them."""

import contextlib
import json

import jax

from transxssm_jax.parallel import processes


class PreemptionSync:
    """Passes a request to stop, which reached one process, to all, so that all stop at the same call.

    Every process calls `should_stop` at the same places: before each step of
    training and each batch of an evaluation, whose result it waits for before the
    call after the next. So when a process announces at call t that it was asked
    to stop, none can have come further than call t + 1, and all stop at call t + 2.
    Each call costs one message to process 0, while the devices work.
    """

    def __init__(self, topic: str = 'stop'):
        self._call, self._key = 0, processes.KEY_ROOT + topic

    def should_stop(self, exit_code: int) -> int:
        """
        Args:
          exit_code: what this process was asked to stop with, e.g. by a signal; 0: it was not asked.

        Returns:
          The exit code that all processes stop with now; 0: the run goes on.
        """
        if not processes.is_multiprocess():
            return exit_code
        self._call += 1
        if exit_code:
            # An error means that another process was asked too, and announced it first.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                processes.client().key_value_set(self._key, json.dumps([self._call + 2, exit_code]))
        try:
            at, exit_code = json.loads(processes.client().key_value_try_get(self._key))
        except jax.errors.JaxRuntimeError as error:
            if 'NOT_FOUND' not in str(error):
                raise
            return 0
        if self._call > at:
            raise AssertionError(f'call {self._call} came before the announcement to stop at call {at}')
        return exit_code if self._call == at else 0
