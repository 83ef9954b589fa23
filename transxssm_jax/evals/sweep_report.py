"""What a sweep found: a table sorted by the metric, the best trial's command, charts, JSON and CSV."""

import csv
import io
import json
import math
import shlex
from collections.abc import Sequence

from transxssm_jax.data.manifest import write_file
from transxssm_jax.evals import charts, run_report
from transxssm_jax.evals.charts import Chart, Curve
from transxssm_jax.evals.run_records import RunRecords
from transxssm_jax.evals.sweep_trials import DONE, PRUNED, Fate, State, Trial

BEST, OTHER = 0, 7  # colors
LOG_RATIO = 10.0  # of the largest to the least value of a setting, from which its axis is logarithmic


class Results:
    """The trials of a sweep with the metric that each reached, the best first.

    Args:
      state: trials and fates.
      metric: name in metrics.jsonl; its last value counts.
      goal: 'min' or 'max'.
    """

    def __init__(self, state: State, metric: str, goal: str):
        self.state, self.metric, self.goal = state, metric, goal
        found = []
        for trial, fate in zip(state.trials, state.fates, strict=True):
            records = trial.records()
            value = records.last(metric) if records else None
            found.append((trial, fate, records, value))
        self._loss = ['loss'] if metric != 'loss' else []  # a column of its own
        self.rows = sorted(found, key=self._rank)
        self.varied = list(dict.fromkeys(name for trial in state.trials for name in trial.varied))

    def _rank(self, row):
        trial, fate, _, value = row
        order = {DONE: 0, PRUNED: 1}.get(fate.status, 2)
        missing = value is None or not math.isfinite(value)
        return order, missing, 0.0 if missing else value if self.goal == 'min' else -value, trial.number

    @property
    def best(self) -> Trial | None:
        """The finished trial with the best value; None before there is one."""
        trial, fate, _, value = self.rows[0] if self.rows else (None, Fate(), None, None)
        return trial if fate.status == DONE and value is not None and math.isfinite(value) else None

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(headings, a row per trial): number, the varied settings, the metric, the loss, the status and why."""
        headings = [
            'trial',
            *(name.partition('.')[2] or name for name in self.varied),
            self.metric,
            *self._loss,
            'step',
            'status',
        ]
        rows = []
        for trial, fate, records, value in self.rows:
            settings = ['' if (given := trial.varied.get(name)) is None else _shown(given) for name in self.varied]
            step = f'{records.training[-1]["step"]:,}' if records and records.training else '-'
            status = fate.status if fate.status != PRUNED else 'stopped early'
            rows.append(
                [str(trial.number), *settings, _number(value)]
                + [_number(records.last(name) if records else None) for name in self._loss]
                + [step]
                + [f'{status}: {fate.reason}' if fate.reason and fate.status not in (DONE, PRUNED) else status]
            )
        return headings, rows

    def records(self) -> list[dict]:
        """A plain dict per trial, the best first; a number that is not finite, which JSON has not, is None."""
        return [
            {
                'trial': trial.number,
                'name': trial.name,
                'workdir': str(trial.workdir),
                **{name: trial.varied.get(name) for name in self.varied},
                self.metric: _finite(value),
                'loss': _finite(records.last('loss') if records else None),
                'step': records.training[-1]['step'] if records and records.training else 0,
                'status': fate.status,
                'starts': fate.starts,
                'reason': fate.reason,
            }
            for trial, fate, records, value in self.rows
        ]

    def write(self, command: Sequence[str]) -> None:
        """Writes table.md, results.json, results.csv, report.html and the charts as PNG into the directory of the sweep."""
        directory, records = self.state.directory, self.records()
        best = best_command(self.best) if self.best else ''
        content = {'command': list(command), 'metric': self.metric, 'goal': self.goal, 'best': best, 'trials': records}
        table = run_report.markdown(*self.table())
        text = io.StringIO()
        writer = csv.DictWriter(text, list(records[0]) if records else ['trial'])
        writer.writeheader()
        writer.writerows(records)
        for name, whole in (
            ('table.md', f'{table}\n'),
            ('results.json', json.dumps(content, indent=1) + '\n'),
            ('results.csv', text.getvalue()),
        ):
            write_file(directory / name, whole.encode())
        runs = [run for _, _, run, _ in self.rows if run is not None and run.training]
        if not runs:
            return
        drawn, found = run_report.charts_of(runs), [*self.slices(), *self.parallel()]
        note = f'The best trial: {best}' if best else ''
        page = run_report.page(directory.name, runs, drawn, note, self.table(), found)
        write_file(directory / 'report.html', page.encode())
        charts.write_pngs(directory, [*found, *drawn])

    # ---- charts ----------------------------------------------------------------

    def _reached(self) -> list[tuple[Trial, Fate, RunRecords, float]]:
        return [row for row in self.rows if row[3] is not None and math.isfinite(row[3])]

    def _settings(self) -> list[str]:
        """Varied settings that have several values."""
        rows = self._reached()
        return [name for name in self.varied if len({repr(trial.varied.get(name)) for trial, *_ in rows}) > 1]

    def slices(self) -> list[Chart]:
        """The metric by each varied setting, a dot per trial; those that were stopped early are grey."""
        rows, found = self._reached(), []
        for name in self._settings():
            place, ticks = _axis([trial.varied.get(name) for trial, *_ in rows])
            curves = [
                Curve(trial.name, [(place(trial.varied.get(name)), value)], BEST if fate.status == DONE else OTHER)
                for trial, fate, _, value in rows
            ]
            title = f'{self.metric} by {name}'
            found.append(Chart(f'slice_{name}', title, name, self.metric, curves, dots=True, x_ticks=ticks))
        return found

    def parallel(self) -> list[Chart]:
        """Parallel coordinates: an axis per setting and one for the metric, a line per trial, the best quarter in color."""
        rows, names = self._reached(), self._settings()
        if len(names) < 2 or len(rows) < 2:
            return []
        columns, labels = [], []
        for name, values in (
            *((name, [trial.varied.get(name) for trial, *_ in rows]) for name in names),
            (self.metric, [value for *_, value in rows]),
        ):
            place, ticks = _axis(values)
            at = [place(value) for value in values]
            low, high = min(at), max(at)
            columns.append([(x - low) / (high - low) if high > low else 0.5 for x in at])
            short = name.rpartition('.')[2]
            ends = (
                (charts.label(min(values)), charts.label(max(values)))
                if _are_numbers(values)
                else (ticks[0][1], ticks[-1][1])
            )
            labels.append(f'{short}\n{ends[0]} to {ends[1]}')
        best = max(1, len(rows) // 4)
        curves = [
            Curve(row[0].name, [(axis, column[i]) for axis, column in enumerate(columns)], BEST if i < best else OTHER)
            for i, row in reversed(list(enumerate(rows)))  # the best are drawn last, above the others
        ]
        x_ticks = tuple(enumerate(labels))
        title = 'Settings of the trials and what they reached, the best quarter in color'
        return [Chart('parallel_coordinates', title, '', '', curves, x_ticks=x_ticks, is_wide=True)]


def best_command(trial: Trial) -> str:
    """The command that trains a trial, or goes on with it, to paste."""
    return shlex.join(['python', '-m', 'transxssm_jax.train', *trial.arguments()])


def _are_numbers(values: Sequence) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _axis(values: Sequence):
    """(value -> place on an axis, its ticks): logarithmic for numbers of many sizes; words stand one beside another."""
    if not _are_numbers(values):
        words = sorted({str(value) for value in values})
        return lambda value: float(words.index(str(value))), tuple(enumerate(words))
    low, high = min(values), max(values)
    is_log = low > 0 and high > LOG_RATIO * low
    place = math.log10 if is_log else float
    distinct = sorted(set(values))
    if len(distinct) <= 6:
        shown = distinct
    elif is_log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        few = high / low < 300
        shown = [f * 10.0**d for d in decades for f in ((1, 2, 5) if few else (1,)) if low <= f * 10.0**d <= high]
    else:
        shown = charts.ticks(low, high)
    return place, tuple((place(number), charts.label(number)) for number in shown)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _number(value: float | None) -> str:
    return '-' if value is None else f'{value:.5g}'


def _shown(value) -> str:
    return f'{value:g}' if isinstance(value, float) else str(value)
