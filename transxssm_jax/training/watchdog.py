"""Notices that a run does not get on: a step that takes far longer than the others, input that does not come, a slow host.

A thread looks at the run's phase (phases.py). Where a step, a batch that is waited for, or a batch of an evaluation takes
longer than train.watchdog_factor times the median step, and than train.watchdog_seconds, it warns: what the run waits for,
since when, and, on stderr, the stack of every thread of the process. With train.watchdog_action='stop' it also ends the run:

- Input that does not come is given up: what was trained is saved, and the run ends with exit code 75.
- A step that hangs, in a collective that another host does not enter, say, cannot be given up from within. Should it come
  back, the run saves and stops with exit code 75; should it not, within the same time again, the process ends with 69.

Both codes are those after which launchers start the same command again.
"""

import faulthandler
import json
import logging
import signal
import statistics
import sys
import threading
import time

import jax

from transxssm_jax.cli import ExitCode
from transxssm_jax.config import Config
from transxssm_jax.data.manifest import DataError
from transxssm_jax.parallel import processes
from transxssm_jax.training.phases import Phases

# What each phase that is watched waits for. The others take as long as they take.
WATCHED = {
    'steps': 'the devices to finish step {next}, or a collective of it that another process has not entered',
    'input': 'the loader to give the batch of step {next}',
    'evaluation': 'a batch of the evaluation after step {step}',
}
WITHOUT_MEDIAN = 10  # times train.watchdog_seconds is the limit while there are too few steps for a median
_INTERRUPT = signal.SIGURG  # ignored by default, so that one that comes late does no harm

log = logging.getLogger(__name__)


class StalledLoaderError(DataError):
    """The loader gave no batch for so long that the run was told to stop."""

    exit_code = ExitCode.TERMINATED


class Watchdog:
    """Watches the phases of a run from a thread, between `start` and `close`.

    Args:
      config: of the run.
      phases: are watched.
      request_stop: called with the exit code that the run should stop with after the step under way.
      end: called with (exit code, message) where the run cannot stop by itself.
    """

    def __init__(self, config: Config, phases: Phases, request_stop, end=processes.end_all):
        self._train, self._phases, self._request_stop, self._end = config.train, phases, request_stop, end
        self._workers = config.data.num_workers
        self._warned = -1.0  # phases.since of the stall that was warned of last
        self._message, self._closed, self._before = '', threading.Event(), None
        self.has_interrupted = False  # the loader, whose threads may never end

    def start(self) -> None:
        """Starts the thread. To be called in the main thread, which is the one that is interrupted."""
        if not self._train.watchdog_factor:
            return
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(_INTERRUPT, self._give_up_input)
        threading.Thread(target=self._watch, name='watchdog', daemon=True).start()

    def close(self) -> None:
        """May be called again."""
        self._closed.set()
        if self._before is not None:
            signal.signal(_INTERRUPT, self._before)
            self._before = None

    def limit_seconds(self) -> float:
        """How long a piece of a watched phase may take."""
        usual, least = self._phases.usual_step_seconds(), self._train.watchdog_seconds
        return WITHOUT_MEDIAN * least if usual is None else max(least, self._train.watchdog_factor * usual)

    def look(self, now: float) -> None:
        """Acts on what is to be seen at a time of time.monotonic()."""
        name, since, step, limit = self._phases.name, self._phases.since, self._phases.step, self.limit_seconds()
        waited, stops = now - since, self._train.watchdog_action == 'stop'
        if name not in WATCHED or waited <= limit:
            return
        if since != self._warned:
            self._warned = since
            self._warn(name, step, waited)
            if stops:
                self._request_stop(ExitCode.TERMINATED)
                if name == 'input' and self._before is not None:
                    signal.pthread_kill(threading.main_thread().ident, _INTERRUPT)
        elif stops and waited > 2 * limit:
            self._closed.set()
            self._end(
                ExitCode.PEER_LOST,
                f'{self._message}; it did not come back, so that nothing more can be saved: start the same command again '
                'on every host, and training goes on from the last checkpoint',
            )

    def _warn(self, name: str, step: int, waited: float) -> None:
        usual = self._phases.usual_step_seconds()
        median = (
            f'a step takes {usual:.3g} s as a rule' if usual is not None else 'there were few steps to compare with'
        )
        what = WATCHED[name].format(step=step, next=step + 1)
        self._message = f'step {step + 1}: waiting for {what} for {waited:.1f} s; {median}'
        log.error('%s; the stacks of all threads follow%s', self._message, processes.process_label())
        sys.stderr.flush()
        faulthandler.dump_traceback(file=2, all_threads=True)  # sys.stderr may be no file

    def _watch(self) -> None:
        while not self._closed.wait(max(0.05, min(1.0, self.limit_seconds() / 4))):
            self.look(time.monotonic())

    def _give_up_input(self, number, frame) -> None:
        del number, frame
        if self._phases.name == 'input' and not self._closed.is_set():
            self.has_interrupted = True
            raise StalledLoaderError(
                f'{self._message}, and train.watchdog_action is stop (data.num_workers={self._workers}; look at the file '
                'system of the data)'
            )


class Pace:
    """Finds the host that the others wait for: each process tells how long it was busy by itself, not with its devices."""

    def __init__(self):
        self._named = -1

    def compare(self, own_seconds: float, window_seconds: float, steps: int) -> str:
        """To be called by all processes after a window of steps; none waits for another.

        Args:
          own_seconds: of the window, that this process spent on input and its own work while no step could begin.
          window_seconds: length of the window.
          steps: in it.

        Returns:
          a warning at process 0, where one process holds the others up for a third of the time; else ''.
        """
        if not processes.is_multiprocess():
            return ''
        key = f'{processes.KEY_ROOT}pace'
        value = json.dumps([round(own_seconds / max(steps, 1), 4), round(window_seconds / max(steps, 1), 4)])
        try:
            processes.client().key_value_set(f'{key}/{processes.process_index()}', value, allow_overwrite=True)
            if not processes.is_coordinator():
                return ''
            told = {int(k.rpartition('/')[2]): json.loads(v) for k, v in processes.client().key_value_dir_get(key)}
        except jax.errors.JaxRuntimeError:  # process 0 or the network is lost, which others notice
            return ''
        return self.slowest({process: own for process, (own, _) in told.items()}, window_seconds / max(steps, 1))

    def slowest(self, own: dict[int, float], step_seconds: float) -> str:
        """The warning; '' where all are alike, or it is the process that was named last.

        Args:
          own: seconds a step by process.
          step_seconds: of the window.
        """
        worst = max(own, key=own.get)
        others = [seconds for process, seconds in own.items() if process != worst]
        behind = own[worst] - statistics.median(others) if others else 0.0
        if behind <= step_seconds / 3:
            self._named = -1
            return ''
        if worst == self._named:
            return ''
        self._named = worst
        return (
            f'process {worst} keeps the others waiting: of a step of {step_seconds:.3g} s it spends {own[worst]:.3g} s on its '
            f'input and its own work, the others {statistics.median(others):.3g} s; look at its host'
        )
