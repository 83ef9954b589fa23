"""Runs that are killed, stopped and robbed go on from the last good checkpoint, with the losses of an undisturbed run.

The suite has a handful. The long form,

    python -m pytest -m faults tests/faults -s

kills a run a hundred times (`--fault_kills=N` another number), strikes it within every part of the program, and prints counts.
"""

import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from harness import BEFORE_THE_FIRST_STEP, WITHIN, Start, Strike, assert_same, kill_until_finished, run
from train_fixtures import ROOT, arguments, checkpoint_steps, prepare_bytes, write_config


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp('run')
    return write_config(directory, prepare_bytes(directory))


@pytest.fixture(scope='module')
def undisturbed(config, tmp_path_factory):
    """(workdir, seconds of a start to the end with everything compiled) of a run that nothing happens to."""
    directory = tmp_path_factory.mktemp('undisturbed')
    assert run(config, directory / 'compiles').code == 0
    began = time.monotonic()
    ended = run(config, directory / 'run')
    assert ended.code == 0 and not ended.has_traceback, str(ended)
    return directory / 'run', time.monotonic() - began


# ---- killed at random --------------------------------------------------------


def test_a_run_that_is_killed_at_random_changes_no_number(config, undisturbed, tmp_path):
    struck = kill_until_finished(
        config, tmp_path / 'run', undisturbed[1], random.Random(3), 3, (signal.SIGKILL, signal.SIGTERM)
    )
    assert struck
    assert_same(tmp_path / 'run', undisturbed[0])


@pytest.mark.faults
@pytest.mark.timeout(7200)
def test_a_hundred_kills(config, undisturbed, tmp_path, request):
    rng, counts, wanted, runs = random.Random(0), collections.Counter(), request.config.getoption('--fault_kills'), 0
    while sum(counts.values()) < wanted:
        workdir = tmp_path / str(runs) / 'run'
        workdir.parent.mkdir()
        left = min(wanted - sum(counts.values()), 10)
        struck = kill_until_finished(config, workdir, undisturbed[1], rng, left, (signal.SIGKILL, signal.SIGTERM))
        assert_same(workdir, undisturbed[0])
        counts.update(struck)
        runs += 1
        shutil.rmtree(workdir.parent)
    print(f'\n{sum(counts.values())} strikes over {runs} runs, all ended with the undisturbed losses:', dict(counts))


# ---- struck within each part ---------------------------------------------------


def strike(config, undisturbed, workdir, within, number, call=1, after_seconds=0.0):
    """A start that is struck within a part, on top of one that was stopped at step 8; then one to the end."""
    if within not in BEFORE_THE_FIRST_STEP[:2] + BEFORE_THE_FIRST_STEP[5:6]:
        first = Start(config, workdir)
        first.until(lambda: (workdir / 'checkpoints' / '4').exists())
        first.kill()
        first.finish()
    before = checkpoint_steps(workdir) if (workdir / 'checkpoints').exists() else []
    ended = run(config, workdir, strike=Strike(within, number, call, after_seconds))
    assert not ended.has_traceback, str(ended)
    after = checkpoint_steps(workdir) if (workdir / 'checkpoints').exists() else []
    if within in BEFORE_THE_FIRST_STEP and not after_seconds:
        assert after == before, (within, before, after)
    again = run(config, workdir)
    assert again.code == 0, (ended, again)
    assert_same(workdir, undisturbed[0])
    return ended


IN_SUITE = [
    ('restore', signal.SIGTERM),
    ('compilation', signal.SIGTERM),
    ('evaluation', signal.SIGTERM),
    ('save', signal.SIGTERM),
    ('the commit of a save', signal.SIGKILL),
    ('the final sample', signal.SIGTERM),
]


@pytest.mark.parametrize('within, number', IN_SUITE, ids=[f'{number.name} within {name}' for name, number in IN_SUITE])
def test_struck_within(config, undisturbed, tmp_path, within, number):
    ended = strike(config, undisturbed, tmp_path / 'run', within, number)
    assert ended.code == (75 if number == signal.SIGTERM else -number), str(ended)


@pytest.mark.faults
@pytest.mark.timeout(7200)
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize('within', WITHIN)
def test_struck_within_every_part(config, undisturbed, tmp_path, within, number):
    rng = random.Random(f'{within} {number}')
    codes = collections.Counter()
    for index, after_seconds in enumerate((0.0, rng.uniform(0, 0.1), rng.uniform(0, 0.5))):
        call = rng.choice([1, 1, 2, 3]) if index and within not in BEFORE_THE_FIRST_STEP else 1
        workdir = tmp_path / str(index) / 'run'
        workdir.parent.mkdir()
        ended = strike(config, undisturbed, workdir, within, number, call, after_seconds)
        code = {signal.SIGTERM: 75, signal.SIGINT: 130}.get(number, -number)
        # A signal that comes late in a part may find the run at its end.
        assert ended.code == code or (after_seconds and ended.code == 0) or (call > 1 and ended.code == 0), str(ended)
        codes[ended.code] += 1
    print(f'\n{number.name} within {within}: exit codes {dict(codes)}')


def test_a_signal_while_python_imports_ends_quietly(config, tmp_path):
    command = [
        sys.executable,
        '-X',
        'importtime',
        '-m',
        'transxssm_jax.train',
        *arguments(config, tmp_path / 'run')[1:],
    ]
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True) as process:
        for line in process.stderr:
            if line.rstrip().endswith(' jax._src.typing'):  # in the midst of them
                process.send_signal(signal.SIGTERM)
                break
        out, err = process.communicate(timeout=120)
    assert process.returncode == 75 and out == '' and 'Traceback' not in err
    assert not (tmp_path / 'run').exists()


# ---- space, places, other runs -------------------------------------------------


def full_disk(config, undisturbed, workdir, most_bytes):
    ended = run(config, workdir, most_bytes=most_bytes)
    assert ended.code in (2, 0) and not ended.has_traceback, str(ended)
    if ended.code == 2:
        errors = [line for line in ended.err.splitlines() if line.startswith('error')]
        assert len(errors) == 1 and str(workdir) in errors[0], str(ended)
    again = run(config, workdir)
    assert again.code == 0, (ended, again)
    assert_same(workdir, undisturbed[0])
    return ended.code


def test_a_disk_that_fills_up(config, undisturbed, tmp_path):
    assert full_disk(config, undisturbed, tmp_path / 'run', 8192) == 2


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_a_disk_that_fills_up_anywhere(config, undisturbed, tmp_path):
    codes = collections.Counter()
    for index, most_bytes in enumerate([100, 400, 1000, 2000, 4000, 6000, 12_000, 16_000, 32_000, 65_536, 100_000]):
        workdir = tmp_path / str(index) / 'run'
        workdir.parent.mkdir()
        codes[full_disk(config, undisturbed, workdir, most_bytes)] += 1
    print('\na full disk: exit codes', dict(codes))


@pytest.mark.parametrize('comes_back', [False, True])
def test_a_workdir_that_is_taken_away_ends_the_run_in_one_line(config, undisturbed, tmp_path, comes_back):
    workdir = tmp_path / 'run'
    start = Start(config, workdir, train__steps=10**6)
    assert start.until(lambda: (workdir / 'checkpoints' / '8').exists())
    start.kill(signal.SIGSTOP)
    kept = shutil.copytree(workdir, tmp_path / 'kept')
    shutil.rmtree(workdir)
    if comes_back:  # as a checkpoint that is being written makes it
        (workdir / 'checkpoints').mkdir(parents=True)
    start.kill(signal.SIGCONT)
    ended = start.finish()
    assert ended.code == 2 and not ended.has_traceback, str(ended)
    errors = [line for line in ended.err.splitlines() if line.startswith('error')]
    assert len(errors) == 1 and str(workdir) in errors[0], str(ended)
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.move(kept, workdir)  # from a backup
    ended = run(config, workdir)
    assert ended.code == 0 and 'resuming from step' in ended.out, str(ended)
    assert_same(workdir, undisturbed[0])


def test_of_two_runs_in_one_workdir_one_is_refused(config, undisturbed, tmp_path):
    starts = [Start(config, tmp_path / 'run') for _ in range(2)]
    ends = sorted((start.finish() for start in starts), key=lambda ended: ended.code)
    assert [ended.code for ended in ends] == [0, 2], ends
    assert 'is in use by another run' in ends[1].err and not ends[1].has_traceback
    assert_same(tmp_path / 'run', undisturbed[0])


# ---- data ------------------------------------------------------------------------


def test_a_missing_shard_is_named_and_costs_nothing(config, undisturbed, tmp_path):
    data, workdir = shutil.copytree(config.parent / 'prepared', tmp_path / 'data'), tmp_path / 'run'
    start = Start(config, workdir, data__path=data)
    start.until(lambda: (workdir / 'checkpoints' / '4').exists())
    start.kill()
    start.finish()
    (shard,) = data.glob('documents-train.array_record-*')
    shard.rename(tmp_path / 'shard')
    ended = run(config, workdir, data__path=data)
    assert ended.code == 2 and str(shard) in ended.err and not ended.has_traceback, str(ended)
    (tmp_path / 'shard').rename(shard)
    assert run(config, workdir, data__path=data).code == 0
    assert_same(workdir, undisturbed[0])


def poison() -> None:
    """The batch of step 11 makes the loss NaN."""
    from transxssm_jax.training import metrics

    original = metrics.PendingMetrics.push

    def push(self, step, values):
        original(self, step, values | ({'loss': values['loss'] * float('nan')} if step == 11 else {}))

    metrics.PendingMetrics.push = push


def test_a_step_that_is_not_finite_is_not_saved(config, undisturbed, tmp_path):
    ended = run(config, tmp_path / 'run', patch=('test_faults', 'poison'))
    assert ended.code == 3 and 'step 11 is not finite' in ended.err and not ended.has_traceback, str(ended)
    assert checkpoint_steps(tmp_path / 'run')[-1] == 8
    assert run(config, tmp_path / 'run').code == 0
    assert_same(tmp_path / 'run', undisturbed[0])


HANGS_AT = 10


def before_each_batch(act) -> None:
    """The loader calls act(its batches, item) before it makes a batch."""
    from transxssm_jax.data import loader

    original = loader._Batches.__getitem__

    def read(self, item):
        act(self, item)
        return original(self, item)

    loader._Batches.__getitem__ = read


def hang() -> None:
    """The loader never gives the batch of step 10: its file system does not answer."""

    def wait(batches, item):
        if batches._repeat and batches._start_step + int(item) + 1 >= HANGS_AT:
            time.sleep(3600)

    before_each_batch(wait)


def test_a_loader_that_hangs_is_given_up(config, undisturbed, tmp_path):
    stop = dict(train__watchdog_seconds=0.3, train__watchdog_action='stop')
    ended = run(config, tmp_path / 'run', patch=('test_faults', 'hang'), **stop)
    assert ended.code == 75 and not ended.has_traceback, str(ended)
    assert 'waiting for the loader to give the batch of step 10' in ended.err and 'Current thread' in ended.err
    assert 'step 9 is saved, and the same command goes on from there' in ended.err
    assert checkpoint_steps(tmp_path / 'run')[-1] == 9
    assert run(config, tmp_path / 'run').code == 0
    assert_same(tmp_path / 'run', undisturbed[0])


def slow() -> None:
    """The loader takes its time for every batch."""
    before_each_batch(lambda batches, item: time.sleep(random.uniform(0, 0.2)))


@pytest.mark.faults
def test_a_slow_loader_changes_no_number(config, undisturbed, tmp_path):
    ended = run(config, tmp_path / 'run', patch=('test_faults', 'slow'))
    assert ended.code == 0 and 'goodput' in ended.out, str(ended)
    assert_same(tmp_path / 'run', undisturbed[0])


def stall() -> None:
    """Step 10 never comes back, as where another host does not enter its collective."""
    from transxssm_jax.training import metrics

    original = metrics.PendingMetrics._read

    def read(self, pending):
        if pending and pending[0] == HANGS_AT:
            time.sleep(3600)
        return original(self, pending)

    metrics.PendingMetrics._read = read


def test_a_step_that_hangs_ends_the_run(config, undisturbed, tmp_path):
    stop = dict(train__watchdog_seconds=0.3, train__watchdog_action='stop')
    ended = run(config, tmp_path / 'run', patch=('test_faults', 'stall'), **stop)
    assert ended.code == 69 and not ended.has_traceback, str(ended)
    assert 'waiting for the devices to finish step' in ended.err and 'File "' in ended.err
    errors = [line for line in ended.err.splitlines() if line.startswith('error')]
    assert len(errors) == 1 and 'start the same command again' in errors[0], str(ended)
    assert run(config, tmp_path / 'run').code == 0
    assert_same(tmp_path / 'run', undisturbed[0])
