"""Causal attention by the splash kernels that ship with JAX, for TPUs.

Splash attention skips the blocks above the diagonal, takes grouped key/value heads without
repeating them, and compares segment ids inside the kernel.

Shapes: B batch, L length, H heads, G key/value heads, K head width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import xla
from pallas_kernels.dispatch import UnsupportedError, in_32_bits

# Side of a kernel block. 512 fills the 128 x 128 MXU with long inner loops and, at head widths
# to 256, leaves VMEM for double buffering in the backward kernels.
MAX_BLOCK = 512
LANES = 128  # blocks are multiples of it


def unsupported(q_BLHK):
    """Why splash cannot serve these arguments, or None."""
    K = q_BLHK.shape[-1]
    if q_BLHK.dtype != jnp.bfloat16:
        # The kernel multiplies float32 operands in one bfloat16 pass, which is less accurate than
        # this package promises for float32.
        return f'splash attention takes bfloat16, got {q_BLHK.dtype}'
    if K > 256:
        return f'splash attention takes head widths up to 256, got K={K}'
    try:
        _modules()
    except UnsupportedError as error:
        return str(error)
    return None


def _block(L):
    """Block side and padded length: the largest block that pads by at most an eighth."""
    for block in (MAX_BLOCK, MAX_BLOCK // 2, LANES):
        padded = -(-L // block) * block
        if padded - L <= L // 8 or block == LANES:
            return block, padded


@functools.cache
def _modules():
    """The kernels' module, and the masks of causal and of full attention."""
    try:
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    except ImportError as error:
        raise UnsupportedError(
            f"implementation='splash' needs jax.experimental.pallas.ops.tpu.splash_attention, which"
            f" jax {jax.__version__} does not have ({error}); use implementation='xla'"
        ) from error

    uniform = functools.cache(lambda value, rows, columns: np.full((rows, columns), value))

    class Causal(masks.CausalMask):
        """The same mask, without a comparison of every number of the blocks off the diagonal while tracing.

        At 65,536 tokens the comparison took half a minute.
        """

        def __getitem__(self, index):
            rows, columns = (range(n)[i] for n, i in zip(self.shape, index, strict=True))
            if rows[0] >= columns[-1] or rows[-1] < columns[0]:
                return uniform(rows[0] >= columns[-1], len(rows), len(columns))
            return super().__getitem__(index)

    return splash, masks.MultiHeadMask, Causal, masks.FullMask


def _kernel(H, length, block, causal, **options):
    """(the kernels' module, the kernel for length queries and keys)."""
    splash, of_heads, causal_mask, full_mask = _modules()
    mask = (causal_mask if causal else full_mask)((length, length))
    return splash, splash.make_splash_mha_single_device(
        of_heads([mask] * H),
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=block,
            block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
            block_q_dq=block, block_kv_dq=block,
        ),
        **options,
    )  # fmt: skip


def _scaled(q_BLHK, scale):
    # The kernel has no scale. Exact where scale is a power of two (K = 64: 1/8), otherwise one
    # rounding of q.
    return (q_BLHK.astype(jnp.float32) * scale).astype(q_BLHK.dtype)


def _traced_in_32_bits(f):
    """f, which has a gradient of its own, with both traced by `in_32_bits`.

    The gradient of JAX's kernel is traced when the caller's is taken, after the call.
    """
    run = jax.custom_vjp(in_32_bits(f))
    run.defvjp(in_32_bits(functools.partial(jax.vjp, f)), in_32_bits(lambda pull, cotangent: pull(cotangent)))
    return run


@in_32_bits
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
      UnsupportedError: this JAX has no splash attention.
    """
    B, L, H, K = q_BLHK.shape
    block, padded = _block(L)
    splash = _modules()[0]
    q_BLHK = _scaled(q_BLHK, scale)

    def heads_first(x):
        x = jnp.pad(x, [(0, 0), (0, padded - L), (0, 0), (0, 0)])
        return x.transpose(0, 2, 1, 3)

    arguments = [heads_first(x) for x in (q_BLHK, k_BLGK, v_BLGK)]
    if segment_ids_BL is not None:
        # Padded positions are after every real one, so causality alone hides their keys. They
        # continue the last document, so that each of them still sees a key.
        ids = jnp.pad(segment_ids_BL, [(0, 0), (0, padded - L)], mode='edge')
        arguments.append(splash.SegmentIds(ids, ids))

    def attend(*arguments):
        # Made in here, its tables of the mask's blocks are values of the trace that is differentiated; made outside, under a
        # jit of the layer, the gradient would use values of a trace that has ended.
        options = dict(interpret=interpret, residual_checkpoint_name=xla.RESIDUAL_NAME)
        _, kernel = _kernel(H, padded, block, causal=True, **options)
        return jax.vmap(lambda *args: kernel(*args))(*arguments)

    out_BHLK = _traced_in_32_bits(attend)(*arguments)
    return out_BHLK.transpose(0, 2, 1, 3)[:, :L]


# ---- blocks of a longer sequence ----


def _block_operands(q_BLHK, k_BLGK, v_BLGK, segments, scale, causal, **options):
    """(module, kernel, (q, k, v) with heads first and q scaled, ids of both sides or None)."""
    _, L, H, _ = q_BLHK.shape
    block = next(block for block in (MAX_BLOCK, MAX_BLOCK // 2, LANES) if L % block == 0)
    splash, kernel = _kernel(H, L, block, causal, **options)
    arrays = tuple(x.transpose(0, 2, 1, 3) for x in (_scaled(q_BLHK, scale), k_BLGK, v_BLGK))
    return splash, kernel, arrays, None if segments is None else splash.SegmentIds(*segments)


@in_32_bits
def block_forward(q_BLHK, k_BLGK, v_BLGK, segments, scale, causal, interpret=False):
    """A block of attention over a longer sequence: causal, or all L queries are after all L keys.

    Args:
      q_BLHK, k_BLGK, v_BLGK: bfloat16, L a multiple of LANES.
      segments: None, or the ids [B, L] int32 of the queries and of the keys.
      scale: float, factor of the scores.

    Returns:
      [B, L, H, K] in q's dtype, and its logsumexp [B, H, L] float32. Of a query that sees no key they are
      finite and about -1e38.
    """
    _, kernel, arrays, ids = _block_operands(
        q_BLHK, k_BLGK, v_BLGK, segments, scale, causal, save_residuals=True, interpret=interpret
    )
    out_BHLK, (lse_BHL,) = jax.vmap(kernel)(*arrays, ids)
    return out_BHLK.transpose(0, 2, 1, 3), lse_BHL


@in_32_bits
def block_backward(q_BLHK, k_BLGK, v_BLGK, segments, scale, causal, lse_BHL, delta_BHL, dout_BLHK, interpret=False):
    """Terms of (dq, dk, dv) from such a block, in q's dtype.

    lse_BHL, delta_BHL: [B, H, L] float32, the logsumexp and `xla.row_products` of the queries over the whole sequence.
    The public kernel would compute them from this block alone, so this function calls the functions below it.
    """
    splash, kernel, (q, k, v), ids = _block_operands(
        q_BLHK, k_BLGK, v_BLGK, segments, scale, causal, save_residuals=True, interpret=interpret
    )
    sizes, options = kernel.kwargs['block_sizes'], kernel.kwargs
    shared = dict(
        is_mqa=False,
        mask_value=options['mask_value'],
        attn_logits_soft_cap=None,
        q_layout=sizes.q_layout,
        k_layout=sizes.k_layout,
        v_layout=sizes.v_layout,
        mask_function=options['mask_function'],
        interpret=interpret,
    )

    def one(q, k, v, ids, lse, delta, dout):
        arguments = q, k, v, ids, None, lse, dout, delta
        _, dk, dv = splash._splash_attention_bwd_dkv(
            *arguments,
            bq=sizes.block_q_dkv,
            bkv=sizes.block_kv_dkv,
            bkv_compute=sizes.block_kv_dkv_compute,
            mask_info=kernel.dkv_mask_info,
            use_fused_bwd_kernel=False,
            **shared,
        )
        dq = splash._splash_attention_bwd_dq(
            *arguments, bq=sizes.block_q_dq, bkv=sizes.block_kv_dq, mask_info=kernel.dq_mask_info, **shared
        )
        return dq, dk, dv

    grads = jax.vmap(one)(q, k, v, ids, lse_BHL, delta_BHL, dout_BLHK.transpose(0, 2, 1, 3))
    dq, dk, dv = (x.transpose(0, 2, 1, 3) for x in grads)
    return dq.astype(jnp.float32) * scale, dk, dv
