"""The profiler's window of a run."""

import pathlib

import jax

from transxssm_jax.config import Train
from transxssm_jax.parallel import processes


class ProfilerWindow:
    """Traces the steps train.profile_start_step to train.profile_start_step + train.profile_steps - 1.

    Only process 0 traces: one host's trace shows what the others do too.
    """

    def __init__(self, train: Train, directory: pathlib.Path):
        enabled = train.profile_steps > 0 and processes.is_coordinator()
        self._first = train.profile_start_step if enabled else -1
        self._end = self._first + train.profile_steps
        self._directory, self.is_tracing = directory, False

    def begins_at(self, step: int) -> bool:
        return step == self._first

    def ends_at(self, step: int) -> bool:
        return self.is_tracing and step == self._end

    def start(self) -> None:
        jax.profiler.start_trace(str(self._directory))
        self.is_tracing = True

    def stop(self) -> str:
        """Ends the trace; the steps in it must be done. Returns a line to print."""
        jax.profiler.stop_trace()
        self.is_tracing = False
        return f'profile written to {self._directory}'
