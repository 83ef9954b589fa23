"""The end of a Mamba-2 mixer, D skip, gate and RMSNorm: one function, several implementations.

Legend: B batch, L length, H heads, P head width, G groups (H % G == 0).
"""

import typing

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.gated_norm import gpu, reference, xla


def skip_gate_norm(
    y: Float[Array, 'B L H P'],
    x: Float[Array, 'B L H P'],
    z: Float[Array, 'B L H P'],
    d: Float[Array, 'H'],
    scale: Float[Array, 'H P'],
    *,
    epsilon: float,
    num_groups: int,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, 'B L H P']:
    """RMSNorm((y + d x) silu(z)) scale; the mean square is over the heads of one group.

    Source: Mamba-2 (Dao and Gu, 2024), norm_before_gate=False. Reverse-mode differentiable in every array. What it keeps
    for the gradient is its arguments, and in 'xla' one number per token and group.

    Args:
      y, x, z: [B, L, H, P] bfloat16 or float32, of one dtype.
      d: float32 [H].
      scale: float32 [H, P].
      epsilon: is added to the mean square.
      num_groups: G.
      implementation: a name of the table, or None: the first in the platform's order that can serve (`OPERATOR`).

        | name         | runs on       | dtypes    | partitioned by GSPMD / Shardy |
        | 'reference'  | all           | all       | yes                           |
        | 'xla'        | all           | bf16, f32 | yes, over B and H             |
        | 'mosaic_gpu' | NVIDIA Hopper | bf16, f32 | no: wrap in jax.shard_map     |

        'mosaic_gpu' takes groups of 64, 128, 256 or 512 channels (P H / G) and B L a multiple of 16.
      interpret: run the Pallas kernels on CPU, slowly.

    Returns:
      [B, L, H, P] in z's dtype, computed in float32.

    Raises:
      ValueError: an argument's shape or dtype breaks a rule above, or the implementation is unknown.
      dispatch.UnsupportedError (a NotImplementedError): the named implementation cannot serve this call.
    """
    _check(y, x, z, d, scale, num_groups)
    call = Call(y.dtype.name, *y.shape, num_groups, interpret)
    return OPERATOR.run(implementation, call, (y, x, z, d, scale), epsilon, num_groups)


class Call(typing.NamedTuple):
    """The static properties of a call, which decide the choice."""

    dtype: str
    B: int
    L: int
    H: int
    P: int
    G: int
    interpret: bool = False


def _run_reference(call, *arguments):
    return reference.skip_gate_norm(*arguments)


def _run_xla(call, *arguments):
    return xla.skip_gate_norm(*arguments)


def _run_gpu(call, *arguments):
    return gpu.skip_gate_norm(*arguments, interpret=call.interpret)


_computes_in_float32 = dispatch.computes_in_float32('y')


def _gpu_unsupported(device, call):
    reason, K = _computes_in_float32(device, call), call.H // call.G * call.P
    if reason is None and K not in gpu.GROUPS:
        reason = f"groups of {K} channels, but it is for groups of {gpu.GROUPS}; use implementation='xla'"
    if reason is None and call.B * call.L % gpu.TOKENS:
        reason = f"B L = {call.B * call.L} is no multiple of {gpu.TOKENS}; use implementation='xla'"
    return reason or dispatch.not_hopper(device)


def _describe(call):
    B, L, H, P, G = call[1:6]
    return f'{call.dtype} B={B} L={L} H={H} P={P} G={G}'


# On an H100 the kernel takes half the time of XLA's form (convolution/NOTES.md).
OPERATOR = dispatch.Operator(
    implementations={
        'reference': dispatch.Implementation(_run_reference),
        'xla': dispatch.Implementation(_run_xla, _computes_in_float32),
        'mosaic_gpu': dispatch.Implementation(_run_gpu, _gpu_unsupported),
    },
    order={'gpu': ('mosaic_gpu', 'xla')},
    everywhere=('xla',),
    log_line=dispatch.log_line('skip_gate_norm', _describe),
)
IMPLEMENTATIONS = tuple(OPERATOR.implementations)


def _check(y, x, z, d, scale, num_groups):
    if y.ndim != 4:
        raise ValueError(f'y: shape {y.shape} must have the 4 dimensions [B, L, H, P]')
    if y.dtype not in (jnp.bfloat16, jnp.float32, jnp.float64):
        raise ValueError(f'y: dtype {y.dtype} must be bfloat16 or float32; cast it with astype')
    H, P, wide = *y.shape[2:], jnp.promote_types(y.dtype, jnp.float32)
    wanted = {
        'x': (x, y.shape, y.dtype), 'z': (z, y.shape, y.dtype), 'd': (d, (H,), wide), 'scale': (scale, (H, P), wide),
    }  # fmt: skip
    for name, (v, shape, dtype) in wanted.items():
        if v.shape != shape:
            raise ValueError(f'{name}: shape {v.shape} must be {shape}, for y of shape {y.shape}')
        if v.dtype != dtype:
            raise ValueError(f'{name}: dtype {v.dtype} must be {jnp.dtype(dtype)}; cast it with astype')
    if num_groups < 1 or H % num_groups:
        raise ValueError(f'num_groups={num_groups} must divide H={H} heads')
