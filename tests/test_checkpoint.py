"""Checkpoints: what is kept, what is skipped with a warning, and what is refused."""

import errno
import os
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import make_checkpoint
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small import small_config

from transxssm_jax import config as config_lib
from transxssm_jax.model import parameters
from transxssm_jax.training import checkpoint, checkpoint_files, digest, run_directory
from transxssm_jax.training.checkpoint import CheckpointError, Checkpoints


def make_state(step, sharding=None):
    state = {
        'step': jnp.int32(step),
        'params': {
            'embedding': step + jnp.arange(64.0).reshape(8, 8),
            'layers': {'ssd': {'scale': jnp.full(8, step, jnp.float32)}},
        },
        'opt_state': {'mu': {'embedding': jnp.full((8, 8), step / 2)}, 'count': jnp.int32(step)},
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


def sabotage(monkeypatch, error, times=1000):
    """Makes the next writes of arrays fail."""
    finish, left = checkpoint_files.Save._finish_arrays, [times]

    def failing(self):
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return finish(self)

    monkeypatch.setattr(checkpoint_files.Save, '_finish_arrays', failing)


def save(checkpoints, step, eval_loss=None):
    checkpoints.save(step, make_state(step), {'next_step': step}, eval_loss)
    checkpoints.wait()


def assert_is(restored, step):
    assert restored[0] == step and restored[2] == {'next_step': step}
    jax.tree.map(np.testing.assert_array_equal, restored[1], make_state(step))


def directory(tmp_path, step):
    return tmp_path / 'checkpoints' / str(step)


def damage(tmp_path, step, item='params'):
    place = directory(tmp_path, step) / item
    for path in [place] if place.is_file() else [path for path in place.rglob('*') if path.is_file()]:
        path.write_bytes(path.read_bytes()[:5])


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith(checkpoint.__name__)]


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
    params = ocp.StandardCheckpointer().restore(directory(tmp_path, 5) / 'params')
    assert params.keys() == {'params'} and params['params'].keys() == {'embedding', 'layers'}
    np.testing.assert_array_equal(params['params']['layers']['ssd']['scale'], np.full(8, 5.0))
    training = ocp.StandardCheckpointer().restore(directory(tmp_path, 5) / 'training')
    assert training.keys() == {'step', 'opt_state'} and training['opt_state'].keys() == {'mu', 'count'}
    assert digest.read_json(directory(tmp_path, 5) / 'digests.json')['format'] == 2


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


def caused(error, by):
    error.__cause__ = by
    return error


def in_context(error, of):
    error.__context__ = of
    return error


PASSING = [
    PermissionError(13, 'Permission denied'),
    ValueError('UNAVAILABLE: Connection reset'),
    OSError(errno.EIO, 'Input/output error'),
    caused(ValueError('Failed to read.'), OSError(errno.ESTALE, 'Stale file handle')),
    in_context(ValueError('Failed to read.'), caused(RuntimeError('x'), TimeoutError(errno.ETIMEDOUT, 'timed out'))),
    caused(ValueError('Failed to read.'), MemoryError()),
    caused(ValueError('x'), ValueError('Error reading "d/1": [OS error 12: ENOMEM Cannot allocate memory]')),
    ExceptionGroup('several', [ValueError('x'), OSError(errno.EMFILE, 'Too many open files')]),
]


@pytest.mark.parametrize('error', PASSING, ids=str)
def test_an_error_that_may_pass_is_no_damage(opened, tmp_path, monkeypatch, error):
    checkpoints = opened()
    save(checkpoints, 3)
    save(checkpoints, 4)

    def restore(*args, **kwargs):
        raise error

    monkeypatch.setattr(checkpoint_files.ocp.StandardCheckpointHandler, 'restore', restore)
    with pytest.raises(CheckpointError, match='4 cannot be read now.*run the same command again'):
        checkpoints.restore(abstract())
    monkeypatch.setattr(checkpoint.step_lib, 'abstract_params', lambda config: abstract()['params'])
    with pytest.raises(CheckpointError, match='4 cannot be read now.*run the same command again'):
        checkpoint.load_trained(tmp_path)
    assert checkpoints.steps() == [3, 4], 'and nothing is set aside'


@pytest.mark.parametrize(
    'error', [ValueError('DATA_LOSS: bad'), KeyError('x'), FileNotFoundError(2, 'No such file'), OSError('x')], ids=str
)
def test_other_errors_are_damage(error):
    assert not checkpoint_files.may_pass(caused(ValueError('Failed to read.'), error))


@pytest.mark.parametrize('code', [errno.EIO, errno.ESTALE], ids=errno.errorcode.get)
def test_an_error_that_may_pass_while_digests_are_checked(opened, monkeypatch, code):
    checkpoints = opened()
    save(checkpoints, 3)

    def of_block(path, start):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(digest, '_of_block', of_block)
    with pytest.raises(CheckpointError, match='cannot be read now'):
        checkpoints.restore(abstract())


def test_an_incomplete_checkpoint_is_skipped_with_a_warning(opened, tmp_path, caplog):
    save(opened(), 3)
    unfinished, half_deleted = directory(tmp_path, '8.partial'), directory(tmp_path, '1.removed')
    for path in (unfinished, half_deleted):
        (path / 'params').mkdir(parents=True)
    assert_is(opened().restore(abstract()), 3)
    assert messages(caplog) == [f'skipping incomplete checkpoint {unfinished}']
    assert not unfinished.exists() and not half_deleted.exists()


@pytest.mark.parametrize('item', ['params', 'training', 'config.json', 'data.json', 'digests.json'])
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
    sabotage(monkeypatch, OSError(28, 'No space left on device\nand more\nlines'))
    checkpoints.save(4, make_state(4), {})
    with pytest.raises(CheckpointError) as error:
        checkpoints.wait()
    assert '\n' not in str(error.value)
    assert 'No space left on device' in str(error.value) and str(tmp_path) in str(error.value)
    assert_is(opened().restore(abstract()), 3)
    assert os.listdir(tmp_path / 'checkpoints') == ['3'], 'what it had written makes room'


def test_a_failed_write_is_tried_once_more_at_the_next_step(opened, monkeypatch, caplog):
    checkpoints = opened()
    sabotage(monkeypatch, OSError(28, 'No space left on device'), times=1)
    checkpoints.save(4, make_state(4), {'next_step': 4})
    checkpoints._save.result()  # the write has ended
    saved = []

    def save_again():
        saved.append(5)
        checkpoints.save(5, make_state(5), {'next_step': 5})

    checkpoints.check(save_again)
    assert saved == [5] and checkpoints.steps() == [5]
    [message] = messages(caplog)
    assert 'No space left on device' in message and message.endswith('tried once more')
    checkpoints.wait()
    checkpoints.check(save_again)
    assert saved == [5], 'what is written is not written again'
    assert_is(opened().restore(abstract()), 5)


def test_a_write_that_fails_twice_ends_the_run(opened, monkeypatch):
    checkpoints = opened()
    sabotage(monkeypatch, OSError(28, 'No space left on device'))
    checkpoints.save(4, make_state(4), {})
    with pytest.raises(CheckpointError, match='No space left on device'):
        checkpoints.wait(lambda: checkpoints.save(4, make_state(4), {}))
    checkpoints = opened()
    checkpoints.save(4, make_state(4), {})
    checkpoints.save(5, make_state(5), {})
    with pytest.raises(CheckpointError, match='No space left on device'):
        checkpoints.save(6, make_state(6), {})


def test_a_failed_preparation_is_a_failed_write(opened, tmp_path, monkeypatch):
    checkpoints = opened()

    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(checkpoint_files.Save, '_make_directory', full)
    checkpoints.save(4, make_state(4), {})
    with pytest.raises(CheckpointError, match='No space left on device'):
        checkpoints.wait()


def test_settings_that_changed_since_the_checkpoint_are_known(opened):
    save(opened(), 3)
    checkpoints = opened(train_steps=30, optimizer_learning_rate=2e-2)
    checkpoints.restore(abstract())
    changed = config_lib.differences(checkpoints.config, checkpoints.restored_config)
    assert changed == {'train.steps': (30, 20), 'optimizer.learning_rate': (2e-2, 1e-2)}


# ---- metrics ---------------------------------------------------------------


@pytest.mark.parametrize('content', [b'', b'{"eval_loss": 0.0}', b'5', b'\xff', b'[[[['])
def test_damaged_metrics_are_passed_over(opened, tmp_path, caplog, content):
    settings = dict(train_keep_last=1, train_keep_best=1)
    checkpoints = opened(**settings)
    save(checkpoints, 1, 0.5)
    save(checkpoints, 2, 1.0)
    metrics = directory(tmp_path, 1) / 'metrics.json'
    metrics.write_bytes(content)
    checkpoints = opened(**settings)
    assert_is(checkpoints.restore(abstract()), 2)
    save(checkpoints, 3)
    save(checkpoints, 4)
    assert checkpoints.steps() == [2, 4], 'the loss of step 1 is not known any more'
    [message] = messages(caplog)
    assert message.startswith(f'checkpoint {metrics.parent} does not count among the best: ')


# ---- one flipped bit -------------------------------------------------------


@pytest.fixture(scope='module')
def real(tmp_path_factory):
    """A workdir with two checkpoints of a small model, and the states of both."""
    workdir, config, states = tmp_path_factory.mktemp('real'), small_config(model_num_layers=4), {}
    run_directory.open_workdir(workdir, config)
    checkpoints = Checkpoints(workdir, config)
    for step in (3, 6):
        params = jax.jit(lambda step=step: parameters.init_params(config.model, step))()
        states[step] = {
            'step': jnp.int32(step),
            'params': params,
            'opt_state': {'mu': jax.tree.map(lambda leaf: leaf / 3, params), 'nu': jax.tree.map(jnp.square, params)},
        }
        checkpoints.save(step, states[step], {'next_step': step}, eval_loss=step)
        checkpoints.wait()
    checkpoints.close()
    return workdir, config, states


def files_of(path):
    return sorted(file.relative_to(path).as_posix() for file in path.rglob('*') if file.is_file())


def kind_of(name):
    return '/'.join('*' if len(part) == 32 else part for part in name.split('/'))


KINDS = [
    'config.json',
    'data.json',
    'digests.json',
    'metrics.json',
    *(
        f'{group}/{file}'
        for group in ('params', 'training')
        for file in (
            '_METADATA',
            '_sharding',
            'array_metadatas/process_0',
            'd/*',
            'manifest.ocdbt',
            'ocdbt.process_0/d/*',
            'ocdbt.process_0/manifest.ocdbt',
        )
    ),
]


def test_the_kinds_of_files_are_these(real):
    assert {kind_of(name) for name in files_of(real[0] / 'checkpoints' / '6')} == set(KINDS)


@pytest.mark.parametrize('kind', KINDS)
def test_a_flipped_bit_is_never_loaded(real, monkeypatch, caplog, kind):
    workdir, config, states = real
    path, rng = workdir / 'checkpoints' / '6', random.Random(kind)
    names = [name for name in files_of(path) if kind_of(name) == kind]
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), states[6])
    monkeypatch.setattr(Checkpoints, '_set_aside', lambda self, steps: None)
    for _ in range(3):
        file = path / rng.choice(names)
        content = file.read_bytes()
        position = rng.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        caplog.clear()
        try:
            file.write_bytes(flipped)
            checkpoints = Checkpoints(workdir, config)
            step, state, data_position = checkpoints.restore(wanted)
            best = checkpoints._eval_loss(6)
            checkpoints.close()
            params, _ = checkpoint.load_trained(workdir)
        finally:
            file.write_bytes(content)
        expected = 6 if kind == 'metrics.json' else 3
        assert step == expected and data_position == {'next_step': expected}, (file, position)
        assert any(str(file) in message for message in messages(caplog)), messages(caplog)
        jax.tree.map(np.testing.assert_array_equal, state, states[expected])
        assert best == (None if kind == 'metrics.json' else 6)
        # Without the optimizer's state, its files do not matter.
        trained = 3 if kind.startswith('params/') or kind in ('config.json', 'digests.json') else 6
        jax.tree.map(np.testing.assert_array_equal, params, states[trained]['params'])


def test_a_flipped_bit_is_named_where_one_step_is_asked_for(real):
    workdir, _, _ = real
    path = workdir / 'checkpoints' / '6'
    file = path / next(name for name in files_of(path) if name.startswith('params/ocdbt.process_0/d/'))
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        for read in (checkpoint.load_trained, checkpoint.find_params):
            with pytest.raises(CheckpointError, match=f'of step 6 .*{file.name} is damaged'):
                read(workdir, 6)
        assert checkpoint.find_params(workdir)[0] == workdir / 'checkpoints' / '3' / 'params'
        file.write_bytes(content[:-1])
        with pytest.raises(
            CheckpointError, match=f'{file.name} has {len(content) - 1} bytes instead of {len(content)}'
        ):
            checkpoint.load_trained(workdir, 6)
        file.unlink()
        with pytest.raises(CheckpointError, match=f'{file.name} is missing'):
            checkpoint.load_trained(workdir, 6)
    finally:
        file.write_bytes(content)


def test_a_digest_is_of_every_block(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, 'BLOCK_BYTES', 1000)
    monkeypatch.setattr(digest, 'PIECE_BYTES', 300)
    content = random.Random(0).randbytes(3456)
    (tmp_path / 'a').write_bytes(content)
    (tmp_path / 'empty').touch()
    found = digest.of_files(tmp_path, ['a', 'empty'])
    assert found == {'a': digest.of_bytes(content), 'empty': digest.of_bytes(b'')}
    assert found['a'][0] == 3456 and found['empty'][0] == 0
    digest.check(tmp_path, found)
    for position in (0, 999, 1000, 2500, 3455):
        (tmp_path / 'a').write_bytes(content[:position] + bytes([content[position] ^ 8]) + content[position + 1 :])
        with pytest.raises(digest.DamagedError, match='a is damaged'):
            digest.check(tmp_path, found)
        digest.check(tmp_path, found, part=1, parts=2)  # the part of another process
        with pytest.raises(digest.DamagedError):
            digest.check(tmp_path, found, part=0, parts=2)


# ---- formats ---------------------------------------------------------------


def test_a_newer_format_is_refused_by_name(opened, tmp_path):
    save(opened(), 3)
    path = directory(tmp_path, 3) / 'digests.json'
    content = digest.read_json(path)
    digest.write_json(path, {**content, 'format': 3})
    for read in (lambda: opened().restore(abstract()), lambda: checkpoint.load_trained(tmp_path)):
        with pytest.raises(CheckpointError, match='3 is of format 3, newer than format 2 of this version; update'):
            read()
    assert directory(tmp_path, 3).is_dir()


def test_a_checkpoint_without_a_number_is_refused_in_one_line(opened, tmp_path):
    for name in ('state', 'data', 'config'):
        (directory(tmp_path, 3) / name).mkdir(parents=True)
    for read in (lambda: opened().restore(abstract()), lambda: checkpoint.load_trained(tmp_path)):
        with pytest.raises(CheckpointError, match='3 has no digests.json.*format 1 of an older version') as error:
            read()
        assert '\n' not in str(error.value)


# ---- reading while the run saves -------------------------------------------


def test_a_checkpoint_that_is_removed_while_it_is_read_gives_way_to_a_fresh_listing(real, monkeypatch):
    workdir, config, states = real
    read_digests, removed = checkpoint_files.read_digests, []

    def racing(path):
        if not removed:  # the run replaces the newest, 6, by 9
            removed.append(path)
            path.rename(path.with_name('9'))
        return read_digests(path)

    monkeypatch.setattr(checkpoint_files, 'read_digests', racing)
    try:
        params, _ = checkpoint.load_trained(workdir)
        jax.tree.map(np.testing.assert_array_equal, params, states[6]['params'])
        assert removed == [workdir / 'checkpoints' / '6']
        with pytest.raises(CheckpointError, match='no checkpoint of step 6; it has 3, 9'):
            checkpoint.load_trained(workdir, 6)
    finally:
        (workdir / 'checkpoints' / '9').rename(workdir / 'checkpoints' / '6')


def test_a_run_that_removes_faster_than_one_reads_is_named(real, monkeypatch):
    workdir, _, _ = real
    checkpoints, numbers = workdir / 'checkpoints', iter(range(10, 1000))

    def racing(path):
        path.rename(checkpoints / str(next(numbers)))
        raise FileNotFoundError(2, 'No such file or directory')

    monkeypatch.setattr(checkpoint_files, 'read_digests', racing)
    try:
        with pytest.raises(CheckpointError, match='removes its checkpoints faster than they can be read'):
            checkpoint.load_trained(workdir)
    finally:
        (checkpoints / str(next(numbers) - 1)).rename(checkpoints / '6')


def test_a_long_reason_keeps_its_end():
    line = checkpoint_files.first_line(ValueError('begin ' + 'x' * 1000 + ' No space left'))
    assert line.startswith('begin') and line.endswith('No space left') and len(line) < 350
    assert checkpoint_files.first_line(KeyError()) == 'KeyError'


# ---- the workdir -----------------------------------------------------------


def test_a_workdir_keeps_the_config(tmp_path):
    config = small_config()
    run_directory.open_workdir(tmp_path / 'a' / 'b', config)
    assert config_lib.from_json((tmp_path / 'a' / 'b' / 'config.json').read_text()) == config
    longer = small_config(train_steps=30)
    run_directory.open_workdir(tmp_path / 'a' / 'b', longer)
    assert config_lib.from_json((tmp_path / 'a' / 'b' / 'config.json').read_text()) == longer


def test_a_workdir_with_checkpoints_refuses_another_config(opened, tmp_path):
    run_directory.open_workdir(tmp_path, small_config())
    run_directory.open_workdir(tmp_path, small_config(model_d_mlp=64))  # nothing was trained yet
    run_directory.open_workdir(tmp_path, small_config())
    save(opened(), 3)
    before = (tmp_path / 'config.json').read_text()
    with pytest.raises(CheckpointError, match='model.d_mlp is 96 in the checkpoint and 64 in this config'):
        run_directory.open_workdir(tmp_path, small_config(model_d_mlp=64))
    assert (tmp_path / 'config.json').read_text() == before


@pytest.mark.parametrize(
    'content', [b'{"model_type": "TransXSSM", "vocab_size": 3}', b'[]', b'{"model', b'\xff', b'{}']
)
def test_a_config_of_another_program_is_not_overwritten(tmp_path, content):
    (tmp_path / 'config.json').write_bytes(content)
    with pytest.raises(CheckpointError, match='holds a config.json that is not of a run, and would be overwritten'):
        run_directory.open_workdir(tmp_path, small_config())
    assert (tmp_path / 'config.json').read_bytes() == content
    run_directory.open_workdir(tmp_path / 'new', small_config())
    run_directory.open_workdir(tmp_path / 'new', small_config(model_d_mlp=64))


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / 'file').write_text('')
    for path in (tmp_path / 'file', tmp_path / 'file' / 'below', pathlib.Path('/proc/nowhere')):
        with pytest.raises(CheckpointError, match=f'--workdir={path} cannot be written'):
            run_directory.open_workdir(path, small_config())


@pytest.mark.parametrize('content', [b'\xff\xfe', b'5', b'null', b'{"model": 3}', b'{"model": ', b'[' * 100_000, b''])
def test_a_saved_config_that_is_none_is_named_in_one_line(opened, tmp_path, content):
    run_directory.open_workdir(tmp_path, small_config())
    save(opened(), 3)
    (tmp_path / 'config.json').write_bytes(content)
    with pytest.raises(CheckpointError, match='config.json: .*delete it') as error:
        run_directory.open_workdir(tmp_path, small_config())
    assert '\n' not in str(error.value)


# ---- old checkpoints -------------------------------------------------------


def test_a_kept_checkpoint_of_format_2_loads(tmp_path):
    workdir = shutil.copytree(pathlib.Path(__file__).parent / 'data' / 'checkpoint_format_2', tmp_path / 'run')
    config = make_checkpoint.tiny_config()
    params, saved = checkpoint.load_trained(workdir)
    assert config_lib.unfit_for_checkpoint(saved, config) == []
    expected = make_checkpoint.tiny_state()
    jax.tree.map(np.testing.assert_array_equal, params, expected['params'])

    device_mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), 'a')
    everywhere = NamedSharding(device_mesh, PartitionSpec())
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), expected)
    step, state, position = Checkpoints(workdir, config).restore(wanted)
    assert (step, position) == (make_checkpoint.STEP, make_checkpoint.POSITION)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
