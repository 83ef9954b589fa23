"""What a run is doing: the phase that it is in, since when, and the wall time that each phase has taken."""

import collections
import contextlib
import statistics
import time

# In the order in which a record names them. 'steps' is what a run is for; the rest is not.
NAMES = ('steps', 'start', 'compile', 'restore', 'save', 'input', 'evaluation', 'end')
_STEPS_REMEMBERED = 64


class Phases:
    """The phases of a run; entered by one thread, and read by others.

    Attributes:
      name: of the phase now; one of NAMES.
      step: that was taken last.
      since: time.monotonic() when the phase, or what it now does, began.
    """

    def __init__(self):
        self.name, self.step, self.since = 'start', 0, time.monotonic()
        self._credited, self._seconds = self.since, dict.fromkeys(NAMES, 0.0)
        self._steps, self._before = collections.deque(maxlen=_STEPS_REMEMBERED), 0.0

    def begin(self, name: str) -> None:
        """The run is in another phase from now on."""
        self._credit()
        self.name = name

    @contextlib.contextmanager
    def within(self, name: str):
        """The block is of another phase; then the run is in the one before."""
        before = self.name
        self.begin(name)
        try:
            yield
        finally:
            self.begin(before)

    def beat(self) -> None:
        """The phase has got on by a piece, such as a batch of an evaluation."""
        self.since = time.monotonic()

    def took_step(self, step: int) -> None:
        """A step was given to the devices, and the one before is done."""
        self._credit()
        total = self._seconds['steps'] + self._seconds['input']
        self._steps.append(total - self._before)
        self.step, self._before = step, total

    def forget_steps(self) -> None:
        """What comes is no measure for the steps before, nor they for it."""
        self._steps.clear()

    def seconds(self) -> dict[str, float]:
        """Wall time of each phase, up to now."""
        self._credit()
        return dict(self._seconds)

    def usual_step_seconds(self, least: int = 8) -> float | None:
        """The median of the last steps with their input; None where there are fewer than `least`."""
        steps = list(self._steps)
        return statistics.median(steps) if len(steps) >= least else None

    def _credit(self) -> None:
        now = time.monotonic()
        self._seconds[self.name] += now - self._credited
        self._credited = self.since = now
