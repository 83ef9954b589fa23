"""Every kernel under jax_enable_x64: it is lowered for its platform, widens nothing, and gives the same results.

Legend: B batch, L length, H heads, G groups, P and K head widths, N state width.
"""

import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from ssd_oracle import relative_error

from pallas_kernels.attention import causal_attention, decode_attention, ring_attention
from pallas_kernels.ssd import rotary_ssd, rotary_ssd_state, rotary_ssd_step
from pallas_kernels.ssd.context import rotary_ssd_in_context

B, L, H, G, P, N, SHARDS = 2, 256, 4, 2, 64, 128, 2
KERNEL_CALLS = {
    'tpu': 'custom_call @tpu_custom_call',
    'cuda': 'custom_call @mosaic_gpu',
    'cudnn': 'fmhaSoftmaxBackward',
}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def allow_cudnn_here(monkeypatch):
    """JAX asks for the cuDNN library while tracing, even when only lowering."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, 'check_cudnn_version', lambda: 92100)


def spec(*shape, dtype='float32'):
    return jax.ShapeDtypeStruct(shape, dtype)


def with_pull(f, floats, *rest):
    """f's results and the gradients of its floating arguments; the results serve as cotangents."""
    results, pull = jax.vjp(lambda *v: f(*v, *rest), *floats)
    return results, pull(results)


def scan(f, dtype, length=L, batch=B):
    """(f with gradients, arguments) of a scan; f takes x, dt, a, b, c, cos, sin, segment_ids and initial_state."""
    bc = spec(batch, length, G, N, dtype=dtype)
    floats = (spec(batch, length, H, P, dtype=dtype), spec(batch, length, H), spec(H), bc, bc)
    rest = (*[spec(length, N // 2)] * 2, spec(batch, length, dtype='int32'), spec(batch, H, P, N))
    return functools.partial(with_pull, f), (floats, *rest)


def over_shards(f, specs, out_spec):
    mesh = Mesh(np.array(jax.devices()[:SHARDS]), ('context',))
    return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out_spec, check_vma=False)


def scan_call(implementation, dtype):
    def f(x, dt, a, b, c, cos, sin, ids, state):
        keywords = dict(segment_ids=ids, implementation=implementation)
        y, final = rotary_ssd(x, dt, a, b, c, (cos, sin), initial_state=state, **keywords)
        return y, final, rotary_ssd_state(x, dt, a, b, (cos, sin), **keywords)

    return scan(f, dtype)


def scan_over_shards(implementation, dtype):
    def f(x, dt, a, b, c, cos, sin, ids):
        return rotary_ssd_in_context(
            x, dt, a, b, c, (cos, sin), axis_name='context', axis_size=SHARDS, segment_ids=ids,
            implementation=implementation,
        )  # fmt: skip

    rows, table = PartitionSpec(None, 'context'), PartitionSpec('context')
    sharded = over_shards(f, (rows, rows, PartitionSpec(), rows, rows, table, table, rows), rows)
    return scan(lambda *v: sharded(*v[:-1]), dtype)


def scan_step(implementation, dtype):
    bc = spec(B, G, N, dtype=dtype)
    arguments = (
        spec(B, H, P, N),
        spec(B, H, P, dtype=dtype),
        spec(B, H),
        spec(H),
        bc,
        bc,
        (spec(N // 2), spec(N // 2)),
    )
    return rotary_ssd_step, arguments


def attention_arguments(dtype, length):
    q, kv = spec(B, length, H, P, dtype=dtype), spec(B, length, G, P, dtype=dtype)
    return (q, kv, kv), spec(B, length, dtype='int32')


def attention_call(implementation, dtype):
    def f(q, k, v, ids):
        return causal_attention(q, k, v, segment_ids=ids, implementation=implementation)

    return functools.partial(with_pull, f), attention_arguments(dtype, L)


def attention_over_shards(implementation, dtype):
    def f(q, k, v, ids):
        return ring_attention(
            q, k, v, axis_name='context', axis_size=SHARDS, segment_ids=ids, implementation=implementation
        )

    rows = PartitionSpec(None, 'context')
    return functools.partial(with_pull, over_shards(f, (rows,) * 4, rows)), attention_arguments(dtype, 256 * SHARDS)


def attention_step(implementation, dtype):
    cache = spec(B, G, L, P, dtype=dtype)
    f = functools.partial(decode_attention, implementation=implementation)
    return f, (spec(B, H, P, dtype=dtype), cache, cache, spec(B, dtype='int32'))


# (function that builds the call, implementation, dtype, platform, kernel that its program must hold)
CASES = [
    (scan_call, 'reference', 'float32', 'cpu', None),
    (scan_call, 'xla', 'float32', 'cpu', None),
    (scan_call, 'xla', 'bfloat16', 'cpu', None),
    (scan_call, 'mosaic_tpu', 'bfloat16', 'tpu', 'tpu'),
    (scan_call, 'mosaic_gpu', 'bfloat16', 'cuda', 'cuda'),
    (scan_over_shards, 'xla', 'bfloat16', 'cpu', None),
    (scan_over_shards, 'mosaic_gpu', 'bfloat16', 'cuda', 'cuda'),
    (scan_step, None, 'bfloat16', 'cpu', None),
    (attention_call, 'reference', 'float32', 'cpu', None),
    (attention_call, 'xla', 'float32', 'cpu', None),
    (attention_call, 'cudnn', 'bfloat16', 'cuda', 'cudnn'),
    (attention_call, 'splash', 'bfloat16', 'tpu', 'tpu'),
    (attention_over_shards, 'xla', 'bfloat16', 'cpu', None),
    (attention_over_shards, 'cudnn', 'bfloat16', 'cuda', 'cudnn'),
    (attention_over_shards, 'splash', 'bfloat16', 'tpu', 'tpu'),
    (attention_step, 'xla', 'bfloat16', 'cpu', None),
    (attention_step, 'cudnn', 'bfloat16', 'cuda', None),
]


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def dtypes(variables):
    return {getattr(variable.aval, 'dtype', None) for variable in variables}


def is_kernel(name):
    return name.startswith(('pallas_call', 'mpmd_map', 'dot_product_attention'))


@pytest.mark.parametrize(
    'build, implementation, dtype, platform, kernel', CASES, ids=lambda v: getattr(v, '__name__', None) or str(v)
)
def test_lowers_and_widens_nothing(build, implementation, dtype, platform, kernel):
    """Forward and backward. No float64 anywhere, no int64 for a kernel, and results in the dtypes that they have without x64."""
    f, arguments = build(implementation, dtype)
    traced = jax.jit(f).trace(*arguments)
    found = list(equations(traced.jaxpr.jaxpr))
    assert len(found) > 5 and [e for e in found if jnp.dtype('float64') in dtypes(e.outvars)] == []
    kernels = [e for e in found if is_kernel(e.primitive.name)]
    assert bool(kernels) == (implementation in ('mosaic_tpu', 'mosaic_gpu', 'cudnn', 'splash'))
    assert [e for e in kernels if jnp.dtype('int64') in dtypes((*e.invars, *e.outvars))] == []
    with jax.enable_x64(False):
        assert jax.tree.map(lambda v: v.dtype, jax.eval_shape(f, *arguments)) == jax.tree.map(
            lambda v: v.dtype, traced.out_info
        )
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert kernel is None or KERNEL_CALLS[kernel] in text


@pytest.mark.parametrize('f, implementation, platform', [(scan_call, 'mosaic_tpu', 'tpu'), (scan_call, 'mosaic_gpu', 'cuda'),
                                                         (attention_call, 'splash', 'tpu')])  # fmt: skip
def test_a_batch_of_calls_lowers(f, implementation, platform):
    """vmap of a jitted function: the kernel is batched after it was traced."""
    call, arguments = f(implementation, 'bfloat16')
    stacked = jax.tree.map(lambda v: spec(3, *v.shape, dtype=v.dtype), arguments)
    text = jax.jit(jax.vmap(jax.jit(call))).trace(*stacked).lower(lowering_platforms=(platform,)).as_text()
    assert KERNEL_CALLS[platform] in text


@pytest.mark.parametrize('build', [scan_call, attention_call])
def test_the_xla_forms_compute_the_same(build):
    """Forward and backward on CPU: what they compute without x64."""
    f, arguments = build('xla', 'float32')
    rng = np.random.default_rng(0)

    def draw(v):
        if v.dtype == jnp.int32:
            return np.cumsum(rng.random(v.shape) < 0.05, axis=1).astype(np.int32)
        return rng.standard_normal(v.shape).astype(v.dtype)

    values = jax.tree.map(draw, arguments)
    if build is scan_call:
        (x, dt, a, b, c), *rest = values
        values = ((x, np.abs(dt), -np.abs(a), b, c), *rest)
    got = jax.jit(f)(*values)
    with jax.enable_x64(False):
        want = jax.jit(f)(*values)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == other.dtype
        assert relative_error(one, other) < 1e-6
