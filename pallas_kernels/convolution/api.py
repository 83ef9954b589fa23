"""The short causal convolution: one function, several implementations.

Legend: B batch, L length, W width, C channels (any number of axes), J = W - 1 tokens before the row.
"""

# ruff: noqa: F821, F722  (shape strings of jaxtyping)
import math
import typing

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels import dispatch
from pallas_kernels.convolution import gpu, reference, tpu, xla


def causal_convolution(
    u: Float[Array, 'B L *channels'],
    kernel: Float[Array, 'W *channels'],
    bias: Float[Array, '*channels'],
    *,
    before: Float[Array, 'B J *channels'] | None = None,
    reach: Int32[Array, 'B L'] | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, 'B L *channels']:
    """silu(bias + sum_j kernel_{W-1-j} u_{t-j}), one filter per channel; the last tap is the token's own.

    Source: the convolution of Mamba-2 (Dao and Gu, 2024). Reverse-mode differentiable in u, kernel, bias and before. What
    it keeps for the gradient is its arguments.

    Args:
      u: [B, L, *channels] bfloat16 or float32, L >= 1.
      kernel: float32 [W, *channels], W at least 2.
      bias: float32 [*channels].
      before: [B, W - 1, *channels] in u's dtype, the tokens before the row. None: zeros.
      reach: of `tokens_in_reach`: how many tokens back each token sees. None: W - 1, rows are of one document.
      implementation: a name of the table, or None: the first in the platform's order that can serve (`OPERATOR`).

        | name         | runs on       | dtypes    | partitioned by GSPMD / Shardy |
        | 'reference'  | all           | all       | yes                           |
        | 'xla'        | all           | bf16, f32 | yes, over B and channels      |
        | 'mosaic_gpu' | NVIDIA Hopper | bf16, f32 | no: wrap in jax.shard_map     |
        | 'mosaic_tpu' | TPU           | bf16, f32 | no: wrap in jax.shard_map     |

        'mosaic_gpu' takes W of 2 to 4, L a multiple of 16 and channels that are a multiple of 128 in all; 'mosaic_tpu'
        W of 2 to 7, and L and channels that are multiples of 128.
      interpret: run the Pallas kernels on CPU, slowly.

    Returns:
      [B, L, *channels] in u's dtype, computed in float32.

    Raises:
      ValueError: an argument's shape or dtype breaks a rule above, or the implementation is unknown.
      dispatch.UnsupportedError (a NotImplementedError): the named implementation cannot serve this call.
    """
    _check(u, kernel, bias, before, reach)
    (B, L, *channels), W = u.shape, kernel.shape[0]
    if before is None:
        before = jnp.zeros((B, W - 1, *channels), u.dtype)
    if reach is None:
        reach = jnp.full((B, L), W - 1, jnp.int32)
    call = Call(u.dtype.name, B, L, math.prod(channels), W, interpret)
    return OPERATOR.run(implementation, call, (u, kernel, bias, before, reach))


def tokens_in_reach(segment_ids: Int[Array, 'B J_and_L'], width: int) -> Int32[Array, 'B L']:
    """How many tokens back each token sees: those of its document, at most width - 1.

    Args:
      segment_ids: [B, W - 1 + L], with the W - 1 tokens before the row. A document begins where the id changes.
      width: W.
    """
    goes_on = segment_ids[:, 1:] == segment_ids[:, :-1]
    length = segment_ids.shape[1] - width + 1
    reach, joined = jnp.zeros((segment_ids.shape[0], length), jnp.int32), True
    for back in range(1, width):
        start = width - 1 - back
        joined = joined & goes_on[:, start : start + length]
        reach = reach + joined
    return reach


# --- implementations ---------------------------------------------------------------------------


class Call(typing.NamedTuple):
    """The static properties of a call, which decide the choice."""

    dtype: str  # of u
    B: int
    L: int
    C: int  # channels in all
    W: int
    interpret: bool = False


def _run_reference(call, *arrays):
    return reference.convolve(*arrays)


def _run_xla(call, *arrays):
    return xla.convolve(*arrays)


def _flat(convolve):
    """run of an implementation that takes channels as one axis."""

    def run(call, u, kernel, bias, before, reach):
        arrays = [v.reshape(*v.shape[:axes], -1) for v, axes in ((u, 2), (kernel, 1), (bias, 0), (before, 2))]
        return convolve(*arrays, reach, interpret=call.interpret).reshape(u.shape)

    return run


_computes_in_float32 = dispatch.computes_in_float32('u')


def _kernel_unsupported(kernel):
    def unsupported(device, call):
        reason = _computes_in_float32(device, call)
        if reason is None and call.dtype not in ('bfloat16', 'float32'):
            reason = f"u is {call.dtype}, but it is for bfloat16 and float32; use implementation='xla'"
        if reason is None and call.W not in kernel.WIDTHS:
            reason = (
                f"W={call.W}, but it is for W of {kernel.WIDTHS[0]} to {kernel.WIDTHS[-1]}; use implementation='xla'"
            )
        if reason is None and call.L % kernel.LENGTHS:
            reason = f"L={call.L} is no multiple of {kernel.LENGTHS}; use implementation='xla'"
        if reason is None and call.C % kernel.CHANNELS:
            reason = f"{call.C} channels are no multiple of {kernel.CHANNELS}; use implementation='xla'"
        return reason

    return unsupported


def _gpu_unsupported(device, call):
    return _kernel_unsupported(gpu)(device, call) or dispatch.not_hopper(device)


def _describe(call):
    return f'{call.dtype} B={call.B} L={call.L} C={call.C} W={call.W}'


# On TPU the kernel: by the compiler's static profile for v5e it takes a third of the cycles of XLA's form, forward and
# backward of x at 1.3B. On an H100 it takes a third of the time (NOTES.md).
OPERATOR = dispatch.Operator(
    implementations={
        'reference': dispatch.Implementation(_run_reference),
        'xla': dispatch.Implementation(_run_xla, _computes_in_float32),
        'mosaic_gpu': dispatch.Implementation(_flat(gpu.convolve), _gpu_unsupported),
        'mosaic_tpu': dispatch.Implementation(_flat(tpu.convolve), _kernel_unsupported(tpu)),
    },
    order={'gpu': ('mosaic_gpu', 'xla'), 'tpu': ('mosaic_tpu',)},
    everywhere=('xla',),
    log_line=dispatch.log_line('causal_convolution', _describe),
)
IMPLEMENTATIONS = tuple(OPERATOR.implementations)


# --- checks ------------------------------------------------------------------------------------


def _check(u, kernel, bias, before, reach):
    if u.ndim < 3:
        raise ValueError(f'u: shape {u.shape} must be [B, L, *channels]')
    (B, L, *channels), wide = u.shape, jnp.promote_types(u.dtype, jnp.float32)
    if u.dtype not in (jnp.bfloat16, jnp.float32, jnp.float64):
        raise ValueError(f'u: dtype {u.dtype} must be bfloat16 or float32; cast it with astype')
    if L < 1:
        raise ValueError(f'u: shape {u.shape} has length 0; L must be at least 1')
    if kernel.ndim < 2 or kernel.shape[0] < 2:
        raise ValueError(f'kernel: shape {kernel.shape} must be [W, *channels] with W at least 2')
    wanted = {
        'kernel': (kernel, (kernel.shape[0], *channels), wide), 'bias': (bias, tuple(channels), wide),
        'before': (before, (B, kernel.shape[0] - 1, *channels), u.dtype), 'reach': (reach, (B, L), jnp.int32),
    }  # fmt: skip
    for name, (v, shape, dtype) in wanted.items():
        if v is not None and tuple(v.shape) != shape:
            raise ValueError(f'{name}: shape {tuple(v.shape)} must be {shape}, for u of shape {u.shape}')
        if v is not None and v.dtype != dtype:
            raise ValueError(f'{name}: dtype {v.dtype} must be {jnp.dtype(dtype)}; cast it with astype')
