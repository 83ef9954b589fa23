"""Several runs beside each other: which charts there are, a table, and one page that needs nothing else."""

import html
import math
import statistics
from collections.abc import Callable, Sequence

from transxssm_jax import cli
from transxssm_jax.evals import charts
from transxssm_jax.evals.charts import Chart, Curve
from transxssm_jax.evals.run_evaluations import table_of
from transxssm_jax.evals.run_records import RunRecords, common_metrics, differing_settings, repeats

# (file, title, metric, axis); what not all runs have is left out.
CHARTS = [
    ('loss_by_tokens', 'Training loss by tokens', 'loss', 'tokens'),
    ('loss_by_time', 'Training loss by time', 'loss', 'seconds'),
    ('tokens_per_second', 'Throughput', 'tokens_per_second', 'tokens'),
    ('mfu', 'Model FLOPs utilisation', 'mfu', 'tokens'),
    ('goodput', 'Share of the wall time in steps that count', 'goodput', 'tokens'),
    ('learning_rate', 'Learning rate', 'learning_rate', 'tokens'),
    ('grad_norm', 'Gradient norm before clipping', 'grad_norm', 'tokens'),
    ('update_norm', 'Norm of the updates', 'update_norm', 'tokens'),
    ('param_norm', 'Norm of the parameters', 'param_norm', 'tokens'),
]
UNITS = {
    'loss': 'nats per token',
    'tokens_per_second': 'tokens/s',
    'seconds': 'seconds of training',
    'mfu': 'share of the peak',
}
FALLS = ('loss', 'norm', 'perplexity')  # metrics whose first values may lie beyond the frame


def charts_of(runs: Sequence[RunRecords]) -> list[Chart]:
    """A chart of each metric that every run has: repeats have one color, and lines of their own.

    Values that are not finite are left out, and so is a run that has no others.
    """
    common = common_metrics(runs)
    style = {}
    for color, group in enumerate(repeats(runs)):
        style |= {run.name: (color, dash) for dash, run in enumerate(group)}
    wanted = list(CHARTS)
    for metric in sorted(common):
        if metric.startswith('eval/') and metric.endswith('/loss'):
            split = metric.split('/')[1]
            wanted.append((f'eval_{split}_loss', f'Held-out loss ({split}) by tokens', metric, 'tokens'))
    found = []
    for file, title, metric, x in wanted:
        if metric not in common:
            continue
        series = {run.name: run.series(metric, x) for run in runs}
        finite = {name: [point for point in points if math.isfinite(point[1])] for name, points in series.items()}
        curves = [Curve(name, points, *style[name]) for name, points in finite.items() if points]
        if curves and all(series.values()):
            skips = any(word in metric for word in FALLS)
            unit = UNITS['loss'] if metric.endswith('/loss') else UNITS.get(metric, metric)
            found.append(Chart(file.replace(' ', '_'), title, UNITS.get(x, x), unit, curves, skips))
    return found


# ---- table -------------------------------------------------------------------

_EVALUATED = 'held-out perplexity'
# (heading, value of a run, how it is shown); a column that no run has is left out.
COLUMNS: list[tuple[str, Callable[[RunRecords], float | None], str]] = [
    ('tokens', lambda run: run.training[-1].get('tokens') if run.training else None, ',.0f'),
    ('loss', lambda run: run.last('loss'), '.4f'),
    ('held-out loss', lambda run: run.last('eval_loss'), '.4f'),
    (_EVALUATED, lambda run: run.last('eval_perplexity'), '.3f'),
    ('bits/byte', lambda run: run.last('eval_bits_per_byte'), '.4f'),
    ('tokens/s', lambda run: run.usual('tokens_per_second'), ',.0f'),
    ('steps/s', lambda run: 1 / run.usual('step_seconds') if run.usual('step_seconds') else None, '.3g'),
    ('MFU', lambda run: run.usual('mfu'), '.1%'),
    ('goodput', lambda run: run.last('goodput'), '.1%'),
    ('hours', lambda run: run.training[-1].get('seconds', 0) / 3600 if run.training else None, '.2f'),
]


def rows_of(runs: Sequence[RunRecords]) -> tuple[list[str], list[list[str]]]:
    """(headings, one row per run) of what was reached; unfinished runs are marked."""
    columns = [column for column in COLUMNS if any(column[1](run) is not None for run in runs)]
    rows = []
    for run in runs:
        values = [(value(run), form) for _, value, form in columns]
        name = run.name if run.is_finished else f'{run.name} (unfinished)'
        rows.append([name, *('-' if value is None else format(value, form) for value, form in values)])
    return ['run', *(name for name, *_ in columns)], rows


def settings_of(runs: Sequence[RunRecords]) -> tuple[list[str], list[list[str]]]:
    """(headings, one row per setting in which runs differ)."""
    found = differing_settings(runs)
    return ['setting', *(run.name for run in runs)], [
        [name, *(cli.shorten(str(value), 60) or "''" for value in values)] for name, values in found.items()
    ]


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; numbers are set to the right."""
    lines = [headings, ['---', *['---:'] * (len(headings) - 1)], *rows]
    return '\n'.join('| ' + ' | '.join(cell.replace('|', '\\|') for cell in line) + ' |' for line in lines)


def spread(values: Sequence[float], form: str) -> str:
    """Mean of repeats and, of two or more, half their range: '8.18 +- 0.02'."""
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f'{mean} ± {format((max(values) - min(values)) / 2, form)}'


# ---- page --------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --soft: #57606a; --grid: #d8dee4;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b8568f; --c4: #9a7209; --c5: #2b8cc4; --c6: #6b4fc0; --c7: #6e6e6e; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e6e9ec; --soft: #9aa4ad; --grid: #343b42;
  --c0: #4fb0ea; --c1: #f5863a; --c2: #2fc596; --c3: #e79cc6; --c4: #e0b445; --c5: #8fd0f5; --c6: #b3a0f2; --c7: #b0b0b0; } }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } p { color: var(--soft); overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 12px; }
svg .title { fill: var(--ink); font-size: 14px; font-weight: 600; }
.grid { stroke: var(--grid); stroke-width: 1; } .curve { fill: none; stroke-width: 1.8; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--grid); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; }
@media (max-width: 36rem) { svg text { font-size: 17px; } svg .title { font-size: 19px; } }  /* charts are half as large */
li svg { width: 2.2rem; height: .7rem; margin-right: .4rem; }
"""


def page(
    title: str,
    runs: Sequence[RunRecords],
    drawn: Sequence[Chart],
    note: str = '',
    table: tuple[list[str], list[list[str]]] | None = None,
    more: Sequence[Chart] = (),
) -> str:
    """One HTML file with the table, the charts and the settings that differ; it loads nothing.

    Args:
      drawn: curves of the runs, which share one legend.
      table: (headings, rows) in place of `rows_of(runs)`.
      more: charts to come first.
    """
    headings, rows = table or rows_of(runs)
    names, settings = settings_of(runs)
    evaluations = table_of(runs)
    legend = []
    for curve in drawn[0].curves if drawn else []:
        dash = charts.DASHES[curve.dash % len(charts.DASHES)]
        line = f'<line x1="0" x2="36" y1="6" y2="6" class="curve" stroke="var(--c{curve.color % len(charts.COLORS)})"'
        line += f' stroke-dasharray="{dash}"/>' if dash else '/>'
        legend.append(f'<li><svg viewBox="0 0 36 12" aria-hidden="true">{line}</svg>{html.escape(curve.name)}</li>')
    return '\n'.join(
        [
            '<!doctype html>',
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>',
            f'<h1>{html.escape(title)}</h1>',
            f'<p>{html.escape(note)}</p>' if note else '',
            _table(headings, rows),
            *(['<h2>Settings and what was reached</h2>', _figures(more)] if more else []),
            '<h2>Curves</h2>',
            f'<ul>{"".join(legend)}</ul>',
            _figures(drawn),
            *(['<h2>Evaluations</h2>', _table(*evaluations)] if evaluations[1] else []),
            '<h2>What differs between the configs</h2>',
            _table(names, settings) if settings else '<p>Nothing.</p>',
            '</body></html>\n',
        ]
    )


def _figures(drawn: Sequence[Chart]) -> str:
    style = {True: 'margin:0;grid-column:1/-1', False: 'margin:0'}
    figures = ''.join(f'<figure style="{style[chart.is_wide]}">{charts.svg(chart)}</figure>\n' for chart in drawn)
    return f'<div class="charts">{figures}</div>'


def _table(headings: list[str], rows: list[list[str]]) -> str:
    head = ''.join(f'<th>{html.escape(cell)}</th>' for cell in headings)
    body = ''.join('<tr>' + ''.join(f'<td>{html.escape(cell)}</td>' for cell in row) + '</tr>' for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
