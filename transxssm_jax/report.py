"""Several training runs beside each other: python -m transxssm_jax.report --output=DIR RUN RUN ...

RUN is a workdir of train. Writes to --output, a new directory, one page that loads nothing else (report.html), its charts as PNG
and its tables as Markdown (report.md): loss by tokens and by time, throughput, learning rate, norms, evaluations, and what
differs between the configs. Runs that differ in their seeds alone have one color.

Runs are refused whose configs differ in what is not compared: in --compared, by default the model, they may differ; in
seeds and in settings of speed they always may.
"""

from transxssm_jax import cli

if __name__ == '__main__':
    cli.start('transxssm_jax.report')

import pathlib

from transxssm_jax.cli import Flag
from transxssm_jax.evals import charts, run_report
from transxssm_jax.evals.run_evaluations import table_of
from transxssm_jax.evals.run_records import NotAlikeError, RunError, check_comparable, read_runs

COMMAND = cli.Command(
    'transxssm_jax.report',
    __doc__,
    [
        Flag('output', cli.REQUIRED, 'New directory.', example='DIR', is_path=True),
        Flag('compared', ('model',), 'Sections and settings in which the runs may differ.'),
        Flag('allow', False, 'Whether to compare runs that differ in other settings too.'),
        Flag('title', 'Training runs', 'Title of the page.'),
    ],
    arguments='RUN',
)


def main(argv: list[str] | None = None) -> int:
    """The command; see the module's docstring. Returns its exit code."""
    return cli.run(COMMAND, _report, argv)


def _report(flags) -> None:
    if not flags.arguments:
        raise RunError('no RUN is given, e.g. python -m transxssm_jax.report --output=report runs/a runs/b')
    output = pathlib.Path(flags.output)
    if output.exists():
        raise RunError(f'--output={output} exists; name a new directory')
    runs = read_runs(flags.arguments)
    note = ''
    try:
        check_comparable(runs, flags.compared)
    except NotAlikeError as error:
        if not flags.allow:
            raise
        note = f'Not alike: {error.difference}.'
    drawn = run_report.charts_of(runs)
    headings, rows = run_report.rows_of(runs)
    names, settings = run_report.settings_of(runs)
    evaluations = table_of(runs)
    tables = [f'# {flags.title}', run_report.markdown(headings, rows)]
    tables += ['## Evaluations', run_report.markdown(*evaluations)] if evaluations[1] else []
    tables.append('## What differs between the configs')
    tables.append(run_report.markdown(names, settings) if settings else 'Nothing.')
    output.mkdir(parents=True)
    (output / 'report.html').write_text(run_report.page(flags.title, runs, drawn, note))
    (output / 'report.md').write_text('\n\n'.join([tables[0], *([note] if note else []), *tables[1:]]) + '\n')
    charts.write_pngs(output, drawn)
    print(run_report.markdown(headings, rows))
    print(f'written to {output}: {", ".join(sorted(path.name for path in output.iterdir()))}')
