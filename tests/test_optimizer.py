"""The optimizer: schedules at their corners, what decays, clipping, AdamW written out, and the plain form of its state."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small import packed_batch, small_config

from transxssm_jax import config as config_lib
from transxssm_jax.model import parameters
from transxssm_jax.parallel import mesh
from transxssm_jax.training import optimizer
from transxssm_jax.training import step as step_lib


def rates(*steps, **settings):
    settings = {f'optimizer_{name}': value for name, value in settings.items()}
    schedule = optimizer.schedule(small_config(train_steps=100, optimizer_learning_rate=2.0, **settings))
    return [float(schedule(step)) for step in steps]


def test_warmup_is_linear_from_0_to_the_peak():
    for shape in ('cosine', 'linear', 'wsd', 'constant'):
        assert rates(0, 1, 5, 10, schedule=shape, warmup_steps=10, decay_steps=20) == pytest.approx(
            [0, 0.2, 1.0, 2.0]
        ), shape


@pytest.mark.parametrize(
    'shape, steps, expected',
    [
        ('cosine', (10, 55, 100), (2.0, 0.2 + 0.9, 0.2)),
        ('cosine', (32.5, 77.5), (0.2 + 1.8 * (0.5 + 0.5**1.5), 0.2 + 1.8 * (0.5 - 0.5**1.5))),
        ('linear', (10, 55, 100), (2.0, 1.1, 0.2)),
        ('wsd', (10, 50, 80, 90, 100), (2.0, 2.0, 2.0, 1.1, 0.2)),
        ('constant', (10, 55, 100), (2.0, 2.0, 2.0)),
    ],
)
def test_corners(shape, steps, expected):
    got = rates(*steps, schedule=shape, warmup_steps=10, decay_steps=20, final_fraction=0.1)
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('shape', ['cosine', 'linear', 'wsd', 'constant'])
def test_without_warmup_the_first_step_has_the_peak(shape):
    assert rates(0, schedule=shape, warmup_steps=0, decay_steps=20) == [2.0]


@pytest.mark.parametrize('shape', ['cosine', 'linear', 'wsd'])
def test_the_rate_never_rises_after_warmup_and_stays_beyond_the_last_step(shape):
    got = rates(*range(10, 140), schedule=shape, warmup_steps=10, decay_steps=20, final_fraction=0.25)
    assert all(later <= earlier + 1e-6 for earlier, later in zip(got, got[1:], strict=False))
    assert got[90:] == pytest.approx([0.5] * 40)


def test_a_run_that_is_all_warmup_or_all_decay():
    assert rates(50, 99, schedule='cosine', warmup_steps=100) == pytest.approx([1.0, 1.98])
    assert rates(0, 50, 100, schedule='wsd', warmup_steps=0, decay_steps=100) == pytest.approx([2.0, 1.1, 0.2])
    assert rates(10, 55, 100, schedule='wsd', warmup_steps=10, decay_steps=90) == pytest.approx([2.0, 1.1, 0.2])


def flat(tree):
    return {'/'.join(map(str, path)): leaf for path, leaf in nnx.traversals.flatten_mapping(tree).items()}


def test_decay_is_of_matrices_only():
    config = small_config(model_use_bias=True, model_tie_embeddings=False, model_num_layers=4)
    shapes = jax.eval_shape(lambda: parameters.init_params(config.model, 0))
    mask = flat(optimizer.decay_mask(shapes))
    maps = {('ssd', 'mixer'): ('x', 'b', 'c', 'dt'), ('attention', 'mixer'): ('q', 'k', 'v')}
    maps |= {(kind, 'mlp'): ('gate', 'up') for kind in ('ssd', 'attention')}
    decayed = {'embedding', 'head'}
    decayed |= {f'layers/{kind}/{part}/out_proj/kernel' for kind, part in maps}
    decayed |= {f'layers/{kind}/{part}/in_proj/{name}/kernel' for (kind, part), names in maps.items() for name in names}
    assert {name for name, decays in mask.items() if decays} == decayed
    spared = {name.rpartition('/')[2] for name, decays in mask.items() if not decays}
    assert spared == {'scale', 'weight', 'bias', 'a_log', 'dt_bias'}


def update(config, grads, params):
    tx = optimizer.make_optimizer(config)
    updates, _ = tx.update(grads, tx.init(params), params)
    return updates


def test_weight_decay_moves_matrices_and_nothing_else():
    settings = dict(optimizer_warmup_steps=0, optimizer_schedule='constant', optimizer_weight_decay=0.5)
    params = {'kernel': jnp.full((2, 2), 3.0), 'scale': jnp.full(2, 3.0), 'a_log': jnp.full(2, 3.0)}
    updates = update(small_config(**settings), jax.tree.map(jnp.zeros_like, params), params)
    np.testing.assert_allclose(updates['kernel'], -1e-2 * 0.5 * 3.0)
    assert not updates['scale'].any() and not updates['a_log'].any()


def test_clipping_scales_the_whole_gradient():
    # Adam divides the scale out again, except for its epsilon, which is made to rule here.
    settings = dict(
        optimizer_warmup_steps=0, optimizer_weight_decay=0.0, optimizer_epsilon=1e6, optimizer_schedule='constant'
    )
    params = {'kernel': jnp.zeros(2), 'scale': jnp.zeros(2)}
    grads = {'kernel': jnp.array([3.0, 0.0]), 'scale': jnp.array([0.0, 4.0])}
    plain = update(small_config(**settings, optimizer_clip_norm=0.0), grads, params)
    clipped = update(small_config(**settings, optimizer_clip_norm=1.0), grads, params)
    for name in params:
        np.testing.assert_allclose(plain[name], -1e-2 * grads[name] / 1e6, rtol=1e-4)
        np.testing.assert_allclose(clipped[name], plain[name] / 5, rtol=1e-4)
    small = jax.tree.map(lambda g: g / 10, grads)
    assert optax.global_norm(small) < 1
    for name, value in update(small_config(**settings, optimizer_clip_norm=1.0), small, params).items():
        np.testing.assert_allclose(value, plain[name] / 10, rtol=1e-4)


def test_two_steps_are_adamw_written_out():
    config = small_config(
        optimizer_warmup_steps=2,
        optimizer_schedule='constant',
        optimizer_b1=0.8,
        optimizer_b2=0.9,
        optimizer_epsilon=1e-3,
        optimizer_weight_decay=0.1,
        optimizer_clip_norm=0.0,
    )
    tx = optimizer.make_optimizer(config)
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 2))
    params = {'kernel': jnp.asarray(kernel, jnp.float32)}
    state, m, v = tx.init(params), 0.0, 0.0
    for count in range(3):
        grad = rng.normal(size=(3, 2))
        updates, state = tx.update({'kernel': jnp.asarray(grad, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        m, v = 0.8 * m + 0.2 * grad, 0.9 * v + 0.1 * grad**2
        unbiased_m, unbiased_v = m / (1 - 0.8 ** (count + 1)), v / (1 - 0.9 ** (count + 1))
        rate = 1e-2 * min(count / 2, 1)
        kernel = kernel - rate * (unbiased_m / (np.sqrt(unbiased_v) + 1e-3) + 0.1 * kernel)
    np.testing.assert_allclose(params['kernel'], kernel, rtol=1e-5)


# ---- state -----------------------------------------------------------------


def test_the_names_in_the_config_are_those_of_the_table():
    (name,) = (field for field in dataclasses.fields(config_lib.Optimizer) if field.name == 'name')
    assert set(name.metadata['choices']) == set(optimizer.OPTIMIZERS)
    with pytest.raises(
        config_lib.ConfigError, match="optimizer.name='adam' is not one of the choices; did you mean adamw"
    ):
        small_config(optimizer_name='adam')


CHAINS = {
    'adamw': lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, mask=optimizer.decay_mask)),
    'momentum': lambda: optax.sgd(optax.linear_schedule(0.1, 0.0, 10), momentum=0.9),
    'plain': lambda: optax.sgd(0.1),
    'factored': lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
    'parts': lambda: optax.partition(
        {'matrix': optax.sgd(0.1, momentum=0.9), 'rest': optax.adam(1e-2)},
        lambda params: jax.tree.map(lambda decays: 'matrix' if decays else 'rest', optimizer.decay_mask(params)),
    ),
    'named': lambda: optax.named_chain(
        ('fast', optax.trace(0.5)), ('slow', optax.trace(0.9)), ('rate', optax.scale(-0.1))
    ),
}
PARAMS = {'layers': {'kernel': jnp.ones((2, 4, 8)), 'scale': jnp.ones(4)}, 'embedding': jnp.ones((16, 8))}


def is_plain(tree):
    return isinstance(tree, jax.Array) or type(tree) is dict and all(map(is_plain, tree.values()))


@pytest.mark.parametrize('chain', CHAINS.values(), ids=CHAINS)
def test_updates_through_the_plain_state_are_those_of_optax(chain):
    tx, rng = chain(), np.random.default_rng(0)
    params, state, opt_state = PARAMS, tx.init(PARAMS), optimizer.init(tx, PARAMS)
    for step in range(3):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS)
        expected, state = tx.update(grads, state, params)
        updates, opt_state = optimizer.update(tx, grads, opt_state, params, jnp.int32(step))
        assert is_plain(opt_state)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
        params = optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, optimizer.from_plain(tx, opt_state, params, 3), state)


def test_names_of_states_are_stable():
    """They are the names in checkpoints: a change here orphans runs."""
    names = {
        chain: sorted('/'.join(path) for path in flat_paths(optimizer.init(make(), {'head': jnp.ones((4, 8))})))
        for chain, make in CHAINS.items()
    }
    assert names['adamw'] == ['mu/head', 'nu/head'] and names['momentum'] == ['trace/head'] and names['plain'] == []
    assert names['named'] == ['fast/trace/head', 'slow/trace/head']
    assert names['parts'] == ['inner_states/matrix/inner_state/trace/head']
    config = small_config()
    params = {'head': jnp.ones((4, 8))}
    with_clipping = optimizer.init(optimizer.make_optimizer(config), params)
    without = optimizer.init(optimizer.make_optimizer(small_config(optimizer_clip_norm=0.0)), params)
    assert flat_paths(with_clipping) == flat_paths(without) == {('mu', 'head'), ('nu', 'head')}


def flat_paths(tree):
    return {tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def test_two_states_of_one_name_are_refused():
    with pytest.raises(ValueError, match='trace/head is the name of two states.*named_chain'):
        optimizer.init(optax.chain(optax.trace(0.5), optax.trace(0.9)), {'head': jnp.ones(2)})


def test_what_is_kept_of_a_parameter_is_matched_to_it():
    values = {'layers': {'kernel': 'K', 'scale': 'S'}, 'embedding': 'E'}
    assert optimizer.like_params(optimizer.init(CHAINS['adamw'](), PARAMS), PARAMS, values, 'other') == {
        'mu': values,
        'nu': values,
    }
    factored = optimizer.like_params(optimizer.init(CHAINS['factored'](), PARAMS), PARAMS, values, 'other')
    assert factored['v_row']['layers']['kernel'] == 'other', 'a row of it has another shape'
    assert factored['v']['layers']['scale'] == 'S', 'too small to be factored'


def test_another_optimizer_needs_only_its_chain(monkeypatch):
    """The state, its shardings and the train step follow from the chain."""
    monkeypatch.setitem(optimizer.OPTIMIZERS, 'adamw', lambda config: CHAINS['parts']())
    config = small_config(mesh_data=1, mesh_fsdp=4, mesh_tensor=2)
    device_mesh = mesh.build(config)
    shardings = step_lib.state_shardings(config, device_mesh)
    state, before = step_lib.create_state(config, device_mesh), step_lib.create_state(config, device_mesh)['params']
    with jax.set_mesh(device_mesh):
        batch = jax.device_put(packed_batch(config), step_lib.batch_sharding(device_mesh))
        state, metrics = jax.jit(step_lib.train_step(config), out_shardings=(shardings, None))(state, batch)
    assert 0 < float(metrics['update_norm']) < np.inf and int(state['step']) == 1
    trace = state['opt_state']['inner_states']['matrix']['inner_state']['trace']['embedding']
    assert trace.sharding == state['params']['embedding'].sharding and trace.any()
    assert not np.array_equal(state['params']['final_norm']['scale'], before['final_norm']['scale'])
