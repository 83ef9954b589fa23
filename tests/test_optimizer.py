"""The optimizer: schedules at their corners, what decays, clipping, and one step against AdamW written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small import small_config

from transxssm_jax.model import parameters
from transxssm_jax.training import optimizer


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
    tx = optimizer.optimizer(config)
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
    tx = optimizer.optimizer(config)
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
