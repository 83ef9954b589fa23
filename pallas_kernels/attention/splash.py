"""Causal attention by the splash kernels that ship with JAX, for TPUs.

Splash skips the blocks above the diagonal, takes grouped key/value heads without repeating
them, and compares segment ids inside the kernel.

Shapes: B batch, L length, H heads, G key/value heads, K head width.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import xla

# Side of a kernel block. 512 fills the 128 x 128 MXU with long inner loops and, at head widths
# to 256, leaves VMEM for double buffering in the backward kernels.
MAX_BLOCK = 512
_LANES = 128


def unsupported(q_BLHK):
    """Why splash cannot serve these arguments, or None."""
    K = q_BLHK.shape[-1]
    if q_BLHK.dtype != jnp.bfloat16:
        # The kernel multiplies float32 operands in one bfloat16 pass, which breaks the accuracy
        # that this package promises for float32.
        return f'splash attention takes bfloat16, got {q_BLHK.dtype}'
    if K > 256:
        return f'splash attention takes head widths up to 256, got K={K}'
    return None


def _block(L):
    """Block side and padded length: the largest block that pads by at most an eighth."""
    for block in (MAX_BLOCK, MAX_BLOCK // 2, _LANES):
        padded = -(-L // block) * block
        if padded - L <= L // 8 or block == _LANES:
            return block, padded


def attention(q_BLHK, k_BLGK, v_BLGK, segment_ids_BL, scale, interpret=False):
    """Fused causal attention.

    Args:
      q_BLHK: [B, L, H, K] bfloat16, K <= 256.
      k_BLGK, v_BLGK: [B, L, G, K] bfloat16, H % G == 0.
      segment_ids_BL: [B, L] int32 or None.
      scale: float, factor of the scores.
      interpret: bool, run the kernels on CPU (tests).

    Returns:
      [B, L, H, K] in q's dtype.

    Raises:
      NotImplementedError: this JAX has no splash attention.
    """
    try:
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    except ImportError as error:
        raise NotImplementedError(
            f"implementation='splash' needs jax.experimental.pallas.ops.tpu.splash_attention, which"
            f" jax {jax.__version__} does not have ({error}); use implementation='xla'"
        ) from error
    B, L, H, K = q_BLHK.shape
    block, padded = _block(L)
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.CausalMask((padded, padded))] * H),
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=block,
            block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
            block_q_dq=block, block_kv_dq=block,
        ),
        residual_checkpoint_name=xla.RESIDUAL_NAME,
        interpret=interpret,
    )  # fmt: skip
    # The kernel has no scale. Exact where scale is a power of two (K = 64: 1/8), otherwise one
    # rounding of q.
    q_BLHK = (q_BLHK.astype(jnp.float32) * scale).astype(q_BLHK.dtype)

    def heads_first(x):
        x = jnp.pad(x, [(0, 0), (0, padded - L), (0, 0), (0, 0)])
        return x.transpose(0, 2, 1, 3)

    arguments = [heads_first(x) for x in (q_BLHK, k_BLGK, v_BLGK)]
    if segment_ids_BL is not None:
        # Padded positions stand after every real one, so causality alone hides their keys; they
        # continue the last document so that each of them still sees a key.
        ids = jnp.pad(segment_ids_BL, [(0, 0), (0, padded - L)], mode='edge')
        arguments.append(splash.SegmentIds(ids, ids))
    out_BHLK = jax.vmap(lambda *args: kernel(*args))(*arguments)
    return out_BHLK.transpose(0, 2, 1, 3)[:, :L]
