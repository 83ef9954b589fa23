"""RMSNorm of the residual stream, and the stream past it: one function, several implementations.

Legend: D width of the stream.
"""

import math
import typing

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.residual_norm import gpu, reference, xla


def norm_and_residual(
    x: Float[Array, '*tokens D'],
    scale: Float[Array, 'D'],
    weight: Float[Array, 'D'],
    *,
    epsilon: float,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, '*tokens D'], Float[Array, '*tokens D']]:
    """RMSNorm(x) scale, which a layer reads, and weight x, to which the layer's output is added.

    They are one function because their gradients are: that of x is the sum of both, and apart each reads and writes arrays
    of x's size. Reverse-mode differentiable in every array. For the gradient x is kept, and in 'xla' one number per token.

    Args:
      x: [..., D] bfloat16 or float32.
      scale, weight: float32 [D].
      epsilon: is added to the mean square (Zhang and Sennrich, 2019).
      implementation: a name of the table, or None: the first in the platform's order that can serve (`OPERATOR`).

        | name         | runs on       | dtypes    | partitioned by GSPMD / Shardy    |
        | 'reference'  | all           | all       | yes                              |
        | 'xla'        | all           | bf16, f32 | yes, over everything but D       |
        | 'mosaic_gpu' | NVIDIA Hopper | bf16, f32 | no: wrap in jax.shard_map        |

        'mosaic_gpu' takes D below 1,024 in multiples of 128, and from there to 4,096 in multiples of 512; tokens a multiple
        of 16.
      interpret: run the Pallas kernels on CPU, slowly.

    Returns:
      normed [..., D] in x's dtype, computed in float32, and weight x [..., D] in float32, which is meant to be added to at
      once. Its gradient is rounded to x's dtype, as that of a sum in x's dtype is anyway.

    Raises:
      ValueError: an argument's shape or dtype breaks a rule above, or the implementation is unknown.
      dispatch.UnsupportedError (a NotImplementedError): the named implementation cannot serve this call.
    """
    _check(x, scale, weight)
    call = Call(x.dtype.name, math.prod(x.shape[:-1]), x.shape[-1], interpret)
    return OPERATOR.run(implementation, call, (x, scale, weight), epsilon)


class Call(typing.NamedTuple):
    """The static properties of a call, which decide the choice; M tokens."""

    dtype: str
    M: int
    D: int
    interpret: bool = False


def _run_reference(call, *arguments):
    return reference.norm_and_residual(*arguments)


def _run_xla(call, *arguments):
    return xla.norm_and_residual(*arguments)


def _run_gpu(call, x, *arguments):
    results = gpu.norm_and_residual(x.reshape(-1, call.D), *arguments, interpret=call.interpret)
    return tuple(v.reshape(x.shape) for v in results)


_computes_in_float32 = dispatch.computes_in_float32('x')


def _gpu_unsupported(device, call):
    reason = _computes_in_float32(device, call)
    if reason is None and not gpu.warps_of_row(call.D):
        reason = (
            f'D={call.D}, but it is for multiples of 128 below 1024 and of 512 up to {gpu.LONGEST}; '
            "use implementation='xla'"
        )
    if reason is None and (call.M == 0 or call.M % gpu.TOKENS):
        reason = f"{call.M} tokens are no multiple of {gpu.TOKENS}; use implementation='xla'"
    return reason or dispatch.not_hopper(device)


OPERATOR = dispatch.Operator(
    implementations={
        'reference': dispatch.Implementation(_run_reference),
        'xla': dispatch.Implementation(_run_xla, _computes_in_float32),
        'mosaic_gpu': dispatch.Implementation(_run_gpu, _gpu_unsupported),
    },
    order={'gpu': ('mosaic_gpu', 'xla')},
    everywhere=('xla',),
    log_line=dispatch.log_line('norm_and_residual', lambda call: f'{call.dtype} tokens={call.M} D={call.D}'),
)
IMPLEMENTATIONS = tuple(OPERATOR.implementations)


def _check(x, scale, weight):
    if x.ndim < 2:
        raise ValueError(f'x: shape {x.shape} must have two dimensions [..., D] or more')
    if x.dtype not in (jnp.bfloat16, jnp.float32, jnp.float64):
        raise ValueError(f'x: dtype {x.dtype} must be bfloat16 or float32; cast it with astype')
    wide = jnp.promote_types(x.dtype, jnp.float32)
    for name, v in {'scale': scale, 'weight': weight}.items():
        if v.shape != x.shape[-1:]:
            raise ValueError(f'{name}: shape {v.shape} must be {x.shape[-1:]}, for x of shape {x.shape}')
        if v.dtype != wide:
            raise ValueError(f'{name}: dtype {v.dtype} must be {jnp.dtype(wide)}; cast it with astype')
