"""Runs the trials of a sweep where it can wait for them: starts, follows, prunes, tries again, and keeps what became of each."""

import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable

from transxssm_jax import cli
from transxssm_jax.cli import ExitCode
from transxssm_jax.config_sweep import Search, SweepError
from transxssm_jax.evals.experiment import STOPS
from transxssm_jax.evals.sweep_places import Place, Started
from transxssm_jax.evals.sweep_study import Study
from transxssm_jax.evals.sweep_trials import DONE, FAILED, PRUNED, RUNNING, WAITING, Fate, State, Trial

# Exit codes that the same trial would end with again: they are not tried again.
FOREVER = (ExitCode.WRONG_INPUT, ExitCode.NOT_FINITE)
LOG = 'log.txt'  # of a trial, in its directory


class Sweep:
    """The trials of a sweep under way.

    Args:
      state: trials, and what became of them in earlier calls; a search adds its own.
      place: where trainings run.
      metric: name in metrics.jsonl.
      retries: how often a trial that fails is tried again.
      study: of Optuna; None: nothing is pruned.
      search: that the study chooses trials from; None: the trials are those of the state.
      make: (overrides, number) -> trial, its config checked; for a search.
      interval: seconds between two looks.
    """

    def __init__(
        self,
        state: State,
        place: Place,
        *,
        metric: str,
        retries: int = 1,
        study: Study | None = None,
        search: Search | None = None,
        make: Callable[[dict, int], Trial] | None = None,
        interval: float = 1.0,
        show: 'Table | None' = None,
    ):
        self._state, self._place, self._metric, self._retries = state, place, metric, retries
        self._study, self._search, self._make, self._interval = study, search, make, interval
        self._show = show or Table()
        self._running: dict[int, tuple[Started, int]] = {}  # index of a trial -> (training, its slot)
        self._followers: dict[int, Follower] = {}
        self._failures: dict[int, int] = {}  # of this call
        self._hopeless: set[int] = set()
        self._stop_code = 0
        self._signals = self._passed_on = 0  # how many came, and how many of them the trainings have got
        for fate in state.fates:  # of a call that was killed: the study thinks that they run
            if fate.status == WAITING and fate.study_number >= 0:
                self._tell(fate, None)
                fate.study_number = -1

    def run(self) -> int:
        """Runs all that is to be run. Returns 0, or the exit code of the signal that stopped it, all trials having saved.

        Whatever it raises, no training goes on without it: each is told to stop, saves, and waits for the next call.
        """
        handlers = {number: signal.signal(number, self._on_signal) for number in STOPS}
        try:
            while (self._start_what_can() and not self._stop_code) or self._running:
                time.sleep(self._interval)
                self._pass_signals_on()
                self._look()
                self._show.draw(self._state, self._followers, self._metric)
            self._state.save()
            self._show.draw(self._state, self._followers, self._metric)
        except BaseException:
            self._stop_all()
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self._stop_code

    def _on_signal(self, number, frame) -> None:
        del frame
        # No more here: it may come while a line is printed, or before a training that is being started is among the others.
        self._signals += 1
        self._stop_code = ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.TERMINATED

    def _pass_signals_on(self) -> None:
        if self._passed_on == self._signals:
            return
        if not self._passed_on:
            self._show.line(f'stopping: {len(self._running)} trials save')
        self._passed_on = self._signals
        for started, _ in self._running.values():
            started.stop()

    def _stop_all(self) -> None:
        """Stops what runs and waits for it; for an error of the sweep's own."""
        self._passed_on = -1  # so that all are told once, and again by every signal that comes meanwhile
        while any(started.exit_code() is None for started, _ in self._running.values()):
            if self._passed_on != self._signals:
                self._passed_on = self._signals
                for started, _ in self._running.values():
                    started.stop()
            time.sleep(self._interval)
        for fate in self._state.fates:
            if fate.status == RUNNING:
                fate.status = WAITING
        self._running.clear()
        self._state.save()

    def _start_what_can(self) -> bool:
        """Starts trials in the free slots; whether there is, or may be, anything left to do."""
        free = sorted(set(range(self._place.slots)) - {slot for _, slot in self._running.values()})
        while free and not self._stop_code:
            index = self._next()
            if index is None:
                break
            trial, fate = self._state.trials[index], self._state.fates[index]
            trial.workdir.mkdir(parents=True, exist_ok=True)
            if self._study and (self._search is None or fate.study_number < 0):
                given = trial.number if self._search is None else trial.varied
                fate.study_number, _ = self._study.next(given)
            fate.status, fate.starts = RUNNING, fate.starts + 1
            self._followers[index] = Follower(trial.workdir / 'metrics.jsonl')
            slot = free.pop(0)
            self._running[index] = self._place.start(slot, trial.command(), trial.workdir / LOG), slot
            self._show.line(f'{trial.name}: started')
            self._state.save()
        return bool(self._running) or self._next_exists()

    def _next(self) -> int | None:
        """Index of the next trial to start; a search makes one where none waits."""
        waiting = [i for i, fate in enumerate(self._state.fates) if fate.status == WAITING]
        if waiting:
            return waiting[0]
        while self._can_choose():
            if (index := self._chosen()) is not None:
                return index
        return None

    def _can_choose(self) -> bool:
        return self._search is not None and len(self._state.trials) + self._study.passed_over < self._search.trials

    def _next_exists(self) -> bool:
        return self._can_choose() or any(fate.status == WAITING for fate in self._state.fates)

    def _chosen(self) -> int | None:
        """Adds a trial that the study chooses; None, and it counts as one of the search, where it cannot be trained."""
        number = len(self._state.trials)
        at = number + self._study.passed_over
        study_number, varied = self._study.next(self._search.first[at] if at < len(self._search.first) else None)
        twin = next((i for i, trial in enumerate(self._state.trials) if trial.varied == varied), None)
        if twin is not None:
            # Rounded to the same numbers, or the same choices again: it would be the same training.
            is_done = self._state.fates[twin].status == DONE
            self._study.pass_over(study_number, self._value(twin) if is_done else None)
            return None
        try:
            self._state.add(self._make(varied, number), Fate(study_number=study_number))
        except SweepError as error:  # settings of the space that do not go together
            self._show.line(f'not trained: {error}')
            self._study.pass_over(study_number, None)
            return None
        return number

    def _look(self) -> None:
        for index, (started, _) in list(self._running.items()):
            fate, follower = self._state.fates[index], self._followers[index]
            values = follower.read(self._metric)
            if self._study and values and index not in self._hopeless and not self._stop_code:
                is_over = follower.step >= self._state.trials[index].config.train.steps
                if self._study.is_hopeless(fate.study_number, values) and not is_over:
                    self._hopeless.add(index)
                    started.stop()
            if (code := started.exit_code()) is not None:
                del self._running[index]
                self._ended(index, code)
                self._state.save()

    def _ended(self, index: int, code: int) -> None:
        trial, fate = self._state.trials[index], self._state.fates[index]
        value = self._value(index)
        if code == 0:
            fate.status, fate.reason = DONE, ''
            reached = 'without' if value is None else f'{value:.5g}'
            self._show.line(f'{trial.name}: finished, {self._metric} {reached}')
            self._tell(fate, value)
        elif self._stop_code:
            fate.status = WAITING  # it goes on with the next call
            self._tell(fate, None)
            fate.study_number = -1
        elif index in self._hopeless:
            follower = self._followers[index]
            fate.status, fate.reason = PRUNED, f'{self._metric} {follower.value:.5g} at step {follower.step}'
            self._show.line(f'{trial.name}: stopped early, {fate.reason}')
            self._tell(fate, None, pruned=True)
        else:
            failures = self._failures[index] = self._failures.get(index, 0) + 1
            fate.reason = f'exit code {code}: {last_line(trial.workdir / LOG)}'
            again = code not in FOREVER and failures <= self._retries
            fate.status = WAITING if again else FAILED
            self._show.line(f'{trial.name}: {fate.reason}' + (' (it is tried again)' if again else ''))
            self._tell(fate, None)
            if again:
                fate.study_number = -1

    def _value(self, index: int) -> float | None:
        records = self._state.trials[index].records()
        return records.last(self._metric) if records else None

    def _tell(self, fate: Fate, value: float | None, *, pruned: bool = False) -> None:
        if self._study:
            self._study.end(fate.study_number, value, pruned=pruned)


def last_line(path: pathlib.Path) -> str:
    """The last line that a training printed, at most 160 characters of it."""
    try:
        lines = path.read_text(errors='replace').splitlines()
    except OSError:
        return 'it printed nothing'
    return cli.shorten(next((line.strip() for line in reversed(lines) if line.strip()), 'it printed nothing'), 160)


class Follower:
    """Reads a metrics.jsonl as it grows; a training that goes on writes a new file.

    Attributes:
      step: of the newest record.
      loss: newest training loss; None before the first.
      value: newest value of the metric that was asked for; None before the first.
    """

    def __init__(self, path: pathlib.Path):
        self._path, self._file, self._position = path, 0, 0
        self._reported = -1
        self.step, self.loss, self.value = 0, None, None

    def read(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of the records that came since, none twice."""
        try:
            with open(self._path, 'rb') as file:
                found = os.fstat(file.fileno()).st_ino
                if found != self._file:
                    self._file, self._position = found, 0
                file.seek(self._position)
                whole = file.read().rpartition(b'\n')[0]
        except OSError:
            return []
        self._position += len(whole) + 1 if whole else 0
        values = []
        for line in whole.splitlines():
            try:
                record = json.loads(line)
                step = int(record['step'])
            except (ValueError, KeyError, TypeError, OverflowError):
                continue
            self.step, self.loss = max(self.step, step), record.get('loss', self.loss)
            if isinstance(value := record.get(metric), int | float) and step > self._reported:
                self._reported, self.value = step, float(value)
                values.append((step, self.value))
        return values


class Table:
    """The live table: redrawn in place on a terminal; elsewhere a line whenever something begins or ends."""

    def __init__(self, file=None, rows: int = 12):
        self._file, self._rows, self._drawn = file or sys.stdout, rows, 0
        self._is_live = self._file.isatty()

    def line(self, text: str) -> None:
        """A line that stays."""
        self._clear()
        print(text, file=self._file, flush=True)

    def draw(self, state: State, followers: dict[int, Follower], metric: str) -> None:
        """The trials under way, and how many are where."""
        if not self._is_live:
            return
        self._clear()
        lines = self.lines(state, followers, metric)
        width = os.get_terminal_size(self._file.fileno()).columns if hasattr(self._file, 'fileno') else 120
        self._file.write(''.join(line[: width - 1] + '\n' for line in lines))
        self._file.flush()
        self._drawn = len(lines)

    def lines(self, state: State, followers: dict[int, Follower], metric: str) -> list[str]:
        running = [i for i, fate in enumerate(state.fates) if fate.status == RUNNING]
        found = []
        for i in running[: self._rows]:
            trial, follower = state.trials[i], followers[i]
            steps = trial.config.train.steps
            done = round(20 * follower.step / steps)
            values = {'loss': follower.loss, metric: follower.value}
            shown = [f'{name} {value:.4g}' for name, value in values.items() if value is not None]
            found.append(f'  {"#" * done:.<20} {follower.step:>8,} of {steps:,}  {", ".join(shown):<32} {trial.name}')
        if len(running) > self._rows:
            found.append(f'  and {len(running) - self._rows} more')
        return [*found, counts(state)]

    def _clear(self) -> None:
        if self._drawn:
            self._file.write(f'\x1b[{self._drawn}A\x1b[J')
        self._drawn = 0


def counts(state: State) -> str:
    """'3 finished, 1 running, 4 waiting'."""
    of = {
        status: sum(fate.status == status for fate in state.fates)
        for status in (DONE, RUNNING, WAITING, PRUNED, FAILED)
    }
    return ', '.join(
        f'{count} {"stopped early" if status == PRUNED else status}' for status, count in of.items() if count
    )
