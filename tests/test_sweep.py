"""Sweeps: combinators, names, trials that run, fail, are tried again and stopped early, clusters, and what is found."""

import contextlib
import csv
import json
import math
import os
import pathlib
import shlex
import signal
import stat
import subprocess
import sys
import threading

import pytest
import quick_compile
import train_fixtures

from transxssm_jax import config as config_lib
from transxssm_jax import config_sweep, sweep
from transxssm_jax.config_sweep import (
    Search,
    SweepError,
    chain,
    choice,
    integers,
    log_uniform,
    product,
    sample,
    uniform,
    vary,
    zipped,
)
from transxssm_jax.evals import sweep_run, sweep_trials
from transxssm_jax.evals.sweep_places import Here, visible_gpus
from transxssm_jax.evals.sweep_report import Results
from transxssm_jax.training.lease import Lease

ROOT = pathlib.Path(__file__).parents[1]
PLACE = ('model.attention_period', 'model.attention_offset')


# ---- combinators ---------------------------------------------------------------


def test_combinators():
    rates, places = vary('optimizer.learning_rate', [1e-3, 2e-3]), vary(PLACE, [(8, 7), (4, 3)])
    assert places == [
        {'model.attention_period': 8, 'model.attention_offset': 7},
        {'model.attention_period': 4, 'model.attention_offset': 3},
    ]
    combined = product(rates, places)
    assert len(combined) == 4 and combined[1] == {'optimizer.learning_rate': 1e-3, **places[1]}
    assert zipped(rates, places) == [{**rates[0], **places[0]}, {**rates[1], **places[1]}]
    assert chain(rates, places) == rates + places
    assert product() == [{}] and product(rates) == rates
    drawn = sample(combined, 3, seed=1)
    assert len(drawn) == 3 and all(trial in combined for trial in drawn) and drawn == sample(combined, 3, seed=1)
    assert drawn != sample(combined, 3, seed=2)
    space = {
        'a.b': log_uniform(1e-4, 1e-2),
        'a.c': integers(1, 3),
        'a.d': uniform(0, 1),
        ('a.e', 'a.f'): choice((1, 2)),
    }
    for trial in sample(space, 20):
        assert 1e-4 <= trial['a.b'] <= 1e-2 and trial['a.c'] in (1, 2, 3) and 0 <= trial['a.d'] <= 1
        assert (trial['a.e'], trial['a.f']) == (1, 2)
        assert float(f'{trial["a.b"]:.4g}') == trial['a.b']  # a name holds all of its digits


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: zipped(vary('a', [1]), vary('b', [1, 2])), 'parts have 1, 2 trials'),
        (lambda: product(vary('a', [1]), vary('a', [2])), 'a is varied by two parts'),
        (lambda: vary(('a', 'b'), [1]), '1 must be a tuple of 2 values'),
        (lambda: vary('a', []), 'has no values'),
        (lambda: sample(vary('a', [1]), 2), 'count=2 is more than the 1 trials'),
        (lambda: uniform(1, 1), 'must rise'),
        (lambda: log_uniform(0, 1), 'be above 0'),
        (lambda: Search({}, 3), 'at least one setting'),
        (lambda: Search({'a': uniform(0, 1), ('a', 'b'): choice((1, 2))}, 3), 'a is varied by two parts'),
        (lambda: Search({'a': uniform(0, 1)}, 3, sampler='tpa'), "sampler='tpa'"),
        (lambda: Search({'a': [0, 1]}, 3), r'\[0, 1\] is no distribution'),
        (lambda: Search({('a', 'b'): uniform(0, 1)}, 3), 'need choice'),
        (lambda: Search({('a', 'b'): choice((1, 2), (3,))}, 3), 'must be a tuple of 2 values'),
        (lambda: Search({'a': uniform(0, 1)}, 3, first={'a': 0.5}), 'must be a tuple of trials'),
        (
            lambda: Search({'a': uniform(0, 1)}, 3, first=({'a': 2},)),
            'a=2 of a trial to begin with is out of its range',
        ),
        (lambda: Search({'a': uniform(0, 1)}, 3, first=({'a': 1, 'b': 2},)), 'sets b, which is not in the space'),
        (lambda: Search({'a': choice(1, 2)}, 3, first=({'a': 3},)), 'none of the choices'),
        (lambda: integers(0.5, 2), 'must be whole numbers'),
    ],
)
def test_a_wrong_sweep_is_one_line(make, message):
    with pytest.raises(SweepError, match=message):
        make()


def test_names_hold_what_differs():
    trials = product(
        vary('data.seed', [0, 1]), vary('optimizer.learning_rate', [3e-4]), vary('model.pattern', ['ssd', 'a/b c'])
    )
    assert sweep_trials.names_of(trials) == [
        'data.seed=0,model.pattern=ssd', 'data.seed=0,model.pattern=a_b_c-65acc9db8b64',
        'data.seed=1,model.pattern=ssd', 'data.seed=1,model.pattern=a_b_c-d702b7c3e091',
    ]  # fmt: skip
    # Values that differ in what no directory is named by have directories of their own, which any file system takes.
    odd = sweep_trials.names_of(vary('data.path', ['a/b', 'a b', 'a_b', 'ä', '数' * 170]))
    assert len(set(odd)) == 5 and odd[2] == 'data.path=a_b' and all(len(name.encode()) <= 180 for name in odd)
    assert sweep_trials.names_of(vary('optimizer.learning_rate', [3e-4])) == ['optimizer.learning_rate=0.0003']
    long = {f'section.setting_{i}': i for i in range(50)}
    assert len(sweep_trials.name_of(long)) == 180 and sweep_trials.name_of(long) != sweep_trials.name_of(
        long | {'a': 1}
    )
    with pytest.raises(SweepError, match='trials 0 and 2 of the sweep are the same'):
        sweep_trials.names_of(vary('a', [1, 2, 1.0]))
    with pytest.raises(SweepError, match='trials 0 and 1 of the sweep are the same'):
        sweep_trials.names_of([{'a': 1, 'b': 2}, {'b': 2, 'a': 1}])
    # A trial that was begun keeps its name when another setting is varied; a name that is taken is not given twice.
    begun = [{'name': 'a=1', 'varied': {'a': 1, 'b': 0}}]
    assert sweep_trials.names_of(product(vary('a', [1]), vary('b', [0, 1])), begun) == ['a=1', 'b=1']
    with pytest.raises(SweepError, match='would both be in the directory a=1'):
        sweep_trials.names_of([{'a': 1, 'b': 0}, {'a': 1}, {'a': 2}], begun)


def test_drawn_numbers_stay_in_their_range_and_ends_are_as_likely():
    assert uniform(0.9, 0.99996).rounded(0.99996) == 0.99996 and uniform(0.100004, 1).rounded(0.100004) == 0.100004
    drawn = [trial['a'] for trial in sample({'a': integers(1, 4)}, 4000)]
    assert all(800 < drawn.count(number) < 1200 for number in (1, 2, 3, 4))


@pytest.mark.parametrize('path', sorted((ROOT / 'configs' / 'sweeps').glob('*.py')), ids=lambda path: path.stem)
def test_the_shipped_sweeps_are_of_configs(path):
    found = config_sweep.load(path.stem)  # by name
    trials = sample(found.space, 20) + list(found.first) if isinstance(found, Search) else found
    for i, trial in enumerate(trials):
        sweep_trials.make_trial(ROOT / 'configs' / 'tiny.py', pathlib.Path('o'), {}, trial, i)
    assert f'--sweep={path.stem}' in path.read_text()


# ---- the command, with a stand-in for training ---------------------------------

# Writes the records of a training whose loss falls to a hundred times the distance of the learning rate from 0.003, plus one.
STAND_IN = """
import json, os, pathlib, signal, sys, time
from transxssm_jax import config as config_lib
flags = dict(word[2:].split('=', 1) for word in sys.argv[1:])
changes = {name.removeprefix('config.'): value for name, value in flags.items() if name.startswith('config.')}
config = config_lib.load(flags['config'], changes)
workdir = pathlib.Path(flags['workdir'])
(workdir / 'config.json').write_text(config_lib.to_json(config))
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
print('devices', os.environ.get('CUDA_VISIBLE_DEVICES'), flush=True)
rate, records = config.optimizer.learning_rate, []
begun = len((workdir / 'metrics.jsonl').read_text().splitlines()) // 2 if (workdir / 'metrics.jsonl').exists() else 0
for step in range(begun + 1, config.train.steps + 1):
    loss = 1 + 100 * abs(rate - 0.003) + 1 / step
    with open(workdir / 'metrics.jsonl', 'a') as file:
        file.write(json.dumps({'step': step, 'loss': loss, 'tokens': step * 256, 'seconds': step * 0.1}) + '\\n')
        file.write(json.dumps({'step': step, 'eval_loss': loss}) + '\\n')
    time.sleep(SLEEP)
    while rate == 0.05 and step == 3 and not stopped:  # until it is found to be hopeless
        time.sleep(0.05)
    if stopped:
        sys.exit(75)
    if step == 2 and rate == 0.007 and not (workdir / 'once').exists():
        (workdir / 'once').touch()
        raise ValueError('a fault')
    if rate == 0.009:
        print('error: step 3: loss nan')
        sys.exit(3)
"""


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp('data')
    return train_fixtures.write_config(directory, train_fixtures.prepare_bytes(directory))


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Trials call a program in place of training; returns its command, and a function that sets how long its steps take."""
    path = tmp_path / 'training.py'

    def pace(seconds):
        path.write_text(STAND_IN.replace('SLEEP', str(seconds)))

    pace(0)
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    monkeypatch.setattr(
        sweep_trials.Trial, 'command', lambda trial: [sys.executable, str(path), *trial.arguments()], raising=False
    )
    monkeypatch.setattr(sweep, '_leave_accelerators', lambda: None)
    original = sweep_run.Sweep.__init__
    monkeypatch.setattr(
        sweep_run.Sweep, '__init__', lambda self, *a, **k: original(self, *a, **{**k, 'interval': 0.02})
    )
    return pace


def write_sweep(tmp_path, body, name='sweep.py'):
    path = tmp_path / name
    imports = 'from transxssm_jax.config_sweep import Search, chain, choice, log_uniform, product, sample, uniform, vary, zipped'
    path.write_text(f'{imports}\n\ndef get_sweep():\n    return {body}\n')
    return path


def call(capsys, prepared, path, output, *more):
    code = sweep.main([f'--sweep={path}', f'--config={prepared}', f'--output={output}', *more])
    return code, *capsys.readouterr()


RATES = "vary('optimizer.learning_rate', [0.001, 0.003, 0.007, 0.009])"


def test_a_sweep_runs_fails_tries_again_and_ends_in_a_table(tmp_path, prepared, stand_in, capsys):
    path, output = write_sweep(tmp_path, RATES), tmp_path / 'runs'
    code, out, err = call(capsys, prepared, path, output, '--parallel=2', '--config.train.steps=6')
    assert code == 1 and err == ''  # one diverged
    rows = json.loads((output / 'results.json').read_text())
    assert [row['optimizer.learning_rate'] for row in rows['trials']] == [0.003, 0.001, 0.007, 0.009]
    assert [row['status'] for row in rows['trials']] == ['finished'] * 3 + ['failed']
    assert [row['starts'] for row in rows['trials']] == [1, 1, 2, 1]  # a fault is tried again, a loss of nan is not
    assert rows['trials'][0]['eval_loss'] == pytest.approx(1 + 1 / 6)
    assert rows['trials'][3]['reason'] == 'exit code 3: error: step 3: loss nan'
    with open(output / 'results.csv') as file:
        assert [float(row['optimizer.learning_rate']) for row in csv.DictReader(file)] == [0.003, 0.001, 0.007, 0.009]
    # Best first; its command trains it.
    [*_, command] = [line for line in out.splitlines() if line.startswith('  python -m transxssm_jax.train')]
    flags = dict(word[2:].split('=', 1) for word in shlex.split(command)[3:])
    assert pathlib.Path(flags['workdir']) == output / 'optimizer.learning_rate=0.003'
    assert flags['config.optimizer.learning_rate'] == '0.003' and rows['best'] in command
    table = (output / 'table.md').read_text()
    assert table.splitlines()[0].startswith('| trial | learning_rate | eval_loss |') and table.strip() in out
    page = (output / 'report.html').read_text()
    assert 'eval_loss by optimizer.learning_rate' in page and 'http' not in page.replace('http://www.w3.org', '')
    assert '(it is tried again)' in out and 'ValueError: a fault' in out
    # A report tells of the failure, too, and changes nothing.
    kept = (output / 'sweep.json').read_bytes()
    code, out, _ = call(capsys, prepared, path, output, '--report', '--config.train.steps=6')
    assert code == 1 and json.loads((output / 'results.json').read_text())['trials'][3]['status'] == 'failed'
    assert '| failed: exit code 3: error: step 3: loss nan |' in out and (output / 'sweep.json').read_bytes() == kept
    # Called again, only what failed is tried.
    log = (output / 'optimizer.learning_rate=0.003' / 'log.txt').read_text()
    code, out, _ = call(capsys, prepared, path, output, '--parallel=2', '--config.train.steps=6')
    assert code == 1 and '3 finished, 1 waiting' in out
    assert (output / 'optimizer.learning_rate=0.003' / 'log.txt').read_text() == log
    # More trials of the same sweep go beside them; a sweep of other settings does not.
    more = write_sweep(tmp_path, "vary('optimizer.learning_rate', [0.001, 0.002, 0.003])")
    code, out, _ = call(capsys, prepared, more, output, '--config.train.steps=6')
    assert code == 0 and 'optimizer.learning_rate=0.002: finished' in out and '0.001: started' not in out
    code, _, err = call(capsys, prepared, more, output, '--config.train.steps=7')
    assert code == 2 and 'holds a sweep with overrides' in err


def test_stopped_by_a_signal_it_goes_on_where_it_stood(tmp_path, prepared, stand_in, capsys):
    path, output = write_sweep(tmp_path, "vary('optimizer.learning_rate', [0.001, 0.002])"), tmp_path / 'runs'
    stand_in(0.1)
    arguments = ['--parallel=2', '--config.train.steps=2000']  # which takes minutes

    def stop_once_both_have_begun():
        while len(list(output.glob('*/metrics.jsonl'))) < 2:
            threading.Event().wait(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_once_both_have_begun, daemon=True).start()
    code, out, _ = call(capsys, prepared, path, output, *arguments)
    assert code == 75 and 'the same command goes on from there' in out
    records = [len((folder / 'metrics.jsonl').read_text().splitlines()) for folder in output.glob('*=*')]
    stand_in(0)
    code, out, _ = call(capsys, prepared, path, output, *arguments)
    assert code == 0 and '2 waiting' in out
    finished = [(folder / 'metrics.jsonl').read_text().splitlines() for folder in sorted(output.glob('*=*'))]
    assert [len(lines) for lines in finished] == [4000, 4000] and all(count < 4000 for count in records)


def test_a_search_learns_and_hopeless_trials_are_stopped(tmp_path, prepared, stand_in, capsys):
    pytest.importorskip('optuna', reason='needs pip install optuna')
    body = (
        "Search({'optimizer.learning_rate': log_uniform(0.0003, 0.03), ('data.seed', 'train.seed'): choice((0, 1), (2, 3))}, "
        "trials=12, first=({'optimizer.learning_rate': 0.02, 'data.seed': 0, 'train.seed': 1},))"
    )
    path, output = write_sweep(tmp_path, body), tmp_path / 'runs'
    stand_in(0.05)
    code, out, err = call(capsys, prepared, path, output, '--pruner=median', '--parallel=2', '--config.train.steps=10')
    assert code == 0, err
    rows = json.loads((output / 'results.json').read_text())['trials']
    assert len(rows) == 12 and rows[0]['eval_loss'] < 1.5
    assert next(row for row in rows if row['trial'] == 0)['optimizer.learning_rate'] == 0.02
    assert {(row['data.seed'], row['train.seed']) for row in rows} <= {(0, 1), (2, 3)}
    assert all(row['step'] < 10 for row in rows if row['status'] == 'pruned')
    page = (output / 'report.html').read_text()
    assert 'parallel_coordinates' in page and 'eval_loss by data.seed' in page
    # Again: all of it is there.
    code, out, _ = call(capsys, prepared, path, output, '--pruner=median', '--config.train.steps=10')
    assert code == 0 and ': started' not in out


def test_a_search_passes_over_what_cannot_be_trained_or_was(tmp_path, prepared, stand_in, capsys):
    """Settings that do not go together, and the same trial again, each use up one trial of the search, and no more."""
    pytest.importorskip('optuna', reason='needs pip install optuna')
    place = "('model.attention_period', 'model.attention_offset')"
    first = ', '.join(str(dict(zip(PLACE, pair, strict=True))) for pair in ((2, 1), (2, 1), (2, 9), (1, 0)))
    body = f'Search({{{place}: choice((2, 1), (2, 9), (1, 0))}}, trials=1500, sampler="random", first=({first}))'
    path, output = write_sweep(tmp_path, body.replace('trials=1500', 'trials=4')), tmp_path / 'runs'
    arguments = ['--config.train.steps=2', '--parallel=2']
    code, _, err = call(capsys, prepared, path, tmp_path / 'other', *arguments)
    assert code == 2 and 'model.attention_offset=9' in err and err.count('\n') == 1  # a first trial is checked at once
    path = write_sweep(
        tmp_path, body.replace('trials=1500', 'trials=40').replace(first, first.partition(', {')[0] + ',')
    )
    code, out, err = call(capsys, prepared, path, output, *arguments)
    assert code == 0, (out, err)
    rows = json.loads((output / 'results.json').read_text())['trials']
    assert sorted(row['model.attention_period'] for row in rows) == [1, 2] and 'not trained: trial' in out
    code, out, _ = call(capsys, prepared, path, output, *arguments)
    assert code == 0 and ': started' not in out  # all forty were chosen
    # What Optuna learned holds for one metric, one goal and the same choices.
    for changed, message in (
        ('--goal=max', 'begun with --goal min'),
        ('--metric=loss', 'begun with --metric eval_loss'),
    ):
        code, _, err = call(capsys, prepared, path, output, *arguments, changed)
        assert code == 2 and message in err and err.count('\n') == 1
    path.write_text(path.read_text().replace('(2, 9), (1, 0)', '(1, 0), (2, 9)'))
    code, _, err = call(capsys, prepared, path, output, *arguments)
    assert code == 2 and 'begun with choices of model.attention_period,model.attention_offset' in err


def test_a_study_lies_in_its_directory_whatever_that_is_called(tmp_path):
    pytest.importorskip('optuna', reason='needs pip install optuna')
    from transxssm_jax.evals.sweep_study import STORAGE, Study

    for name in ('5%20', '5 ', 'why?', '#1 é'):
        study = Study(tmp_path / name, Search({'a': uniform(0, 1)}, 3), 'none', 'min', 'loss')
        number, _ = study.next()
        assert number == 0 and (tmp_path / name / STORAGE).exists()


def test_an_error_or_a_signal_while_a_trial_starts_leaves_no_training_behind(tmp_path, prepared):
    class Started:
        code = None

        def exit_code(self):
            return self.code

        def stop(self):
            self.code = 75

    class Place:
        slots = 2

        def __init__(self, second):
            self.started, self.second = [], second

        def start(self, slot, command, log):
            if self.started:
                self.second()
            self.started.append(Started())
            return self.started[-1]

    def fail():
        raise OSError('no space')

    def make_sweep(place, folder):
        state = sweep_trials.State(tmp_path / folder, {'config': str(prepared), 'overrides': {}})
        for number in (0, 1):
            state.add(sweep_trials.make_trial(prepared, state.directory, {}, {'data.seed': number}, number))
        return state, sweep_run.Sweep(state, place, metric='loss', interval=0.01)

    place = Place(fail)
    state, running = make_sweep(place, 'error')
    with pytest.raises(OSError, match='no space'):
        running.run()
    assert place.started[0].code == 75 and [fate.status for fate in state.fates] == ['waiting', 'waiting']
    saved = sweep_trials.read_state(state.directory)
    assert [record['status'] for record in saved['trials']] == ['waiting', 'waiting']

    place = Place(lambda: os.kill(os.getpid(), signal.SIGTERM))
    state, running = make_sweep(place, 'signal')
    assert running.run() == 75 and [started.code for started in place.started] == [75, 75]


def test_two_sweeps_do_not_run_in_one_directory(tmp_path, prepared, stand_in, capsys):
    path, output = write_sweep(tmp_path, RATES), tmp_path / 'runs'
    with contextlib.ExitStack() as stack:
        stack.callback(Lease(output).release)
        code, _, err = call(capsys, prepared, path, output)
        assert code == 2 and f'--output={output} is in use by another sweep' in err and err.count('\n') == 1
        assert not list(output.glob('*=*'))
        assert call(capsys, prepared, path, output, '--report')[0] == 0  # which only reads


def test_a_sweep_goes_on_from_another_directory_and_with_another_setting(
    tmp_path, prepared, stand_in, monkeypatch, capsys
):
    body = "product(vary('optimizer.learning_rate', [0.001, 0.002]), vary('data.seed', [0]))"
    monkeypatch.chdir(prepared.parent)
    sweep_file, output = write_sweep(tmp_path, body), tmp_path / 'runs'
    assert call(capsys, prepared.name, sweep_file, output, '--config.train.steps=2')[0] == 0
    monkeypatch.chdir(tmp_path)
    write_sweep(tmp_path, body.replace('[0])', '[0, 1])'))
    code, out, err = call(capsys, prepared, sweep_file, 'runs', '--config.train.steps=2')
    assert code == 0 and '2 finished, 2 waiting' in out, err
    # Two trials that set the same in other words are one.
    write_sweep(tmp_path, "vary('data.seed', [0]) + vary('train.seed', [0])")
    code, _, err = call(capsys, prepared, sweep_file, tmp_path / 'other')
    assert code == 2 and 'trials 0 and 1 of the sweep are the same: data.seed=0 and train.seed=0' in err


def test_a_metric_that_is_not_measured_is_told(tmp_path, prepared, stand_in, capsys):
    path, output = write_sweep(tmp_path, "vary('optimizer.learning_rate', [0.001, 0.002])"), tmp_path / 'runs'
    code, _, err = call(capsys, prepared, path, output, '--config.train.eval_every_steps=0')
    assert code == 2 and 'is never evaluated, so that it has no eval_loss' in err and not output.exists()
    for _ in range(2):  # the second call trains nothing
        code, out, _ = call(capsys, prepared, path, output, '--config.train.steps=2', '--metric=eval_los')
        assert code == 1 and '2 finished trials have no eval_los' in out and 'measured: eval_loss, loss' in out
    assert call(capsys, prepared, path, output, '--config.train.steps=2')[0] == 0


def test_trials_of_a_given_list_are_pruned_too(tmp_path, prepared, stand_in, capsys):
    pytest.importorskip('optuna', reason='needs pip install optuna')
    rates = [0.003, 0.0031, 0.0032, 0.0033, 0.0034, 0.05]
    path, output = write_sweep(tmp_path, f"vary('optimizer.learning_rate', {rates})"), tmp_path / 'runs'
    code, out, err = call(capsys, prepared, path, output, '--pruner=median', '--config.train.steps=8')
    assert code == 0, err
    statuses = {row['trial']: row['status'] for row in json.loads((output / 'results.json').read_text())['trials']}
    assert statuses == {**dict.fromkeys(range(5), 'finished'), 5: 'pruned'} and 'stopped early' in out


# ---- what is refused -------------------------------------------------------------


@pytest.mark.parametrize(
    'body, flags, message',
    [
        (RATES, ['--sweep=nowhere'], '--sweep=nowhere: no such file'),
        (RATES, ['--config=nowhere'], '--config=nowhere: no such file'),
        (RATES, ['--config.data.path='], 'data.path is empty'),
        (RATES, ['--config.optimizer.learning_rate=1'], 'optimizer.learning_rate is given, and the sweep varies it'),
        (RATES, ['--slurm=', '--ray='], '--slurm and --ray exclude each other'),
        (RATES, ['--slurm=', '--pruner=median'], '--slurm has a queue of its own'),
        (RATES, ['--trial=3'], 'holds 0 trials'),
        (RATES, ['--config.data.global_batch=4000'], 'one batch of 4000'),
        ("vary('optimizer.learning_rat', [1])", [], 'trial 0 (optimizer.learning_rat=1): unknown setting'),
        ("vary('model.d_model', [32, 33])", [], 'trial 1 (model.d_model=33): model.d_model=33'),
        ("vary('model.d_model', [32, 32])", [], 'trials 0 and 1 of the sweep are the same'),
        ('3', [], 'must have a function get_sweep() that returns a list of trials'),
        ('[]', [], 'must have a function get_sweep()'),
        ('vary(1)', [], 'TypeError'),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_before_anything_starts(tmp_path, prepared, stand_in, capsys, body, flags, message):
    path = write_sweep(tmp_path, body)
    code, out, err = call(capsys, prepared, path, tmp_path / 'runs', *flags)
    assert code == 2 and err.count('\n') == 1 and message in err and out == ''
    assert not (tmp_path / 'runs').exists()


def test_every_trial_is_planned_before_the_first_starts(tmp_path, prepared, stand_in, monkeypatch, capsys):
    calls = []

    def plan(command):
        calls.append(command)
        fits = '--config.model.d_mlp=64' not in command
        return subprocess.CompletedProcess(command, 0 if fits else 3, json.dumps({'nearest': {'mesh.fsdp': 8}}), '')

    monkeypatch.setattr(sweep.children, 'run', plan)
    body = "product(vary('train.accumulation_steps', [1, 2]), vary('model.d_mlp', [32, 64]), vary('data.seed', [0, 1]))"
    code, _, err = call(capsys, prepared, write_sweep(tmp_path, body), tmp_path / 'runs', '--plan=v5e:2x2')
    assert (
        code == 2
        and 'trial 2 (train.accumulation_steps=1,model.d_mlp=64,data.seed=0) does not fit v5e:2x2' in err
        and 'mesh.fsdp' in err
    )
    assert len(calls) == 2 and '--topology=v5e:2x2' in calls[0]  # a seed changes no step
    assert not (tmp_path / 'runs').exists()


# ---- places ----------------------------------------------------------------------


def test_a_trial_gets_its_own_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    assert visible_gpus() == [] and Here().slots == 1 and Here(parallel=3).slots == 3
    monkeypatch.delenv('JAX_PLATFORMS')
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,5,6,7,8')
    assert Here().slots == 5 and Here(2).slots == 2 and Here(2, parallel=1).slots == 1
    with pytest.raises(SweepError, match='--devices_per_trial=6: 5 GPUs are here'):
        Here(6)
    place, log = Here(2), tmp_path / 'log'
    program = [sys.executable, '-c', "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"]
    for slot in (0, 1):
        assert place.start(slot, program, log).process.wait() == 0
    assert log.read_text() == '4,5\n6,7\n'


def test_a_mesh_that_the_gpus_do_not_make_is_refused_at_once(tmp_path, prepared, stand_in, monkeypatch, capsys):
    monkeypatch.delenv('JAX_PLATFORMS')
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0,1,2,3')
    path = write_sweep(tmp_path, "vary('mesh.fsdp', [2, 3])")
    code, _, err = call(capsys, prepared, path, tmp_path / 'runs', '--devices_per_trial=2')
    assert code == 2 and 'must multiply to the 2 devices' in err and not (tmp_path / 'runs').exists()


def test_what_compiles_another_step_is_planned_by_itself():
    def step(**changes):
        changes = {name.replace('__', '.'): value for name, value in changes.items()}
        return sweep_trials.step_settings(config_lib.load(ROOT / 'configs' / 'tiny.py', changes))

    assert step() == step(train__steps=500, data__seed=3) != step(train__accumulation_steps=2)


def test_slurm_gets_an_array(tmp_path, prepared, stand_in, monkeypatch, capsys):
    path, output = write_sweep(tmp_path, RATES), tmp_path / 'My 5% runs'
    slurm = ['--slurm=--time=1:00:00 --gpus-per-node=8', '--parallel=2', '--retries=3']
    code, out, _ = call(capsys, prepared, path, output, *slurm, '--dry-run')
    assert code == 0 and not output.exists()
    head, _, rest = out.partition("<<'JOB'\n")
    submit = shlex.split(head[head.index('sbatch') :])
    assert {
        '--array=0,1,2,3%2',
        '--requeue',
        '--time=1:00:00',
        '--job-name=my-5-runs',
        f'--output={tmp_path}/My 5%% runs/slurm-%A_%a.out',
        f'--chdir={pathlib.Path.cwd()}',
    } <= set(submit)
    assert submit.index('--gpus-per-node=8') > submit.index('--gpus-per-node=1')  # the later one counts
    # It is handed to sbatch, and a job runs its trial: the right command, and again after an interruption.
    for name, text in (('sbatch', f'cat > {tmp_path}/job'), ('srun', '[ $1 = --kill-on-bad-exit=0 ]; shift; exec "$@"'),
                       ('scontrol', f'echo "$*" >> {tmp_path}/requeued')):  # fmt: skip
        program = tmp_path / 'bin' / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/usr/bin/env bash\n{text}\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv('PATH', f'{tmp_path}/bin:{os.environ["PATH"]}')
    code, out, _ = call(capsys, prepared, path, output, *slurm)
    assert code == 0 and '4 trials are submitted' in out
    job = (tmp_path / 'job').read_text()
    assert job == rest.removesuffix('JOB\n')
    started = []
    monkeypatch.setattr(sweep.os, 'execv', lambda program, command: started.append(command))
    words = shlex.split(next(line for line in job.splitlines() if line.startswith('srun')))[5:]
    sweep.main([word.replace('$SLURM_ARRAY_TASK_ID', '2') for word in words])
    assert started[0][-1] == '--config.optimizer.learning_rate=0.007'
    for exits, again in ((75, True), (1, True), (3, False), (0, False)):
        (tmp_path / 'requeued').unlink(missing_ok=True)
        (tmp_path / 'bin' / 'srun').write_text(f'#!/usr/bin/env bash\nexit {exits}\n')
        environment = os.environ | {'SLURM_ARRAY_JOB_ID': '9', 'SLURM_ARRAY_TASK_ID': '2', 'SLURM_RESTART_COUNT': '2'}
        assert subprocess.run(['bash', '-c', job], env=environment, check=False).returncode == exits
        assert (tmp_path / 'requeued').exists() == again
    code, out, _ = call(capsys, prepared, path, output, '--report')
    assert code == 0 and out.count('waiting') == 4
    # Jobs that wait take their trials by number: others may come after them, and none between.
    write_sweep(tmp_path, RATES.replace('[', '[0.0005, '))
    code, _, err = call(capsys, prepared, path, output, *slurm)
    assert code == 2 and 'trial 0 was optimizer.learning_rate=0.001 before' in err and err.count('\n') == 1
    write_sweep(tmp_path, RATES.replace(']', ', 0.0005]'))
    assert call(capsys, prepared, path, output, *slurm)[0] == 0


def test_gke_gets_a_workload_per_trial(tmp_path, prepared, stand_in, capsys):
    path = write_sweep(tmp_path, "vary('optimizer.learning_rate', [0.001, 0.002])")
    gke = '--gke=--cluster=pod --tpu_type=v5litepod-8'
    code, out, _ = call(capsys, prepared, path, tmp_path / 'rates', gke, '--dry-run')
    calls = [shlex.split(line) for line in out.splitlines() if 'gke.sh' in line]
    assert code == 0 and [words[3] for words in calls] == ['--name=rates-0', '--name=rates-1']
    result = subprocess.run([*calls[1], '--dry-run'][:4] + ['--dry-run'] + calls[1][4:], capture_output=True, text=True)
    assert 'xpk workload create' in result.stdout and '--config.optimizer.learning_rate=0.002' in result.stdout


def test_a_ray_cluster_runs_trials_and_stops_them(tmp_path, prepared, stand_in, capsys):
    """A real Ray, started here: the same sweep file as elsewhere, and programs that know nothing of training."""
    pytest.importorskip('ray', reason='needs pip install ray')
    path, output = write_sweep(tmp_path, RATES), tmp_path / 'runs'
    code, out, err = call(capsys, prepared, path, output, '--ray=local', '--parallel=2', '--config.train.steps=4')
    rows = json.loads((output / 'results.json').read_text())['trials']
    assert code == 1 and [row['status'] for row in rows] == ['finished'] * 3 + ['failed'], (out, err)
    assert [row['starts'] for row in rows] == [1, 1, 2, 1]

    from transxssm_jax.evals.sweep_places import OnRay

    handler = signal.getsignal(signal.SIGTERM)
    place = OnRay('local', parallel=2)
    assert signal.getsignal(signal.SIGTERM) == handler
    try:
        assert place.slots >= 1
        log = tmp_path / 'log'
        quick = place.start(0, [sys.executable, '-c', 'import os; print(os.getcwd()); raise SystemExit(7)'], log)
        assert _wait(quick) == 7 and log.read_text().strip() == os.getcwd()
        program = (
            'import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print(1, flush=True)'
        )
        slow = place.start(0, [sys.executable, '-c', f'{program}; time.sleep(600)'], tmp_path / 'slow')
        while not (tmp_path / 'slow').exists() or not (tmp_path / 'slow').read_text():
            assert slow.exit_code() is None
            threading.Event().wait(0.2)
        slow.stop()
        assert _wait(slow) == 75
    finally:
        place.close()


def _wait(started):
    while (code := started.exit_code()) is None:
        threading.Event().wait(0.1)
    return code


# ---- with training ----------------------------------------------------------------


def test_it_trains(tmp_path, prepared, monkeypatch, capsys):
    """The whole, with two real trainings in processes of their own."""
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    monkeypatch.setenv('XLA_FLAGS', quick_compile.XLA_FLAGS)
    path = write_sweep(tmp_path, "vary('optimizer.learning_rate', [0.01, 0.0001])")
    monkeypatch.chdir(tmp_path)
    code, out, err = call(
        capsys, prepared, path, 'runs', '--parallel=2', '--config.train.steps=4', '--config.train.eval_every_steps=2'
    )
    assert code == 0, (out, err)
    rows = json.loads((tmp_path / 'runs' / 'results.json').read_text())['trials']
    assert [row['optimizer.learning_rate'] for row in rows] == [0.01, 0.0001] and rows[0]['step'] == 4
    assert (
        config_lib.from_json((tmp_path / rows[0]['workdir'] / 'config.json').read_text()).optimizer.learning_rate
        == 0.01
    )


def test_results_of_the_largest_value(tmp_path):
    state = sweep_trials.State(tmp_path, {})
    for number, value in enumerate((1.0, 3.0, 2.0)):
        trial = sweep_trials.make_trial(ROOT / 'configs' / 'tiny.py', tmp_path, {}, {'data.seed': number}, number)
        trial.workdir.mkdir()
        (trial.workdir / 'config.json').write_text(config_lib.to_json(trial.config))
        record = {'step': 1, 'loss': 1.0, 'tokens': 1, 'seconds': 1.0, 'speed': value}
        (trial.workdir / 'metrics.jsonl').write_text(json.dumps(record) + '\n')
        state.add(trial, sweep_trials.Fate('finished'))
    assert [row['trial'] for row in Results(state, 'speed', 'max').records()] == [1, 2, 0]
    assert Results(state, 'speed', 'min').best.number == 0 and Results(state, 'none', 'min').best is None
    assert Results(state, 'loss', 'min').table()[0] == ['trial', 'seed', 'loss', 'step', 'status']


def test_a_metric_that_is_not_finite_is_never_the_best(tmp_path):
    state = sweep_trials.State(tmp_path, {})
    trial = sweep_trials.make_trial(ROOT / 'configs' / 'tiny.py', tmp_path, {}, {'data.seed': 0}, 0)
    trial.workdir.mkdir()
    (trial.workdir / 'config.json').write_text(config_lib.to_json(trial.config))
    (trial.workdir / 'metrics.jsonl').write_text('{"step": 1, "tokens": 1, "loss": NaN}\n')
    state.add(trial, sweep_trials.Fate('finished'))
    results = Results(state, 'loss', 'min')
    results.write(['sweep'])
    assert results.best is None and results.table()[1][0][2] == 'nan'
    found = json.loads((tmp_path / 'results.json').read_text(), parse_constant=pytest.fail)
    assert found['trials'][0]['loss'] is None and found['best'] == ''


def test_a_follower_reads_numbers_only(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    records = ({'step': 1, 'loss': None}, {'step': 2, 'loss': {'a': 1}}, {'step': 3, 'loss': 2}, {'step': math.inf})
    path.write_text(''.join(json.dumps(record) + '\n' for record in records) + '[1]\n3\n{"step": 4, "los')
    assert sweep_run.Follower(path).read('loss') == [(3, 2.0)]
