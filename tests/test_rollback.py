"""A run goes back from a bad batch, leaves its batches out, and every start and replay agrees which."""

import json
import math

import numpy as np
import pytest
from small import small_config
from test_spikes import WINDOW, Batches, values_of
from train_fixtures import before_saving, checkpoint_steps, losses, prepare_bytes, records, send, train, write_config

from transxssm_jax import replay as replay_command
from transxssm_jax.training import batch_order, loop, spikes
from transxssm_jax.training.batch_order import BatchOrder


def ledger_of(workdir):
    lines = map(json.loads, (workdir / 'ledger' / 'process-0.jsonl').read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in ('config', 'sum')} for line in lines]


def told(path):
    file = path / spikes.FILE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# ---- the order -----------------------------------------------------------------


def test_without_skips_step_t_takes_batch_t_minus_1():
    order = BatchOrder()
    assert [order.batch(step) for step in (1, 2, 99)] == [0, 1, 98] and order.saved() == {}
    assert [order.batches_before(step) for step in (0, 1, 7)] == [0, 1, 7]


def test_batches_that_are_left_out():
    order = BatchOrder().back(10, 14)  # batches 10 to 13, of steps 11 to 14
    assert [order.batch(step) for step in (9, 10, 11, 12)] == [8, 9, 14, 15]
    assert order.batches_before(10) == 10 and order.batches_before(11) == 15
    again = order.back(8, 12)  # batches 8, 9, 14 and 15 too
    assert [again.batch(step) for step in (8, 9, 10)] == [7, 16, 17]
    later = order.back(20, 22)
    assert [later.batch(step) for step in (10, 11, 20, 21, 22)] == [9, 14, 23, 26, 27]
    assert BatchOrder.of(json.loads(json.dumps(later.saved()))).skips == later.skips == [(10, 4), (20, 6)]


def test_a_batch_that_is_left_out_is_never_taken_and_none_twice():
    rng, order, taken, step = np.random.default_rng(0), BatchOrder(), {}, 0
    for _ in range(300):
        step += 1
        taken[step] = order.batch(step)
        if rng.random() < 0.1:
            to = max(0, step - int(rng.integers(1, 9)))
            gone = {taken.pop(later) for later in range(to + 1, step + 1)}
            order, step = order.back(to, step), to
            assert order.batch(step + 1) == max(gone) + 1
    assert sorted(taken.values()) == list(taken.values()) and len(set(taken.values())) == len(taken)
    assert taken == {number: order.batch(number) for number in taken}, 'a pure function of the skips'
    assert batch_order.BatchOrder.of(None).skips == []


# ---- the rule --------------------------------------------------------------------

BACK = dict(train_spike_window=WINDOW, train_spike_action='rollback', train_max_spikes=2, train_rollback_steps=3)


def watch(tmp_path, position=None, step=0, back=None):
    return spikes.Spikes(small_config(**BACK), tmp_path, Batches(), step, position, back)


@pytest.mark.parametrize('bad', [30.0, math.nan])
def test_a_spike_sends_the_run_back(tmp_path, bad):
    watched = watch(tmp_path)
    for number in range(1, 11):
        watched.observe(number, values_of(3.0, update_norm=50.0 if number == 10 else 0.1))
    assert watched.counts() == {'spikes': 1}, 'the update norm alone is warned of'
    with pytest.raises(spikes.RollBack) as caught:
        watched.observe(11, values_of(bad))
    back = caught.value
    assert (back.step, back.to, back.order.skips, back.rollbacks) == (11, 8, [(8, 3)], [11])
    assert not any(record['step'] == 11 for record in told(tmp_path)), 'later records are dropped first'

    watched = watch(tmp_path, step=4, back=back)
    assert watched.counts() == {'spikes': 1, 'rollbacks': 1} and watched.order.skips == [(8, 3)]
    [record] = told(tmp_path)
    assert record['step'] == 11 and record['back_to'] == 8 and record['documents'] == [['', 10, 0, 32]]
    for number in range(5, 13):
        watched.observe(number, values_of(3.0))
    again = watch(tmp_path, json.loads(json.dumps(watched.saved())), 12)
    assert again.counts() == watched.counts() and again.order.skips == [(8, 3)]
    assert told(tmp_path) == [record], 'it stays over a restart'


def test_going_back_too_often_ends_the_run(tmp_path):
    watched, back = watch(tmp_path), None
    for number in range(1, 11):
        watched.observe(number, values_of(3.0))
    for _ in range(2):
        with pytest.raises(spikes.RollBack) as caught:
            watched.observe(11, values_of(math.inf))
        back = caught.value
        watched = watch(tmp_path, step=8, back=back)
        for number in range(9, 11):
            watched.observe(number, values_of(3.0))
    with pytest.raises(spikes.TooManySpikesError, match='3 of the last 8 steps'):
        watched.observe(11, values_of(math.inf))


# ---- runs --------------------------------------------------------------------------

STEPS, BAD = 40, 31
SETTINGS = dict(
    train__steps=STEPS,
    train__spike_window=16,
    train__eval_every_steps=0,
    train__checkpoint_every_steps=10,
    train__keep_last=1,
    train__keep_best=0,
    optimizer__clip_norm=0,
)
ROLLBACK = dict(train__spike_action='rollback', train__max_spikes=2, train__rollback_steps=4)


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp('run')
    return write_config(directory, prepare_bytes(directory))


@pytest.fixture(scope='module', autouse=True)
def compile_once():
    """All runs here are of one compiled step."""
    from transxssm_jax.training import compilation

    made, compile_step = [], compilation.compile_train_step

    def made_once(config, device_mesh):
        made[:] = made or [compile_step(config, device_mesh)]
        return made[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation, 'compile_train_step', made_once)
        yield


@pytest.fixture
def bad_batch(monkeypatch):
    """The batch with number BAD - 1 is spoiled, whichever step takes it and how often."""
    original = loop.to_devices

    def to_devices(run, batch):
        if run.next_batch == BAD:
            batch = batch | {
                'targets': np.where(batch['targets'] >= 0, 250 + batch['targets'] % 7, -1).astype(np.int32)
            }
        return original(run, batch)

    monkeypatch.setattr(loop, 'to_devices', to_devices)


def test_a_bad_batch_is_gone_back_from(config, tmp_path, bad_batch, capsys):
    workdir = tmp_path / 'run'
    result = train(config, workdir, **SETTINGS, **ROLLBACK)
    assert result.code == 0, result
    assert (
        'step 31 went wrong: back to step 27, from the checkpoint of step 20; the batches of the 4 steps' in result.out
    )
    lines = ledger_of(workdir)
    assert [line['step'] for line in lines] == list(range(1, STEPS + 1))
    numbers = [line.get('batch_number', line['step'] - 1) for line in lines]
    assert numbers == [*range(27), *range(31, STEPS + 4)], 'batches 27 to 30 are left out'
    assert losses(workdir).keys() == set(range(1, STEPS + 1))
    [spike] = told(workdir)
    assert (
        spike['step'] == BAD and spike['back_to'] == 27 and spike['documents'] and spike['loss'] > spike['loss_limit']
    )
    last = records(workdir)[-1]
    assert last['rollbacks'] == last['spikes'] == 1 and last['time/lost'] > 0
    position = json.loads((workdir / 'checkpoints' / '40' / 'data.json').read_text())
    assert position['skips'] == [[27, 4]] and position['next_step'] == 40

    # A run that only warns is thrown back by it; this one is as one that never saw the batch.
    assert train(config, tmp_path / 'warned', **SETTINGS).code == 0
    warned, found = losses(tmp_path / 'warned'), losses(workdir)
    assert warned[31] > 1.5 * warned[30]
    assert all(warned[step] > found[step - 4] + 0.05 for step in range(32, 36)), 'of the same batches'

    # Replay takes the same batches, over the place where some were left out, and after it.
    capsys.readouterr()
    for step in (29, 40):
        assert replay_command.main([f'--workdir={workdir}', f'--step={step}']) in (0, 2)
    out, err = capsys.readouterr()
    assert 'difference' not in out, out
    assert replay_command.main([f'--workdir={workdir}', '--step=29', '--documents']) in (0, 2)

    # Stopped and started at every place around it, the run ends as the one that was not.
    for stops in ([(29, 'SIGTERM')], [(24, 'SIGTERM'), (32, 'SIGUSR1')]):
        other = tmp_path / f'stopped{stops[0][0]}'
        for at, name in stops:
            with before_saving(at, send(name)):
                assert train(config, other, **SETTINGS, **ROLLBACK).code == 75
        assert train(config, other, **SETTINGS, **ROLLBACK).code == 0
        assert ledger_of(other) == lines
        assert losses(other) == found and told(other) == [spike]


def test_a_run_without_a_checkpoint_goes_back_to_its_beginning(config, tmp_path, monkeypatch):
    original = loop.to_devices

    def to_devices(run, batch):  # the third batch holds nothing to learn, and its loss is no number
        if run.next_batch == 3:
            run.state['params']['embedding'] = run.state['params']['embedding'] * math.nan
        return original(run, batch)

    monkeypatch.setattr(loop, 'to_devices', to_devices)
    settings = SETTINGS | dict(train__steps=8)
    result = train(config, tmp_path / 'run', **settings, **ROLLBACK)
    assert result.code == 0, result
    assert 'step 3 went wrong: back to step 0; the batches of the 3 steps' in result.out
    lines = ledger_of(tmp_path / 'run')
    assert [line['batch_number'] for line in lines] == list(range(3, 11))
    assert checkpoint_steps(tmp_path / 'run') == [8]
    assert replay_command.main([f'--workdir={tmp_path / "run"}', '--step=8']) == 2, 'no checkpoint before it'


def test_a_batch_that_stays_bad_ends_the_run(config, tmp_path, monkeypatch):
    original = loop.to_devices

    def to_devices(run, batch):
        if run.next_batch >= BAD:
            batch = batch | {
                'targets': np.where(batch['targets'] >= 0, 250 + batch['targets'] % 7, -1).astype(np.int32)
            }
        return original(run, batch)

    monkeypatch.setattr(loop, 'to_devices', to_devices)
    result = train(config, tmp_path / 'run', **SETTINGS, **ROLLBACK)
    assert result.code == 3
    assert 'steps were spikes, more than train.max_spikes=2' in result.err.splitlines()[-1]
    assert result.out.count('went wrong') == 2
