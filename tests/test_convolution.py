"""The causal convolution and the end of the Mamba-2 mixer: every implementation against float64, values and gradients.

Without their hardware the kernels are lowered for it, and interpreted on small shapes. On a GPU:

  JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu tests/test_convolution.py

Legend: B batch, L length, W width, C channels, H heads, P head width, G groups.
"""

import functools
import importlib.util
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from ssd_oracle import relative_error

from pallas_kernels import convolution, dispatch, gated_norm, tpu_profile
from pallas_kernels.chips import TPUS
from pallas_kernels.convolution import api as convolution_api
from pallas_kernels.convolution import causal_convolution, tokens_in_reach
from pallas_kernels.device import Device
from pallas_kernels.gated_norm import api as gated_norm_api
from pallas_kernels.gated_norm import skip_gate_norm

# Norm of the error over the norm.
TOLERANCE = {'float32': 1e-6, 'bfloat16': 4e-3}
CONVOLUTION, NORM = ('u', 'kernel', 'bias', 'before'), ('y', 'x', 'z', 'd', 'scale')  # what has a gradient
KERNELS = {'tpu': 'custom_call @tpu_custom_call', 'cuda': 'custom_call @mosaic_gpu'}


# ---- definitions in float64 ------------------------------------------------------------------------


def silu(v):
    return v / (1 + np.exp(-v))


def convolved(u, kernel, bias, before, ids):
    """Token by token; ids [B, W - 1 + L]."""
    W, (B, L) = len(kernel), u.shape[:2]
    window, out = np.concatenate([before, u], axis=1), np.zeros(u.shape)
    for row in range(B):
        for t in range(L):
            out[row, t] = bias
            for back in range(W):
                place = t + W - 1 - back
                if len(set(ids[row, place : t + W])) > 1:
                    break
                out[row, t] += kernel[W - 1 - back] * window[row, place]
    return silu(out)


def normed(y, x, z, d, scale, epsilon, groups):
    gated = (y + d[:, None] * x) * silu(z)
    by_group = gated.reshape(*gated.shape[:2], groups, -1)
    return (by_group / np.sqrt(np.mean(by_group**2, axis=-1, keepdims=True) + epsilon)).reshape(gated.shape) * scale


def assert_gradients(f, names, gradients, values, weight, tolerance, seed=5):
    """Of sum(f(values) * weight), along two random directions of each array, by central differences in float64."""
    rng = np.random.default_rng(seed)
    for i, name in enumerate(names):
        gradient = np.asarray(gradients[name], np.float64)
        for _ in range(2):
            direction, step = rng.standard_normal(gradient.shape), 1e-5
            sides = [
                np.sum(f(*[v + sign * step * direction if j == i else v for j, v in enumerate(values)]) * weight)
                for sign in (1, -1)
            ]
            scale = np.linalg.norm(gradient) * np.linalg.norm(direction) / np.sqrt(gradient.size)
            error = abs(np.sum(gradient * direction) - (sides[0] - sides[1]) / (2 * step))
            assert error <= tolerance * scale + 1e-7, (name, error / scale)


# ---- the convolution -------------------------------------------------------------------------------

# Of a kernel: the smallest shapes with two parts of a row and two strips of channels.
CONVOLUTIONS = {
    'reference, W 3': ('reference', (2, 9, (2, 3), 3)),
    'xla, W 2': ('xla', (2, 11, (6,), 2)),
    'xla, W 4': ('xla', (2, 19, (2, 3), 4)),
    'xla, W 7, a row shorter than that': ('xla', (2, 3, (4,), 7)),
    'xla, one token': ('xla', (2, 1, (4,), 4)),
    'mosaic_gpu, W 2': ('mosaic_gpu', (1, 16, (128,), 2)),
    'mosaic_gpu, W 3': ('mosaic_gpu', (2, 48, (128,), 3)),
    'mosaic_gpu, W 4': ('mosaic_gpu', (1, 48, (3, 128), 4)),
    'mosaic_tpu, W 2': ('mosaic_tpu', (1, 128, (128,), 2)),
    'mosaic_tpu, W 4': ('mosaic_tpu', (2, 384, (3, 128), 4)),
    'mosaic_tpu, W 7': ('mosaic_tpu', (1, 128, (128,), 7)),
}


def convolution_inputs(shape, dtype, seed=0):
    """(u, kernel, bias, before), ids [B, W - 1 + L] with documents of few tokens, dy."""
    B, L, channels, W = shape
    rng = np.random.default_rng(seed)
    ids = np.cumsum(rng.random((B, W - 1 + L)) < 0.25, axis=1).astype(np.int32)
    ids[0, : W + 1] = 7  # what is before the first row belongs to its document

    def draw(*shape, dtype=dtype):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    wide = 'float64' if dtype == 'float64' else 'float32'
    values = (
        draw(B, L, *channels),
        draw(W, *channels, dtype=wide),
        draw(*channels, dtype=wide),
        draw(B, W - 1, *channels),
    )
    return values, ids, draw(B, L, *channels)


@functools.partial(jax.jit, static_argnames=('implementation', 'interpret'))
def convolve_both_ways(values, ids, dy, implementation, interpret=False):
    def f(u, kernel, bias, before):
        reach = tokens_in_reach(ids, kernel.shape[0])
        return causal_convolution(
            u, kernel, bias, before=before, reach=reach, implementation=implementation, interpret=interpret
        )

    y, pull = jax.vjp(f, *values)
    return y, dict(zip(CONVOLUTION, pull(dy)))


def exact(tree):
    return jax.tree.map(lambda v: np.asarray(v, np.float64), tree)


@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_convolution_is_its_definition(name):
    """In float32; every gradient too."""
    implementation, shape = CONVOLUTIONS[name]
    values, ids, dy = convolution_inputs(shape, 'float32')
    y, gradients = convolve_both_ways(values, ids, dy, implementation, implementation.startswith('mosaic'))
    assert relative_error(y, convolved(*exact(values), ids)) <= TOLERANCE['float32']
    if np.size(values[0]) < 2000:
        assert_gradients(lambda *v: convolved(*v, ids), CONVOLUTION, gradients, exact(values), exact(dy), 1e-4)
    # Against one that passed, of larger shapes too.
    wanted, wanted_gradients = convolve_both_ways(values, ids, dy, 'reference')
    for found, right in ((y, wanted), *((gradients[key], wanted_gradients[key]) for key in gradients)):
        assert relative_error(found, exact(right)) <= TOLERANCE['float32']


@pytest.mark.parametrize('name', ['xla, W 4', 'mosaic_gpu, W 3', 'mosaic_tpu, W 4'])
def test_convolution_in_bfloat16(name):
    """Gradients of parameters are summed in float32, of derivatives that XLA's form rounds once more."""
    implementation, shape = CONVOLUTIONS[name]
    values, ids, dy = convolution_inputs(shape, 'bfloat16', seed=1)
    y, gradients = convolve_both_ways(values, ids, dy, implementation, implementation.startswith('mosaic'))
    wide = [v.astype(jnp.float32) for v in (*values, dy)]
    wanted, wanted_gradients = convolve_both_ways(tuple(wide[:-1]), ids, wide[-1], 'reference')
    assert y.dtype == gradients['u'].dtype == gradients['before'].dtype == jnp.bfloat16
    assert gradients['kernel'].dtype == gradients['bias'].dtype == jnp.float32
    for found, right in ((y, wanted), *((gradients[key], wanted_gradients[key]) for key in gradients)):
        assert relative_error(found, exact(right)) <= TOLERANCE['bfloat16']


def test_reference_computes_in_float64():
    with jax.enable_x64(True):
        values, ids, dy = convolution_inputs((2, 9, (4,), 4), 'float64')
        y, gradients = convolve_both_ways(values, ids, dy, 'reference')
    assert relative_error(y, convolved(*exact(values), ids)) <= 1e-14
    assert_gradients(lambda *v: convolved(*v, ids), CONVOLUTION, gradients, exact(values), exact(dy), 1e-7)


def test_a_row_in_shards_is_the_row():
    """The tokens before a shard and their ids are given to it, and the gradient of those tokens goes back."""
    (u, kernel, bias, before), ids, dy = convolution_inputs((2, 12, (4,), 4), 'float32')
    y, gradients = convolve_both_ways((u, kernel, bias, before), ids, dy, 'xla')
    first = convolve_both_ways((u[:, :6], kernel, bias, before), ids[:, :9], dy[:, :6], 'xla')
    second = convolve_both_ways((u[:, 6:], kernel, bias, u[:, 3:6]), ids[:, 6:], dy[:, 6:], 'xla')
    assert relative_error(np.concatenate([first[0], second[0]], axis=1), exact(y)) <= 1e-6
    du = np.concatenate([first[1]['u'].at[:, 3:].add(second[1]['before']), second[1]['u']], axis=1)
    assert relative_error(du, exact(gradients['u'])) <= 1e-6
    assert relative_error(first[1]['kernel'] + second[1]['kernel'], exact(gradients['kernel'])) <= 1e-6


def test_without_documents_and_tokens_before():
    (u, kernel, bias, _), _, _ = convolution_inputs((2, 9, (4,), 3), 'float32')
    wanted = convolved(*exact((u, kernel, bias)), np.zeros((2, 2, 4)), np.zeros((2, 11), np.int32))
    assert relative_error(causal_convolution(u, kernel, bias), wanted) <= TOLERANCE['float32']


# ---- the end of the mixer --------------------------------------------------------------------------

NORMS = {
    'reference': ('reference', (2, 5, 4, 3, 2)),
    'xla': ('xla', (2, 5, 4, 3, 2)),
    'xla, one group': ('xla', (2, 4, 6, 2, 1)),
    'mosaic_gpu, groups of 64': ('mosaic_gpu', (2, 16, 4, 32, 2)),
    'mosaic_gpu, groups of 256': ('mosaic_gpu', (1, 32, 4, 64, 1)),
    'mosaic_gpu, groups of 512': ('mosaic_gpu', (1, 80, 4, 128, 1)),
}
EPSILON = 1e-2


def norm_inputs(shape, dtype, seed=0):
    B, L, H, P, _ = shape
    rng = np.random.default_rng(seed)
    y, x, z, dout = (jnp.asarray(rng.standard_normal((B, L, H, P)), dtype) for _ in range(4))
    wide = 'float64' if dtype == 'float64' else 'float32'
    d, scale = (jnp.asarray(1 + 0.3 * rng.standard_normal(s), wide) for s in (H, (H, P)))
    return (y, x, z, d, scale), dout


@functools.partial(jax.jit, static_argnames=('groups', 'implementation', 'interpret'))
def norm_both_ways(values, dout, groups, implementation, interpret=False):
    keywords = dict(epsilon=EPSILON, num_groups=groups, implementation=implementation, interpret=interpret)
    out, pull = jax.vjp(lambda *v: skip_gate_norm(*v, **keywords), *values)
    return out, dict(zip(NORM, pull(dout)))


@pytest.mark.parametrize('name', NORMS)
def test_norm_is_its_definition(name):
    implementation, shape = NORMS[name]
    values, dout = norm_inputs(shape, 'float32')
    out, gradients = norm_both_ways(values, dout, shape[-1], implementation, implementation.startswith('mosaic'))
    assert relative_error(out, normed(*exact(values), EPSILON, shape[-1])) <= TOLERANCE['float32']
    if np.size(out) < 2000:
        assert_gradients(lambda *v: normed(*v, EPSILON, shape[-1]), NORM, gradients, exact(values), exact(dout), 1e-4)
    wanted, wanted_gradients = norm_both_ways(values, dout, shape[-1], 'reference')
    for found, right in ((out, wanted), *((gradients[key], wanted_gradients[key]) for key in gradients)):
        assert relative_error(found, exact(right)) <= TOLERANCE['float32']


@pytest.mark.parametrize('name', ['xla', 'mosaic_gpu, groups of 64'])
def test_norm_in_bfloat16(name):
    implementation, shape = NORMS[name]
    values, dout = norm_inputs(shape, 'bfloat16', seed=1)
    out, gradients = norm_both_ways(values, dout, shape[-1], implementation, implementation.startswith('mosaic'))
    wide = [v.astype(jnp.float32) for v in (*values, dout)]
    wanted, wanted_gradients = norm_both_ways(tuple(wide[:-1]), wide[-1], shape[-1], 'reference')
    assert out.dtype == jnp.bfloat16 and gradients['d'].dtype == gradients['scale'].dtype == jnp.float32
    for found, right in ((out, wanted), *((gradients[key], wanted_gradients[key]) for key in gradients)):
        assert relative_error(found, exact(right)) <= TOLERANCE['bfloat16']


def test_what_is_kept_for_the_gradients():
    """The arguments, and nothing in float32 of their size."""
    values, ids, _ = convolution_inputs((2, 32, (8,), 4), 'bfloat16')
    reach = tokens_in_reach(ids, 4)
    for implementation in ('xla', 'mosaic_gpu', 'mosaic_tpu'):
        if implementation != 'xla':
            values, ids, _ = convolution_inputs((1, 128, (128,), 4), 'bfloat16')
            reach = tokens_in_reach(ids, 4)
        f = functools.partial(causal_convolution, reach=reach, implementation=implementation, interpret=True)
        _, pull = jax.eval_shape(lambda *v, f=f: jax.vjp(lambda *w: f(*w[:3], before=w[3]), *v), *values)
        sizes = [v.size for v in jax.tree.leaves(pull) if v.dtype == jnp.float32]
        assert max(sizes) <= 4 * values[2].size
    norm_values, _ = norm_inputs((2, 16, 4, 16, 1), 'bfloat16')
    for implementation in ('xla', 'mosaic_gpu'):
        f = functools.partial(skip_gate_norm, epsilon=1e-5, num_groups=1, implementation=implementation, interpret=True)
        _, pull = jax.eval_shape(lambda *v, f=f: jax.vjp(f, *v), *norm_values)
        assert max(v.size for v in jax.tree.leaves(pull) if v.dtype == jnp.float32) <= norm_values[-1].size


# ---- the choice ------------------------------------------------------------------------------------

HOPPER, V5E = Device('gpu', 'NVIDIA H100', '9.0'), Device('tpu', 'TPU v5e', '')


@pytest.mark.parametrize(
    'operator, device, call, reason',
    [
        ('conv', HOPPER, dict(), None),
        ('conv', HOPPER, dict(dtype='float32', L=16, C=128, W=2), None),
        ('conv', HOPPER, dict(W=5), 'W=5, but it is for W of 2 to 4'),
        ('conv', HOPPER, dict(L=1000), 'L=1000 is no multiple of 16'),
        ('conv', HOPPER, dict(C=96), '96 channels are no multiple of 128'),
        ('conv', HOPPER, dict(dtype='float64'), 'it computes in float32'),
        ('conv', HOPPER._replace(compute_capability='10.0'), dict(), 'has compute capability 10.0'),
        ('conv', V5E, dict(W=7, L=128), None),
        ('conv', V5E, dict(W=8), 'W=8, but it is for W of 2 to 7'),
        ('conv', V5E, dict(L=64), 'L=64 is no multiple of 128'),
        ('norm', HOPPER, dict(), None),
        ('norm', HOPPER, dict(G=4), 'groups of 1024 channels'),
        ('norm', HOPPER, dict(B=1, L=100), 'B L = 100 is no multiple of 16'),
        ('norm', HOPPER, dict(dtype='float64'), 'it computes in float32'),
        ('norm', HOPPER._replace(compute_capability='8.0'), dict(), 'has compute capability 8.0'),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_kernels_serve(operator, device, call, reason):
    api, usual = {
        'conv': (convolution_api, dict(dtype='bfloat16', B=4, L=4096, C=4096, W=4)),
        'norm': (gated_norm_api, dict(dtype='bfloat16', B=4, L=4096, H=64, P=64, G=8)),
    }[operator]
    call, name = api.Call(**usual | call), f'mosaic_{device.backend}'
    if reason is None:
        assert api.OPERATOR.choose(name, call, device) == api.OPERATOR.choose(None, call, device) == name
        return
    with pytest.raises(dispatch.UnsupportedError, match=f"implementation='{name}' cannot serve this call: .*{reason}"):
        api.OPERATOR.choose(name, call, device)
    if call.dtype != 'float64':
        assert api.OPERATOR.choose(None, call, device) == 'xla'


def test_the_choice_is_logged_once(caplog):
    dispatch.log_once.cache_clear()
    call = convolution_api.Call('bfloat16', 4, 4096, 4096, 8)
    with caplog.at_level(logging.INFO, logger='pallas_kernels'):
        for _ in range(2):
            assert convolution_api.OPERATOR.choose(None, call, V5E) == 'xla'
    (message,) = caplog.messages
    assert "C=4096 W=8: xla, not 'mosaic_tpu': W=8" in message


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(u=(2, 8)), r'u: shape \(2, 8\) must be'),
        (dict(u=(2, 0, 4)), 'has length 0'),
        (dict(kernel=(1, 4)), 'W at least 2'),
        (dict(kernel=(4, 5)), r'kernel: shape \(4, 5\) must be \(4, 4\)'),
        (dict(bias=(5,)), r'bias: shape \(5,\) must be \(4,\)'),
        (dict(before=(2, 4, 4)), r'before: shape \(2, 4, 4\) must be \(2, 3, 4\)'),
        (dict(reach=(2, 7)), r'reach: shape \(2, 7\) must be \(2, 8\)'),
        (dict(dtype='float16'), 'dtype float16 must be bfloat16 or float32'),
        (dict(implementation='cudnn'), "implementation='cudnn' is unknown"),
    ],
    ids=str,
)
def test_bad_arguments_of_the_convolution(change, message):
    shapes = dict(u=(2, 8, 4), kernel=(4, 4), bias=(4,), before=(2, 3, 4), reach=(2, 8)) | change
    u, kernel, bias, before = (jnp.zeros(shapes[name]) for name in ('u', 'kernel', 'bias', 'before'))
    u = u.astype(shapes.get('dtype', 'float32'))
    reach = jnp.zeros(shapes['reach'], jnp.int32)
    with pytest.raises(ValueError, match=message):
        causal_convolution(u, kernel, bias, before=before, reach=reach, implementation=change.get('implementation'))


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(y=(2, 8, 4)), r'must have the 4 dimensions'),
        (dict(x=(2, 8, 4, 3)), r'x: shape .* must be \(2, 8, 4, 2\)'),
        (dict(d=(3,)), r'd: shape \(3,\) must be \(4,\)'),
        (dict(num_groups=3), 'num_groups=3 must divide H=4'),
        (dict(implementation='mosaic_tpu'), 'is unknown'),
    ],
    ids=str,
)
def test_bad_arguments_of_the_norm(change, message):
    rows = (2, 8, 4, 2)
    shapes = dict(y=rows, x=rows, z=rows, d=(4,), scale=(4, 2), num_groups=2, implementation=None) | change
    arrays = (jnp.zeros(shapes[name]) for name in ('y', 'x', 'z', 'd', 'scale'))
    with pytest.raises(ValueError, match=message):
        skip_gate_norm(*arrays, epsilon=1e-5, num_groups=shapes['num_groups'], implementation=shapes['implementation'])


# ---- lowered for their platforms -------------------------------------------------------------------


def count_kernels(platform, f, *values):
    text = jax.jit(lambda *v: f(*v)).trace(*values).lower(lowering_platforms=(platform,)).as_text()
    return len(re.findall(KERNELS[platform], text))


def convolution_loss(implementation):
    def loss(u, kernel, bias, before):
        y = causal_convolution(u, kernel, bias, before=before, implementation=implementation)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    return loss


def norm_loss(*values):
    out = skip_gate_norm(*values, epsilon=1e-5, num_groups=2, implementation='mosaic_gpu')
    return jnp.sum(jnp.square(out.astype(jnp.float32)))


@pytest.mark.parametrize('x64', [False, True])
@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('platform', KERNELS)
def test_convolution_lowers_without_its_hardware(platform, dtype, x64):
    """One kernel forward and one backward, also under vmap and jax_enable_x64."""
    loss = convolution_loss({'tpu': 'mosaic_tpu', 'cuda': 'mosaic_gpu'}[platform])
    values, _, _ = convolution_inputs((1, 128, (256,), 4), dtype)
    with jax.enable_x64(x64):
        assert count_kernels(platform, jax.grad(loss, argnums=range(4)), *values) == 2
        if x64:
            stacked = [jnp.stack([v] * 3) for v in values]
            assert count_kernels(platform, jax.vmap(jax.grad(loss, argnums=range(4))), *stacked) == 2


@pytest.mark.parametrize('x64', [False, True])
@pytest.mark.parametrize('dtype, P', [('float32', 64), ('bfloat16', 16), ('bfloat16', 32), ('bfloat16', 128)])
def test_norm_lowers_without_a_gpu(dtype, P, x64):
    values, _ = norm_inputs((1, 32, 8, P, 2), dtype)
    with jax.enable_x64(x64):
        assert count_kernels('cuda', jax.grad(norm_loss, argnums=range(5)), *values) == 2
        if x64:
            stacked = [jnp.stack([v] * 3) for v in values]
            assert count_kernels('cuda', jax.vmap(jax.grad(norm_loss, argnums=range(5))), *stacked) == 2


def test_kernels_refuse_other_platforms():
    values, _, _ = convolution_inputs((1, 128, (128,), 4), 'float32')
    for name, platform in (('mosaic_gpu', 'tpu'), ('mosaic_tpu', 'cuda'), ('mosaic_gpu', 'cpu')):
        traced = jax.jit(convolution_loss(name)).trace(*values)
        with pytest.raises(dispatch.UnsupportedError, match=f"'{name}' cannot serve.* lowered for {platform}"):
            traced.lower(lowering_platforms=(platform,))


@pytest.mark.parametrize('check_vma', [True, False])
@pytest.mark.parametrize('implementation', ['xla', 'mosaic_gpu', 'mosaic_tpu'])
def test_under_shard_map(implementation, check_vma):
    """Rows over devices: the gradients of kernel and bias are summed where JAX tracks that they must be."""
    mesh = jax.make_mesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = PartitionSpec('data'), PartitionSpec()
    values, ids, _ = convolution_inputs((2, 128, (128,), 4), 'float32')
    loss = convolution_loss(implementation)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(rows, whole, whole, rows), out_specs=whole, check_vma=check_vma
    )
    def sharded(*v):
        return jax.lax.psum(loss(*v), 'data')

    gradients = jax.grad(sharded, argnums=range(4))
    if implementation != 'xla':
        platform = {'mosaic_gpu': 'cuda', 'mosaic_tpu': 'tpu'}[implementation]
        assert count_kernels(platform, gradients, *values) == 2
        return
    for found, right in zip(jax.jit(gradients)(*values), jax.grad(loss, argnums=range(4))(*values)):
        assert relative_error(found, exact(right)) <= 1e-6


# ---- through the TPU compiler ----------------------------------------------------------------------


def convolution_case(B, L, C, W, dtype):
    """(f, args) for tpu_profile.profile: both kernels in one program."""

    def array(*shape, dtype='float32'):
        return jax.ShapeDtypeStruct(shape, dtype)

    u = array(B, L, C, dtype=dtype)
    values = (u, array(W, C), array(C), array(B, W - 1, C, dtype=dtype))
    return jax.grad(convolution_loss('mosaic_tpu'), argnums=range(4)), values


def compile_for(chip, *case):
    profile = tpu_profile.profile(chip, 'test_convolution:convolution_case', *case)
    kernels = [kernel for kernel in profile.kernels if 'causal_convolution' in kernel.name]
    assert len(kernels) == 2
    # The backward kernel holds some ten arrays of [256, 128], and spills at most 2,200 registers a step (v4).
    assert all(kernel.spills <= 2500 and 0 < kernel.vmem <= TPUS[chip].vmem for kernel in kernels)


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed: pip install -e .[tpu]'
)


@needs_compiler
@pytest.mark.timeout(600)
def test_compiles_for_v5e():
    compile_for('v5e', 2, 256, 384, 4, 'bfloat16')


@needs_compiler
@pytest.mark.tpu_compile_full
@pytest.mark.parametrize(
    'case', [(4, 4096, 4096, 4, 'bfloat16'), (1, 128, 128, 2, 'bfloat16'), (2, 128, 384, 7, 'float32')]
)
@pytest.mark.parametrize('chip', TPUS)
def test_compiles(chip, case):
    compile_for(chip, *case)


# ---- on the GPU itself -----------------------------------------------------------------------------


@pytest.fixture(scope='module')
def hopper():
    if jax.default_backend() != 'gpu' or not jax.devices()[0].compute_capability.startswith('9.'):
        pytest.skip('needs a Hopper GPU')


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize(
    'shape', [(2, 48, (128,), 2), (1, 144, (3, 128), 3), (2, 1024, (16, 64), 4), (4, 4096, (8, 128), 4)], ids=str
)
def test_convolution_on_gpu(shape, dtype, hopper):
    values, ids, dy = convolution_inputs(shape, dtype)
    y, gradients = convolve_both_ways(values, ids, dy, 'mosaic_gpu')
    wide = [v.astype(jnp.float32) for v in (*values, dy)]
    wanted, wanted_gradients = convolve_both_ways(tuple(wide[:-1]), ids, wide[-1], 'reference')
    for found, right in ((y, wanted), *((gradients[key], wanted_gradients[key]) for key in gradients)):
        assert relative_error(found, exact(right)) <= max(TOLERANCE[dtype], 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize(
    'shape', [(2, 16, 4, 32, 2), (1, 32, 4, 64, 2), (1, 80, 4, 64, 1), (4, 4096, 16, 64, 2)], ids=str
)
def test_norm_on_gpu(shape, dtype, hopper):
    values, dout = norm_inputs(shape, dtype)
    out, gradients = norm_both_ways(values, dout, shape[-1], 'mosaic_gpu')
    wide = [v.astype(jnp.float32) for v in (*values, dout)]
    wanted, wanted_gradients = norm_both_ways(tuple(wide[:-1]), wide[-1], shape[-1], 'reference')
    for found, right in ((out, wanted), *((gradients[key], wanted_gradients[key]) for key in gradients)):
        assert relative_error(found, exact(right)) <= max(TOLERANCE[dtype], 1e-5)


def test_names():
    assert convolution.IMPLEMENTATIONS == ('reference', 'xla', 'mosaic_gpu', 'mosaic_tpu')
    assert gated_norm.IMPLEMENTATIONS == ('reference', 'xla', 'mosaic_gpu')
