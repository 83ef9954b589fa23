"""Blockwise (flash) attention in plain JAX, for every backend.

Only one [Q, Q] block per head of the score matrix exists at a time. One `lax.scan` computes the
blocks on and below the diagonal, row by row, and inside a row from the diagonal to the left:

  * The list of blocks is static, so the loop has a known trip count, and XLA can pipeline it and
    estimate its cost. A loop to a data-dependent bound would make a GPU wait for the host in every
    step, and would become selects under vmap. Blocks above the diagonal are never computed.
  * The diagonal block comes first because each query sees at least itself there. The running
    maximum is finite from then on, so a block that segment ids mask away adds exp(-inf) = 0 and
    never a NaN.
  * `forward` and `backward` also compute a block of a longer sequence (causal=False), in which all
    queries are after the keys of this call. A query may see none of these keys; then its output is
    0 and its logsumexp -inf.
  * The matmuls batch over the batch and head axes only, and nothing gathers along these axes, so the
    SPMD partitioner shards the loop over batch and heads without communication.

Source: FlashAttention-2 (arXiv:2307.08691), algorithms 1 and 2.

Shapes: B batch, L length, T keys of a call (L where causal), H heads, G key/value heads, K head
width, C blocks of queries, D blocks of keys, Q query and S key inside a block, M queries of a
block, stacked over the heads that share a key/value head (M = (H / G) Q), so that grouped heads
become one larger matmul.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

# Of 128, 256 and 512 the fastest forward + backward on 2 CPU cores at L = 1024 and 4096 (float32,
# 4 heads of width 64: 50 and 691 ms, against 295 and 7,707 ms of the dense reference).
DEFAULT_CHUNK = 256
RESIDUAL_NAME = 'attention_residual'


def _precision(dtype):
    # float32 inputs ask for float32 products: the default is TF32 on GPU, bfloat16 on TPU.
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def _block_pairs(C, D, causal):
    """(i, j, first): query block i, its key blocks from the last that it sees to the left, which of them is the first."""
    last = [i if causal else D - 1 for i in range(C)]
    pairs = [(i, j, j == last[i]) for i in range(C) for j in range(last[i], -1, -1)]
    i, j, first = np.array(pairs, np.int32).T
    return jnp.asarray(i), jnp.asarray(j), jnp.asarray(first, bool)


def _constant(shape, value, dtype, like):
    """A constant that varies over the same shard_map axes as `like`, as a scan carry must."""
    axes = tuple(jax.typeof(like).mat.varying)
    constant = jnp.full(shape, value, dtype)
    return lax.pcast(constant, axes, to='varying') if axes else constant


def _pad_length(x, length):
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def _block_queries(x_BLHK, C, Q, G):
    B, _, H, K = x_BLHK.shape
    x = _pad_length(x_BLHK, C * Q).reshape(B, C, Q, G, H // G, K)
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(C, B, G, H // G * Q, K)


def _unblock_queries(x_CBGMK, L, Q):
    C, B, G, M, K = x_CBGMK.shape
    x = x_CBGMK.reshape(C, B, G, M // Q, Q, K).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(B, C * Q, G * (M // Q), K)[:, :L]


def _block_keys(x_BLGK, C, Q):
    B, _, G, K = x_BLGK.shape
    return _pad_length(x_BLGK, C * Q).reshape(B, C, Q, G, K).transpose(1, 0, 3, 2, 4)


def _unblock_keys(x_CBGSK, L):
    C, B, G, S, K = x_CBGSK.shape
    return x_CBGSK.transpose(1, 0, 3, 2, 4).reshape(B, C * S, G, K)[:, :L]


def _block_rows(x_BHL, C, Q, G):
    """Per-query statistics [B, H, L] -> [C, B, G, M]."""
    B, H, L = x_BHL.shape
    x = jnp.pad(x_BHL, [(0, 0), (0, 0), (0, C * Q - L)]).reshape(B, G, H // G, C, Q)
    return x.transpose(3, 0, 1, 2, 4).reshape(C, B, G, H // G * Q)


def _unblock_rows(x_CBGM, L, Q):
    C, B, G, M = x_CBGM.shape
    x = x_CBGM.reshape(C, B, G, M // Q, Q).transpose(1, 2, 3, 0, 4)
    return x.reshape(B, G * (M // Q), C * Q)[:, :, :L]


def _block_segments(segment_ids_BL, C, Q):
    if segment_ids_BL is None:
        return None
    # The ids of padded positions do not matter: causality hides padded keys from real queries.
    return _pad_length(segment_ids_BL, C * Q).reshape(-1, C, Q).transpose(1, 0, 2)


def _scores(q_BGMK, k_BGSK, i, j, segments_CBQ, key_segments_DBS, scale, Q, T, causal):
    """Masked float32 scores of block (i, j), [B, G, M, S]."""
    s_BGMS = scale * jnp.einsum(
        'BGMK,BGSK->BGMS',
        q_BGMK,
        k_BGSK,
        precision=_precision(q_BGMK.dtype),
        preferred_element_type=jnp.float32,
    )
    M, S = s_BGMS.shape[-2:]
    key_S = j * S + jnp.arange(S, dtype=jnp.int32)[None, :]
    if causal:
        allowed = i * Q + jnp.arange(M, dtype=jnp.int32)[:, None] % Q >= key_S
    else:
        allowed = key_S < T  # padded keys
    if segments_CBQ is not None:
        rows_BM = jnp.tile(segments_CBQ[i], (1, M // Q))
        allowed = allowed & (rows_BM[:, None, :, None] == key_segments_DBS[j][:, None, None, :])
    return jnp.where(allowed, s_BGMS, -jnp.inf)


def _block_all(q_BLHK, k_BTGK, v_BTGK, segments, chunk):
    """((q, k, v and both ids in blocks), (C, D, Q, S))."""
    (L, T), G = (q_BLHK.shape[1], k_BTGK.shape[1]), k_BTGK.shape[2]
    Q, S = min(chunk, L), min(chunk, T)
    C, D = -(-L // Q), -(-T // S)
    ids_BL, key_ids_BT = (None, None) if segments is None else segments
    arrays = (
        _block_queries(q_BLHK, C, Q, G),
        _block_keys(k_BTGK, D, S),
        _block_keys(v_BTGK, D, S),
        _block_segments(ids_BL, C, Q),
        _block_segments(key_ids_BT, D, S),
    )
    return arrays, (C, D, Q, S)


def forward(q_BLHK, k_BTGK, v_BTGK, segments, scale, chunk, *, causal=True, dtype=None):
    """Attention output [B, L, H, K] in dtype (None: q's) and logsumexp [B, H, L] float32.

    segments: None, or the ids [B, L] of the queries and [B, T] of the keys, int32. causal: T = L; otherwise all keys
    are before all queries.
    """
    L, T = q_BLHK.shape[1], k_BTGK.shape[1]
    arrays, (C, D, Q, S) = _block_all(q_BLHK, k_BTGK, v_BTGK, segments, chunk)
    q_CBGMK, k_DBGSK, v_DBGSK, *segments = arrays
    block, rows = q_CBGMK.shape[1:], q_CBGMK.shape[1:-1]

    def step(carry, pair):
        acc_BGMK, m_BGM, l_BGM, out_CBGMK, lse_CBGM = carry
        i, j, first = pair
        m_BGM = jnp.where(first, -jnp.inf, m_BGM)
        l_BGM = jnp.where(first, 0.0, l_BGM)
        acc_BGMK = jnp.where(first, 0.0, acc_BGMK)

        s_BGMS = _scores(q_CBGMK[i], k_DBGSK[j], i, j, *segments, scale, Q, T, causal)
        m_new_BGM = jnp.maximum(m_BGM, s_BGMS.max(-1))
        # -inf: the row saw no key yet, which the diagonal block excludes.
        shift_BGM = m_new_BGM if causal else jnp.where(m_new_BGM == -jnp.inf, 0.0, m_new_BGM)
        p_BGMS = jnp.exp(s_BGMS - shift_BGM[..., None])
        shrink_BGM = jnp.exp(m_BGM - shift_BGM)
        l_BGM = shrink_BGM * l_BGM + p_BGMS.sum(-1)
        acc_BGMK = shrink_BGM[..., None] * acc_BGMK + jnp.einsum(
            'BGMS,BGSK->BGMK',
            p_BGMS.astype(v_DBGSK.dtype),
            v_DBGSK[j],
            precision=_precision(v_DBGSK.dtype),
            preferred_element_type=jnp.float32,
        )
        # Written in every step and right after the last one of the row: cheaper than keeping
        # unnormalised float32 rows of the whole sequence.
        weight_BGM = l_BGM if causal else jnp.where(l_BGM == 0, 1.0, l_BGM)
        out_CBGMK = out_CBGMK.at[i].set((acc_BGMK / weight_BGM[..., None]).astype(out_CBGMK.dtype))
        lse_CBGM = lse_CBGM.at[i].set(m_new_BGM + jnp.log(l_BGM))
        return (acc_BGMK, m_new_BGM, l_BGM, out_CBGMK, lse_CBGM), None

    f32 = jnp.float32
    init = (
        _constant(block, 0, f32, q_BLHK),
        _constant(rows, 0, f32, q_BLHK),
        _constant(rows, 0, f32, q_BLHK),
        _constant((C, *block), 0, dtype or q_BLHK.dtype, q_BLHK),
        _constant((C, *rows), 0, f32, q_BLHK),
    )
    (_, _, _, out_CBGMK, lse_CBGM), _ = lax.scan(step, init, _block_pairs(C, D, causal))
    return _unblock_queries(out_CBGMK, L, Q), _unblock_rows(lse_CBGM, L, Q)


def row_products(out_BLHK, dout_BLHK):
    """What the backward needs of the output: its product with its gradient, [B, H, L] float32."""
    return jnp.einsum('BLHK,BLHK->BHL', out_BLHK.astype(jnp.float32), dout_BLHK.astype(jnp.float32))


def backward(q_BLHK, k_BTGK, v_BTGK, segments, scale, chunk, lse_BHL, delta_BHL, dout_BLHK, *, causal=True, dtype=None):
    """Gradients (dq, dk, dv) in dtype (None: that of q, k, v); dk and dv accumulate in float32.

    segments, causal: as in `forward`. lse and delta (`row_products`) are those of the whole sequence, which may have
    more keys than these T.
    """
    L, T, G = q_BLHK.shape[1], k_BTGK.shape[1], k_BTGK.shape[2]
    f32 = jnp.float32
    arrays, (C, D, Q, S) = _block_all(q_BLHK, k_BTGK, v_BTGK, segments, chunk)
    q_CBGMK, k_DBGSK, v_DBGSK, *segments = arrays
    dout_CBGMK = _block_queries(dout_BLHK.astype(q_BLHK.dtype), C, Q, G)
    # Padded rows have lse 0 and dout 0: p stays finite and every product with it is 0.
    lse_CBGM, delta_CBGM = _block_rows(lse_BHL, C, Q, G), _block_rows(delta_BHL, C, Q, G)
    einsum = functools.partial(jnp.einsum, precision=_precision(q_BLHK.dtype), preferred_element_type=f32)

    def step(carry, pair):
        dq_BGMK, dq_CBGMK, dk_DBGSK, dv_DBGSK = carry
        i, j, first = pair
        q_BGMK, dout_BGMK, k_BGSK, v_BGSK = q_CBGMK[i], dout_CBGMK[i], k_DBGSK[j], v_DBGSK[j]
        s_BGMS = _scores(q_BGMK, k_BGSK, i, j, *segments, scale, Q, T, causal)
        p_BGMS = jnp.exp(s_BGMS - lse_CBGM[i][..., None])
        dv_BGSK = einsum('BGMS,BGMK->BGSK', p_BGMS.astype(q_BGMK.dtype), dout_BGMK)
        dp_BGMS = einsum('BGMK,BGSK->BGMS', dout_BGMK, v_BGSK)
        ds_BGMS = scale * p_BGMS * (dp_BGMS - delta_CBGM[i][..., None])
        ds_BGMS = ds_BGMS.astype(q_BGMK.dtype)
        dq_BGMK = jnp.where(first, 0.0, dq_BGMK) + einsum('BGMS,BGSK->BGMK', ds_BGMS, k_BGSK)
        dk_BGSK = einsum('BGMS,BGMK->BGSK', ds_BGMS, q_BGMK)
        return (
            dq_BGMK,
            dq_CBGMK.at[i].set(dq_BGMK.astype(dq_CBGMK.dtype)),
            dk_DBGSK.at[j].add(dk_BGSK),
            dv_DBGSK.at[j].add(dv_BGSK),
        ), None

    init = (
        _constant(q_CBGMK.shape[1:], 0, f32, q_BLHK),
        _constant(q_CBGMK.shape, 0, dtype or q_BLHK.dtype, q_BLHK),
        _constant(k_DBGSK.shape, 0, f32, q_BLHK),
        _constant(v_DBGSK.shape, 0, f32, q_BLHK),
    )
    (_, dq_CBGMK, dk_DBGSK, dv_DBGSK), _ = lax.scan(step, init, _block_pairs(C, D, causal))
    dk_BTGK = _unblock_keys(dk_DBGSK, T).astype(dtype or k_BTGK.dtype)
    dv_BTGK = _unblock_keys(dv_DBGSK, T).astype(dtype or v_BTGK.dtype)
    return _unblock_queries(dq_CBGMK, L, Q), dk_BTGK, dv_BTGK


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attention(q_BLHK, k_BLGK, v_BLGK, segment_ids_BL, scale, chunk):
    """Blockwise attention; saves q, k, v, the output and one float32 per query and head for the backward pass.

    Args:
      q_BLHK: [B, L, H, K] bfloat16 or float32.
      k_BLGK, v_BLGK: [B, L, G, K], same dtype, H % G == 0.
      segment_ids_BL: [B, L] int32 or None.
      scale: float, factor of the scores.
      chunk: int >= 1, side of a score block.

    Returns:
      [B, L, H, K] in q's dtype.
    """
    return _attention_fwd(q_BLHK, k_BLGK, v_BLGK, segment_ids_BL, scale, chunk)[0]


def _attention_fwd(q, k, v, segment_ids, scale, chunk):
    segments = None if segment_ids is None else (segment_ids, segment_ids)
    out, lse = forward(q, k, v, segments, scale, chunk)
    out, lse = checkpoint_name(out, RESIDUAL_NAME), checkpoint_name(lse, RESIDUAL_NAME)
    return out, (q, k, v, segment_ids, out, lse)


def _attention_bwd(scale, chunk, residuals, dout):
    q, k, v, segment_ids, out, lse = residuals
    segments = None if segment_ids is None else (segment_ids, segment_ids)
    return *backward(q, k, v, segments, scale, chunk, lse, row_products(out, dout), dout), None


attention.defvjp(_attention_fwd, _attention_bwd)
