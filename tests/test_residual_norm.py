"""RMSNorm and the residual past it: every implementation against float64, values and gradients.

Without Hopper the kernel is lowered for it, and interpreted on small shapes. On a GPU:

  JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu tests/test_residual_norm.py

Legend: B batch, L length, D width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import small_config
from ssd_oracle import relative_error

from pallas_kernels import dispatch
from pallas_kernels.device import Device
from pallas_kernels.residual_norm import IMPLEMENTATIONS, STATISTICS_NAME, api, gpu, norm_and_residual
from transxssm_jax.model.language_model import Block

EPSILON = 1e-5
TOLERANCE = {'float32': 1e-6, 'bfloat16': 4e-3}  # norm of the error over the norm
KERNEL = 'custom_call @mosaic_gpu'
HOPPER = Device('gpu', 'NVIDIA H100', '9.0')
ARRAYS = ('x', 'scale', 'weight')


def definition(x, scale, weight):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPSILON) * scale, weight * x


def inputs(shape, dtype, seed=0):
    """(x, scale, weight), and the cotangents of normed and residual, of which the second is one of x's dtype."""
    rng = np.random.default_rng(seed)
    x, dnormed, dresidual = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(3))
    scale, weight = (jnp.asarray(1 + 0.3 * rng.standard_normal(shape[-1]), jnp.float32) for _ in range(2))
    return (2 * x, scale, weight), (dnormed, dresidual.astype(jnp.float32))


@functools.partial(jax.jit, static_argnames=('implementation', 'interpret'))
def both_ways(values, cotangents, implementation, interpret=False):
    f = functools.partial(norm_and_residual, epsilon=EPSILON, implementation=implementation, interpret=interpret)
    out, pull = jax.vjp(f, *values)
    return out, dict(zip(ARRAYS, pull(cotangents)))


def exact(tree):
    return jax.tree.map(lambda v: np.asarray(v, np.float64), tree)


@pytest.mark.parametrize('implementation', ['reference', 'xla'])
def test_it_is_its_definition(implementation):
    """Values, and gradients along two directions of each array by central differences in float64."""
    values, cotangents = inputs((2, 3, 16), 'float32')
    out, gradients = both_ways(values, cotangents, implementation)
    arguments, weights = exact(values), exact(cotangents)
    for found, right in zip(out, definition(*arguments)):
        assert relative_error(found, right) <= TOLERANCE['float32']
    rng = np.random.default_rng(5)
    for i, name in enumerate(ARRAYS):
        gradient = np.asarray(gradients[name], np.float64)
        for _ in range(2):
            direction, step = rng.standard_normal(gradient.shape), 1e-5
            sides = []
            for sign in (1, -1):
                moved = [v + sign * step * direction if j == i else v for j, v in enumerate(arguments)]
                sides.append(sum(np.sum(y * w) for y, w in zip(definition(*moved), weights)))
            error = abs(np.sum(gradient * direction) - (sides[0] - sides[1]) / (2 * step))
            assert error <= 1e-5 * np.linalg.norm(gradient) * np.linalg.norm(direction), name


# D below 1,024: four rows at a time, a warp each; from there a row at a time. Vectors of 16 bytes, and of 8.
@pytest.mark.parametrize('shape', [(2, 16, 256), (1, 48, 384), (1, 32, 1024), (2, 16, 1536)], ids=str)
@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('blocks', [3, 1000])
def test_the_kernel_is_the_reference(shape, dtype, blocks, monkeypatch):
    """Also where some blocks take a row more than others, and where there are fewer rows than blocks."""
    monkeypatch.setattr(gpu, 'BLOCKS', blocks)
    values, cotangents = inputs(shape, dtype, seed=1)
    # Compiled for this test: what is in the cache is for another number of blocks.
    run = functools.partial(both_ways.__wrapped__, implementation='mosaic_gpu', interpret=True)
    found = jax.jit(run)(values, cotangents)
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), (values, cotangents))
    wanted = both_ways(*wide, 'reference')
    (normed, residual), gradients = found
    assert normed.dtype == gradients['x'].dtype == dtype
    assert residual.dtype == gradients['scale'].dtype == gradients['weight'].dtype == jnp.float32
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert relative_error(one, exact(other)) <= TOLERANCE[dtype]


@pytest.mark.parametrize('implementation', ['reference', 'xla'])
def test_dtypes(implementation):
    values, cotangents = inputs((2, 3, 16), 'bfloat16')
    (normed, residual), gradients = both_ways(values, cotangents, implementation)
    assert normed.dtype == gradients['x'].dtype == jnp.bfloat16
    assert residual.dtype == gradients['scale'].dtype == gradients['weight'].dtype == jnp.float32


def test_what_is_kept_for_the_gradient():
    """x itself, and nothing in float32 of its size."""
    values, _ = inputs((2, 16, 256), 'bfloat16')
    f = functools.partial(norm_and_residual, epsilon=EPSILON, implementation='mosaic_gpu', interpret=True)
    _, pull = jax.eval_shape(lambda *v: jax.vjp(f, *v), *values)
    assert max(v.size for v in jax.tree.leaves(pull) if v.dtype == jnp.float32) <= 256


def test_the_statistics_can_be_kept():
    """A remat policy that keeps them computes no root again."""
    values, _ = inputs((2, 16, 256), 'bfloat16')

    def roots(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)

        @functools.partial(jax.checkpoint, policy=policy)
        def loss(*v):
            normed, residual = norm_and_residual(*v, epsilon=EPSILON, implementation='mosaic_gpu')
            return jnp.sum(jnp.square(normed.astype(jnp.float32)) + residual)

        lowered = jax.jit(jax.value_and_grad(loss)).trace(*values).lower(lowering_platforms=('cuda',))
        return lowered.as_text().count('stablehlo.rsqrt')

    assert roots(STATISTICS_NAME) == 1 and roots() == 2


# ---- the choice ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'device, call, reason',
    [
        (HOPPER, dict(), None),
        (HOPPER, dict(dtype='float32', M=16, D=128), None),
        (HOPPER, dict(D=4096), None),
        (HOPPER, dict(D=5120), 'D=5120, but it is for multiples of 128 below 1024 and of 512 up to 4096'),
        (HOPPER, dict(D=1100), 'D=1100, but it is for'),
        (HOPPER, dict(M=100), '100 tokens are no multiple of 16'),
        (HOPPER, dict(M=0), '0 tokens are no multiple of 16'),
        (HOPPER, dict(dtype='float64'), 'it computes in float32'),
        (HOPPER._replace(compute_capability='8.0'), dict(), 'has compute capability 8.0'),
    ],
    ids=str,
)
def test_what_the_kernel_serves(device, call, reason):
    call = api.Call(**dict(dtype='bfloat16', M=32768, D=2048) | call)
    if reason is None:
        assert (
            api.OPERATOR.choose('mosaic_gpu', call, device) == api.OPERATOR.choose(None, call, device) == 'mosaic_gpu'
        )
        return
    with pytest.raises(dispatch.UnsupportedError, match=f"implementation='mosaic_gpu' cannot serve .*{reason}"):
        api.OPERATOR.choose('mosaic_gpu', call, device)
    if call.dtype != 'float64':
        assert api.OPERATOR.choose(None, call, device) == 'xla'


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(x=(8,)), 'must have two dimensions'),
        (dict(scale=(3,)), r'scale: shape \(3,\) must be \(4,\)'),
        (dict(weight=(4, 1)), r'weight: shape \(4, 1\) must be \(4,\)'),
        (dict(dtype='float16'), 'x: dtype float16 must be bfloat16 or float32'),
        (dict(scale_dtype='bfloat16'), 'scale: dtype bfloat16 must be float32'),
        (dict(implementation='triton'), "implementation='triton' is unknown"),
    ],
    ids=str,
)
def test_bad_arguments(change, message):
    given = dict(x=(2, 8, 4), scale=(4,), weight=(4,), dtype='float32', scale_dtype='float32') | change
    x, scale = jnp.zeros(given['x'], given['dtype']), jnp.zeros(given['scale'], given['scale_dtype'])
    with pytest.raises(ValueError, match=message):
        norm_and_residual(
            x, scale, jnp.zeros(given['weight']), epsilon=EPSILON, implementation=change.get('implementation')
        )


# ---- lowered for Hopper ----------------------------------------------------------------------------------


def count_kernels(f, *values):
    return jax.jit(f).trace(*values).lower(lowering_platforms=('cuda',)).as_text().count(KERNEL)


@pytest.mark.parametrize('x64', [False, True])
@pytest.mark.parametrize('dtype', TOLERANCE)
def test_it_lowers_without_its_hardware(dtype, x64):
    """One kernel, backward only, also under vmap and jax_enable_x64."""

    def loss(*v):
        normed, residual = norm_and_residual(*v, epsilon=EPSILON, implementation='mosaic_gpu')
        return jnp.sum(jnp.square((residual + normed).astype(v[0].dtype).astype(jnp.float32)))

    values, _ = inputs((2, 16, 2048), dtype)
    gradient = jax.grad(loss, argnums=range(3))
    with jax.enable_x64(x64):
        assert count_kernels(loss, *values) == 0
        assert count_kernels(gradient, *values) == 1
        if x64:
            assert count_kernels(jax.vmap(gradient), *(jnp.stack([v] * 3) for v in values)) == 1


@pytest.mark.parametrize('d_mlp', [0, 256])
def test_a_block_calls_it_for_mixer_and_mlp(d_mlp, monkeypatch):
    """A norm and a residual of their own would pass every other test, and take longer."""
    calls = []

    def counted(call, *arguments):
        calls.append(call)
        return api.reference.norm_and_residual(*arguments)

    monkeypatch.setitem(api.OPERATOR.implementations, 'xla', dispatch.Implementation(counted))
    config = small_config(model_d_model=128, model_num_heads=4, model_d_mlp=d_mlp, model_attention_encoding='none')
    block = Block(config.model, 'attention', rngs=nnx.Rngs(0))
    block(jnp.ones((2, 32, 128)), segment_ids_BL=jnp.ones((2, 32), jnp.int32), rope=None, scale_BL=None)
    assert [(call.M, call.D) for call in calls] == [(64, 128)] * (2 if d_mlp else 1)


@pytest.fixture
def hopper():
    if jax.default_backend() != 'gpu' or not jax.devices()[0].compute_capability.startswith('9.'):
        pytest.skip('needs an NVIDIA Hopper GPU')


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('shape', [(4, 1024, 2048), (4, 1024, 768), (1, 4112, 512), (1, 2064, 2560)], ids=str)
def test_on_gpu(shape, dtype, hopper):
    values, cotangents = inputs(shape, dtype)
    found = both_ways(values, cotangents, 'mosaic_gpu')
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), (values, cotangents))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(both_ways(*wide, 'reference')), strict=True):
        assert relative_error(one, exact(other)) <= max(TOLERANCE[dtype], 1e-5)


def test_names():
    assert IMPLEMENTATIONS == ('reference', 'xla', 'mosaic_gpu')
