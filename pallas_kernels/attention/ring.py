"""Ring attention: causal self-attention over a sequence that is sharded over a mesh axis.

The caller's shard i of n holds the i-th contiguous 1/n of every row. Causality gives the last shard
2n-1 times the work of the first, so the rows are cut into 2n pieces, half a shard each, and device i
works on pieces i and 2n-1-i (the zigzag layout). Keys and values then visit every device in n-1 steps,
and each step is the same work on each of them, two full (unmasked) blocks of piece x piece:

    keys from a device before (j < i):   both pieces of queries see piece j; no query sees 2n-1-j
    keys from a device after  (j > i):   only the late queries see keys, and they see both pieces

`_operands` selects the queries and keys that meet, so one call of one shape computes every step. The
device's own step is causal attention over its two pieces as one row. The results of the steps are
combined by their logsumexp, in float32.

The backward pass sends keys and values around the ring again, and their gradients one step behind
them: a device adds its term to the sum that arrives. The first and the last step are outside of the
loop, so that no array is sent in vain, and the next arrays are sent before a step computes. A device
holds its own keys and values, the visiting ones and the next ones.

Two permutations, of the even and of the odd pieces, bring pieces to their devices (`_to_pieces`).
Where no document reaches from the visiting keys to the queries, the step's blocks are not computed.

Bytes that a device sends, with u for one shard's K and V and q for its queries. Forward: (n-1) u around
the ring, and u + 2 q to and from the pieces (at n = 2 half of that, because the other half stays).
Backward: (n-1) u and as many gradients in float32 (at n = 2 in k's dtype, because they are no sums), and
u + 2 q to and from the pieces ('cudnn': 3 q). The ids of documents and one float32 per query and head
are sent as well.

Source: Ring Attention (arXiv:2310.01889); balanced pieces: Striped Attention (arXiv:2311.09431) and
the zigzag form of Llama 3 (arXiv:2407.21783, section 3.3.2).

Shapes: B batch, L length of a shard, S length of a piece (L = 2 S), H heads, G key/value heads,
K head width; 2: the early and the late piece.
"""

# ruff: noqa: F722  (shape strings of jaxtyping)
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch
from pallas_kernels.attention import api, cudnn, splash, xla


class _Ring(NamedTuple):
    axis_name: str
    n: int
    implementation: str
    scale: float
    interpret: bool


def ring_attention(
    q_BLHK: Float[Array, 'B L H K'],
    k_BLGK: Float[Array, 'B L G K'],
    v_BLGK: Float[Array, 'B L G K'],
    *,
    axis_name: str,
    axis_size: int,
    segment_ids: Int32[Array, 'B L'] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, 'B L H K']:
    """`causal_attention` of rows of axis_size x L tokens, called inside jax.shard_map on contiguous shards of them.

    Memory grows linearly with L and not with axis_size. Reverse-mode differentiable in q, k and v.

    Args:
      q_BLHK: [B, L, H, K] bfloat16 or float32, this shard's L tokens, L even.
      k_BLGK, v_BLGK: [B, L, G, K], q's dtype, H % G == 0; sent as they are, without repeated heads.
      axis_name: mesh axis that shards the length; the shard's position in the row is its index there.
      axis_size: number of shards. With 1 the call is `causal_attention`.
      segment_ids: [B, L] int32, this shard of the row's ids, which follow the rule of
        `causal_attention` over the whole row: equal ids are contiguous. None: one document per row.
      scale: factor of the scores; None: 1 / sqrt(K).
      implementation: as for `causal_attention` ('reference' does not exist here). 'splash' takes
        L / 2 that are multiples of 128, and its shard_map needs check_vma=False.
      interpret: run the kernels of 'splash' on CPU (tests).

    Returns:
      [B, L, H, K] in q's dtype: this shard's queries over all keys before them in their document.

    Raises:
      ValueError: a shape, dtype or name breaks a rule above.
      dispatch.UnsupportedError (a NotImplementedError): the named implementation cannot serve these arguments.
    """
    api.check(q_BLHK, k_BLGK, v_BLGK, segment_ids, scale, None, implementation)
    if not isinstance(axis_size, int) or axis_size < 1:
        raise ValueError(
            f'axis_size={axis_size!r}; it must be an int of at least 1, the size of mesh axis {axis_name!r}'
        )
    if axis_size == 1:
        return api.causal_attention(
            q_BLHK, k_BLGK, v_BLGK, segment_ids=segment_ids, scale=scale, implementation=implementation
        )
    L = q_BLHK.shape[1]
    if L % 2:
        whole, unit = L * axis_size, 2 * axis_size
        raise ValueError(
            f'q has length {L} on each of {axis_size} shards of {axis_name!r}; it must be even, for each shard works on '
            f'two pieces: make the whole length {whole} a multiple of {unit}, such as {whole // unit * unit or unit} or '
            f'{-(-whole // unit) * unit}'
        )
    implementation = OPERATOR.choose(implementation, api.Call(q_BLHK, k_BLGK, segment_ids))
    scale = 1 / math.sqrt(q_BLHK.shape[-1]) if scale is None else scale
    ring = _Ring(axis_name, axis_size, implementation, float(scale), interpret)
    return _attention(*api.vary_alike(q_BLHK, k_BLGK, v_BLGK, segment_ids), ring)


# ---- between the contiguous shards and the pieces ----


def _home(piece, n):
    """Device that works on a piece."""
    return min(piece, 2 * n - 1 - piece)


def _move(x, routes, ring):
    if all(source == target for source, target in routes):
        return x
    return lax.ppermute(x, ring.axis_name, routes)


def _routes(ring):
    """Where the first (even) and the second (odd) piece of shard i go: two permutations of the devices."""
    return [[(i, _home(2 * i + odd, ring.n)) for i in range(ring.n)] for odd in (0, 1)]


def _early_is_even(ring):
    # The early piece of device i is piece i, its late one 2n-1-i: one of each parity.
    return lax.axis_index(ring.axis_name) % 2 == 0


def _to_pieces(x, ring):
    """[B, L, ...], a contiguous shard -> [B, 2, S, ...], the early and the late piece of this device."""
    halves = x.reshape(x.shape[0], 2, x.shape[1] // 2, *x.shape[2:])
    even, odd = (_move(halves[:, i], routes, ring) for i, routes in enumerate(_routes(ring)))
    swap = ~_early_is_even(ring)
    return jnp.stack([jnp.where(swap, odd, even), jnp.where(swap, even, odd)], axis=1)


def _to_rows(x_B2S, ring):
    """The inverse of `_to_pieces`."""
    early, late = x_B2S[:, 0], x_B2S[:, 1]
    swap = ~_early_is_even(ring)
    halves = jnp.where(swap, late, early), jnp.where(swap, early, late)
    back = [[(target, source) for source, target in routes] for routes in _routes(ring)]
    halves = [_move(half, routes, ring) for half, routes in zip(halves, back, strict=True)]
    return jnp.concatenate(halves, axis=1)


def _pass_on(tree, ring):
    """Sends to the next device, and returns what the one before sends."""
    return jax.tree.map(lambda x: lax.ppermute(x, ring.axis_name, [(i, (i + 1) % ring.n) for i in range(ring.n)]), tree)


# ---- blocks ----


def _forward_xla(ring, *arrays, causal):
    return xla.forward(*arrays, ring.scale, xla.DEFAULT_CHUNK, causal=causal, dtype=jnp.float32)


def _forward_cudnn(ring, *arrays, causal):
    return cudnn.block_forward(*arrays, ring.scale, causal)


def _forward_splash(ring, *arrays, causal):
    return splash.block_forward(*arrays, ring.scale, causal, ring.interpret)


def _backward_xla(ring, *arrays, causal, lse_BHL, known, dout):
    return xla.backward(*arrays, ring.scale, xla.DEFAULT_CHUNK, lse_BHL, known.swapaxes(1, 2), dout, causal=causal,
                        dtype=jnp.float32)  # fmt: skip


def _backward_cudnn(ring, *arrays, causal, lse_BHL, known, dout):
    return cudnn.block_backward(*arrays, ring.scale, causal, lse_BHL, known, dout)


def _backward_splash(ring, *arrays, causal, lse_BHL, known, dout):
    return splash.block_backward(*arrays, ring.scale, causal, lse_BHL, known.swapaxes(1, 2), dout, ring.interpret)


class _Blocks(NamedTuple):
    """An implementation of attention of some queries over some keys, and of its gradient."""

    forward: Callable
    backward: Callable
    needs_output: bool = False  # backward takes the output itself, not its product with its gradient


def _reference_unsupported(device, call):
    return "'reference' holds all scores of a row at once, on one device"


def _splash_unsupported(device, call):
    S = call.q_BLHK.shape[1] // 2
    if S % splash.LANES:
        return f'splash attention takes pieces (half of a shard) that are multiples of {splash.LANES}, got {S}'
    return api.splash_unsupported(device, call)


OPERATOR = dispatch.Operator(
    implementations={
        'reference': dispatch.Implementation(None, _reference_unsupported, remedy=api.BLOCKWISE_REMEDY),
        'xla': dispatch.Implementation(_Blocks(_forward_xla, _backward_xla), api.xla_unsupported),
        'cudnn': dispatch.Implementation(
            _Blocks(_forward_cudnn, _backward_cudnn, needs_output=True), api.cudnn_unsupported,
            remedy=api.BLOCKWISE_REMEDY),
        'splash': dispatch.Implementation(
            _Blocks(_forward_splash, _backward_splash), _splash_unsupported, remedy=api.BLOCKWISE_REMEDY),
    },
    order=api.FUSED,
    everywhere=('xla',),
    log_line=api.log_line('ring_attention'),
)  # fmt: skip


def _block_forward(ring, q, k, v, segments, causal):
    """(output [B, L, H, K], logsumexp [B, L, H] float32) of queries over the keys of this call."""
    blocks = OPERATOR.implementations[ring.implementation].run
    out, lse_BHL = blocks.forward(ring, q, k, v, segments, causal=causal)
    return out, lse_BHL.swapaxes(1, 2)


def _block_backward(ring, q, k, v, segments, causal, lse_BLH, known, dout):
    """Terms of (dq, dk, dv), float32; lse and known (see `_known`) are those of the whole sequence."""
    blocks = OPERATOR.implementations[ring.implementation].run
    grads = blocks.backward(
        ring, q, k, v, segments, causal=causal, lse_BHL=lse_BLH.swapaxes(1, 2), known=known, dout=dout)  # fmt: skip
    return [x.astype(jnp.float32) for x in grads]


def _known(ring, y_BLHK, dy_BLHK):
    """What the backward pass needs of the output: cuDNN the output, the others its product with its gradient, [B, L, H]."""
    if OPERATOR.implementations[ring.implementation].run.needs_output:
        return y_BLHK
    return xla.row_products(y_BLHK, dy_BLHK).swapaxes(1, 2)


# ---- a step of the ring ----


def _rows(x_B2S):
    """The two pieces as one row."""
    return None if x_B2S is None else x_B2S.reshape(x_B2S.shape[0], -1, *x_B2S.shape[3:])


def _piece(x_B2S):
    """0 of the early and 1 of the late piece, along axis 1 of x."""
    return jnp.arange(2, dtype=jnp.int32).reshape(2, *(1,) * (x_B2S.ndim - 2))


# The functions below select along the axis of the pieces instead of slicing and stacking: one pass over memory each.


def _operands(is_before, of_queries, of_keys):
    """The queries and keys that meet in a step, as a batch of 2 B rows. is_before: the keys come from a device before.

    Row 0 of each pair is (early or late queries, early keys), row 1 (late queries, early or late keys).
    """

    def queries(x):
        return None if x is None else jnp.where(is_before | (_piece(x) == 1), x, x[:, 1:])

    def keys(x):
        return None if x is None else jnp.where(is_before & (_piece(x) == 1), x[:, :1], x)

    def batch(x):
        return None if x is None else x.reshape(-1, *x.shape[2:])

    return [batch(queries(x)) for x in of_queries], [batch(keys(x)) for x in of_keys]


def _pairs(x):
    return x.reshape(-1, 2, *x.shape[1:])


def _combine(*results):
    """Attention over the keys of all results, (output, logsumexp float32) each. In the first, every query saw a key."""
    total = functools.reduce(jnp.logaddexp, (lse for _, lse in results))
    return sum(out.astype(jnp.float32) * jnp.exp(lse - total)[..., None] for out, lse in results), total


def _sum_of_queries(is_before, x_B2S):
    """Sum of what row 0 and row 1 of a step add to each piece of the queries."""
    late = _piece(x_B2S) == 1
    return jnp.where(late | is_before, x_B2S, 0.0) + jnp.where(late & ~is_before, x_B2S[:, :1], 0.0)


def _sum_of_keys(is_before, x_B2S):
    """Sum of what row 0 and row 1 of a step add to each piece of the keys."""
    early = _piece(x_B2S) == 0
    return jnp.where(early | ~is_before, x_B2S, 0.0) + jnp.where(early & is_before, x_B2S[:, 1:], 0.0)


def _if_shared(is_before, ids_B2S, key_ids_B2S, compute, otherwise):
    """compute() where a document reaches from these keys to these queries, otherwise otherwise().

    Such a document fills everything between them, so the last key has the id of the first query.
    """
    if ids_B2S is None:
        return compute()
    (ids,), (key_ids,) = _operands(is_before, [ids_B2S], [key_ids_B2S])
    return lax.cond(jnp.any(ids[:, 0] == key_ids[:, -1]), compute, otherwise)


def _visit_forward(ring, step, q, ids, so_far, here):
    """(output, logsumexp) so far, with the keys and values that have been sent on `step` times."""
    out, lse = so_far
    k, v, key_ids = here
    is_before = lax.axis_index(ring.axis_name) >= step

    def compute():
        (q_, ids_), (k_, v_, key_ids_) = _operands(is_before, [q, ids], [k, v, key_ids])
        block = _block_forward(ring, q_, k_, v_, None if ids is None else (ids_, key_ids_), causal=False)
        block_out, block_lse = (_pairs(x) for x in block)
        late, nothing = _piece(block_lse) == 1, -jnp.inf
        return _combine(
            (out, lse),
            (block_out, jnp.where(late | is_before, block_lse, nothing)),
            (block_out[:, :1], jnp.where(late & ~is_before, block_lse[:, :1], nothing)),
        )

    return _if_shared(is_before, ids, key_ids, compute, lambda: (out, lse))


def _visit_backward(ring, step, queries, dq, here):
    """(dq with this step's term, the step's terms of dk and dv), float32; queries: (q, ids, lse, known, dout)."""
    k, v, key_ids = here
    is_before = lax.axis_index(ring.axis_name) >= step

    def compute():
        (q_, ids_, *rest), (k_, v_, key_ids_) = _operands(is_before, queries, [k, v, key_ids])
        segments = None if key_ids is None else (ids_, key_ids_)
        dq_, dk_, dv_ = (_pairs(x) for x in _block_backward(ring, q_, k_, v_, segments, False, *rest))
        return dq + _sum_of_queries(is_before, dq_), *(_sum_of_keys(is_before, x) for x in (dk_, dv_))

    def otherwise():
        return dq, jnp.zeros_like(k, jnp.float32), jnp.zeros_like(v, jnp.float32)

    dq, dk, dv = _if_shared(is_before, queries[1], key_ids, compute, otherwise)
    return dq, (dk, dv)


# ---- the ring ----


def _forward(ring, q, k, v, segment_ids):
    """(y [B, L, H, K], what the backward pass needs besides y)."""
    dtype = q.dtype
    q, k, v = (_to_pieces(x, ring) for x in (q, k, v))
    ids = None if segment_ids is None else _to_pieces(segment_ids, ring)
    here = _pass_on((k, v, ids), ring)  # sent before the device's own step, which does not need them
    segments = None if ids is None else (_rows(ids),) * 2
    out, lse = _block_forward(ring, *map(_rows, (q, k, v)), segments, causal=True)
    so_far = out.astype(jnp.float32).reshape(q.shape), lse.reshape(q.shape[:-1])

    def body(carry, step):
        so_far, here = carry
        following = _pass_on(here, ring)
        return (_visit_forward(ring, step, q, ids, so_far, here), following), None

    (so_far, here), _ = lax.scan(body, (so_far, here), jnp.arange(1, ring.n - 1, dtype=jnp.int32))
    out, lse = _visit_forward(ring, ring.n - 1, q, ids, so_far, here)
    return _to_rows(out.astype(dtype), ring), (q, k, v, ids, lse)


def _backward(ring, y, residuals, dy):
    """(dq, dk, dv) in the layout and dtype of q, k, v."""
    q, k, v, ids, lse = residuals
    dtype = q.dtype
    here = _pass_on((k, v, ids), ring)
    dout = _to_pieces(dy.astype(dtype), ring)
    known = _to_pieces(_known(ring, y, dy), ring)
    segments = None if ids is None else (_rows(ids),) * 2
    own = _block_backward(ring, *map(_rows, (q, k, v)), segments, True, *map(_rows, (lse, known, dout)))
    dq, *own = (grad.reshape(x.shape) for grad, x in zip(own, (q, k, v), strict=True))
    queries = q, ids, lse, known, dout

    following = _pass_on(here, ring) if ring.n > 2 else None
    dq, travelling = _visit_backward(ring, 1, queries, dq, here)
    if ring.n > 2:

        def add(dq, travelling, here, step):
            arriving = _pass_on(travelling, ring)
            dq, term = _visit_backward(ring, step, queries, dq, here)
            return dq, jax.tree.map(jnp.add, arriving, term)

        def body(carry, step):
            dq, travelling, here = carry
            following = _pass_on(here, ring)
            return (*add(dq, travelling, here, step), following), None

        carry = dq, travelling, following
        (dq, travelling, here), _ = lax.scan(body, carry, jnp.arange(2, ring.n - 1, dtype=jnp.int32))
        dq, travelling = add(dq, travelling, here, ring.n - 1)
    else:
        # There is one step, and its term is what the kernel wrote in this dtype.
        travelling = jax.tree.map(lambda x: x.astype(dtype), travelling)
    home = _pass_on(travelling, ring)
    dk, dv = (mine + theirs.astype(jnp.float32) for mine, theirs in zip(own, home, strict=True))
    return tuple(_to_rows(x.astype(dtype), ring) for x in (dq, dk, dv))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, segment_ids, ring):
    return _forward(ring, q, k, v, segment_ids)[0]


def _attention_fwd(q, k, v, segment_ids, ring):
    y, (*pieces, lse) = _forward(ring, q, k, v, segment_ids)
    # The layers that follow save y as it is returned; saved in pieces it would be a second copy.
    y, lse = checkpoint_name(y, xla.RESIDUAL_NAME), checkpoint_name(lse, xla.RESIDUAL_NAME)
    return y, (y, (*pieces, lse))


def _attention_bwd(ring, residuals, dy):
    return *_backward(ring, *residuals, dy), None


_attention.defvjp(_attention_fwd, _attention_bwd)
