"""Linear maps in the form for decoding: out-in kernels, the maps of one input in one matrix, norms folded in.

Shape legend: B batch, L length, D model.
"""

import math
import typing

import jax
import jax.numpy as jnp

from transxssm_jax.config import Model
from transxssm_jax.parallel import collectives

Weights = dict  # of one layer or one map: arrays by name


def pack_linear(params: dict, num_inputs: int) -> Weights:
    """A Linear's parameters with an out-in kernel, [*outputs, *inputs]."""
    kernel = params['kernel']
    order = (*range(num_inputs, kernel.ndim), *range(num_inputs))
    return params | {'kernel': kernel.transpose(order)}


def pack_projections(params: dict, names: typing.Sequence[str], num_groups: int) -> Weights:
    """An InputProjections' parameters as one matrix [groups, width, D] with the norm's scale folded in.

    The first output axis of every map, of heads or groups, is cut into num_groups, whose parts are laid side by side:
    a mesh that shards heads shards the packed matrix as it shards each map.
    """

    def join(leaf, num_inputs):
        leaves = [params[name][leaf] for name in names]
        return jnp.concatenate([x.reshape(*x.shape[:num_inputs], num_groups, -1) for x in leaves], axis=-1)

    joint = {leaf: join(leaf, 1 if leaf == 'kernel' else 0) for leaf in params[names[0]]}
    return fold_norm(pack_linear(joint, num_inputs=1), params['norm'])


def fold_norm(weights: Weights, norm: dict) -> Weights:
    """Weights of a map of x / rms(x) from those of a map of RMSNorm(x); out-in."""
    return weights | {'kernel': weights['kernel'] * norm['scale']}


def with_bias(axes: dict, model: Model, bias_axes) -> dict:
    return axes | ({'bias': bias_axes} if model.use_bias else {})


def linear(weights: Weights, axes: dict, x: jax.Array, num_inputs: int, out_dtype=None, rms_scale_BL=None) -> jax.Array:
    """The product of x with an out-in kernel, all-reduced where an input axis is sharded.

    Args:
      weights, axes: `kernel` and perhaps `bias`, and their logical axes.
      num_inputs: contracted axes, the last of x and of the kernel.
      out_dtype: default: x's dtype.
      rms_scale_BL: float32, multiplies the product of each vector in float32 (`defer_rms`); None: 1.
    """
    out_dtype = out_dtype or x.dtype
    kernel = collectives.all_gather_params(weights['kernel'], axes['kernel'], x.dtype)
    inputs = [axis for axis in axes['kernel'][-num_inputs:] if axis not in (None, 'embed')]
    if rms_scale_BL is None:
        y = _product(kernel, x, num_inputs, out_dtype, inputs)
    else:
        y = _product(kernel, x, num_inputs, jnp.float32, inputs)
        y = (y * rms_scale_BL.reshape(*rms_scale_BL.shape, *(1,) * (y.ndim - rms_scale_BL.ndim))).astype(out_dtype)
    if 'bias' in weights:
        y += collectives.all_gather_params(weights['bias'], axes['bias'], y.dtype)
    return y


def _product(kernel, x, num_inputs, out_dtype, input_axes):
    batch, outputs = x.shape[: x.ndim - num_inputs], kernel.shape[: kernel.ndim - num_inputs]
    if math.prod(batch) == 1:
        # Not as a dot: for one vector XLA chooses forms that read some matrices at a fifth of the memory's speed.
        products = kernel.reshape(*outputs, -1).astype(jnp.float32) * x.reshape(-1).astype(jnp.float32)
        y = jnp.sum(products, axis=-1).astype(out_dtype)
        return collectives.all_reduce(y.reshape(*batch, *outputs), *input_axes)
    y = jax.lax.dot_general(
        x.reshape(*batch, -1),
        kernel.reshape(math.prod(outputs), -1),
        (((len(batch),), (1,)), ((), ())),
        preferred_element_type=out_dtype,
    )
    return collectives.all_reduce(y.reshape(*batch, *outputs), *input_axes)


def defer_rms(x_BLD: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """RMS-normalises x for a `linear` whose kernel already contains the norm's scale.

    Returns:
      (x, the input of the linear, a scale of its output or None). The last two are x / rms(x) and None, or, for a
      single vector, x and float32 [1, 1] 1 / rms(x): a normalised x would be a kernel of its own, in the time of
      reading megabytes of weights.
    """
    x32_BLD = x_BLD.astype(jnp.float32)
    squares_BL = jnp.sum(jnp.square(x32_BLD), axis=-1)
    if squares_BL.size == 1:
        # One kernel makes both; without the barrier the terms of x would be added anew wherever x is read. What
        # follows the sum belongs to the readers: it would be a kernel of its own here.
        x_BLD, squares_BL = jax.lax.optimization_barrier((x_BLD, squares_BL))
    rms_scale_BL = jax.lax.rsqrt(squares_BL / x_BLD.shape[-1] + epsilon)
    if squares_BL.size == 1:
        return x_BLD, x_BLD, rms_scale_BL
    return x_BLD, (x32_BLD * rms_scale_BL[..., None]).astype(x_BLD.dtype), None
