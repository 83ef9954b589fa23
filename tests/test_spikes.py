"""Spikes: a bad batch is seen, skipped and named; a normal run raises no alarm; and every mesh and start decides alike."""

import json
import logging
import pathlib

import jax
import numpy as np
import pytest
from small import packed_batch, small_config
from train_fixtures import before_saving, losses, prepare_bytes, records, send, train, write_config

from transxssm_jax import config as config_lib
from transxssm_jax.config import ConfigError
from transxssm_jax.parallel import mesh
from transxssm_jax.training import loop, spikes, step

WINDOW = 8
DATA = pathlib.Path(__file__).parent / 'data'


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp('run')
    return write_config(directory, prepare_bytes(directory))


class Batches:
    """What a `spikes.Spikes` asks of a loader: one row a step, of one document, whose number is the step's."""

    parts = [type('Part', (), {'name': ''})]

    def row_spans(self, step):
        return [(0, [(step, 0, 32)])]


def watch(tmp_path, position=None, step=0, **settings):
    settings = dict(train_spike_window=WINDOW) | settings
    return spikes.Spikes(small_config(**settings), tmp_path, Batches(), step, position)


def values_of(loss, grad_norm=1.0, update_norm=0.1, **more):
    return {'loss': loss, 'grad_norm': grad_norm, 'update_norm': update_norm, **more}


def normal_losses(steps, seed=0):
    """Of a run: a fall from ln(50304) to about 2.7, with the spread of batches, and gradient norms of a factor of 1.3."""
    rng = np.random.default_rng(seed)
    t = np.arange(1, steps + 1)
    fall = 2.7 + 8.1 * np.exp(-t / 60) + 2 * t**-0.5
    return fall * np.exp(0.02 * rng.standard_normal(steps)), np.exp(0.25 * rng.standard_normal(steps)) * (0.4 + 3 / t)


def told(path):
    return [json.loads(line) for line in (path / spikes.FILE).read_text().splitlines()]


# ---- the rule ----------------------------------------------------------------


def test_a_normal_run_raises_no_alarm_and_a_spike_does(tmp_path, caplog):
    watched = watch(tmp_path, train_spike_window=128)
    for number, (loss, norm) in enumerate(zip(*normal_losses(5000)), 1):
        watched.observe(number, values_of(loss, norm, 0.1 * norm))
    assert watched.counts() == {} and not caplog.records
    watched.observe(5001, values_of(loss * 1.3, norm))
    assert watched.counts() == {'spikes': 1}
    [line] = caplog.messages
    assert 'step 5001 is a spike: loss ' in line and 'grad_norm' not in line, 'only what is above its limit is named'
    assert ' 5000 0 32' in line, 'the document of the batch that made step 5001'
    assert told(tmp_path)[0]['documents'] == [['', 5000, 0, 32]]


def test_a_real_run_raises_no_alarm(tmp_path):
    """The 600 steps of configs/30m.py on an H100, one of whose gradient norms is twice the median, at a spread of 0.09."""
    watched = watch(tmp_path, train_spike_window=128)
    steps = np.loadtxt(DATA / 'run_30m.csv', delimiter=',', skiprows=1)
    assert steps.shape == (600, 3) and steps[477, 1] > 1.9 * np.median(steps[349:477, 1])
    for number, values in enumerate(steps.tolist(), 1):
        watched.observe(number, values_of(*values))
    assert watched.counts() == {}


def test_norms_have_heavy_tails(tmp_path):
    """Of a run at 20M: gradient norms of 0.34, within 5%, and single ones of up to 1.045, without a trace in the loss."""
    rng, watched = np.random.default_rng(0), watch(tmp_path, train_spike_window=128)
    for number in range(1, 301):
        norm = {150: 1.045, 200: 0.816, 210: 0.740, 280: 0.552}.get(number, 0.34 * np.exp(0.05 * rng.standard_normal()))
        watched.observe(number, values_of(4.3, norm))
    assert watched.counts() == {}
    watched.observe(301, values_of(4.3, 5 * 0.34))
    assert watched.counts() == {'spikes': 1}


@pytest.mark.parametrize('name', spikes.WATCHED)
def test_each_value_is_watched(tmp_path, name):
    watched = watch(tmp_path)
    for number in range(1, 11):
        watched.observe(number, values_of(3.0))
    watched.observe(11, values_of(3.0) | {name: 100.0})
    assert watched.counts() == {'spikes': 1}
    watched.observe(12, values_of(3.0) | {name: 1e-3})
    assert watched.counts() == {'spikes': 1}, 'a value below is none'


def test_the_limits_follow_a_lasting_change(tmp_path):
    watched = watch(tmp_path)
    for number in range(1, 41):
        watched.observe(number, values_of(2.0 if number <= 20 else 4.0))
    assert 1 <= watched.counts()['spikes'] <= WINDOW
    watched.observe(41, values_of(4.0))
    assert told(tmp_path)[-1]['step'] < 21 + WINDOW


def test_the_step_before_takes_no_part_in_the_limits(tmp_path):
    """Its metrics are still on the devices, unless a record was due."""
    watched = watch(tmp_path, train_spike_action='skip', train_max_spikes=3)
    for number in range(1, 21):
        watched.observe(number, values_of(2.0 + 0.1 * (number % 3)))
    [before] = watched.limits(22)
    watched.observe(21, values_of(40.0))
    [after] = watched.limits(22)
    np.testing.assert_array_equal(before, after)
    assert before.dtype == np.float32 and before.shape == (2,) and 2.2 < before[0] < 4


def test_a_resumed_run_decides_alike(tmp_path):
    (run_losses, norms), whole = normal_losses(60), watch(tmp_path / 'whole', train_spike_threshold=1.5)
    norms = norms**2  # of heavy tails
    tmp_path.joinpath('whole').mkdir()
    tmp_path.joinpath('cut').mkdir()
    for number in range(1, 61):
        whole.observe(number, values_of(run_losses[number - 1], norms[number - 1]))
    cut = watch(tmp_path / 'cut', train_spike_threshold=1.5)
    for number in range(1, 61):
        if number % 7 == 0:
            position = json.loads(json.dumps(cut.saved()))
            cut = watch(tmp_path / 'cut', position, number - 1, train_spike_threshold=1.5)
        cut.observe(number, values_of(run_losses[number - 1], norms[number - 1]))
    assert whole.counts()['spikes'] >= 2
    assert cut.saved() == whole.saved()
    assert told(tmp_path / 'cut') == told(tmp_path / 'whole')


def test_too_many_spikes_end_the_run(tmp_path):
    watched = watch(tmp_path, train_max_spikes=2)
    for number in range(1, 60):  # one in every window: never too many
        watched.observe(number, values_of(30.0 if number % WINDOW == 0 else 3.0))
    watched.observe(60, values_of(30.0))
    with pytest.raises(
        spikes.TooManySpikesError, match=r'step 61: 3 of the last 8 steps.*train.max_spikes=2'
    ) as caught:
        watched.observe(61, values_of(30.0))
    assert caught.value.exit_code == 3 and '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'settings, message',
    [
        ({'train.spike_action': 'skip'}, r"spike_action='skip' needs train.max_spikes of at least 1.*try 16"),
        ({'train.keep_every_steps': 1500}, r'must be a multiple of train.checkpoint_every_steps=1000.*try 2000'),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        config_lib.replace(small_config(), settings)


# ---- the step ------------------------------------------------------------------


def decisions(num_devices, **axes):
    """[skipped] of steps whose limits are around their values, and the parameters after them."""
    config = small_config(train_spike_action='skip', train_max_spikes=1, **axes)
    device_mesh = mesh.build(config, jax.devices()[:num_devices])
    shardings, rows = step.state_shardings(config, device_mesh), step.batch_sharding(device_mesh)
    whole = mesh.sharding(device_mesh, ())
    run = jax.jit(
        step.train_step(config),
        donate_argnums=0,
        in_shardings=(shardings, rows, whole),
        out_shardings=(shardings, whole),
    )
    state, skipped = step.create_state(config, device_mesh), []
    with jax.set_mesh(device_mesh):
        for seed, limits in enumerate([(5, 9), (4, 9), (np.inf, 0.01), (np.inf, np.inf)]):
            before = jax.device_get({name: state[name] for name in ('params', 'opt_state')})
            batch = jax.device_put(packed_batch(config, seed), rows)
            state, metrics = run(state, batch, np.array(limits, np.float32))
            skipped.append(float(metrics['skipped']))
            after = jax.device_get({name: state[name] for name in ('params', 'opt_state')})
            is_same = jax.tree.leaves(jax.tree.map(np.array_equal, before, after))
            assert all(is_same) if skipped[-1] else not all(is_same)
            assert int(state['step']) == seed + 1
    return skipped


def test_the_step_decides_alike_on_every_mesh():
    assert decisions(1) == [0, 1, 1, 0]
    assert decisions(8, mesh_data=2, mesh_fsdp=2, mesh_tensor=2) == [0, 1, 1, 0]


# ---- runs ------------------------------------------------------------------------

SPIKY = dict(train__steps=40, train__spike_window=16, train__eval_every_steps=0, optimizer__clip_norm=0)


def spoiled(monkeypatch, at, how):
    """The batch of step `at` is spoiled."""
    original = loop.to_devices
    seen = {}

    def to_devices(run, batch):
        if run.step + 1 == at and 'done' not in seen:
            batch = how(batch)
        return original(run, batch)

    monkeypatch.setattr(loop, 'to_devices', to_devices)


def with_wrong_targets(batch):
    """Targets that the data never has, so that the loss jumps."""
    return batch | {'targets': np.where(batch['targets'] >= 0, 250 + batch['targets'] % 7, -1).astype(np.int32)}


def test_a_bad_batch_is_skipped_and_named(config, tmp_path, monkeypatch):
    """Without clipping it throws the run back; skipped, its losses are those of a run that never learned from it."""
    undisturbed = train(config, tmp_path / 'undisturbed', **SPIKY)
    assert undisturbed.code == 0 and not (tmp_path / 'undisturbed' / spikes.FILE).exists(), 'no false alarm'

    spoiled(monkeypatch, 31, with_wrong_targets)
    skip = dict(train__spike_action='skip', train__max_spikes=2)
    assert train(config, tmp_path / 'warned', **SPIKY).code == 0
    result = train(config, tmp_path / 'skipped', **SPIKY, **skip)
    assert result.code == 0, result

    normal, warned, skipped = (losses(tmp_path / name) for name in ('undisturbed', 'warned', 'skipped'))
    assert warned[31] == skipped[31] > 1.5 * normal[31]
    assert warned[32] > normal[32] + 0.2, 'the batch does harm'
    assert abs(skipped[32] - normal[32]) < 0.1 and abs(skipped[40] - normal[40]) < 0.1
    [line] = told(tmp_path / 'skipped')
    assert line['step'] == 31 and line['skipped'] is True and line['loss'] > line['loss_limit'] and line['documents']
    assert told(tmp_path / 'warned')[0]['skipped'] is False
    assert records(tmp_path / 'skipped')[-1]['skipped_steps'] == 1

    # Interrupted just before the spike, it decides alike.
    for stop_at in (30,):
        workdir = tmp_path / f'stopped{stop_at}'
        with before_saving(stop_at, send('SIGTERM')):
            assert train(config, workdir, **SPIKY, **skip).code == 75
        assert train(config, workdir, **SPIKY, **skip).code == 0
        assert losses(workdir) == skipped
        assert told(workdir) == [line]


def test_a_step_that_is_not_finite_is_skipped_too(config, tmp_path, monkeypatch):
    original = step.train_step

    def poisoned(config):
        one = original(config)

        def run(state, batch, limits):
            at = state['step'] + 1
            params = jax.tree.map(lambda p: jax.numpy.where(at == 5, jax.numpy.nan, p), state['params'])
            after, metrics = one(state | {'params': params}, batch, limits)
            is_bad = metrics['skipped'] > 0  # the parameters before this step were whole
            kept = jax.tree.map(lambda new, old: jax.numpy.where(is_bad, old, new), after['params'], state['params'])
            return after | {'params': kept}, metrics

        return run

    monkeypatch.setattr(step, 'train_step', poisoned)
    result = train(config, tmp_path / 'run', **SPIKY, train__spike_action='skip', train__max_spikes=1)
    assert result.code == 0, result
    found = records(tmp_path / 'run')
    assert 'loss' not in found[4] and found[4]['step'] == 5 and found[-1]['skipped_steps'] == 1
    assert all(np.isfinite(record['loss']) for record in found if record['step'] != 5)
    assert told(tmp_path / 'run')[0]['loss'] == 'nan'


def test_a_run_of_bad_batches_ends_with_code_3(config, tmp_path, monkeypatch):
    original = loop.to_devices
    monkeypatch.setattr(
        loop,
        'to_devices',
        lambda run, batch: original(run, with_wrong_targets(batch) if run.step >= 30 else batch),
    )
    result = train(config, tmp_path / 'run', **SPIKY, train__spike_action='skip', train__max_spikes=2)
    assert result.code == 3
    assert 'step 33: 3 of the last 16 steps were spikes, more than train.max_spikes=2' in result.err.splitlines()[-1]


def test_checkpoints_are_kept_for_good(config, tmp_path):
    from train_fixtures import checkpoint_steps

    settings = SPIKY | dict(train__steps=20, train__checkpoint_every_steps=2, train__keep_last=1, train__keep_best=0)
    assert train(config, tmp_path / 'run', **settings, train__keep_every_steps=6).code == 0
    assert checkpoint_steps(tmp_path / 'run') == [6, 12, 18, 20]


def test_a_warning_goes_to_the_log_once(config, tmp_path, monkeypatch, caplog):
    spoiled(monkeypatch, 31, with_wrong_targets)
    with caplog.at_level(logging.WARNING):
        assert train(config, tmp_path / 'run', **SPIKY).code == 0
    assert len([line for line in caplog.messages if 'step 31 is a spike' in line]) == 1
