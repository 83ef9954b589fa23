"""Attention of one new token per row over a cache of keys and values.

A cache is [B, G, S, K]. What one group of heads reads is contiguous, so both products are batched
matmuls over (B, G) without a transpose, and a step reads each key and value once.

Shapes: B batch, S tokens that the cache has room for, H heads, G key/value heads, R heads per
key/value head (H = G R, head h reads key/value head h // R), K head width.
"""

# ruff: noqa: F722  (shape strings of jaxtyping)
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch


def write_token(
    cache_BGSK: Float[Array, 'B G S K'], x_BGK: Float[Array, 'B G K'], position_B: Int32[Array, 'B']
) -> Float[Array, 'B G S K']:
    """Writes x into the cache at each row's own position; in place where the cache is donated or a loop's carry.

    A position outside of [0, S) is clipped to the nearest inside.
    """

    def one(cache_GSK, x_GK, position):
        return jax.lax.dynamic_update_slice(cache_GSK, x_GK[:, None].astype(cache_GSK.dtype), (0, position, 0))

    return jax.vmap(one)(cache_BGSK, x_BGK, position_B)


def decode_attention(
    q_BHK: Float[Array, 'B H K'],
    k_BGSK: Float[Array, 'B G S K'],
    v_BGSK: Float[Array, 'B G S K'],
    length_B: Int32[Array, 'B'],
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, 'B H K']:
    """softmax(scale q k^T) v over the first length_B keys of each row.

    Args:
      q_BHK: [B, H, K] bfloat16 or float32.
      k_BGSK, v_BGSK: [B, G, S, K], q's dtype, H % G == 0; finite, also past length_B.
      length_B: [B] int32, from 1 to S.
      scale: factor of the scores; None: 1 / sqrt(K).
      implementation: 'xla' (everywhere; partitioned over B, and over H with G), 'cudnn' (NVIDIA,
        bfloat16; in jax.shard_map where it is partitioned), or None: 'xla'.

    Returns:
      [B, H, K] in q's dtype; scores and softmax are float32.

    Raises:
      ValueError: a shape, dtype or name breaks a rule above.
      dispatch.UnsupportedError (a NotImplementedError): this JAX or device has no cuDNN attention.
    """
    _check(q_BHK, k_BGSK, v_BGSK, length_B, implementation)
    (B, H, K), G = q_BHK.shape, k_BGSK.shape[1]
    scale = 1 / math.sqrt(K) if scale is None else scale
    attend = OPERATOR.implementations[OPERATOR.choose(implementation, None)].run
    return attend(q_BHK.reshape(B, G, H // G, K), k_BGSK, v_BGSK, length_B, scale).reshape(B, H, K)


def _xla(q_BGRK, k_BGSK, v_BGSK, length_B, scale):
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    s_BGRS = scale * einsum('BGRK,BGSK->BGRS', q_BGRK, k_BGSK)
    is_key_BS = jnp.arange(k_BGSK.shape[2], dtype=jnp.int32) < length_B[:, None]
    s_BGRS = jnp.where(is_key_BS[:, None, None], s_BGRS, -jnp.inf)
    p_BGRS = jnp.exp(s_BGRS - jnp.max(s_BGRS, axis=-1, keepdims=True))
    y_BGRK = einsum('BGRS,BGSK->BGRK', p_BGRS.astype(v_BGSK.dtype), v_BGSK)
    return (y_BGRK / jnp.sum(p_BGRS, axis=-1, keepdims=True)).astype(q_BGRK.dtype)


def _cudnn(q_BGRK, k_BGSK, v_BGSK, length_B, scale):
    # The heads of a group are passed as the queries of one head, so that the kernel reads the group's keys once.
    try:
        from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention
    except ImportError as error:
        raise dispatch.UnsupportedError(
            f"implementation='cudnn' uses JAX internals that jax {jax.__version__} does not have ({error}); use 'xla'"
        ) from error
    queries_B = jnp.full_like(length_B, q_BGRK.shape[2])
    try:
        return dot_product_attention(
            q_BGRK,
            k_BGSK,
            v_BGSK,
            q_seqlen=queries_B,
            kv_seqlen=length_B,
            scale=scale,
            mask_type=MaskType.PADDING,
            qkv_layout='BNTH',
        )
    except RuntimeError as error:  # JAX asks for the library while tracing
        raise dispatch.UnsupportedError(f"implementation='cudnn': {error}; use 'xla' or install jax[cuda13]") from error


def _log_line(device, call, chosen, passed_over):
    return f'decode_attention: {chosen!r} on {device.backend}'


OPERATOR = dispatch.Operator(
    implementations={'xla': dispatch.Implementation(_xla), 'cudnn': dispatch.Implementation(_cudnn)},
    order={},
    everywhere=('xla',),
    log_line=_log_line,
)
IMPLEMENTATIONS = tuple(OPERATOR.implementations)


def _check(q, k, v, length, implementation):
    if q.ndim != 3 or k.ndim != 4:
        raise ValueError(f'q has shape {q.shape} and k {k.shape}; they must be [B, H, K] and [B, G, S, K]')
    (B, H, K), (G, S) = q.shape, k.shape[1:3]
    if k.shape != (B, G, S, K) or v.shape != k.shape or H % G:
        raise ValueError(
            f'k has shape {k.shape} and v {v.shape}; both must be [B, G, S, K] of q {q.shape}, '
            f'with G dividing its {H} heads'
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f'q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; they must be one dtype')
    if length.shape != (B,) or length.dtype != jnp.int32:
        raise ValueError(f'length has shape {length.shape} and dtype {length.dtype}; it must be [{B}] and int32')
    dispatch.check_name(implementation, IMPLEMENTATIONS)
