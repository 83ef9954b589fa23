"""Runs that start from the weights of another run or of a published directory, and the one way to name a checkpoint."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from process_fixtures import start_all
from train_fixtures import arguments, checkpoint_steps, losses, prepare_bytes, train, write_config

from transxssm_jax import config as config_lib
from transxssm_jax import convert, generate
from transxssm_jax.pytorch.conversion import open_weights
from transxssm_jax.training import checkpoint, optimizer, run_reference
from transxssm_jax.training.checkpoint import CheckpointError


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp('run')
    return write_config(directory, prepare_bytes(directory))


@pytest.fixture(scope='module')
def source(config, tmp_path_factory):
    """A finished run of 8 steps with checkpoints of steps 4 and 8, whose state is as wide as a head."""
    workdir = tmp_path_factory.mktemp('source') / 'run'
    result = train(config, workdir, train__steps=8, train__eval_every_steps=4)
    assert result.code == 0, result.err
    assert checkpoint_steps(workdir) == [4, 8]
    return workdir


def params_of(workdir, step=-1):
    params, config = checkpoint.load_trained(workdir, step)
    return jax.tree.map(np.asarray, params), config


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for path, value in jax.tree_util.tree_leaves_with_path(left):
        other = right
        for key in path:
            other = other[key.key]
        np.testing.assert_array_equal(value, other, err_msg=str(path))


# ---- references ----------------------------------------------------------------


@pytest.mark.parametrize('word, step', [('@4', 4), ('@latest', -1), ('', -1)])
def test_a_reference_names_a_step(source, word, step):
    assert run_reference.resolve(f'{source}{word}') == (source, step)


def test_the_best_checkpoint_is_that_of_the_lowest_evaluation_loss(source):
    found = {
        step: json.loads((source / f'checkpoints/{step}/metrics.json').read_text())['eval_loss'] for step in (4, 8)
    }
    assert run_reference.resolve(f'{source}@best') == (source, min(found, key=found.get))


def test_a_directory_of_that_name_is_itself(source, tmp_path):
    twin = tmp_path / 'run@best'
    (tmp_path / 'run').mkdir()
    shutil.copytree(source, twin)
    assert run_reference.resolve(twin) == (twin, -1)
    assert checkpoint.load_trained_step(twin)[2] == 8


@pytest.mark.parametrize(
    'word, flags, expected',
    [
        ('@newest', {}, 'must be a step, best or latest'),
        ('@4', {'step': 8}, 'both name a checkpoint'),
        ('@5', {}, 'has no checkpoint of step 5; it has 4, 8'),
    ],
)
def test_wrong_references_are_refused_in_one_line(source, word, flags, expected):
    with pytest.raises(CheckpointError, match=expected) as error:
        checkpoint.load_config(f'{source}{word}', **flags)
    assert '\n' not in str(error.value)


def test_best_of_a_run_without_evaluations_is_refused(config, tmp_path):
    assert train(config, tmp_path / 'run', train__steps=2, train__eval_every_steps=0).code == 0
    with pytest.raises(CheckpointError, match='no checkpoint there has an evaluation loss'):
        checkpoint.load_config(f'{tmp_path / "run"}@best')


def test_generate_and_export_take_references(source, tmp_path, capsys):
    assert generate.main([f'--workdir={source}@4', '--prompt=a', '--max_tokens=2', '--temperature=0']) == 0
    assert convert.main(['export', f'--workdir={source}@4', f'--output={tmp_path / "out"}']) == 0, capsys.readouterr()
    exported, _ = open_weights(tmp_path / 'out')
    at_4, _ = params_of(source, 4)
    np.testing.assert_array_equal(exported[('embedding',)].read(), at_4['embedding'])


# ---- starting ----------------------------------------------------------------


def start(config, workdir, init_from, what='params', **settings):
    return train(config, workdir, train__init_from=init_from, train__init_what=what, **settings)


def first_state(config, workdir, **settings):
    """The state before the first step of a new run."""
    from transxssm_jax.parallel import mesh
    from transxssm_jax.training import initial_state

    loaded = config_lib.load(config, {name.replace('__', '.'): value for name, value in settings.items()})
    settled = initial_state.settle(loaded, workdir, open_weights)
    state, lines = initial_state.create(settled, mesh.build(settled), open_weights)
    return jax.tree.map(np.asarray, state), settled, lines


def test_params_alone_start_a_new_run_with_other_data_and_lengths(config, source, tmp_path):
    state, settled, lines = first_state(
        config,
        tmp_path,
        train__init_from=f'{source}@4',
        data__seq_len=64,
        data__global_batch=16,
        data__seed=7,
        model__rope_theta=50000.0,
        model__rope_scaling='linear',
    )
    assert_equal(state['params'], params_of(source, 4)[0])
    assert state['step'] == 0
    assert all(not leaf.any() for leaf in jax.tree.leaves(state['opt_state']))
    assert settled.train.init_from == f'{source}@4' and settled.optimizer.updates_before == 0
    assert lines[0] == f'started from params of {source}@4'


def test_the_optimizer_comes_with_its_count(config, source, tmp_path):
    state, settled, _ = first_state(
        config, tmp_path, train__init_from=f'{source}@latest', train__init_what='params+optimizer'
    )
    assert settled.train.init_from == f'{source}@8' and settled.optimizer.updates_before == 8
    saved = checkpoint.Checkpoints(source, settled)
    from transxssm_jax.parallel import mesh
    from transxssm_jax.training import step as step_lib

    stored = checkpoint.load_config(source)
    saved.config = stored
    _, theirs, _ = saved.restore(step_lib.abstract_state(stored, mesh.build(stored)))
    assert_equal(state['opt_state'], jax.tree.map(np.asarray, theirs['opt_state']))
    assert state['step'] == 0


def test_the_first_update_after_an_optimizer_state_is_that_of_the_run_it_comes_from(config, source):
    """The bias correction of Adam goes on, and the schedule begins anew."""
    short = config_lib.load(config, {'optimizer.schedule': 'cosine', 'train.steps': 40})
    goes_on = config_lib.replace(short, {'optimizer.updates_before': 8})
    params = {'kernel': jnp.ones((3, 2))}
    tx, tx_on = optimizer.make_optimizer(short), optimizer.make_optimizer(goes_on)
    state = optimizer.init(tx, params)
    for step in range(8):
        grads = {'kernel': jnp.full((3, 2), 0.1 * (step + 1))}
        _, state = optimizer.update(tx, grads, state, params, step)
    step = 3  # of the new run, whose optimizer has made 8 + 3 updates
    updates, _ = optimizer.update(tx_on, grads, state, params, step + 8)
    plain, _ = optimizer.update(tx, grads, state, params, step + 8)
    rate, other = optimizer.schedule(short)(step), optimizer.schedule(short)(step + 8)
    np.testing.assert_allclose(updates['kernel'] / rate, plain['kernel'] / other, rtol=1e-5)
    assert abs(rate / other - 1) > 0.01


def test_an_anneal_goes_on_where_the_run_stood_and_ignores_init_from_once_it_has_checkpoints(config, source, tmp_path):
    workdir = tmp_path / 'anneal'
    result = start(config, workdir, f'{source}@best', 'params+optimizer', train__steps=6, train__eval_every_steps=0)
    assert result.code == 0, result.err
    assert 'started from params+optimizer of' in result.out
    step = run_reference.resolve(f'{source}@best')[1]
    recorded = config_lib.from_json((workdir / 'config.json').read_text())
    assert recorded.train.init_from == f'{source}@{step}' and recorded.optimizer.updates_before == step
    assert losses(workdir)[1] < losses(source)[1] - 0.5  # it does not begin anew
    # The same command, one that names nothing, and one that names what is not there, all go on from step 6.
    for init_from, steps in ((f'{source}@best', 7), ('', 8), ('nowhere', 9)):
        result = start(config, workdir, init_from, train__steps=steps, train__eval_every_steps=0)
        assert result.code == 0, result.err
        assert f'resuming from step {steps - 1}' in result.out and 'init_from' not in result.out.partition('resum')[2]
    assert checkpoint.load_config(workdir) == config_lib.replace(recorded, {'train.steps': 9})


def test_a_wider_vocabulary_gets_new_rows(config, source, tmp_path):
    state, _, lines = first_state(
        config, tmp_path, train__init_from=str(source), train__init_what='params+optimizer', model__vocab_size=272
    )
    fresh, _, _ = first_state(config, tmp_path, model__vocab_size=272)
    theirs, stored = params_of(source)
    rows = stored.model.vocab_size
    assert rows < 272
    np.testing.assert_array_equal(state['params']['embedding'][:rows], theirs['embedding'])
    np.testing.assert_array_equal(state['params']['embedding'][rows:], fresh['params']['embedding'][rows:])
    assert np.abs(state['params']['embedding'][rows:]).min() > 0
    assert state['opt_state']['mu']['embedding'].shape == (272, stored.model.d_model)
    assert not state['opt_state']['mu']['embedding'][rows:].any() and state['opt_state']['mu']['embedding'].any()
    assert f'embedding: {rows:,} rows there, 272 here; the other {272 - rows} are initialised' in lines[1]


@pytest.mark.parametrize('axes', [{'data': 2, 'fsdp': 4}, {'data': 4, 'tensor': 2}])
def test_the_mesh_of_the_source_does_not_matter(config, source, tmp_path, axes):
    settings = {f'mesh__{name}': size for name, size in axes.items()}
    state, _, _ = first_state(
        config,
        tmp_path,
        train__init_from=str(source),
        train__init_what='params+optimizer',
        model__vocab_size=272,
        **settings,
    )
    alone, _, _ = first_state(
        config, tmp_path, train__init_from=str(source), train__init_what='params+optimizer', model__vocab_size=272
    )
    assert_equal(state, alone)


@pytest.mark.parametrize('layout', ['transformers', 'published'])
def test_exported_weights_start_a_run(config, source, tmp_path, layout):
    assert convert.main(['export', f'--workdir={source}', f'--output={tmp_path / "out"}', f'--layout={layout}']) == 0
    state, settled, lines = first_state(config, tmp_path / 'new', train__init_from=str(tmp_path / 'out'))
    theirs, _ = params_of(source)
    for path, value in jax.tree_util.tree_leaves_with_path(state['params']):
        other = theirs
        for key in path:
            other = other[key.key]
        # Of the published format a_log alone is rounded.
        rounding = 1e-6 if layout == 'published' else 0
        np.testing.assert_allclose(value, other, rtol=rounding, err_msg=str(path))
    assert settled.train.init_from == str(tmp_path / 'out')
    result = start(config, tmp_path / 'refused', tmp_path / 'out', 'params+optimizer')
    assert result.code == 2 and 'holds no optimizer state; give --init_what=params' in result.err
    assert not (tmp_path / 'refused').exists()
    exported = json.loads((tmp_path / 'out' / 'config.json').read_text())['transxssm_jax']
    assert 'init_from' not in exported['train'] and 'updates_before' not in exported['optimizer']


@pytest.mark.slow
def test_two_processes_start_as_one_does(config, source, tmp_path):
    """Each reads its shards, of a checkpoint whose vocabulary grows, and of published weights."""
    assert convert.main(['export', f'--workdir={source}', f'--output={tmp_path / "out"}']) == 0
    settings = dict(model__vocab_size=272, train__steps=4, train__eval_every_steps=0, mesh__data=1, mesh__fsdp=8)
    checkpointed = settings | dict(train__init_from=f'{source}@best', train__init_what='params+optimizer')
    published = dict(train__init_from=tmp_path / 'out', train__steps=4, train__eval_every_steps=0)
    for name, given in (('checkpoint', checkpointed), ('published', published)):
        command = ['-m', 'transxssm_jax.train', *arguments(config, tmp_path / f'{name} two', **given)[1:]]
        ends = start_all(command, 2, devices=4).finish()
        assert [end.code for end in ends] == [0, 0], ends
        assert train(config, tmp_path / f'{name} one', **given).code == 0
        many, one = losses(tmp_path / f'{name} two'), losses(tmp_path / f'{name} one')
        assert many.keys() == one.keys() and all(many[step] == pytest.approx(one[step], rel=2e-5) for step in one)


# ---- refusals ------------------------------------------------------------------


@pytest.mark.parametrize(
    'settings, expected',
    [
        ({'model__d_mlp': 64}, 'has shape [1, 1, 32, 32] there and [1, 1, 32, 64] in this config (and'),
        ({'model__d_mlp': 64}, 'model.d_mlp is 32 there and 64 here'),
        (
            {'model__vocab_size': 260},
            'embedding has shape [264, 32] there and [260, 32] in this config; model.vocab_size',
        ),
        ({'model__tie_embeddings': 'false'}, 'lacks head, which this config has; model.tie_embeddings is True there'),
        ({'model__attention_offset': 0}, 'model.attention_offset is 1 there and 0 here'),
        ({'model__num_layers': 4}, 'model.num_layers is 2 there and 4 here'),
    ],
)
def test_shapes_that_differ_are_refused_by_name_before_the_workdir_is_made(
    config, source, tmp_path, settings, expected
):
    result = start(config, tmp_path / 'new', source, **settings)
    assert result.code == 2
    assert expected in result.err and result.err.count('\n') == 1
    assert not (tmp_path / 'new').exists()


def test_damaged_weights_are_refused(config, source, tmp_path):
    damaged = tmp_path / 'damaged'
    shutil.copytree(source, damaged)
    [path] = [
        path
        for path in sorted((damaged / 'checkpoints/8/params').rglob('*'))
        if path.is_file() and path.parent.name == 'd'
    ][:1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    result = start(config, tmp_path / 'new', f'{damaged}@8')
    assert result.code == 2 and '--init_from=' in result.err and 'is damaged' in result.err
    assert result.err.count('\n') == 1


@pytest.mark.parametrize('given', ['nowhere', 'empty'])
def test_what_holds_no_weights_is_refused(config, tmp_path, given):
    (tmp_path / 'empty').mkdir()
    result = start(config, tmp_path / 'new', tmp_path / given)
    assert result.code == 2 and result.err.count('\n') == 1
    assert ('no such directory' if given == 'nowhere' else 'has neither checkpoints nor config.json') in result.err
