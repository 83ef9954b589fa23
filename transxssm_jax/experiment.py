"""Trains several models alike and compares them: the paper's tables.

    python -m transxssm_jax.experiment --configs=configs/paper/encodings --workdir=runs/encodings --data=PREPARED
        [--steps=2000] [--seeds=0,1] [--only=MODEL,MODEL] [--evaluate='perplexity --lengths=1x'] [--config.a.b=VALUE]

Every file of --configs is a model; it is trained once for each seed, in WORKDIR/MODEL/seed-SEED. The same command goes on
where it stood: finished runs are not trained again, and a run that was stopped continues from its last checkpoint. --only
trains some of the models, on another machine of a shared directory perhaps; the table has all of them. --evaluate, which may
be given again, runs an evaluation of every finished run: perplexity, needle or harness, with its flags.

Prints the table, and writes it to WORKDIR with the curves: table.md, results.json, report.html and PNGs. They are written
anew after every run.

Exit codes: 0 all is trained; 75 stopped by a signal and 130 by Ctrl-C, after saving; otherwise that of the first training
that failed, the others having been trained.
"""

from transxssm_jax import cli

if __name__ == '__main__':
    cli.start('transxssm_jax.experiment')

import dataclasses
import json
import pathlib

import jax

from transxssm_jax import config as config_lib
from transxssm_jax import settings
from transxssm_jax.cli import ExitCode, Flag
from transxssm_jax.data.manifest import write_file
from transxssm_jax.evals import charts, experiment, run_report
from transxssm_jax.evals.experiment import Cell
from transxssm_jax.evals.run_records import RunError, check_comparable

# Models may differ in themselves and in how they are optimized; with several sizes also in their learning rate.
COMPARED = ('model', 'optimizer', 'train.eval_weights')

COMMAND = cli.Command(
    'transxssm_jax.experiment',
    __doc__,
    [
        Flag(
            'configs',
            cli.REQUIRED,
            'Directories of config files, or files, one per model.',
            example='configs/paper/encodings',
            is_list=True,
        ),
        Flag('workdir', cli.REQUIRED, 'Directory above those of the runs.', example='runs/a', is_path=True),
        Flag('data', '', 'Prepared directory; empty: data.path of the configs.', is_path=True),
        Flag('steps', 0, 'Steps of each run, warmup and cadences scaled alike; 0: those of the configs.', minimum=0),
        Flag('seeds', (0, 1), 'Seeds, of parameters and of the order of the data.', minimum=0),
        Flag(
            'evaluate', (), "Evaluation of each run, e.g. 'perplexity --lengths=1x'; repeat.", kind=str, repeated=True
        ),
        Flag('only', (), 'Models to train, by the names of their files; empty: all.', kind=str),
    ],
    settings=config_lib.describe,
    takes_file=False,
)


def main(argv: list[str] | None = None) -> int:
    """The command; see the module's docstring. Returns its exit code."""
    return cli.run(COMMAND, _experiment, argv)


def _experiment(flags) -> int:
    # This process only counts parameters: an accelerator belongs to the trainings, which are processes of their own.
    jax.config.update('jax_platforms', 'cpu')
    files = _config_files(flags.configs)
    names = [file.stem for file in files]
    for name in flags.only:
        if name not in names:
            raise RunError(f'--only={name} is no file of --configs{cli.nearest(name, names)}')
    if len(set(flags.seeds)) < len(flags.seeds) or not flags.seeds:
        raise RunError(f'--seeds={",".join(map(str, flags.seeds))} must be one or more seeds, each once')
    for words in flags.evaluate:
        experiment.check_evaluation(words)
    overrides = dict(flags.overrides) | ({'data.path': flags.data} if flags.data else {})
    workdir = pathlib.Path(flags.workdir)
    cells = experiment.make_cells(files, workdir, flags.seeds, flags.steps, overrides)
    for cell in cells:
        if not cell.config.data.path:
            raise RunError('--data=DIR is missing; prepare data with python -m transxssm_jax.data.prepare')
        cell.check()
    wanted = [cell for cell in cells if not flags.only or cell.name in flags.only]
    workdir.mkdir(parents=True, exist_ok=True)
    failed = 0
    for number, cell in enumerate(wanted, start=1):
        steps = f'{cell.config.train.steps:,} steps of {cell.config.tokens_per_step:,} tokens'
        print(f'--- {number} of {len(wanted)}: {cell.name}, seed {cell.seed}, {steps}', flush=True)
        cell.workdir.mkdir(parents=True, exist_ok=True)
        commands = [] if cell.is_finished() else [cell.command()]
        commands += filter(None, (cell.evaluation(words) for words in flags.evaluate))
        if not commands:
            print('finished before', flush=True)
        for command in commands:
            code = experiment.run(command)
            if code in (ExitCode.TERMINATED, ExitCode.INTERRUPTED):
                print('stopped; the same command goes on from there', flush=True)
                return code
            if code:
                print(f'{cell.name}, seed {cell.seed}: exit code {code}; the others go on all the same', flush=True)
                failed = failed or (code if code > 0 else ExitCode.CRASHED)
                break
        if commands:
            write_results(workdir, cells, flags.argv)
    print(write_results(workdir, cells, flags.argv))
    print(f'written to {workdir}: table.md, results.json, report.html and PNGs')
    return failed


def _config_files(given: tuple[str, ...]) -> list[pathlib.Path]:
    files = []
    for name in given:
        path = settings.find_file(name, '--configs') if name else pathlib.Path()
        found = sorted(path.glob('*.py')) if path.is_dir() else [path]
        if not found or not all(file.is_file() for file in found):
            raise RunError(f'--configs={name} has no config files')
        files += found
    stems = [file.stem for file in files]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice:
        raise RunError(f'--configs has two files {twice}.py; a name is one model')
    return files


def write_results(workdir: pathlib.Path, cells: list[Cell], argv) -> str:
    """Writes what is known of the cells so far; returns the table.

    Raises:
      RunError: the runs cannot be compared; nothing is written.
    """
    runs = [records for cell in cells if (records := cell.records()) is not None and records.training]
    if runs:
        check_comparable(runs, COMPARED)
    results = experiment.results_of(cells)
    table = experiment.table(results)
    record = {
        'command': ['python', '-m', COMMAND.module, *argv],
        'results': [dataclasses.asdict(result) for result in results],
        'configs': {cell.name: json.loads(config_lib.to_json(cell.config)) for cell in cells},
    }
    write_file(workdir / 'results.json', (json.dumps(record, indent=1) + '\n').encode())
    write_file(workdir / 'table.md', f'{table}\n'.encode())
    if not runs:
        return table
    drawn = run_report.charts_of(runs)
    write_file(workdir / 'report.html', run_report.page(workdir.name, runs, drawn).encode())
    charts.write_pngs(workdir, drawn)
    return table
