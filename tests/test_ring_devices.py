"""Ring attention on devices: the real TPU compiler for a pod that need not be here, and NVIDIA GPUs."""

import importlib.util
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_ring_attention as on_cpu
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tpu_compiler import run_alone

from pallas_kernels.attention import cudnn, ring_attention, xla

# ---- the TPU compiler ----


@pytest.mark.tpu_compile_full
@pytest.mark.parametrize('variant', ['segments', 'none'])
def test_compiles_for_v5e(variant):
    if importlib.util.find_spec('libtpu') is None:
        pytest.skip('libtpu is not installed: pip install jax[tpu]')
    assert 'compiled' in run_alone(__file__, variant)


def sent(hlo, turns):
    """Bytes that a device sends in a compiled program of collective permutes, whose one loop runs `turns` times."""
    sizes = {'bf16': 2, 'f32': 4, 's32': 4}
    (loop,) = re.findall(r' while\(.*body=%([\w.\-]+)', hlo)
    total = 0
    for text in re.split(r'\n(?=(?:ENTRY )?%[\w.\-]+ \()', hlo):
        times = turns if text.startswith(f'%{loop} ') else 1
        for dtype, shape in re.findall(r'= \((\w+)\[([\d,]+)\][^\n]*? collective-permute-start\(', text):
            total += times * sizes[dtype] * int(np.prod([int(size) for size in shape.split(',')]))
    return total


def compile_for_v5e(variant):
    """Forward and backward of 1.3B's attention at 16K tokens over 8 of 16 v5e chips."""
    from jax.experimental import topologies

    n, B, L, H, G, K = 8, 2, 16384, 32, 8, 64
    topology = topologies.get_topology_desc(platform='tpu', topology_name='v5e:4x4')
    devices = Mesh(np.array(topology.devices).reshape(2, n), ('data', 'context'), axis_types=(AxisType.Auto,) * 2)
    rows = P('data', 'context')

    def attend(q, k, v, ids):
        return ring_attention(
            q,
            k,
            v,
            axis_name='context',
            axis_size=n,
            implementation='splash',
            segment_ids=ids if variant == 'segments' else None,
        )

    attention = jax.shard_map(attend, mesh=devices, in_specs=(rows,) * 4, out_specs=rows, check_vma=False)

    def grads(q, k, v, ids, dy):
        # As where layers are rematerialised: the backward has a ring of its own.
        y, pull = jax.vjp(jax.checkpoint(lambda *args: attention(*args, ids)), q, k, v)
        return y, pull(dy)

    def place(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(devices, rows))

    q, k, ids = place(B, L, H, K), place(B, L, G, K), place(B, L, dtype=jnp.int32)
    compiled = jax.jit(attention).trace(q, k, k, ids).lower(lowering_platforms=('tpu',)).compile()
    hlo = compiled.as_text()
    for other in ('all-gather', 'all-reduce', 'all-to-all', 'reduce-scatter'):
        assert other not in hlo, other
    q_bytes, kv, ids_bytes = 2 * L // n * H * K, 2 * 2 * L // n * G * K, (variant == 'segments') * 4 * L // n
    assert sent(hlo, n - 2) == n * (kv + ids_bytes) + 2 * q_bytes, (sent(hlo, n - 2), q_bytes, kv, ids_bytes)

    compiled = jax.jit(grads).trace(q, k, k, ids, q).lower(lowering_platforms=('tpu',)).compile()
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    for other in ('all-gather', 'all-reduce', 'all-to-all', 'reduce-scatter'):
        assert other not in hlo, other
    # Forty times the queries, which a width of 64 pads to 128: logsumexps of 128 lanes, float32 sums, both sides of a select.
    assert memory.temp_size_in_bytes < 40 * 2 * q_bytes, memory
    print('compiled', variant, memory.temp_size_in_bytes >> 20, 'MiB temporary')


# ---- on GPUs ----

PACKINGS = {
    'none': None,
    'spanning': [[300, 500, 224], [511, 2, 511]],
    'none shared': [[512, 512], [100, 412, 512]],
    'one shares': [[512, 512], [1, 1023]],
    'whole keys': [[515, 509], [1024]],
    'many': [[32] * 32, [1] * 1024],
}


@pytest.mark.gpu
@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('name', PACKINGS)
def test_cudnn_blocks_on_gpu(name, causal):
    """Each block against the float32 blockwise form; the first half of the row are keys, the second queries."""
    if jax.default_backend() != 'gpu':
        pytest.skip('needs an NVIDIA GPU')
    S, scale = 512, 0.125
    narrow = on_cpu.make(B=2, L=2 * S, H=8, G=2, K=64, dtype=jnp.bfloat16)
    ids = None if PACKINGS[name] is None else on_cpu.documents(*PACKINGS[name])

    def cut(q, k, v, *of_queries):
        if causal:
            return q, k, v, *of_queries
        return q[:, S:], k[:, :S], v[:, :S], *(x[:, S:] for x in of_queries)

    @jax.jit
    def run(q, k, v, dy):
        wide = [x.astype(jnp.float32) for x in (q, k, v, dy)]
        segments = None if ids is None else (ids, ids)
        y, lse = xla.forward(*wide[:3], segments, scale, 256)
        *arrays, y, lse, dy = cut(*wide[:3], y, lse.swapaxes(1, 2), wide[3])
        lse, delta = lse.swapaxes(1, 2), xla.row_products(y, dy)
        segments = segments if causal or ids is None else (ids[:, S:], ids[:, :S])
        want = (
            *xla.forward(*arrays, segments, scale, 256, causal=causal),
            *xla.backward(*arrays, segments, scale, 256, lse, delta, dy, causal=causal),
        )
        arrays, y, dy = ([x.astype(jnp.bfloat16) for x in arrays], *(x.astype(jnp.bfloat16) for x in (y, dy)))
        got = (
            *cudnn.block_forward(*arrays, segments, scale, causal),
            *cudnn.block_backward(*arrays, segments, scale, causal, lse, y, dy),
        )
        return got, want

    for got, want in zip(*run(*narrow), strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        seen = np.isfinite(want)  # the logsumexp of a query that sees no key is -inf in both
        np.testing.assert_array_equal(np.isneginf(got), ~seen)
        assert np.linalg.norm(got[seen] - want[seen]) <= 6e-3 * max(np.linalg.norm(want[seen]), 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize('name', PACKINGS)
def test_ring_on_gpus(name):
    if jax.default_backend() != 'gpu' or jax.device_count() < 2:
        pytest.skip('needs two NVIDIA GPUs')
    q, k, v, dy = on_cpu.make(B=2, L=1024, H=8, G=2, K=64, dtype=jnp.bfloat16)
    ids = None if PACKINGS[name] is None else on_cpu.documents(*PACKINGS[name])
    devices = Mesh(np.array(jax.devices()[:2]), ('context',), axis_types=(AxisType.Auto,))
    rows = P(None, 'context')

    def attend(q, k, v, ids):
        return ring_attention(q, k, v, axis_name='context', axis_size=2, segment_ids=ids, implementation='cudnn')

    sharded = jax.shard_map(
        attend,
        mesh=devices,
        in_specs=(rows, rows, rows, None if ids is None else rows),
        out_specs=rows,
        check_vma=False,
    )
    on_cpu.check(on_cpu.value_and_grads(sharded, q, k, v, ids, dy), on_cpu.on_one(q, k, v, ids, dy), 6e-3)


if __name__ == '__main__':
    compile_for_v5e(sys.argv[1])
