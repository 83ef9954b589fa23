"""The record of the layers' health: half-lives by their definition, gradients by layer, and histograms."""

import json

import numpy as np
import pytest
from small import small_config
from train_fixtures import prepare_bytes, train, write_config

from transxssm_jax.model import parameters
from transxssm_jax.training import layer_health


def test_half_life_is_after_how_many_tokens_half_is_left():
    config = small_config()
    params = parameters.init_params(config.model, 0)
    mixer = params['layers']['ssd']['mixer']
    measured = layer_health.memory_of_heads(params, config.model.dt_min, config.model.dt_max)
    half_life = np.asarray(measured['half_life_tokens']['layers/ssd/mixer'])
    assert half_life.shape == mixer['a_log'].shape == (2, 3, 4)
    kept_per_token = np.exp(-np.logaddexp(0, mixer['dt_bias']) * np.exp(mixer['a_log']))
    np.testing.assert_allclose(kept_per_token**half_life, 0.5, rtol=1e-4)
    assert float(measured['dt_outside']['layers/ssd/mixer']) == 0, 'dt starts within its limits'

    mixer['dt_bias'] = mixer['dt_bias'].at[0, 0, 0].set(5.0).at[1, 2, 3].set(-20.0)
    measured = layer_health.memory_of_heads(params, config.model.dt_min, config.model.dt_max)
    assert float(measured['dt_outside']['layers/ssd/mixer']) == pytest.approx(2 / 24)


def test_a_run_writes_records_and_histograms(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, workdir = write_config(tmp_path, prepare_bytes(tmp_path)), tmp_path / 'run'
    settings = dict(train__health_every_steps=4, train__tensorboard=True, train__eval_every_steps=0)
    assert train(config, workdir, train__steps=8, **settings).code == 0
    assert train(config, workdir, train__steps=12, **settings).code == 0
    found = [json.loads(line) for line in (workdir / 'health.jsonl').read_text().splitlines()]
    assert [record['step'] for record in found] == [4, 8, 12]
    assert np.shape(found[0]['half_life_tokens']['layers/ssd/mixer']) == (1, 1, 2)
    assert np.shape(found[0]['grad_norms']['layers/ssd/mixer/a_log']) == (1, 1)
    assert np.isfinite(found[2]['grad_norms']['embedding'])
    norms = {tuple(np.ravel(record['grad_norms']['layers/attention/mlp/out_proj/kernel'])) for record in found}
    assert len(norms) == 3 and all(norm > 0 for (norm,) in norms)

    events = EventAccumulator(str(workdir / 'tensorboard' / 'layers'))
    events.Reload()
    steps = [event.step for event in events.Tensors('half_life_tokens_log10/layers/ssd/mixer')]
    assert steps == [4, 8, 12]


def test_it_is_off_by_default(tmp_path):
    health = layer_health.LayerHealth(tmp_path, small_config(), None, 0)
    health.write_if_due(10, {}, {})
    assert not list(tmp_path.iterdir())
