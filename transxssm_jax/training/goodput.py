"""Goodput: the share of a run's wall time, over all its starts, that went into steps which count.

WORKDIR/goodput.json holds the seconds by cause:

- 'steps': in steps that count;
- 'lost': in steps that were taken again, because the run had not saved them or went back;
- 'start', 'compile', 'restore', 'save', 'input', 'evaluation', 'end': phases of the run (phases.py); saving in the
  background costs nothing, waiting for it does;
- 'waiting': between the end of a start and the next one, imports included. A start that was killed ends here with its last
  record.

Process 0 writes it with each record; so a run that is killed loses count of what came after its last record.
"""

import json
import logging
import math
import os
import pathlib
import time

from transxssm_jax.parallel import processes
from transxssm_jax.training.phases import NAMES, Phases

FILE = 'goodput.json'
CAUSES = ('steps', 'lost', *NAMES[1:], 'waiting')
_MOST_MARKS = 64  # the newest of the steps that the run may go back to

log = logging.getLogger(__name__)


class Goodput:
    """Adds this start of a run to those before.

    Args:
      workdir: of the run.
      phases: of this start.
      step: that this start goes on from.
    """

    def __init__(self, workdir: pathlib.Path, phases: Phases, step: int):
        self._path, self._phases, now = workdir / FILE, phases, time.time()
        self._before, self._marks, updated, self.starts = self._read(now)
        self._before['waiting'] += max(0.0, now - sum(phases.seconds().values()) - updated)
        self.starts += 1
        self.went_back(step)

    def mark(self, step: int) -> None:
        """The run may go back to this step: what its steps have taken until here is remembered."""
        self._marks[step] = self.seconds()['steps']
        for old in sorted(self._marks)[:-_MOST_MARKS]:
            del self._marks[old]

    def went_back(self, step: int) -> None:
        """The steps after this one are to be taken again, so that what they took is lost."""
        steps = self.seconds()['steps']
        lost = max(0.0, steps - self._marks.get(step, steps if step else 0.0))
        self._before['steps'] -= lost
        self._before['lost'] += lost
        self._marks = {at: seconds for at, seconds in self._marks.items() if at <= step}

    def seconds(self) -> dict[str, float]:
        """Wall time by cause, over all starts."""
        own = self._phases.seconds()
        return {name: self._before[name] + own.get(name, 0.0) for name in CAUSES}

    def record(self) -> dict[str, float]:
        """'goodput', a share, and 'time/CAUSE' in seconds, for a record of the metrics; writes the file."""
        seconds = self.seconds()
        self.write(seconds)
        total = max(sum(seconds.values()), 1e-9)
        return {'goodput': seconds['steps'] / total} | {f'time/{name}': value for name, value in seconds.items()}

    def write(self, seconds: dict[str, float] | None = None) -> None:
        """Writes the file. An error of it is no reason to end a run, and is logged once."""
        if not processes.is_coordinator():
            return
        marks = {str(step): round(value, 3) for step, value in self._marks.items()}
        seconds = {name: round(value, 3) for name, value in (seconds or self.seconds()).items()}
        content = {'seconds': seconds, 'marks': marks, 'updated': time.time(), 'starts': self.starts}
        partial = self._path.with_name(f'.{self._path.name}.tmp')
        try:
            partial.write_text(json.dumps(content) + '\n')  # not synced: a power cut may cost the count
            os.replace(partial, self._path)
        except OSError as error:
            log.warning('%s cannot be written (%s): goodput will not be known', self._path, error.strerror or error)
            self.write = lambda seconds=None: None

    def describe(self) -> str:
        """One line: the share, and what the rest went into."""
        seconds = self.seconds()
        total = max(sum(seconds.values()), 1e-9)
        rest = sorted(((value, name) for name, value in seconds.items() if name != 'steps'), reverse=True)
        causes = ', '.join(f'{name} {value / total:.1%}' for value, name in rest if value / total >= 0.0005)
        starts = f' in {self.starts} starts' if self.starts > 1 else ''
        return f'goodput {seconds["steps"] / total:.1%} of {total:,.0f} s{starts}' + (f': {causes}' if causes else '')

    def _read(self, now: float) -> tuple[dict[str, float], dict[int, float], float, int]:
        """(seconds by cause, seconds of the steps until each mark, time of the last record, starts) of the starts before."""
        fresh = dict.fromkeys(CAUSES, 0.0), {}, now, 0
        try:
            content = json.loads(self._path.read_bytes())
            before = {name: _seconds(content['seconds'][name]) for name in CAUSES}
            marks = {int(step): _seconds(value) for step, value in content['marks'].items()}
            return before, marks, _seconds(content['updated']), int(content['starts'])
        except FileNotFoundError:
            return fresh
        except Exception as error:  # it is no JSON, or not that of `write`
            log.warning('%s cannot be read (%s); goodput counts from here', self._path, type(error).__name__)
            return fresh


def _seconds(value) -> float:
    value = float(value)
    if not (math.isfinite(value) and 0 <= value < 1e12):
        raise ValueError(f'{value} is no number of seconds')
    return value
