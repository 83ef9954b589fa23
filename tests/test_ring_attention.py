"""Ring attention on virtual devices: values and gradients against the definition, documents, what is sent.

Shapes: B batch, L length of the whole row, H heads, G key/value heads, K head width.
"""

import functools
import logging
import re

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from test_attention_kernels import oracle

from pallas_kernels import dispatch
from pallas_kernels.attention import causal_attention, cudnn, ring, ring_attention, save_residuals, splash, xla

NAMES = ('y', 'dq', 'dk', 'dv')
LENGTH = 48  # shards of 24, 12 and 6 tokens, pieces of 12, 6 and 3
# The lengths of a row's documents.
ROWS = {
    'one document': [48],
    'across every border': [5, 30, 13],
    'across one border': [17, 2, 29],
    'ending at borders of shards': [24, 12, 6, 6],
    'ending at borders of pieces': [3, 9, 3, 15, 18],
    'one token each': [1] * 48,
    'one token at a border': [23, 1, 1, 23],
}


def documents(*rows):
    """[B, L] int32, ids in no order."""
    return jnp.asarray([np.repeat(7 * np.arange(len(row)) % 1031, row) for row in rows], jnp.int32)


def make(B=7, L=LENGTH, H=4, G=2, K=8, dtype=jnp.float32, seed=0):
    """q, k, v and the gradient of the output."""
    rng = np.random.default_rng(seed)
    shapes = ((B, L, H, K), (B, L, G, K), (B, L, G, K), (B, L, H, K))
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def mesh(**axes):
    if jax.device_count() < 8:
        pytest.skip('needs XLA_FLAGS=--xla_force_host_platform_device_count=8')
    devices = np.array(jax.devices()[: int(np.prod(list(axes.values())))]).reshape(tuple(axes.values()))
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def on_ring(n, *, segmented, check_vma=False, **options):
    """attention(q, k, v, ids) over n shards of the length."""

    def attend(q, k, v, ids):
        return ring_attention(
            q, k, v, axis_name='context', axis_size=n, segment_ids=ids if segmented else None, **options
        )

    rows = P(None, 'context')
    return jax.shard_map(attend, mesh=mesh(context=n), in_specs=(rows,) * 4, out_specs=rows, check_vma=check_vma)


def on_one(q, k, v, ids, dy):
    """What one device computes, by the definition in float64, in q's dtype; see test_attention_kernels.py."""
    values = oracle(*(x.astype(jnp.float32) for x in (q, k, v, dy)), ids, q.shape[-1] ** -0.5)
    return {name: jnp.asarray(x, q.dtype) for name, x in zip(NAMES, values.values(), strict=True)}


def value_and_grads(attention, q, k, v, ids, dy):
    @jax.jit
    def run(q, k, v, ids, dy):
        y, pull = jax.vjp(lambda *args: attention(*args, ids), q, k, v)
        return dict(zip(NAMES, (y, *pull(dy)), strict=True))

    return run(q, k, v, ids, dy)


def check(got, want, tolerance, rows=None):
    """Relative error of every array, of every row of it where rows are named."""
    errors = {}
    for name in want:
        assert got[name].dtype == want[name].dtype and got[name].shape == want[name].shape
        selected = dict.fromkeys([''], slice(None)) if rows is None else {row: i for i, row in enumerate(rows)}
        for row, index in selected.items():
            g, w = (np.asarray(x[name][index], np.float64) for x in (got, want))
            # The floor is for gradients that are exactly 0 (documents of one token).
            errors[name, row] = np.linalg.norm(g - w) / max(np.linalg.norm(w), 1.0)
    assert all(e <= tolerance for e in errors.values()), errors


# ---- the definition ----


# Two shards have no loop, and send gradients in k's dtype; in float32 they are in test_with_other_axes.
@pytest.mark.parametrize(
    'n, G, dtype, tolerance', [(2, 4, jnp.bfloat16, 6e-3), (4, 1, jnp.float32, 1e-5), (8, 2, jnp.float32, 1e-5)]
)
def test_equals_one_device(n, G, dtype, tolerance):
    q, k, v, dy = make(G=G, dtype=dtype)
    ids = documents(*ROWS.values())
    got = value_and_grads(on_ring(n, segmented=True), q, k, v, ids, dy)
    check(got, on_one(q, k, v, ids, dy), tolerance, rows=ROWS if dtype == jnp.float32 else None)


def test_without_ids():
    q, k, v, dy = make(B=1)
    got = value_and_grads(on_ring(3, segmented=False), q, k, v, None, dy)
    check(got, on_one(q, k, v, None, dy), 1e-5)


def test_with_other_axes():
    """Batch and heads are split too, and replication is tracked."""
    q, k, v, dy = make(B=2)
    ids = documents(ROWS['across every border'], ROWS['ending at borders of pieces'])
    heads = P('data', 'context', 'tensor')

    def attend(q, k, v, ids):
        return ring_attention(q, k, v, axis_name='context', axis_size=2, segment_ids=ids)

    sharded = jax.shard_map(
        attend,
        mesh=mesh(data=2, context=2, tensor=2),
        check_vma=True,
        in_specs=(heads, heads, heads, P('data', 'context')),
        out_specs=heads,
    )
    check(value_and_grads(sharded, q, k, v, ids, dy), on_one(q, k, v, ids, dy), 1e-5)


def test_one_shard_is_causal_attention():
    q, k, v, _ = make()
    ids = documents(*ROWS.values())

    def one_shard(q, k, v):
        return ring_attention(q, k, v, axis_name='context', axis_size=1, segment_ids=ids)

    def alone(q, k, v):
        return causal_attention(q, k, v, segment_ids=ids)

    assert str(jax.make_jaxpr(one_shard)(q, k, v)) == str(jax.make_jaxpr(alone)(q, k, v))


# ---- the kernels' blocks ----


@pytest.mark.parametrize('segmented', [False, True])
def test_splash_interpreted(segmented):
    q, k, v, dy = make(B=1, L=512, H=1, G=1, K=16, dtype=jnp.bfloat16)
    ids = documents([60, 250, 1, 201])
    attention = on_ring(2, segmented=segmented, implementation='splash', interpret=True)
    got = value_and_grads(attention, q, k, v, ids, dy)
    check(got, on_one(q, k, v, ids if segmented else None, dy), 6e-3)


class CudnnModel:
    """What cuDNN documents about the four forms that are used, dense and in place of its two primitives.

    What it leaves undefined is NaN: rows past a sequence's or a document's length, statistics there.
    """

    @staticmethod
    def scores(q, k, lengths, key_lengths, causal, scale):
        s = scale * jnp.einsum('blhk,bshk->bhls', q, jnp.repeat(k, q.shape[2] // k.shape[2], 2), precision='highest')
        row, column = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])
        allowed = (row < lengths[:, None, None]) & (column < key_lengths[:, None, None])
        return jnp.where((allowed & ((row >= column) | (not causal)))[:, None], s, -jnp.inf)

    @staticmethod
    def undefined_past(x, lengths):
        return jnp.where((jnp.arange(x.shape[1]) < lengths[:, None])[:, :, None, None], x, jnp.nan)

    @classmethod
    def forward_of(cls, q, k, v, lengths, key_lengths, causal, scale):
        s = cls.scores(q, k, lengths, key_lengths, causal, scale)
        lse = jax.nn.logsumexp(s, axis=-1)
        out = jnp.einsum(
            'bhls,bshk->blhk',
            jax.nn.softmax(s, axis=-1),
            jnp.repeat(v, q.shape[2] // k.shape[2], 2),
            precision='highest',
        )
        known = (jnp.arange(q.shape[1]) < lengths[:, None])[:, None]
        return cls.undefined_past(out, lengths), jnp.where(known, lse, jnp.nan)

    @classmethod
    def backward_of(cls, q, k, v, lse, out, dout, lengths, key_lengths, causal, scale):
        s = cls.scores(q, k, lengths, key_lengths, causal, scale)
        G, repeats = k.shape[2], q.shape[2] // k.shape[2]
        p = jnp.where(jnp.isfinite(s), jnp.exp(s - lse[..., None]), 0.0)
        dp = jnp.einsum('blhk,bshk->bhls', dout, jnp.repeat(v, repeats, 2), precision='highest')
        ds = scale * p * (dp - jnp.einsum('blhk,blhk->bhl', out, dout)[..., None])
        dq = jnp.einsum('bhls,bshk->blhk', ds, jnp.repeat(k, repeats, 2), precision='highest')
        dk = jnp.einsum('bhls,blhk->bshk', ds, q, precision='highest').reshape(*k.shape[:2], G, repeats, -1).sum(3)
        dv = jnp.einsum('bhls,blhk->bshk', p, dout, precision='highest').reshape(*k.shape[:2], G, repeats, -1).sum(3)
        return [cls.undefined_past(*x) for x in ((dq, lengths), (dk, key_lengths), (dv, key_lengths))]

    @classmethod
    def bind(cls, backward, q, k, v, bias, lengths, key_lengths, offsets, key_offsets, *rest, scale, mask_type, **_):
        causal = mask_type.name in ('CAUSAL', 'PADDING_CAUSAL')
        rest = [x for x in rest if x.size]
        run = cls.backward_of if backward else cls.forward_of
        if 'PADDING' not in mask_type.name:
            full = jnp.full(q.shape[:1], q.shape[1])
            return run(q, k, v, *rest, full, full, causal, scale)
        if not offsets.size:
            assert lengths.shape == key_lengths.shape == q.shape[:1]
            return run(q, k, v, *rest, lengths, key_lengths, causal, scale)
        # Packed: a document is its tokens of the stream of the whole batch.
        rows, T, H, K = q.shape
        N, total = lengths.size, rows * T
        lengths = lengths.reshape(N)
        within = jnp.arange(T) < lengths[:, None]
        token = jnp.where(within, offsets.reshape(-1)[:N, None] // (H * K) + jnp.arange(T), total)

        def take(x):
            return x.reshape(total, *x.shape[2:]).at[token].get(mode='fill', fill_value=0)

        def put(x, like):
            return jnp.full((total, *like.shape[2:]), jnp.nan).at[token].set(x, mode='drop').reshape(like.shape)

        arrays = [take(x) for x in (q, k, v)]
        if not backward:
            out, lse = run(*arrays, lengths, lengths, causal, scale)
            return put(out, q), lse
        lse, *rest = rest
        grads = run(*arrays, lse, *(take(x) for x in rest), lengths, lengths, causal, scale)
        return [put(grad, x) for grad, x in zip(grads, (q, k, v), strict=True)]

    @classmethod
    def install(cls, monkeypatch):
        class Primitive:
            def __init__(self, backward):
                self.bind = functools.partial(cls.bind, backward)

        *_, mask_type, layout = cudnn._private()
        monkeypatch.setattr(cudnn, '_private', lambda: (Primitive(False), Primitive(True), mask_type, layout))
        monkeypatch.setattr(cudnn, 'unsupported', lambda *_: None)  # float32 shows what bfloat16 would hide


@pytest.mark.parametrize('n, segmented', [(4, True), (3, False)])
def test_cudnn_blocks(n, segmented, monkeypatch):
    CudnnModel.install(monkeypatch)
    q, k, v, dy = make()
    ids = documents(*ROWS.values()) if segmented else None
    got = value_and_grads(on_ring(n, segmented=segmented, implementation='cudnn'), q, k, v, ids, dy)
    check(got, on_one(q, k, v, ids, dy), 1e-5, rows=ROWS)


def test_splash_causal_mask():
    """The mask that is not compared number by number has the blocks of the one that is."""
    _, _, causal, _ = splash._modules()
    mask, plain = causal((12, 12)), np.tril(np.ones((12, 12), bool))
    for rows, columns in [(4, 4), (2, 3), (3, 2)]:
        for i in range(0, 12, rows):
            for j in range(0, 12, columns):
                block = np.s_[i : i + rows, j : j + columns]
                np.testing.assert_array_equal(mask[block], plain[block])


# ---- where the work is ----


@pytest.mark.parametrize('n', [2, 3, 5, 8])
def test_pieces(n):
    """Device i gets pieces i and 2n-1-i, and the rows come back as they were."""
    some = ring._Ring('context', n, 'xla', 1.0, False)

    def there_and_back(x):
        pieces = ring._to_pieces(x, some)
        return pieces, ring._to_rows(pieces, some)

    rows = P(None, 'context')
    run = jax.shard_map(there_and_back, mesh=mesh(context=n), in_specs=rows, out_specs=(rows, rows))
    x = jnp.repeat(jnp.arange(2 * n), 3)[None]
    pieces, back = jax.jit(run)(x)
    want = np.array([[i, 2 * n - 1 - i] for i in range(n)]).reshape(1, 2 * n)
    np.testing.assert_array_equal(pieces, np.repeat(want[..., None], 3, axis=-1))
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize('n', [2, 4, 7])
def test_every_step_is_the_same_work(n):
    """The pairs of pieces that meet in n-1 steps of two are exactly those that causality allows between shards."""
    met = []
    for i in range(n):
        for step in range(1, n):
            j = (i - step) % n
            queries, keys = (jnp.array([[[x], [2 * n - 1 - x]]]) for x in (i, j))
            (of_queries,), (of_keys,) = ring._operands(i >= step, [queries], [keys])
            pairs = list(zip(of_queries.ravel().tolist(), of_keys.ravel().tolist(), strict=True))
            assert len(pairs) == 2
            met += pairs
    allowed = {(a, b) for a in range(2 * n) for b in range(a) if ring._home(a, n) != ring._home(b, n)}
    assert len(met) == len(set(met)) and set(met) == allowed


@pytest.mark.parametrize('is_before', [False, True])
def test_blocks_without_a_shared_document_are_skipped(is_before):
    def shared(ids, key_ids):
        ids, key_ids = (jnp.array([x]).reshape(1, 2, 2) for x in (ids, key_ids))
        return bool(
            ring._if_shared(jnp.array(is_before), ids, key_ids, lambda: jnp.array(True), lambda: jnp.array(False))
        )

    if is_before:  # key pieces 0 and 7, query pieces 1 and 6
        assert not shared([[1, 1], [5, 6]], [[0, 0], [6, 6]])
        assert shared([[0, 1], [5, 6]], [[0, 0], [6, 6]])  # of early queries and early keys
    else:  # query pieces 0 and 7, key pieces 1 and 6
        assert not shared([[0, 0], [6, 6]], [[0, 0], [4, 5]])
        assert shared([[0, 0], [5, 6]], [[0, 0], [4, 5]])  # of late queries and late keys


# ---- what travels, what is kept ----


def equations(jaxpr, times=1):
    """(equation, how often it runs); every branch of a cond counts as run."""
    for equation in jaxpr.eqns:
        yield equation, times
        inner = times * equation.params['length'] if equation.primitive.name == 'scan' else times
        for sub in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(sub, inner)


COLLECTIVES = {
    'ppermute',
    'psum',
    'psum2',
    'psum_invariant',
    'all_gather',
    'all_gather_invariant',
    'all_to_all',
    'reduce_scatter',
    'pmax',
    'pmin',
    'pbroadcast',
}


def collectives(function, *args):
    """[(name, bytes a device)] of a function over shards, one entry a run."""
    return [
        (equation.primitive.name, x.aval.size * x.aval.dtype.itemsize)
        for equation, times in equations(jax.make_jaxpr(function)(*args).jaxpr)
        if equation.primitive.name in COLLECTIVES
        for x in equation.invars
        for _ in range(times)
    ]


@pytest.mark.parametrize('n, implementation', [(2, 'xla'), (8, 'xla'), (5, 'splash'), (4, 'cudnn')])
def test_what_travels(n, implementation, monkeypatch):
    allow_cudnn_here(monkeypatch)
    B, L, H, G, K = 2, 256 * n, 8, 2, 16
    arrays = [jax.ShapeDtypeStruct((B, L, heads, K), jnp.bfloat16) for heads in (H, G, G)]
    ids = jax.ShapeDtypeStruct((B, L), jnp.int32)
    attention = on_ring(n, segmented=True, implementation=implementation)

    def grads(q, k, v, ids):
        y, pull = jax.vjp(lambda *args: attention(*args, ids), q, k, v)
        return y, pull(y)

    # Of one shard.
    q, kv, ids_bytes = 2 * B * L // n * H * K, 2 * 2 * B * L // n * G * K, 4 * B * L // n
    moved = 0.5 if n == 2 else 1  # half of the pieces of two shards stay on their device
    forward = (n - 1) * (kv + ids_bytes) + moved * (2 * q + kv + ids_bytes)
    gradients = kv if n == 2 else 2 * kv  # float32 where they are sums
    known = q if implementation == 'cudnn' else 4 * B * L // n * H
    backward = (n - 1) * (kv + ids_bytes + gradients) + moved * (2 * q + kv + known)
    for function, want in ((attention, forward), (grads, forward + backward)):
        found = collectives(function, *arrays, ids)
        assert {name for name, _ in found} == {'ppermute'}
        assert sum(size for _, size in found) == want


@pytest.mark.parametrize('segmented', [False, True])
def test_memory_does_not_grow_with_shards(segmented):
    """Of one shard: no array has more elements than its float32 queries in pieces, or a block of scores."""
    n, local, H, G, K = 8, 1024, 4, 2, 16
    arrays = [jax.ShapeDtypeStruct((1, n * local, heads, K), jnp.bfloat16) for heads in (H, G, G)]
    attention = on_ring(n, segmented=segmented, implementation='xla')
    ids = jax.ShapeDtypeStruct((1, n * local), jnp.int32)

    def grads(q, k, v, ids):
        return jax.grad(lambda *args: jnp.sum(attention(*args, ids).astype(jnp.float32)), (0, 1, 2))(q, k, v)

    inside = [e for e, _ in equations(jax.make_jaxpr(grads)(*arrays, ids).jaxpr) if e.primitive.name == 'shard_map']
    sizes = [x.aval.size for shard in inside for e, _ in equations(shard.params['jaxpr']) for x in e.outvars]
    block = 2 * H * xla.DEFAULT_CHUNK**2  # two pieces per row
    assert len(sizes) > 100 and max(sizes) <= max(local * H * K, block)


def test_policy_saves_the_second_ring():
    q, k, v, _ = make(B=1)
    attention = on_ring(4, segmented=False)

    def forwards(policy):
        f = jax.checkpoint(lambda *args: jnp.sum(jnp.sin(attention(*args, None))), policy=policy)
        return len(collectives(jax.grad(f, (0, 1, 2)), q, k, v))

    # Without it, the keys and values go round a third time and the output comes home again.
    assert forwards(None) == forwards(save_residuals) + 2 * 3 + 2


# ---- errors and choice ----


@pytest.mark.parametrize('change, error, message', [
    ({'L': 2 * 33}, ValueError, r"length 33 on each of 2 shards of 'context'; it must be even.* such as 64 or 68"),
    ({'implementation': 'reference'}, dispatch.UnsupportedError, "'reference' holds all scores of a row"),
    ({'implementation': 'flash'}, ValueError, "implementation='flash'"),
    ({'implementation': 'splash', 'L': 2 * 192, 'dtype': jnp.bfloat16}, dispatch.UnsupportedError, 'multiples of 128, got 96'),
    ({'implementation': 'splash', 'L': 2 * 256}, dispatch.UnsupportedError, 'takes bfloat16, got float32'),
    ({'axis_size': 0}, ValueError, r"axis_size=0; .* mesh axis 'context'"),
])  # fmt: skip
def test_errors(change, error, message):
    q, k, v, _ = make(B=1, L=change.pop('L', LENGTH), dtype=change.pop('dtype', jnp.float32))
    options = {'axis_name': 'context', 'axis_size': 2} | change

    def attend(q, k, v):
        return ring_attention(q, k, v, **options)

    rows = P(None, 'context')
    with pytest.raises(error, match=message):
        jax.shard_map(attend, mesh=mesh(context=2), in_specs=(rows,) * 3, out_specs=rows)(q, k, v)


def test_none_is_xla_on_cpu(caplog):
    if jax.default_backend() != 'cpu':
        pytest.skip('about hosts without an accelerator')
    dispatch.log_once.cache_clear()
    q, k, v, _ = make(B=1)
    with caplog.at_level(logging.INFO, logger='pallas_kernels'):
        jax.make_jaxpr(on_ring(2, segmented=False))(q, k, v, None)
    assert "ring_attention: 'xla' on cpu, which has no fused implementation" in caplog.messages


# ---- lowering for devices that are not here ----


def allow_cudnn_here(monkeypatch):
    """JAX asks for the cuDNN library while tracing, even when only lowering."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, 'check_cudnn_version', lambda: 92100)


@pytest.mark.parametrize('segmented', [False, True])
@pytest.mark.parametrize('implementation, platform', [('cudnn', 'cuda'), ('splash', 'tpu')])
def test_lowers(implementation, platform, segmented, monkeypatch):
    allow_cudnn_here(monkeypatch)
    n, H, G, K = 4, 8, 2, 64
    arrays = [jax.ShapeDtypeStruct((1, 1024 * n, heads, K), jnp.bfloat16) for heads in (H, G, G)]
    ids = jax.ShapeDtypeStruct((1, 1024 * n), jnp.int32)
    attention = on_ring(n, segmented=segmented, implementation=implementation)

    def grads(q, k, v, ids):
        return jax.grad(lambda *args: jnp.sum(attention(*args, ids).astype(jnp.float32)), (0, 1, 2))(q, k, v)

    text = jax.jit(grads).trace(*arrays, ids).lower(lowering_platforms=(platform,)).as_text()
    assert 'collective_permute' in text
    for other in ('all_gather', 'all_reduce', 'all_to_all', 'reduce_scatter'):
        assert other not in text
    if implementation == 'cudnn':
        assert 'fmhaSoftmaxBackward' in text
        masks = set(re.findall(r'mask_type.{1,9}?(NO_MASK|PADDING_CAUSAL|PADDING|CAUSAL)', text))
        assert masks == ({'PADDING', 'PADDING_CAUSAL'} if segmented else {'NO_MASK', 'CAUSAL'})
    else:
        assert 'tpu_custom_call' in text
