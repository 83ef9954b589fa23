"""Causal self-attention: one function, several implementations.

Shapes: B batch, L length, H heads, G key/value heads, K head width.
"""

# ruff: noqa: F722  (shape strings of jaxtyping)
import math
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch
from pallas_kernels.attention import cudnn, reference, splash, xla


def causal_attention(
    q_BLHK: Float[Array, 'B L H K'],
    k_BLGK: Float[Array, 'B L G K'],
    v_BLGK: Float[Array, 'B L G K'],
    *,
    segment_ids: Int32[Array, 'B L'] | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Float[Array, 'B L H K']:
    """softmax(scale q k^T) v over the keys at or before each query in the same document.

    Memory grows linearly with L in every implementation but 'reference'. Reverse-mode
    differentiable in q, k and v (not forward-mode, not twice).

    Args:
      q_BLHK: [B, L, H, K] bfloat16 or float32, L >= 1.
      k_BLGK: [B, L, G, K], q's dtype; H % G == 0, head h reads key/value head h // (H / G).
      v_BLGK: [B, L, G, K], q's dtype.
      segment_ids: [B, L] int32; equal ids are contiguous (padding may end a row with an id of its
        own); a query attends only to keys with its own id. None: one document per row.
      scale: factor of the scores; None: 1 / sqrt(K).
      chunk_size: side of a score block of 'xla'. None: 256. The other implementations ignore it.
      implementation: a name of the table, or None: the fused one of `device.current_device()`
        where it can serve, otherwise 'xla', with the reason logged once. When lowering for a
        platform other than the process's (a TPU topology on a CPU host), set the mesh
        (`jax.set_mesh`), or name it.

        | name        | runs on           | dtypes     | partitioned by GSPMD / Shardy |
        | 'reference' | all               | all        | yes                           |
        | 'xla'       | all               | bf16, f32  | yes, over B, H and G          |
        | 'cudnn'     | NVIDIA sm_80+     | bf16, f16  | yes, over B, H and G          |
        | ... with segment_ids | sm_90+   | bf16, f16  | no: wrap in jax.shard_map     |
        | 'splash'    | TPU               | bf16       | no: wrap in jax.shard_map     |

        "wrap" means shard_map over batch and heads, with L and K whole on every device and G
        sharded as H is. 'xla' and 'reference' work there too, so a model can always wrap. The
        kernels of 'splash' declare no varying axes: their shard_map needs check_vma=False.

    Returns:
      [B, L, H, K] in q's dtype; scores, softmax and accumulation are float32.

    Raises:
      ValueError: a shape, dtype, scale, chunk_size or name breaks a rule above.
      dispatch.UnsupportedError (a NotImplementedError): the named implementation cannot serve these arguments.

    Bitwise repeatable, except the gradients of 'cudnn' without
    `XLA_FLAGS=--xla_gpu_deterministic_ops=true`.

    Source: Vaswani et al. 2017 (arXiv:1706.03762); FlashAttention-2 (arXiv:2307.08691).
    """
    check(q_BLHK, k_BLGK, v_BLGK, segment_ids, scale, chunk_size, implementation)
    if scale is None:
        scale = 1 / math.sqrt(q_BLHK.shape[-1])
    implementation = OPERATOR.choose(implementation, Call(q_BLHK, k_BLGK, segment_ids))
    arrays = vary_alike(q_BLHK, k_BLGK, v_BLGK, segment_ids)
    return OPERATOR.implementations[implementation].run(*arrays, scale, chunk_size or xla.DEFAULT_CHUNK)


def save_residuals(primitive, *_, **params) -> bool:
    """`jax.checkpoint` policy that saves what attention's backward pass needs besides q, k and v.

    With it, the rematerialisation of a layer does not compute attention's forward pass again. It
    saves the output and one float32 per query and head ('cudnn' with segment_ids: up to 32). Combine
    it with other policies by `jax.checkpoint_policies.save_from_both_policies`.
    """
    if primitive.name == 'name':
        return params['name'] == xla.RESIDUAL_NAME
    return primitive.name == 'dot_product_attention_fwd_wrapper'  # cuDNN without segment ids


# ---- implementations ----


class Call(typing.NamedTuple):
    """The arrays whose shapes and dtypes decide the choice."""

    q_BLHK: jax.Array
    k_BLGK: jax.Array
    segment_ids_BL: jax.Array | None


def _run_reference(q, k, v, segment_ids, scale, chunk):
    return reference.attention(q, k, v, segment_ids, scale)


def _run_cudnn(q, k, v, segment_ids, scale, chunk):
    return cudnn.attention(q, k, v, segment_ids, scale)


def _run_splash(q, k, v, segment_ids, scale, chunk):
    return splash.attention(q, k, v, segment_ids, scale)


def xla_unsupported(device, call):
    if call.q_BLHK.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f'blockwise attention takes bfloat16, float16 or float32, got {call.q_BLHK.dtype}'
    return None


def cudnn_unsupported(device, call):
    return cudnn.unsupported(*call)


def splash_unsupported(device, call):
    return splash.unsupported(call.q_BLHK)


def log_line(operator):
    """Line that is logged of a choice, as `dispatch.Operator.log_line`."""

    def line(device, call, chosen, passed_over):
        if device.backend not in FUSED:
            passed_over = 'which has no fused implementation'
        return f'{operator}: {chosen!r} on {device.backend}' + (f', {passed_over}' if passed_over else '')

    return line


FUSED = {'gpu': ('cudnn',), 'tpu': ('splash',)}
BLOCKWISE_REMEDY = "; use implementation='xla' or None"
OPERATOR = dispatch.Operator(
    implementations={
        'reference': dispatch.Implementation(_run_reference),
        'xla': dispatch.Implementation(xla.attention, xla_unsupported, remedy="; use implementation='reference'"),
        'cudnn': dispatch.Implementation(_run_cudnn, cudnn_unsupported, remedy=BLOCKWISE_REMEDY),
        'splash': dispatch.Implementation(_run_splash, splash_unsupported, remedy=BLOCKWISE_REMEDY),
    },
    order=FUSED,
    everywhere=('xla',),
    log_line=log_line('causal_attention'),
)
IMPLEMENTATIONS = tuple(OPERATOR.implementations)


# ---- checks ----


def vary_alike(*arrays):
    """Casts every array to vary over all the axes of a shard_map that any of them varies over.

    Keys and values may be replicated over an axis that shards the queries. The transpose of the cast
    is the psum of their gradients over that axis.
    """
    axes = frozenset().union(*(jax.typeof(x).mat.varying for x in arrays if x is not None))

    def cast(x):
        missing = () if x is None else tuple(sorted(axes - jax.typeof(x).mat.varying))
        return lax.pcast(x, missing, to='varying') if missing else x

    return tuple(cast(x) for x in arrays)


def check(q, k, v, segment_ids, scale, chunk_size, implementation):
    """Raises ValueError where an argument breaks a rule of `causal_attention`."""
    for name, x in (('q', q), ('k', k), ('v', v)):
        if x.ndim != 4:
            raise ValueError(f'{name} has shape {x.shape}; it must have 4 axes (batch, length, heads, width)')
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f'{name} has dtype {x.dtype}; it must be a floating dtype')
        if 0 in x.shape:
            raise ValueError(f'{name} has shape {x.shape}; every axis must be at least 1')
    B, L, H, K = q.shape
    for name, x in (('k', k), ('v', v)):
        if (x.shape[0], x.shape[1], x.shape[3]) != (B, L, K):
            raise ValueError(
                f'{name} has shape {x.shape}; its batch, length and width must be those of q'
                f' {q.shape}, that is ({B}, {L}, G, {K})'
            )
        if x.dtype != q.dtype:
            raise ValueError(f'{name} has dtype {x.dtype}; it must be the dtype of q, {q.dtype}')
    if k.shape != v.shape:
        raise ValueError(f'v has shape {v.shape}; it must be the shape of k, {k.shape}')
    if H % k.shape[2]:
        raise ValueError(f'k has shape {k.shape}: its {k.shape[2]} heads must divide the {H} heads of q {q.shape}')
    if segment_ids is not None:
        if segment_ids.shape != (B, L):
            raise ValueError(f'segment_ids has shape {segment_ids.shape}; it must be (batch, length) = ({B}, {L})')
        if segment_ids.dtype != jnp.int32:
            raise ValueError(
                f'segment_ids has dtype {segment_ids.dtype}; it must be int32: cast it with .astype(jnp.int32)'
            )
    if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale)):
        raise ValueError(f'scale={scale!r}; it must be a finite Python number (it is static) or None')
    if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size >= 1):
        raise ValueError(f'chunk_size={chunk_size!r}; it must be a positive int or None')
    dispatch.check_name(implementation, IMPLEMENTATIONS)
