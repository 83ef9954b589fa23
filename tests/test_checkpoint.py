"""Checkpoints: what is kept, what is skipped with a warning, and what is refused."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small import small_config

from transxssm_jax import config as config_lib
from transxssm_jax.training import checkpoint
from transxssm_jax.training.checkpoint import CheckpointError, Checkpoints


def make_state(step, sharding=None):
    state = {
        'step': jnp.int32(step),
        'params': {
            'embedding': step + jnp.arange(64.0).reshape(8, 8),
            'layers': {'ssd': {'scale': jnp.full(8, step, jnp.float32)}},
        },
    }
    return jax.device_put(state, sharding) if sharding else state


def abstract(sharding=None):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or leaf.sharding), make_state(0)
    )


@pytest.fixture
def opened(tmp_path):
    """Opens the checkpoints of one workdir, again and again, as runs do."""
    managers = []

    def opened(**settings):
        for manager in managers:
            manager.close()
        managers[:] = [Checkpoints(tmp_path, small_config(**settings))]
        return managers[0]

    yield opened
    for manager in managers:
        manager.close()


def save(checkpoints, step, eval_loss=None):
    checkpoints.save(step, make_state(step), {'next_step': step}, eval_loss)
    checkpoints.wait()


def assert_is(restored, step):
    assert restored[0] == step and restored[2] == {'next_step': step}
    jax.tree.map(np.testing.assert_array_equal, restored[1], make_state(step))


def directory(tmp_path, step):
    return tmp_path / 'checkpoints' / str(step)


def damage(tmp_path, step, item='state'):
    for path in (directory(tmp_path, step) / item).rglob('*'):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:5])


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name == checkpoint.__name__]


def test_without_a_checkpoint_there_is_nothing_to_restore(opened):
    assert opened().restore(abstract()) is None


def test_the_newest_comes_back(opened, caplog):
    checkpoints = opened()
    save(checkpoints, 3)
    save(checkpoints, 7)
    assert_is(opened().restore(abstract()), 7)
    assert not messages(caplog)


def test_a_state_comes_back_on_another_mesh(opened):
    devices = np.array(jax.devices())
    eight = NamedSharding(jax.sharding.Mesh(devices, 'a'), PartitionSpec())
    split = NamedSharding(jax.sharding.Mesh(devices.reshape(4, 2), ('a', 'b')), PartitionSpec('b', 'a'))
    checkpoints = opened()
    checkpoints.save(4, {'x': jax.device_put(jnp.arange(64.0).reshape(8, 8), split)}, {'next_step': 4})
    checkpoints.wait()
    for sharding in (
        eight,
        NamedSharding(split.mesh, PartitionSpec('a', 'b')),
        jax.sharding.SingleDeviceSharding(devices[3]),
    ):
        _, state, _ = opened().restore({'x': jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)})
        assert state['x'].sharding == sharding
        np.testing.assert_array_equal(state['x'], np.arange(64.0).reshape(8, 8))


def test_a_checkpoint_is_plain_nested_arrays(opened, tmp_path):
    import orbax.checkpoint as ocp

    save(opened(), 5)
    state = ocp.StandardCheckpointer().restore(directory(tmp_path, 5) / 'state')
    assert state.keys() == {'step', 'params'} and state['params'].keys() == {'embedding', 'layers'}
    np.testing.assert_array_equal(state['params']['layers']['ssd']['scale'], np.full(8, 5.0))


def test_keep_last(opened):
    checkpoints = opened(train_keep_last=2, train_keep_best=0)
    for step in (1, 2, 3, 4):
        save(checkpoints, step, eval_loss=step)
    assert checkpoints.steps() == [3, 4]


def test_keep_best_survives_newer_ones_and_a_restart(opened):
    settings = dict(train_keep_last=1, train_keep_best=2)
    checkpoints = opened(**settings)
    for step, eval_loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, None)):
        save(checkpoints, step, eval_loss)
    assert checkpoints.steps() == [2, 4, 5]
    checkpoints = opened(**settings)
    for step, eval_loss in ((6, None), (7, 1.5), (8, None), (9, 5.0)):
        save(checkpoints, step, eval_loss)
    assert checkpoints.steps() == [2, 7, 9]
    assert_is(checkpoints.restore(abstract()), 9)


def test_an_evaluation_made_up_later_counts_among_the_best(opened):
    settings = dict(train_keep_last=1, train_keep_best=1)
    checkpoints = opened(**settings)
    save(checkpoints, 1, 2.0)
    save(checkpoints, 2)
    checkpoints.evaluated(2, 1.0)
    assert checkpoints.steps() == [1, 2], 'nothing goes before the next is saved'
    save(checkpoints, 3, 5.0)
    assert checkpoints.steps() == [2, 3]
    checkpoints = opened(**settings)
    save(checkpoints, 4)
    assert checkpoints.steps() == [2, 4]


@pytest.mark.parametrize(
    'error',
    [
        PermissionError(13, 'Permission denied'),
        ValueError('UNAVAILABLE: Connection reset'),
        OSError(5, 'Input/output error'),
    ],
    ids=str,
)
def test_an_error_that_may_pass_is_no_damage(opened, tmp_path, monkeypatch, error):
    checkpoints = opened()
    save(checkpoints, 3)

    def restore(*args, **kwargs):
        raise error

    monkeypatch.setattr(checkpoint.ocp.StandardCheckpointHandler, 'restore', restore)
    with pytest.raises(CheckpointError, match='cannot be read now.*run the same command again'):
        checkpoints.restore(abstract())
    assert directory(tmp_path, 3).is_dir(), 'and it is not set aside'


def test_an_incomplete_checkpoint_is_skipped_with_a_warning(opened, tmp_path, caplog):
    save(opened(), 3)
    unfinished = tmp_path / 'checkpoints' / '8.orbax-checkpoint-tmp-123'
    (unfinished / 'state').mkdir(parents=True)
    assert_is(opened().restore(abstract()), 3)
    assert messages(caplog) == [f'skipping incomplete checkpoint {unfinished}']


@pytest.mark.parametrize('item', ['state', 'config', 'data'])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(opened, tmp_path, caplog, item):
    settings = dict(train_keep_last=2, train_keep_best=0)
    checkpoints = opened(**settings)
    save(checkpoints, 3)
    save(checkpoints, 6)
    damage(tmp_path, 6, item)
    checkpoints = opened(**settings)
    assert_is(checkpoints.restore(abstract()), 3)
    assert len(messages(caplog)) == 1
    assert messages(caplog)[0].startswith(f'skipping unreadable checkpoint {directory(tmp_path, 6)}: ')
    # It neither stands in the way of the same step nor counts among those to keep.
    assert checkpoints.steps() == [3]
    save(checkpoints, 5)
    assert checkpoints.steps() == [3, 5]
    save(checkpoints, 6)
    assert checkpoints.steps() == [5, 6]
    assert_is(opened(**settings).restore(abstract()), 6)
    assert directory(tmp_path, '6.unreadable').is_dir(), 'set aside, not deleted'


def test_when_none_can_be_read_the_run_is_refused_and_nothing_is_touched(opened, tmp_path):
    checkpoints = opened()
    for step in (3, 6):
        save(checkpoints, step)
        damage(tmp_path, step)
    with pytest.raises(CheckpointError, match=r'none of the checkpoints \[3, 6\] in .* can be read; .*--workdir'):
        opened().restore(abstract())
    assert directory(tmp_path, 3).is_dir() and directory(tmp_path, 6).is_dir()


def test_a_checkpoint_of_another_config_is_refused(opened, tmp_path):
    save(opened(), 3)
    with pytest.raises(CheckpointError) as error:
        opened(model_d_mlp=64, data_seed=4).restore(abstract())
    assert str(error.value) == (
        f'checkpoint {directory(tmp_path, 3)} holds a run of another config: model.d_mlp is 96 in the checkpoint and 64 in '
        'this config (and 1 more); change it back or use another --workdir'
    )
    assert_is(opened(train_steps=30, mesh_fsdp=4).restore(abstract()), 3)


def test_a_failed_write_is_one_line(opened, tmp_path, monkeypatch):
    checkpoints = opened()
    save(checkpoints, 3)

    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device\nand more\nlines')

    monkeypatch.setattr(checkpoints._manager, 'save', full)
    with pytest.raises(CheckpointError) as error:
        checkpoints.save(4, make_state(4), {})
    assert '\n' not in str(error.value)
    assert 'No space left on device' in str(error.value) and str(tmp_path) in str(error.value)
    assert_is(opened().restore(abstract()), 3)


def test_a_long_reason_keeps_its_end():
    line = checkpoint._first_line(ValueError('begin ' + 'x' * 1000 + ' No space left'))
    assert line.startswith('begin') and line.endswith('No space left') and len(line) < 350
    assert checkpoint._first_line(KeyError()) == 'KeyError'


# ---- the workdir -----------------------------------------------------------


def test_a_workdir_keeps_the_config(tmp_path):
    config = small_config()
    checkpoint.open_workdir(tmp_path / 'a' / 'b', config)
    assert config_lib.from_json((tmp_path / 'a' / 'b' / 'config.json').read_text()) == config
    longer = small_config(train_steps=30)
    checkpoint.open_workdir(tmp_path / 'a' / 'b', longer)
    assert config_lib.from_json((tmp_path / 'a' / 'b' / 'config.json').read_text()) == longer


def test_a_workdir_with_checkpoints_refuses_another_config(opened, tmp_path):
    checkpoint.open_workdir(tmp_path, small_config())
    checkpoint.open_workdir(tmp_path, small_config(model_d_mlp=64))  # nothing was trained yet
    checkpoint.open_workdir(tmp_path, small_config())
    save(opened(), 3)
    before = (tmp_path / 'config.json').read_text()
    with pytest.raises(CheckpointError, match='model.d_mlp is 96 in the checkpoint and 64 in this config'):
        checkpoint.open_workdir(tmp_path, small_config(model_d_mlp=64))
    assert (tmp_path / 'config.json').read_text() == before


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / 'file').write_text('')
    for path in (tmp_path / 'file', tmp_path / 'file' / 'below', pathlib.Path('/proc/nowhere')):
        with pytest.raises(CheckpointError, match=f'--workdir={path} cannot be written'):
            checkpoint.open_workdir(path, small_config())
