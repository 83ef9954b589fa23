"""Checkpoints on the hosts' own disks: preferred where they are whole and newer, and never anything else."""

import json
import shutil

import jax
import numpy as np
import pytest
from small import small_config
from test_checkpoint import make_state
from train_fixtures import before_saving, losses, prepare_bytes, send, train, write_config

from transxssm_jax.training import compilation, local_checkpoint
from transxssm_jax.training.local_checkpoint import LocalCheckpoints


def abstract(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


@pytest.fixture
def opened(tmp_path):
    def opened(workdir='run', **settings):
        settings = (
            dict(train_checkpoint_local_dir=str(tmp_path / 'local'), train_checkpoint_local_every_steps=2) | settings
        )
        return LocalCheckpoints(tmp_path / workdir, small_config(**settings))

    return opened


def save(local, *steps, sharding=None):
    for step in steps:
        local.save(step, make_state(step, sharding), {'next_step': step})
        local.wait()


def test_the_newest_two_are_kept_and_the_newest_comes_back(opened, tmp_path):
    local = opened()
    assert [local.is_due(step) for step in (1, 2, 3, 4)] == [False, True, False, True]
    save(local, 2, 4, 6)
    again = opened()
    assert again.steps() == [4, 6]
    step, state, position = again.restore(abstract(make_state(0)), newer_than=3)
    assert step == 6 and position == {'next_step': 6} and again.restored_config is not None
    jax.tree.map(np.testing.assert_array_equal, state, make_state(6))
    assert again.restore(abstract(make_state(0)), newer_than=6) is None
    again.forget_after(4)
    assert again.steps() == [4]
    again.remove()
    assert not any((tmp_path / 'local').iterdir())


def test_what_is_saved_is_not_what_the_next_step_writes(opened):
    local, state = opened(), make_state(2)
    local.save(2, state, {})
    add = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    add(state)
    local.wait()
    jax.tree.map(np.testing.assert_array_equal, local.restore(abstract(make_state(0)), 0)[1], make_state(2))


def test_shards_come_back_where_the_mesh_is_the_same(opened):
    devices = np.array(jax.devices())
    split = jax.sharding.NamedSharding(
        jax.sharding.Mesh(devices.reshape(4, 2), ('a', 'b')), jax.sharding.PartitionSpec('a', 'b')
    )
    x = jax.device_put(np.arange(64.0, dtype=np.float32).reshape(8, 8), split)
    local = opened()
    local.save(2, {'x': x}, {})
    local.wait()
    _, state, _ = local.restore(abstract({'x': x}), 0)
    assert state['x'].sharding == split
    np.testing.assert_array_equal(state['x'], x)
    other = jax.sharding.NamedSharding(split.mesh, jax.sharding.PartitionSpec('b', 'a'))
    assert local.restore({'x': jax.ShapeDtypeStruct((8, 8), np.float32, sharding=other)}, 0) is None


@pytest.mark.parametrize('name', ['state.safetensors', 'config.json', 'data.json', 'digests.json'])
@pytest.mark.parametrize('damage', ['cut', 'flip', 'gone'])
def test_a_damaged_one_gives_way(opened, caplog, name, damage):
    local = opened()
    save(local, 2, 4)
    path = local._directory / '4' / name
    content = path.read_bytes()
    if damage == 'gone':
        path.unlink()
    else:
        flipped = content[:5] + bytes([content[5] ^ 1]) + content[6:]
        path.write_bytes(content[: len(content) // 2] if damage == 'cut' else flipped)
    step, state, _ = local.restore(abstract(make_state(0)), 0)
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, state, make_state(2))
    assert 'the local checkpoint of step 4' in caplog.messages[0] and 'is not used' in caplog.messages[0]


def test_those_of_another_run_or_config_are_not_taken(opened, tmp_path):
    save(opened(), 2)
    assert opened('other').restore(abstract(make_state(0)), 0) is None
    assert opened(model_d_mlp=64).restore(abstract(make_state(0)), 0) is None
    assert opened().restore(abstract(make_state(0)), 0)[0] == 2
    shutil.rmtree(tmp_path / 'run' / 'checkpoints')  # started anew
    assert opened().restore(abstract(make_state(0)), 0) is None


def test_a_write_that_fails_costs_nothing_else(opened, monkeypatch, caplog):
    local = opened()
    save(local, 2)

    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(local_checkpoint, 'save_file', full)
    save(local, 4)
    assert 'could not be written' in caplog.messages[0] and local.steps() == [2]
    assert not list(local._directory.glob('*.partial'))


def test_without_a_directory_nothing_happens(tmp_path):
    local = LocalCheckpoints(tmp_path, small_config())
    assert not local.is_due(4) and local.restore({}, 0) is None and local.steps() == []
    local.forget_after(0)
    local.remove()
    assert not any(tmp_path.iterdir())


# ---- runs ----------------------------------------------------------------------


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp('run')
    return write_config(directory, prepare_bytes(directory))


@pytest.fixture
def compile_once(monkeypatch):
    made, compile_step = [], compilation.compile_train_step

    def made_once(config, device_mesh):
        made[:] = made or [compile_step(config, device_mesh)]
        return made[0]

    monkeypatch.setattr(compilation, 'compile_train_step', made_once)


def test_a_restart_prefers_the_local_one_and_changes_no_number(config, tmp_path, compile_once):
    settings = dict(train__eval_every_steps=0, train__checkpoint_every_steps=8, train__steps=14)
    local = dict(train__checkpoint_local_dir=tmp_path / 'local', train__checkpoint_local_every_steps=3)
    whole = train(config, tmp_path / 'whole', **settings)
    assert whole.code == 0, whole
    workdir = tmp_path / 'run'
    with before_saving(11, send('SIGINT')), before_saving(11, send('SIGINT')):  # twice: nothing more is saved
        assert train(config, workdir, **settings, **local).code == 130
    assert [path.name for path in sorted((tmp_path / 'local').glob('*/process-0/*'))] == ['6', '9']
    result = train(config, workdir, **settings, **local)
    assert result.code == 0 and '\nresuming from step 9, local\n' in result.out, result
    assert losses(workdir) == losses(tmp_path / 'whole')
    assert not any((tmp_path / 'local').iterdir()), 'the run is finished'
    lines = [(path / 'ledger' / 'process-0.jsonl').read_text().splitlines() for path in (workdir, tmp_path / 'whole')]
    left, right = ([{**json.loads(line), 'config': '', 'sum': ''} for line in own] for own in lines)
    assert left == right
