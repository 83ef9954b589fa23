"""What a run prints about its settings, and what a resumed one says of its learning rate."""

import dataclasses
import types

import pytest
from small import small_config

from transxssm_jax.parallel import mesh
from transxssm_jax.training import announcement, optimizer


def changed(step=10, **settings):
    saved = dict(optimizer_learning_rate=1e-2, optimizer_schedule='cosine', train_steps=20, optimizer_warmup_steps=2)
    return announcement.describe_resumption(small_config(**saved), small_config(**(saved | settings)), step)


@pytest.mark.parametrize(
    'groups, idle', [('', []), ('dt: 0.3', []), ('convolution: 2; dt: 0.3; biases: 1', ['biases', 'convolution'])]
)
def test_groups_without_parameters_are_named(groups, idle, monkeypatch):
    """Configs are shared between architectures, so that such a group is no error."""
    monkeypatch.setattr(announcement.splits, 'describe', lambda config, loader: [])
    config = small_config(optimizer_groups=groups)
    lines = announcement.describe(config, mesh.build(config), types.SimpleNamespace(num_tokens=100), 'runs/a', 10.0)
    found = [line.split()[-1] for line in lines if 'this model has no parameters in' in line]
    assert found == idle


@pytest.mark.parametrize('dtype, is_told', [('bfloat16', True), ('float32', False)])
def test_that_a_cpu_is_slow_in_bfloat16_is_told(dtype, is_told, monkeypatch):
    monkeypatch.setattr(announcement.splits, 'describe', lambda config, loader: [])
    config = small_config(model_dtype=dtype)
    lines = announcement.describe(config, mesh.build(config), types.SimpleNamespace(num_tokens=100), 'runs/a', 10.0)
    assert any('--config.model.dtype=float32' in line for line in lines) == is_told


def test_the_same_settings_need_one_line():
    assert changed() == ['resuming from step 10']


def test_what_changed_is_named_and_a_rate_that_did_not_change_is_not():
    lines = changed(train_log_every_steps=5, mesh_fsdp=2)
    assert lines[1:] == [
        'changed since the checkpoint of step 10:',
        '  train.log_every_steps 10 -> 5',
        '  mesh.fsdp 1 -> 2',
    ]


def test_the_rate_that_follows_a_changed_peak_is_named():
    lines = changed(optimizer_learning_rate=2e-2)
    assert lines[2] == '  optimizer.learning_rate 0.01 -> 0.02'
    before = float(optimizer.schedule(small_config(train_steps=20))(10))
    assert (
        f'learning rate of the next step is {2 * before:.4g}; with the settings of the checkpoint it was {before:.4g}'
        in (lines[-1])
    )
    assert 'moves the' not in lines[-1]


def test_a_stretched_schedule_is_named():
    lines = changed(step=20, train_steps=200)
    rate = float(optimizer.schedule(small_config(train_steps=200))(20))
    assert rate > 5 * 1e-3
    assert f'next step is {rate:.4g}; with the settings of the checkpoint it was 0.001' in lines[-1]
    assert "train.steps=200 moves the 'cosine' schedule of 20 steps, which alone makes it" in lines[-1]


@pytest.mark.parametrize('schedule', ['constant', 'wsd'])
def test_more_steps_of_a_schedule_that_does_not_depend_on_them(schedule):
    settings = dict(optimizer_schedule=schedule, optimizer_decay_steps=2, optimizer_warmup_steps=2)
    saved, now = small_config(train_steps=20, **settings), small_config(train_steps=200, **settings)
    assert announcement.describe_resumption(saved, now, 10)[-1] == '  train.steps 20 -> 200'


def test_the_configs_are_left_as_they_were():
    saved, now = small_config(), small_config(train_steps=200)
    before = dataclasses.asdict(saved), dataclasses.asdict(now)
    announcement.describe_resumption(saved, now, 15)
    assert (dataclasses.asdict(saved), dataclasses.asdict(now)) == before
