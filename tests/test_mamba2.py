"""The Mamba-2 mixer and the encodings of the state-space layer against their definitions in float64, values and gradients."""

import jax
import jax.numpy as jnp
import mamba2_oracle as oracle
import numpy as np
import pytest
from flax import nnx
from small import small_config

from transxssm_jax.model import rope
from transxssm_jax.model.mamba2 import Mamba2
from transxssm_jax.model.ssd import RotarySSD

B, L, D, HEAD, N = 2, 19, 32, 16, 16
IDS = np.stack([np.repeat([3, 1, 2, 1], [5, 1, 2, 11]), np.repeat([1, 2], [16, 3])]).astype(np.int32)
# Relative errors of float32 products and sums against float64.
VALUES, GRADIENTS = 1e-5, 1e-4


def model_of(**settings):
    usual = dict(model_d_model=D, model_num_heads=2, model_num_kv_heads=2, model_num_ssd_groups=2, model_d_state=N)
    return small_config(**usual | settings, model_norm_epsilon=1e-5).model


def params_of(mixer, seed=0):
    """Parameters of a mixer away from their initial values, [name path -> float32]."""
    graph, state = nnx.split(mixer)
    rng = np.random.default_rng(seed)

    def leaf(path, value):
        middle = 1.0 if path[-1].key in ('scale', 'd_skip') else -1.0 if path[-1].key == 'dt_bias' else 0.0
        return jnp.asarray(middle + 0.3 * rng.standard_normal(value.shape), jnp.float32)

    return graph, jax.tree_util.tree_map_with_path(leaf, nnx.to_pure_dict(state))


def published(params):
    """Parameters of ours as the reference module lays them out, float64."""
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
    maps = ('z', 'x', 'b', 'c', 'dt') if 'z' in p['in_proj'] else ('x', 'b', 'c', 'dt')
    rows = [p['in_proj'][name]['kernel'].reshape(p['in_proj'][name]['kernel'].shape[0], -1).T for name in maps]
    t = {
        'in_proj.weight': np.concatenate(rows),
        'out_proj.weight': p['out_proj']['kernel'].reshape(-1, p['out_proj']['kernel'].shape[-1]).T,
        'dt_bias': p['dt_bias'],
        'A_log': p['a_log'],
        'input_norm.weight': p['in_proj']['norm']['scale'],
    }
    if 'conv' in p:
        kernels = [p['conv'][name]['kernel'].reshape(p['conv'][name]['kernel'].shape[0], -1).T for name in 'xbc']
        t['conv1d.weight'] = np.concatenate(kernels)[:, None]
        t['conv1d.bias'] = np.concatenate([p['conv'][name]['bias'].ravel() for name in 'xbc'])
        t['D'] = p['d_skip']
    if 'norm' in p:
        t['norm.weight'] = p['norm']['scale'].ravel()
    return t


def expected(params, x, groups):
    t = published(params)
    u = oracle.rms_norm(x, t.pop('input_norm.weight'), 1e-5)
    return oracle.mixer(t, u, head_dim=HEAD, groups=groups, state=N, segment_ids=IDS)


def expected_ssd(params, x, groups):
    """The state-space layer of the paper's table 2: with a convolution and D, or with the decay alone."""
    t = published(params)
    u = oracle.rms_norm(x, t['input_norm.weight'], 1e-5)
    inner = t['out_proj.weight'].shape[1]
    heads = inner // HEAD
    xbc, dt = np.split(u @ t['in_proj.weight'].T, [inner + 2 * groups * N], axis=-1)
    dt = oracle.softplus(dt + t['dt_bias'])
    out = np.zeros((B, L, inner))
    for row in range(B):
        h, start = np.zeros((heads, HEAD, N)), 0
        for i in range(L):
            if i and IDS[row, i] != IDS[row, i - 1]:
                h, start = np.zeros_like(h), i
            v = xbc[row, i]
            if 'conv1d.weight' in t:
                taps = [t['conv1d.weight'][:, 0, 3 - k] * xbc[row, i - k] for k in range(4) if i - k >= start]
                v = oracle.silu(t['conv1d.bias'] + sum(taps))
            x_HP, b_GN, c_GN = np.split(v, [inner, inner + groups * N])
            x_HP, b_GN, c_GN = x_HP.reshape(heads, HEAD), b_GN.reshape(groups, N), c_GN.reshape(groups, N)
            b_HN, c_HN = (np.repeat(w, heads // groups, axis=0) for w in (b_GN, c_GN))
            decay = np.exp(-np.exp(t['A_log']) * dt[row, i])
            h = decay[:, None, None] * h + (dt[row, i][:, None] * x_HP)[..., None] * b_HN[:, None]
            y = (h * c_HN[:, None]).sum(-1)
            out[row, i] = (y + t['D'][:, None] * x_HP if 'D' in t else y).ravel()
    return out @ t['out_proj.weight'].T


CASES = {
    'mamba2': (Mamba2, dict(), expected),
    'mamba2, one group': (Mamba2, dict(model_num_ssd_groups=1), expected),
    'mamba2, not expanded': (Mamba2, dict(model_mamba_expand=1), expected),
    'ssd, conv1d_d': (RotarySSD, dict(model_ssd_encoding='conv1d_d'), expected_ssd),
    'ssd, decay_only': (RotarySSD, dict(model_ssd_encoding='decay_only'), expected_ssd),
}


@pytest.fixture(params=CASES)
def case(request):
    mixer, settings, reference = CASES[request.param]
    model = model_of(**settings)
    graph, params = params_of(mixer(model, rngs=nnx.Rngs(0)))
    side_inputs = rope.side_inputs(model, mixer.rope_width(model), jnp.zeros((B, L), jnp.int32))

    def ours(params, x):
        module = nnx.merge(graph, params)
        return module(module.in_proj.norm(x), segment_ids_BL=jnp.asarray(IDS), **side_inputs)

    x = np.random.default_rng(1).standard_normal((B, L, D))
    return ours, params, x, lambda params, x: reference(params, x, model.num_ssd_groups)


def test_values_are_those_of_the_recurrence(case):
    ours, params, x, reference = case
    y, wanted = jax.jit(ours)(params, x.astype(np.float32)), reference(params, x)
    assert np.linalg.norm(y - wanted) <= VALUES * np.linalg.norm(wanted)


def test_every_gradient_is_that_of_the_recurrence(case):
    """Along three random directions of each array, by central differences in float64, whose own error is 1e-8."""
    ours, params, x, reference = case
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((B, L, D))

    def loss(params, x):
        return jnp.sum(ours(params, x) * weight.astype(np.float32))

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x.astype(np.float32))
    arguments = jax.tree.map(lambda v: np.asarray(v, np.float64), (params, x))
    flat, tree = jax.tree_util.tree_flatten_with_path(arguments)
    values = [value for _, value in flat]
    for i, (path, value) in enumerate(flat):
        gradient = np.asarray(jax.tree.leaves(grads)[i], np.float64)
        for _ in range(3):
            direction, step = rng.standard_normal(value.shape), 1e-5
            sides = []
            for sign in (1, -1):
                moved = [v + sign * step * direction if j == i else v for j, v in enumerate(values)]
                sides.append(np.sum(reference(*tree.unflatten(moved)) * weight))
            wanted = (sides[0] - sides[1]) / (2 * step)
            scale = np.linalg.norm(gradient) * np.linalg.norm(direction) / np.sqrt(value.size)
            assert abs(np.sum(gradient * direction) - wanted) <= GRADIENTS * scale, jax.tree_util.keystr(path)
