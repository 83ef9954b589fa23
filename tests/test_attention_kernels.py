"""Causal attention: every implementation against a float64 oracle, transforms, memory, lowering.

Shapes: B batch, L length, H heads, G key/value heads, K head width.
"""

import functools
import importlib.util
import logging
import sys
import types

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tpu_compiler import run_alone

from pallas_kernels import dispatch
from pallas_kernels.attention import causal_attention, cudnn, packing, save_residuals, splash

TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 5e-3}
NAMES = ('out', 'dq', 'dk', 'dv')
VARIANTS = ('none', 'segments')


def oracle(q, k, v, dout, segment_ids, scale):
    """Output and gradients by the definition, dense, float64, numpy."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    L, H, G = q.shape[1], q.shape[2], k.shape[2]
    k, v = np.repeat(k, H // G, 2), np.repeat(v, H // G, 2)
    s = scale * np.einsum('blhk,bshk->bhls', q, k)
    allowed = np.tril(np.ones((L, L), bool))[None]
    if segment_ids is not None:
        ids = np.asarray(segment_ids)
        allowed = allowed & (ids[:, :, None] == ids[:, None, :])
    s = np.where(allowed[:, None], s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.einsum('bhls,bshk->blhk', p, v)
    dp = np.einsum('blhk,bshk->bhls', dout, v)
    ds = scale * p * (dp - (p * dp).sum(-1, keepdims=True))

    def group(x):
        return x.reshape(*x.shape[:2], G, H // G, -1).sum(3)

    dq = np.einsum('bhls,bshk->blhk', ds, k)
    dk = group(np.einsum('bhls,blhk->bshk', ds, q))
    dv = group(np.einsum('bhls,blhk->bshk', p, dout))
    return dict(zip(NAMES, (out, dq, dk, dv), strict=True))


def make(B=2, L=100, H=4, G=2, K=16, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((B, L, H, K), (B, L, G, K), (B, L, G, K), (B, L, H, K))
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def segments(B, L, mean, seed=0):
    """[B, L] int32: documents of random length, other boundaries in every row."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(np.cumsum(rng.random((B, L)) < 1 / mean, axis=1), jnp.int32)


def value_and_grads(attention, q, k, v, dout):
    """{name: array} of the output and the gradients of <attention(q, k, v), dout>."""

    def run(q, k, v, dout):
        out, pull = jax.vjp(attention, q, k, v)
        return dict(zip(NAMES, (out, *pull(dout)), strict=True))

    return jax.jit(run)(q, k, v, dout)


def error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    # The floor is for gradients that are exactly 0 (L = 1).
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1.0)


def check(got, want, tolerance):
    assert got.keys() == want.keys()
    errors = {name: error(got[name], want[name]) for name in want}
    assert all(e <= tolerance for e in errors.values()), errors


def attend(implementation, segment_ids=None, **options):
    if implementation == 'splash':  # on CPU: the kernels interpreted
        return lambda q, k, v: splash.attention(q, k, v, segment_ids, 0.25, interpret=True)
    return lambda q, k, v: causal_attention(
        q, k, v, segment_ids=segment_ids, scale=0.25, implementation=implementation, **options
    )


# ---- the oracle ----


# Of implementation, dtype and segments every two meet.
@pytest.mark.parametrize(
    'implementation, dtype, variant',
    [
        ('reference', jnp.float32, 'segments'),
        ('reference', jnp.bfloat16, 'none'),
        ('xla', jnp.float32, 'none'),
        ('xla', jnp.bfloat16, 'segments'),
        ('splash', jnp.float32, 'none'),
        ('splash', jnp.bfloat16, 'segments'),
    ],
)
def test_oracle(implementation, dtype, variant):
    H, G, K = (2, 1, 64) if implementation == 'splash' else (4, 2, 16)
    q, k, v, dout = make(L=200, H=H, G=G, K=K, dtype=dtype)
    ids = segments(2, 200, 30) if variant == 'segments' else None
    options = {'chunk_size': 64} if implementation == 'xla' else {}
    got = value_and_grads(attend(implementation, ids, **options), q, k, v, dout)
    assert got['out'].dtype == got['dk'].dtype == dtype
    check(got, oracle(q, k, v, dout, ids, 0.25), TOLERANCE[dtype])


@pytest.mark.parametrize(
    'B, L, H, G, chunk',
    [(1, 1, 2, 2, None), (2, 7, 4, 4, 3), (1, 64, 4, 1, 64), (1, 65, 6, 2, 64), (2, 9, 3, 3, 1)],
)
def test_shapes(B, L, H, G, chunk):
    q, k, v, dout = make(B, L, H, G)
    ids = segments(B, L, 5)
    got = value_and_grads(attend('xla', ids, chunk_size=chunk), q, k, v, dout)
    check(got, oracle(q, k, v, dout, ids, 0.25), 1e-5)


def test_default_scale():
    q, k, v, dout = make(K=32)
    got = causal_attention(q, k, v)
    assert error(got, oracle(q, k, v, dout, None, 32**-0.5)['out']) <= 1e-5


def test_large_scores_stay_finite():
    q, k, v, dout = make()
    got = value_and_grads(attend('xla', chunk_size=16), 100 * q, 100 * k, v, dout)
    assert all(np.isfinite(x).all() for x in got.values())
    assert error(got['out'], oracle(100 * q, 100 * k, v, dout, None, 0.25)['out']) <= 1e-4


# ---- properties ----


def test_causality():
    q, k, v, _ = make()
    f = jax.jit(attend('xla', chunk_size=16))
    for t in (0, 15, 16, 57, 99):
        later = jnp.arange(100)[None, :, None, None] >= t
        other = f(*(jnp.where(later, 3 * x + 1, x) for x in (q, k, v)))
        np.testing.assert_array_equal(f(q, k, v)[:, :t], other[:, :t])
        assert (f(q, k, v)[:, t] != other[:, t]).any()


def test_packed_equals_separate():
    lengths = (1, 33, 33, 33)
    q, k, v, dout = make(B=1, L=sum(lengths))
    ids = jnp.asarray(np.repeat([0, 1, 4, 5], lengths), jnp.int32)[None]
    packed = value_and_grads(attend('xla', ids, chunk_size=16), q, k, v, dout)
    first = {name: x[:, :1] for name, x in packed.items()}
    check(first, oracle(*(x[:, :1] for x in (q, k, v, dout)), None, 0.25), 1e-6)

    # The documents of 33 tokens as the rows of a batch.
    def rows(x):
        return x[:, 1:].reshape(3, 33, *x.shape[2:])

    separate = value_and_grads(attend('xla', chunk_size=16), *map(rows, (q, k, v, dout)))
    check({name: rows(x) for name, x in packed.items()}, separate, 2e-6)


# ---- transforms ----


def test_vmap():
    q, k, v, dout = (x.reshape(2, 2, *x.shape[1:]) for x in make(B=4, L=40))
    ids = segments(4, 40, 9).reshape(2, 2, 40)

    def grads(q, k, v, dout, ids):
        out, pull = jax.vjp(attend('xla', ids, chunk_size=16), q, k, v)
        return dict(zip(NAMES, (out, *pull(dout)), strict=True))

    together = jax.jit(jax.vmap(grads))(q, k, v, dout, ids)
    for n in range(2):
        want = oracle(q[n], k[n], v[n], dout[n], ids[n], 0.25)
        check({name: x[n] for name, x in together.items()}, want, 1e-5)


def layers(attention, policy=None, remat=True):
    """Loss of three scanned residual layers, so that scan, checkpoint and custom_vjp meet."""

    def loss(x, k, v):
        def layer(x, kv):
            return x + attention(x, *kv), None

        body = jax.checkpoint(layer, policy=policy) if remat else layer
        return jnp.sum(jnp.sin(jax.lax.scan(body, x, (k, v))[0]))

    return loss


def test_scan_and_checkpoint():
    q, k, v, _ = make(L=24)
    k, v = (jnp.stack([x, 2 * x, -x]) for x in (k, v))

    def grads(**options):
        loss = layers(attend('xla', chunk_size=16), **options)
        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    for plain, remat in zip(grads(remat=False), grads(policy=save_residuals), strict=True):
        assert error(remat, plain) <= 1e-6


def test_policy_saves_the_second_forward():
    q, k, v, _ = make(L=40)
    attention = attend('xla', chunk_size=16)

    def loops(policy):
        f = jax.checkpoint(lambda *args: jnp.sum(jnp.sin(attention(*args))), policy=policy)
        return str(jax.make_jaxpr(jax.grad(f, (0, 1, 2)))(q, k, v)).count(' scan[')

    assert loops(None) == loops(save_residuals) + 1


def mesh(*shape):
    if jax.device_count() < 8:
        pytest.skip('needs XLA_FLAGS=--xla_force_host_platform_device_count=8')
    axes = ('data', 'tensor')
    return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize('G', [4, 1])
def test_shard_map(G):
    q, k, v, dout = make(B=4, L=40, H=4, G=G)
    ids = segments(4, 40, 9)
    # One key/value head cannot be split: it is replicated over 'tensor', its gradient summed.
    kv = P('data', None, 'tensor' if G > 1 else None, None)
    heads = P('data', None, 'tensor', None)

    @functools.partial(jax.shard_map, mesh=mesh(4, 2), in_specs=(heads, kv, kv, P('data', None)), out_specs=heads)
    def attention(q, k, v, ids):
        return attend('xla', ids, chunk_size=16)(q, k, v)

    got = value_and_grads(lambda *args: attention(*args, ids), q, k, v, dout)
    check(got, oracle(q, k, v, dout, ids, 0.25), 1e-5)


@pytest.mark.parametrize('variant', VARIANTS)
def test_partitioner_adds_no_communication(variant):
    q, k, v, dout = make(B=4, L=40, H=4, G=4)
    ids = segments(4, 40, 9)
    devices = mesh(4, 2)
    heads = NamedSharding(devices, P('data', None, 'tensor', None))
    args = [jax.device_put(x, heads) for x in (q, k, v, dout)]
    args.append(jax.device_put(ids, NamedSharding(devices, P('data', None))))

    @jax.jit
    def grads(q, k, v, dout, ids):
        ids = ids if variant == 'segments' else None
        out, pull = jax.vjp(attend('xla', ids, chunk_size=16), q, k, v)
        return dict(zip(NAMES, (out, *pull(dout)), strict=True))

    hlo = grads.lower(*args).compile().as_text()
    for op in ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute'):
        assert op not in hlo, op
    got = grads(*args)
    assert got['dk'].sharding.is_equivalent_to(heads, 4)
    check(got, oracle(q, k, v, dout, ids if variant == 'segments' else None, 0.25), 1e-5)


# ---- memory ----


def array_sizes(jaxpr):
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield getattr(variable.aval, 'size', 0), equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from array_sizes(inner)


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('implementation', ['xla', 'cudnn', 'splash'])
def test_no_square_array(implementation, variant, monkeypatch):
    allow_cudnn_here(monkeypatch)
    L = 4096
    q, k, v, _ = (jax.ShapeDtypeStruct((1, L, 2, 64), jnp.bfloat16) for _ in range(4))
    ids = jnp.zeros((1, L), jnp.int32) if variant == 'segments' else None

    def loss(q, k, v):
        out = causal_attention(q, k, v, segment_ids=ids, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32))

    grads = jax.jit(jax.grad(loss, (0, 1, 2)))
    sizes = list(array_sizes(jax.make_jaxpr(grads)(q, k, v).jaxpr))
    assert len(sizes) > 10
    assert max(sizes, key=lambda s: s[0])[0] < L * L
    if implementation == 'xla':
        memory = grads.lower(q, k, v).compile().memory_analysis()
        assert memory.temp_size_in_bytes < L * L


# ---- choice and errors ----


def test_none_is_xla_on_cpu(caplog):
    if jax.default_backend() != 'cpu':
        pytest.skip('about hosts without an accelerator')
    dispatch.log_once.cache_clear()
    q, k, v, _ = make(L=8)
    with caplog.at_level(logging.INFO, logger='pallas_kernels'):
        first, second = (causal_attention(q, k, v) for _ in range(2))
    assert [r.message for r in caplog.records if 'causal_attention' in r.message] == [
        "causal_attention: 'xla' on cpu, which has no fused implementation"
    ]
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    'change, message',
    [
        ({'q': (2, 8, 4)}, r'q has shape \(2, 8, 4\); it must have 4 axes'),
        ({'k': (2, 9, 2, 16)}, r'k has shape \(2, 9, 2, 16\); its batch, length and width'),
        ({'v': (2, 8, 2, 8)}, r'v has shape \(2, 8, 2, 8\); its batch, length and width'),
        ({'v': (2, 8, 4, 16)}, r'v has shape .*; it must be the shape of k'),
        ({'k': (2, 8, 3, 16), 'v': (2, 8, 3, 16)}, r'k has shape .*: its 3 heads must divide the 4'),
        ({'q': (2, 0, 4, 16)}, r'q has shape .*; every axis must be at least 1'),
        ({'k_dtype': jnp.bfloat16}, r'k has dtype bfloat16; it must be the dtype of q, float32'),
        ({'q_dtype': jnp.int32}, r'q has dtype int32; it must be a floating dtype'),
        ({'segment_ids': jnp.zeros((2, 9), jnp.int32)}, r'segment_ids has shape \(2, 9\)'),
        ({'segment_ids': jnp.zeros((2, 8), jnp.int8)}, r'segment_ids has dtype int8; .*astype'),
        ({'scale': float('nan')}, r'scale=nan; it must be a finite Python number'),
        ({'chunk_size': 0}, r'chunk_size=0; it must be a positive int'),
        ({'implementation': 'flash'}, r"implementation='flash' is unknown; .*'xla', 'cudnn', 'splash'"),
    ],
)
def test_value_errors(change, message):
    arrays = {'q': (2, 8, 4, 16), 'k': (2, 8, 2, 16), 'v': (2, 8, 2, 16)}
    arrays = {
        name: jnp.zeros(change.pop(name, shape), change.pop(f'{name}_dtype', jnp.float32))
        for name, shape in arrays.items()
    }
    with pytest.raises(ValueError, match=message):
        causal_attention(*arrays.values(), **change)


def test_no_cudnn_library():
    if jax.default_backend() == 'gpu':
        pytest.skip('about hosts without cuDNN')
    x = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    with pytest.raises(dispatch.UnsupportedError, match='cuDNN is not detected'):
        causal_attention(x, x, x, implementation='cudnn')


@pytest.mark.parametrize(
    'implementation, shape, dtype, message',
    [
        ('cudnn', (1, 8, 2, 64), jnp.float32, 'takes bfloat16 or float16, got float32'),
        ('cudnn', (1, 8, 2, 12), jnp.bfloat16, 'multiples of 8 up to 128, got K=12'),
        ('splash', (1, 8, 2, 64), jnp.float32, 'takes bfloat16, got float32'),
        ('splash', (1, 8, 2, 512), jnp.bfloat16, 'up to 256, got K=512'),
        ('xla', (1, 8, 2, 16), jnp.float8_e4m3fn, 'got float8_e4m3fn'),
    ],
)
def test_cannot_serve(implementation, shape, dtype, message):
    x = jnp.zeros(shape, dtype)
    with pytest.raises(dispatch.UnsupportedError, match=message):
        causal_attention(x, x, x, implementation=implementation)


def test_too_many_elements_for_offsets():
    x = jax.ShapeDtypeStruct((64, 16384, 32, 64), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((64, 16384), jnp.int32)
    assert cudnn.unsupported(x, x, None) is None
    assert '2**31' in cudnn.unsupported(x, x, ids)


def takes_more(fused, monkeypatch):
    def lowering(ctx, query, key, value, *rest, scale, new_parameter):
        pytest.fail('it is not called')

    monkeypatch.setattr(fused, '_dot_product_attention_bwd_cuda_lowering', lowering)


def has_no_primitive(fused, monkeypatch):
    monkeypatch.delattr(fused, '_dot_product_attention_bwd_p')


@pytest.mark.parametrize('change', [has_no_primitive, takes_more])
def test_moved_internals_are_named(change, monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as fused

    change(fused, monkeypatch)
    x = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    with pytest.raises(dispatch.UnsupportedError, match='JAX internals .*implementation=.xla'):
        causal_attention(x, x, x, segment_ids=jnp.zeros((1, 8), jnp.int32), implementation='cudnn')


# ---- cuDNN's packed layout, played on CPU ----


def allow_cudnn_here(monkeypatch):
    """JAX asks for the cuDNN library while tracing, even when only lowering."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, 'check_cudnn_version', lambda: 92100)


class PackedModel:
    """What cuDNN documents about ragged tensors, in numpy, in place of the two primitives.

    Document n < N = rows * m is the `lengths[n]` tokens from element `offsets[n]` of the flat q
    (or k, v, out); statistics are [N, H, T] and undefined past a document's length.
    """

    @staticmethod
    def documents(q, k, lengths, kv_lengths, q_offsets, k_offsets):
        rows, T, H, K = q.shape
        N = lengths.size
        assert q_offsets.shape == (rows, N // rows + 1)
        assert (lengths == kv_lengths).all() and (lengths >= 0).all() and (lengths <= T).all()
        starts, kv_starts = q_offsets.reshape(-1) // (H * K), k_offsets.reshape(-1) // (k.shape[2] * K)
        assert (starts == kv_starts).all() and (np.diff(starts[: N + 1]) >= 0).all()
        for n, (start, length) in enumerate(zip(starts, lengths.reshape(-1), strict=False)):
            if length:
                yield n, np.s_[start : start + length], length

    @classmethod
    def _forward(cls, scale, q, k, v, *layout):
        flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
        out = np.full_like(flat[0], np.nan)
        statistics = np.full((layout[0].size, q.shape[2], q.shape[1]), np.nan, np.float32)
        for n, tokens, length in cls.documents(q, k, *layout):
            one = [x[tokens][None] for x in flat]
            out[tokens] = oracle(*one, one[0], None, scale)['out'][0]
            s = scale * np.einsum('blhk,bshk->bhls', one[0], np.repeat(one[1], q.shape[2] // k.shape[2], 2))
            s = np.where(np.tril(np.ones((length, length), bool)), s, -np.inf)
            statistics[n, :, :length] = np.log(np.exp(s[0]).sum(-1))
        return out.reshape(q.shape), statistics

    @classmethod
    def _backward(cls, scale, q, k, v, *rest):
        *layout, statistics, out, dout = rest
        forward_out, forward_statistics = cls._forward(scale, q, k, v, *layout)
        # The backward must get back what the forward call of this very layout wrote.
        np.testing.assert_array_equal(statistics, forward_statistics)
        mine = np.isfinite(forward_out)
        np.testing.assert_array_equal(out[mine], forward_out[mine])
        flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v, dout)]
        grads = [np.full_like(x, np.nan) for x in flat[:3]]
        for _, tokens, _ in cls.documents(q, k, *layout):
            one = oracle(*(x[tokens][None] for x in flat), None, scale)
            for grad, name in zip(grads, NAMES[1:], strict=True):
                grad[tokens] = one[name][0]
        return tuple(g.reshape(x.shape) for g, x in zip(grads, (q, k, v), strict=True))

    @classmethod
    def forward(cls, q, k, v, bias, lengths, kv_lengths, q_offsets, k_offsets, *_, scale, **__):
        rows, T, H, _ = q.shape

        def like(*x):
            return jax.ShapeDtypeStruct(x, jnp.float32)

        shapes = like(*q.shape), like(lengths.size, H, T)

        def call(*x):
            return cls._forward(scale, *map(np.asarray, x))

        return jax.pure_callback(call, shapes, q, k, v, lengths, kv_lengths, q_offsets, k_offsets)

    @classmethod
    def backward(cls, q, k, v, bias, lengths, kv_lengths, q_offsets, k_offsets, *rest, scale, **__):
        shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v))

        def call(*x):
            return cls._backward(scale, *map(np.asarray, x))

        layout = lengths, kv_lengths, q_offsets, k_offsets
        return jax.pure_callback(call, shapes, q, k, v, *layout, *rest[2:])

    @classmethod
    def install(cls, monkeypatch):
        primitives = [types.SimpleNamespace(bind=f) for f in (cls.forward, cls.backward)]
        monkeypatch.setattr(cudnn, '_private', lambda: (*primitives, None, None))


def documents(*rows):
    return jnp.asarray([np.repeat(np.arange(len(row)), row) for row in rows], jnp.int32)


# name: (segment ids [2, 256], index in packing.plans)
PACKINGS = {
    'one document a row': (documents([256], [256]), 0),
    'few documents': (documents([2, 200, 54], [120, 136]), 1),
    'short documents': (documents([8] * 32, [64] * 4), 2),
    'as many long ones as fit': (documents([34] * 7 + [1] * 18, [33] * 7 + [1] * 25), 2),
    'as many short ones as fit': (documents([4] * 64, [32, *[4] * 48, *[2] * 13, 3, 3]), 2),
    'uneven rows share the room': (documents([1] * 100 + [156], [256]), 2),
    'too many documents': (documents([1] * 150 + [106], [1] * 150 + [106]), 3),
}


def packing_of(name, L):
    ids, index = PACKINGS[name]
    return jnp.repeat(ids, L // 256, axis=1), index


def chosen_plan(ids):
    return packing.choice(packing.documents(ids), packing.plans(*ids.shape))


@jax.jit
def packed_grads(q, k, v, dout, ids):
    """Compiled once per shape; only for tests that install the PackedModel."""
    out, pull = jax.vjp(lambda *a: cudnn.attention(*a, ids, 0.25), q, k, v)
    return dict(zip(NAMES, (out, *pull(dout)), strict=True))


@pytest.mark.parametrize('name', PACKINGS)
def test_packed_operands(name, monkeypatch):
    PackedModel.install(monkeypatch)
    ids, index = packing_of(name, 256)
    assert chosen_plan(ids) == index
    q, k, v, dout = make(L=256)
    got = packed_grads(q, k, v, dout, ids)
    check(got, oracle(q, k, v, dout, ids, 0.25), 1e-5)


# Documents for each of three calls, also of the lengths at which one call ends and the next begins: 33, 32, 5 and 4.
ALL_LENGTHS = documents([150, 40, 20, 12, 6, 5, 4, *[3] * 4, *[1] * 7], [33, 32, 31, 9, 8, 7, *[4] * 30, *[1] * 16])


def test_packed_operands_of_three_calls(monkeypatch):
    PackedModel.install(monkeypatch)
    monkeypatch.setattr(packing, 'SHORTEST', 4)
    plans = packing.plans(2, 256)
    monkeypatch.setattr(packing, 'plans', lambda B, L: plans[-1:])
    assert [call.T for call in plans[-1]] == [256, 32, 4]
    assert all(packing.documents(ALL_LENGTHS).number(call) > 2 for call in plans[-1])
    assert chosen_plan(ALL_LENGTHS) == 0
    q, k, v, dout = make(L=256)
    # Not `packed_grads`, whose compiled form is of other plans.
    got = value_and_grads(lambda *a: cudnn.attention(*a, ALL_LENGTHS, 0.25), q, k, v, dout)
    check(got, oracle(q, k, v, dout, ALL_LENGTHS, 0.25), 1e-5)


@pytest.mark.parametrize('L', [1, 37, 80])
def test_packed_ragged_length(L, monkeypatch):
    PackedModel.install(monkeypatch)
    q, k, v, dout = make(L=L)
    ids = segments(2, L, 6)
    got = packed_grads(q, k, v, dout, ids)
    check(got, oracle(q, k, v, dout, ids, 0.25), 1e-5)


@pytest.mark.parametrize('share_ids', [False, True])
def test_packed_vmap(share_ids, monkeypatch):
    PackedModel.install(monkeypatch)
    q, k, v, dout = (x.reshape(2, 2, *x.shape[1:]) for x in make(B=4, L=48))
    ids = segments(4, 48, 9).reshape(2, 2, 48)
    ids = ids.at[1].set(ids[0]) if share_ids else ids

    axes = (0, 0, 0, 0, None) if share_ids else 0
    got = jax.jit(jax.vmap(packed_grads, axes))(q, k, v, dout, ids[0] if share_ids else ids)
    for n in range(2):
        want = oracle(q[n], k[n], v[n], dout[n], ids[n], 0.25)
        check({name: x[n] for name, x in got.items()}, want, 1e-5)


def test_packed_vmap_over_cotangents(monkeypatch):
    PackedModel.install(monkeypatch)
    q, k, v, dout = make(L=48)
    ids = segments(2, 48, 9)

    @jax.jit
    def grads(douts):
        _, pull = jax.vjp(lambda *a: cudnn.attention(*a, ids, 0.25), q, k, v)
        return jax.vmap(pull)(douts)

    want = oracle(q, k, v, dout, ids, 0.25)
    for name, got in zip(NAMES[1:], grads(jnp.stack([dout, 2 * dout])), strict=True):
        assert error(got[0], want[name]) <= 1e-5
        assert error(got[1], 2 * want[name]) <= 1e-5


# ---- lowering for devices that are not here ----


def loss_and_arguments(implementation, variant, G, B=2, L=4096, H=32, K=64):
    def shape(*s):
        return jax.ShapeDtypeStruct(s, jnp.bfloat16)

    ids = jax.ShapeDtypeStruct((B, L), jnp.int32)

    def forward(q, k, v, ids):
        ids = ids if variant == 'segments' else None
        return causal_attention(q, k, v, segment_ids=ids, implementation=implementation)

    def backward(*args):
        return jax.grad(lambda *a: jnp.sum(forward(*a).astype(jnp.float32)), (0, 1, 2))(*args)

    return forward, backward, (shape(B, L, H, K), shape(B, L, G, K), shape(B, L, G, K), ids)


@pytest.mark.parametrize('G', [32, 8])
@pytest.mark.parametrize('variant', VARIANTS)
def test_cudnn_lowers(variant, G, monkeypatch):
    allow_cudnn_here(monkeypatch)
    forward, backward, arguments = loss_and_arguments('cudnn', variant, G)
    calls = 1 if variant == 'none' else sum(len(plan) for plan in packing.plans(2, 4096))
    for f, backwards in ((forward, 0), (backward, calls)):
        text = jax.jit(f).trace(*arguments).lower(lowering_platforms=('cuda',)).as_text()
        assert text.count('custom_call @__cudnn$fmhaSoftmax(') == calls
        assert text.count('custom_call @__cudnn$fmhaSoftmaxBackward(') == backwards
        assert 'PADDING_CAUSAL' in text if variant == 'segments' else 'CAUSAL' in text


@pytest.mark.parametrize('L', [1, 333])
def test_cudnn_lowers_at_odd_lengths(L, monkeypatch):
    allow_cudnn_here(monkeypatch)
    forward, backward, arguments = loss_and_arguments('cudnn', 'none', 8, L=L)
    assert jax.eval_shape(forward, *arguments).shape == arguments[0].shape
    text = jax.jit(backward).trace(*arguments).lower(lowering_platforms=('cuda',)).as_text()
    assert text.count('custom_call @__cudnn$fmhaSoftmaxBackward(') == 1


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('implementation, platform', [('cudnn', 'cuda'), ('splash', 'tpu')])
def test_fused_lowers_under_shard_map(implementation, platform, variant, monkeypatch):
    allow_cudnn_here(monkeypatch)
    forward, _, arguments = loss_and_arguments(implementation, variant, G=8, B=8, L=1024)
    heads = P('data', None, 'tensor', None)
    # check_vma=False for splash: the shipped kernels do not declare what their outputs vary over.
    sharded = jax.shard_map(
        forward, mesh=mesh(4, 2), in_specs=(heads, heads, heads, P('data', None)),
        out_specs=heads, check_vma=implementation != 'splash',
    )  # fmt: skip
    grads = jax.grad(lambda *a: jnp.sum(sharded(*a).astype(jnp.float32)), (0, 1, 2))
    text = jax.jit(grads).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    assert ('fmhaSoftmaxBackward' if implementation == 'cudnn' else 'tpu_custom_call') in text


@pytest.mark.parametrize('G', [32, 8])
@pytest.mark.parametrize('variant', VARIANTS)
def test_splash_lowers(variant, G):
    forward, backward, arguments = loss_and_arguments('splash', variant, G)
    for f, calls in ((forward, 1), (backward, 3)):
        text = jax.jit(f).trace(*arguments).lower(lowering_platforms=('tpu',)).as_text()
        assert text.count('custom_call @tpu_custom_call(') == calls


@pytest.mark.tpu_compile_full
@pytest.mark.parametrize('implementation', ['splash', 'xla'])
def test_compiles_for_v5e(implementation):
    if importlib.util.find_spec('libtpu') is None:
        pytest.skip('libtpu is not installed: pip install jax[tpu]')
    output = run_alone(__file__, implementation)
    assert output.count('compiled') == 4, output


def compile_for_v5e(implementation):
    """Compile forward and backward for one v5e chip, whole shape, G 32 and 8; see the test above."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2')
    devices = jax.sharding.Mesh(np.array(topology.devices)[:1], ('one',))
    for variant in VARIANTS:
        for G in (32, 8):
            _, backward, arguments = loss_and_arguments(implementation, variant, G)

            def replicated(x):
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(devices, P()))

            lowered = jax.jit(backward).trace(*map(replicated, arguments)).lower(lowering_platforms=('tpu',))
            memory = lowered.compile().memory_analysis()
            # Four copies of q in float32 and the score blocks of all heads are more than enough.
            assert memory.temp_size_in_bytes < 1 << 30, memory
            print('compiled', variant, G, memory.temp_size_in_bytes >> 20, 'MiB temporary')


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize('G', [4, 2])
@pytest.mark.parametrize('L', [1024, 512])
@pytest.mark.parametrize('name', ['none', *PACKINGS])
def test_cudnn_on_gpu(name, L, G):
    if jax.default_backend() != 'gpu':
        pytest.skip('needs an NVIDIA GPU')
    q, k, v, dout = make(L=L, G=G, K=64, dtype=jnp.bfloat16)
    ids = None
    if name != 'none':
        ids, index = packing_of(name, L)
        assert chosen_plan(ids) == index
    got = value_and_grads(attend('cudnn', ids), q, k, v, dout)
    check(got, oracle(q, k, v, dout, ids, 0.25), 5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize('plan', range(4))
def test_every_plan_on_gpu(plan, monkeypatch):
    """Rows of 2,048 tokens have plans of one, two and three calls; the first takes 4 documents of two rows."""
    if jax.default_backend() != 'gpu':
        pytest.skip('needs an NVIDIA GPU')
    ids = documents([1500, 400, 100, 30, 10, 8], [300, 700, 600, 257, 64, 65, 33, 29])
    ids = ids if plan else documents([2048], [2000, 48])
    plans = packing.plans(2, 2048)
    monkeypatch.setattr(packing, 'plans', lambda B, L: plans[plan : plan + 1])
    assert [len(plan) for plan in plans] == [1, 1, 2, 3] and chosen_plan(ids) == 0
    q, k, v, dout = make(L=2048, K=64, dtype=jnp.bfloat16)
    got = value_and_grads(attend('cudnn', ids), q, k, v, dout)
    check(got, oracle(q, k, v, dout, ids, 0.25), 5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize('L', [1, 37, 333])
@pytest.mark.parametrize('variant', VARIANTS)
def test_cudnn_ragged_length_on_gpu(variant, L):
    if jax.default_backend() != 'gpu':
        pytest.skip('needs an NVIDIA GPU')
    q, k, v, dout = make(L=L, K=64, dtype=jnp.bfloat16)
    ids = segments(2, L, 40) if variant == 'segments' else None
    # The packed form refuses a single token: the automatic choice takes the blockwise form there.
    got = value_and_grads(attend('cudnn' if L > 1 else None, ids), q, k, v, dout)
    check(got, oracle(q, k, v, dout, ids, 0.25), 5e-3)


if __name__ == '__main__':
    compile_for_v5e(sys.argv[1])
