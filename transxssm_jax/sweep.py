"""Trains once for every trial of a sweep and compares them.

    python -m transxssm_jax.sweep --sweep=learning_rate --config=tiny --output=runs/rates --config.data.path=PREPARED

--sweep is a Python file whose get_sweep() returns a list of overrides (config_sweep.py: vary, product, zipped, chain, sample),
or a Search, whose trials Optuna chooses by what earlier ones reached; or the name of one that comes with this project.
Every trial has a directory below --output that is named by what differs. The config of every trial is checked, and with
--plan=TOPOLOGY compiled, before the first one starts. The same command goes on where it stood.

Where trials run: here, one for every --devices_per_trial GPUs; with --slurm as an array; with --gke as workloads of xpk; with
--ray on a Ray cluster. After --slurm and --gke the same command with --report collects what is finished.

At the end there are a table sorted by --metric, the best trial's command, and in --output table.md, results.json, results.csv,
report.html and PNGs: the metric by every setting, parallel coordinates, curves.

Exit codes: 0 all trials are finished or were stopped early; 1 some failed; 2 wrong input; 75 stopped by a signal and 130 by
Ctrl-C, all trials having saved.
"""

from transxssm_jax import cli

if __name__ == '__main__':
    cli.start('transxssm_jax.sweep')

import contextlib
import functools
import json
import os
import pathlib
import shlex
import signal
import sys

from transxssm_jax import children, config_sweep, settings
from transxssm_jax import config as config_lib
from transxssm_jax.cli import ExitCode, Flag
from transxssm_jax.config import ConfigError
from transxssm_jax.config_sweep import Search, SweepError
from transxssm_jax.evals import run_report, sweep_clusters, sweep_trials
from transxssm_jax.evals.sweep_places import Here, OnRay, visible_gpus
from transxssm_jax.evals.sweep_report import Results, best_command
from transxssm_jax.evals.sweep_run import Sweep, Table, counts
from transxssm_jax.evals.sweep_study import PRUNERS, Study
from transxssm_jax.evals.sweep_trials import DONE, FAILED, WAITING, State, Trial

DRAWN = 50  # trials of a search's space, of which one at least must be right before it starts

COMMAND = cli.Command(
    'transxssm_jax.sweep',
    __doc__,
    [
        Flag('sweep', cli.REQUIRED, 'Sweep file, or the name of one.', example='learning_rate', is_path=True),
        Flag('output', cli.REQUIRED, 'Directory above those of the trials.', example='runs/sweep', is_path=True),
        Flag('metric', 'eval_loss', 'What trials are compared by: a name in metrics.jsonl; its last value counts.'),
        Flag('goal', 'min', 'Whether the least value is the best, or the largest.', choices=('min', 'max')),
        Flag('pruner', 'none', "Optuna's pruner, which stops hopeless trials early.", choices=PRUNERS),
        Flag('retries', 1, 'How often a trial that fails is tried again.', minimum=0),
        Flag('devices_per_trial', 1, 'GPUs of a trial, here and on Ray.', minimum=1),
        Flag(
            'parallel', 0, 'Most trials at a time; 0: one per group of GPUs, and one where there are none.', minimum=0
        ),
        Flag(
            'plan',
            '',
            'Compile every trial for this topology first, as python -m transxssm_jax.plan does, e.g. v5e:16x16.',
        ),
        Flag(
            'slurm', '', "Submit a SLURM array, with these options of sbatch, e.g. '--time=4:00:00 --gpus-per-node=8'."
        ),
        Flag(
            'gke',
            '',
            "Submit workloads by launch/gke.sh, with these options, e.g. '--cluster=pod --tpu_type=v5litepod-8'.",
        ),
        Flag('ray', '', "Address of a Ray cluster; 'auto': the one that runs here; 'local': start one."),
        Flag('trial', -1, "Run this one trial of a sweep that has begun; a cluster's job does.", minimum=-1),
        Flag('report', False, 'Whether only to collect what is finished.'),
        Flag('dry_run', False, 'Whether only to check, and to print what would run.'),
    ],
    settings=config_lib.describe,
)


def main(argv: list[str] | None = None) -> int:
    """The command; see the module's docstring. Returns its exit code."""
    return cli.run(COMMAND, _sweep, argv)


def _sweep(flags) -> int:
    where = [name for name in ('slurm', 'gke', 'ray') if name in flags.given]
    if len(where) > 1:
        raise SweepError(f'--{where[0]} and --{where[1]} exclude each other')
    if not flags.config_file:
        raise ConfigError('--config=PATH is missing, e.g. --config=tiny')
    output = pathlib.Path(flags.output)
    if flags.trial >= 0:
        return _run_one(flags, output)
    sweep = config_sweep.load(flags.sweep)
    state, saved = _open(flags, output, sweep)
    search = sweep if isinstance(sweep, Search) else None
    queued = bool({'slurm', 'gke'} & set(where))
    if queued and (search or flags.pruner != 'none'):
        raise SweepError(
            f'--{where[0]} has a queue of its own, so that nothing can be learned from trials; use --ray, or run here'
        )
    _check(flags, state, search)
    sweep_trials.with_fates(state, saved, again=not flags.report)
    if flags.report:
        return _finish(flags, state)
    if search is not None:
        _check_space(state, search)
    if flags.dry_run:
        _show_plan(flags, state, search)
    if queued:
        return _queue(flags, state, saved, where[0])
    if flags.dry_run:
        return ExitCode.FINISHED
    return _run(flags, state, search, where)


def _open(flags, output: pathlib.Path, sweep: list | Search) -> tuple[State, dict | None]:
    """The trials of the sweep, all checked, without their fates; and what an earlier call has kept."""
    file = sweep_trials.relative(settings.find_file(flags.config_file))
    config_lib.load(str(file), flags.overrides)  # so that a fault of what is common is not a trial's
    kept = {'config': os.path.abspath(file), 'overrides': dict(flags.overrides)}
    saved = sweep_trials.read_state(output)
    sweep_trials.check_same_sweep(saved, kept, output)
    state = State(output, kept)
    begun = (saved or {}).get('trials', [])
    if isinstance(sweep, Search):
        varied, names = [record['varied'] for record in begun], [record['name'] for record in begun]
    else:
        varied, names = sweep, sweep_trials.names_of(sweep, begun)
    configs: dict[str, int] = {}
    for number, (one, name) in enumerate(zip(varied, names, strict=True)):
        trial = sweep_trials.make_trial(file, output, flags.overrides, one, number, name)
        state.add(trial)
        if (first := configs.setdefault(config_lib.to_json(trial.config), number)) != number:
            raise SweepError(f'trials {first} and {number} of the sweep are the same: {names[first]} and {name}')
    return state, saved


def _check_space(state: State, search: Search) -> None:
    """Raises SweepError where a trial of an earlier call that is still to be trained is none of this search."""
    for trial, fate in zip(state.trials, state.fates, strict=True):
        try:
            if fate.status == WAITING:
                search.parameters_of(trial.varied)
        except SweepError:
            raise SweepError(
                f'trial {trial.number} ({cli.shorten(trial.name, 80)}) of {state.directory} is not finished, and is not in '
                'the space of the sweep file any more; name another --output'
            ) from None


def _check(flags, state: State, search: Search | None) -> None:
    """Raises what can be known before the first trial: its data, its directory and, with --plan, what the compiler says."""
    trials = list(state.trials)
    if search is not None:
        make = _maker(flags, state)
        trials += [make(varied, number) for number, varied in enumerate(search.first)]
        trials.append(_one_of(search, make, len(trials)))
    for trial in trials:
        config = trial.config
        if flags.metric.startswith('eval') and not (config.train.eval_every_steps and config.data.eval_split_names):
            raise SweepError(
                f'trial {trial.number} ({trial.name}) is never evaluated, so that it has no {flags.metric}; '
                'set train.eval_every_steps and data.eval_splits, or give --metric=loss'
            )
        if not trial.config.data.tokenizer_path:
            raise SweepError('data.path is empty; give --config.data.path=DIR, which transxssm_jax.data.prepare wrote')
        trial.check()
        _check_mesh(trial, flags)
    from transxssm_jax.training import splits  # it imports jax

    _leave_accelerators()
    for config in {sweep_trials.data_settings(trial.config): trial.config for trial in trials}.values():
        splits.check_data(config)
    if flags.plan:
        _compile(flags, trials)


def _maker(flags, state: State):
    """(overrides, number) -> trial of this sweep, its config checked."""
    file = sweep_trials.relative(pathlib.Path(state.settings['config']))
    return functools.partial(sweep_trials.make_trial, file, state.directory, dict(flags.overrides))


def _one_of(search: Search, make, number: int) -> Trial:
    """A trial that the space may give, in place of those that are not chosen yet.

    Raises:
      SweepError: of many none can be trained; some may hold settings that do not go together, which the search passes over.
    """
    drawn = config_sweep.sample(search.space, DRAWN, search.seed)
    for varied in drawn:
        with contextlib.suppress(SweepError):
            return make(varied, number)
    return make(drawn[0], number)  # which raises


def _check_mesh(trial: Trial, flags) -> None:
    """Raises ConfigError where a trial's sizes do not divide by the GPUs that it would get here."""
    if visible_gpus() and not {'slurm', 'gke', 'ray'} & flags.given:
        from transxssm_jax.parallel import mesh  # it imports jax

        mesh.axis_sizes(trial.config, flags.devices_per_trial)


def _leave_accelerators() -> None:
    import jax

    jax.config.update('jax_platforms', 'cpu')  # they belong to the trials, which are processes of their own


def _compile(flags, trials: list[Trial]) -> None:
    """Runs transxssm_jax.plan for every trial whose step differs from those before."""
    done = set()
    for trial in trials:
        if (key := sweep_trials.step_settings(trial.config)) in done:
            continue
        done.add(key)
        print(f'plan for {flags.plan}: {trial.name}', flush=True)
        words = [f'--config={trial.file}', *(f'--config.{name}={value}' for name, value in trial.overrides.items())]
        command = [sys.executable, '-m', 'transxssm_jax.plan', *words, f'--topology={flags.plan}', '--json']
        result = children.run(command)
        if result.returncode == ExitCode.DOES_NOT_FIT:
            raise SweepError(f'trial {trial.number} ({trial.name}) does not fit {flags.plan}: {_why(result.stdout)}')
        if result.returncode:
            last = next((line for line in reversed(result.stderr.splitlines()) if line.strip()), '')
            raise SweepError(f'trial {trial.number} ({trial.name}): plan ended with {result.returncode}: {last}')


def _why(text: str) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        found = json.loads(text)
        return f'see python -m transxssm_jax.plan; {cli.shorten(json.dumps(found.get("nearest") or {}))}'
    return 'see python -m transxssm_jax.plan'


def _show_plan(flags, state: State, search: Search | None) -> None:
    if search is not None:
        print(
            f'{len(state.trials)} of at most {search.trials} trials are chosen; the next are chosen by {search.sampler}'
        )
    for trial, fate in zip(state.trials, state.fates, strict=True):
        print(f'{trial.number:4d}  {fate.status:<9} {trial.name}')
    waiting = [trial for trial, fate in zip(state.trials, state.fates, strict=True) if fate.status == WAITING]
    if waiting:
        print(f'a trial is trained by\n  {shlex.join(waiting[0].command())}')


# ---- running -------------------------------------------------------------------


def _run(flags, state: State, search: Search | None, where: list[str]) -> int:
    with _held(state.directory):
        return _run_held(flags, state, search, where)


@contextlib.contextmanager
def _held(directory: pathlib.Path):
    """Holds the directory while the block runs: two sweeps at a time would start the same trials.

    Raises:
      SweepError: another sweep runs there.
    """
    from transxssm_jax.training import lease  # it imports jax

    def lost(message):
        cli.print_error(message)
        os.kill(os.getpid(), signal.SIGTERM)  # all trials save

    try:
        held = lease.Lease(directory, on_lost=lost)
    except lease.LeaseError as error:
        raise SweepError(str(error).replace('--workdir', '--output').replace('another run', 'another sweep')) from None
    try:
        yield
    finally:
        held.release()


def _run_held(flags, state: State, search: Search | None, where: list[str]) -> int:
    study = None
    if search is not None or flags.pruner != 'none':
        study = Study(state.directory, search, flags.pruner, flags.goal, flags.metric)
    if where == ['ray']:
        place = OnRay(flags.ray or 'auto', flags.devices_per_trial, flags.parallel)
        stack = contextlib.closing(place)
    else:
        place, stack = Here(flags.devices_per_trial, flags.parallel), contextlib.nullcontext()
    total = search.trials if search else len(state.trials)
    print(
        f'{total} trials, {place.slots} at a time; {counts(state) or "none is chosen yet"}; results go to {state.directory}'
    )
    with stack:
        code = Sweep(
            state,
            place,
            metric=flags.metric,
            retries=flags.retries,
            study=study,
            search=search,
            make=_maker(flags, state),
            show=Table(),
        ).run()
    result = _finish(flags, state)
    if code:
        print('stopped; the same command goes on from there')
    return code or result


def _run_one(flags, output: pathlib.Path) -> int:
    """Becomes the training of one trial of a sweep that has begun."""
    saved = sweep_trials.read_state(output)
    records = (saved or {}).get('trials', [])
    if flags.trial >= len(records):
        raise SweepError(f'--trial={flags.trial}: {output} holds {len(records)} trials')
    record, kept = records[flags.trial], saved['settings']
    trial = sweep_trials.make_trial(
        pathlib.Path(kept['config']), output, kept['overrides'], record['varied'], flags.trial, record['name']
    )
    sys.stdout.flush()
    os.execv(sys.executable, trial.command())  # a signal comes to the training itself


def _queue(flags, state: State, saved: dict | None, kind: str) -> int:
    """Hands the trials that are not finished to SLURM or GKE.

    Raises:
      SweepError: elements of an array that still wait would take other trials, because the sweep file has changed.
    """
    if kind == 'slurm':
        names = [trial.name for trial in state.trials]
        for number, record in enumerate((saved or {}).get('trials', [])):
            if names[number : number + 1] != [record['name']]:
                raise SweepError(
                    f'trial {number} was {cli.shorten(record["name"], 80)} before, and a job that waits takes its trial by this '
                    'number; add trials at the end of the sweep, or name another --output'
                )
    trials = [t for t, fate in zip(state.trials, state.fates, strict=True) if fate.status != DONE]
    if not trials:
        return _finish(flags, state)
    if not flags.dry_run:
        state.save()  # from which a job takes its trial
    if kind == 'slurm':
        words = [f'--sweep={flags.sweep}', f'--config={flags.config_file}', f'--output={flags.output}']
        command = [sys.executable, '-m', 'transxssm_jax.sweep', *words]
        submit, job = sweep_clusters.slurm_job(
            trials, state.directory, flags.slurm, command, flags.parallel, flags.retries
        )
        calls = [(submit, job)]
    else:
        calls = [(command, '') for command in sweep_clusters.gke_commands(trials, state.directory, flags.gke)]
    for command, script in calls:
        if flags.dry_run:
            print(shlex.join(command) + (f" <<'JOB'\n{script}JOB" if script else ''))
        else:
            sweep_clusters.submit(command, script)
    if not flags.dry_run:
        print(f'{len(trials)} trials are submitted; the same command with --report collects what is finished')
    return ExitCode.FINISHED


def _finish(flags, state: State) -> int:
    """Writes and prints the results."""
    if not state.trials:
        print('no trial has begun')
        return ExitCode.FINISHED
    results = Results(state, flags.metric, flags.goal)
    state.directory.mkdir(parents=True, exist_ok=True)
    results.write(['python', '-m', COMMAND.module, *flags.argv])
    print(run_report.markdown(*results.table()))
    if results.best:
        print(f'the best trial, by {flags.metric}:\n  {best_command(results.best)}')
    print(f'written to {state.directory}: table.md, results.json, results.csv, report.html and PNGs')
    if without := [trial.name for trial, fate, _, value in results.rows if fate.status == DONE and value is None]:
        found = ', '.join(sorted({name for _, _, records, _ in results.rows if records for name in records.metrics}))
        print(f'{len(without)} finished trials have no {flags.metric}, {without[0]} for one; measured: {found}')
    has_failed = any(fate.status == FAILED for fate in state.fates)
    return ExitCode.CRASHED if has_failed or without else ExitCode.FINISHED
