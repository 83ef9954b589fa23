"""The average of the weights through a run: kept in checkpoints, resumed, evaluated, read and exported by a word."""

import json

import jax
import numpy as np
import pytest
from train_fixtures import compiled_once, prepare_bytes, records, train, write_config

from transxssm_jax import convert, generate
from transxssm_jax.pytorch.conversion import open_weights
from transxssm_jax.training import checkpoint

SETTINGS = dict(
    train__steps=4,
    train__checkpoint_every_steps=2,
    train__eval_every_steps=2,
    train__keep_last=4,
    optimizer__name='muon',
    optimizer__ema_decay=0.9,
    train__eval_weights='ema',
    mesh__fsdp=2,
    mesh__tensor=2,
)


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp('ema')
    with compiled_once(directory):
        yield write_config(directory, prepare_bytes(directory))


@pytest.fixture(scope='module')
def whole(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('whole') / 'run'
    result = train(config, workdir, **SETTINGS)
    assert result.code == 0, result
    return workdir


def eval_losses(workdir):
    return {r['step']: r['eval_loss'] for r in records(workdir) if 'eval_loss' in r}


def test_a_resumed_run_goes_on_with_its_average_and_evaluates_what_it_is_told(config, whole, tmp_path):
    workdir = tmp_path / 'run'
    assert train(config, workdir, **SETTINGS | dict(train__steps=2, train__eval_weights='trained')).code == 0
    assert train(config, workdir, **SETTINGS).code == 0
    for weights in checkpoint.WEIGHTS:
        ours, theirs = (checkpoint.load_trained(run, 4, weights)[0] for run in (workdir, whole))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    ours, theirs = eval_losses(workdir), eval_losses(whole)
    assert ours[4] == theirs[4] and abs(ours[2] - theirs[2]) > 1e-5, 'at 2 of the trained weights, at 4 of the average'
    assert json.loads((whole / 'checkpoints/4/metrics.json').read_text())['eval_loss'] == theirs[4]


def test_the_average_is_generated_from_and_exported_by_a_word(whole, tmp_path, capsys):
    average, _ = checkpoint.load_trained(whole, weights='ema')
    trained, _ = checkpoint.load_trained(whole)
    assert not np.array_equal(average['embedding'], trained['embedding'])
    assert generate.main([f'--workdir={whole}', '--weights=ema', '--prompt=a', '--max_tokens=2']) == 0
    for weights, expected in (('ema', average), ('trained', trained)):
        out = tmp_path / weights
        code = convert.main(['export', f'--workdir={whole}', f'--output={out}', f'--weights={weights}'])
        assert code == 0, capsys.readouterr()
        np.testing.assert_array_equal(open_weights(out)[0][('embedding',)].read(), expected['embedding'])


def test_a_run_without_an_average_is_named(config, tmp_path, capsys):
    assert train(config, tmp_path / 'run', train__steps=2, train__eval_every_steps=0).code == 0
    for main, *flags in ((generate.main, '--prompt=a'), (convert.main, 'export', f'--output={tmp_path / "out"}')):
        assert main([*flags, f'--workdir={tmp_path / "run"}', '--weights=ema']) == 2
        error = capsys.readouterr().err
        assert 'has no average of the weights' in error and '--weights=trained' in error and error.count('\n') == 1


def test_a_new_run_begins_its_average_with_what_it_starts_from(config, whole, tmp_path):
    from transxssm_jax.training import loop

    seen = []
    loop.after_step_callbacks.append(lambda run: seen.append(jax.device_get(run.state['ema'])))
    try:
        settings = SETTINGS | dict(train__steps=2, train__init_from=f'{whole}@4', optimizer__warmup_steps=2)
        assert train(config, tmp_path / 'new', **settings).code == 0
    finally:
        loop.after_step_callbacks.pop()
    start, _ = checkpoint.load_trained(whole, 4)  # the first step of a warmup from 0 changes nothing
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), seen[0], jax.device_get(start))


def test_evaluating_an_average_needs_one(config, tmp_path):
    result = train(config, tmp_path / 'run', train__eval_weights='ema')
    assert result.code == 2 and 'set optimizer.ema_decay' in result.err
