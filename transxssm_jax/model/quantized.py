"""Products of a linear map with 8-bit operands, model.quantization: quantised as they are multiplied.

    forward       y  = Q(x) Q(W)
    backward      dx = Q(dy) Q(W)^T,   dW = Q(x)^T Q(dy)

'fp8' rounds x and W to float8_e4m3fn and dy, whose range is wider, to float8_e5m2, each with one scale per matrix: the
least power of two by which its largest magnitude fits the type (Micikevicius et al., arXiv:2209.05433, with the scale of
the very matrix instead of an earlier step's). Hopper multiplies these twice as fast as bfloat16.

'int8' rounds, by qwix, to int8 with one scale per token of x and dy and one per output of W; dW, whose sum over tokens has
no such scales, stays a product in x's dtype. TPU v5e and v6e multiply int8 twice as fast as bfloat16.

Parameters, their gradients and the optimizer are what they are without it; the rounding passes gradients as the identity
would. A scale is that of the part of a matrix that a device holds.

Shape legend: ... batch axes, I inputs, O outputs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.linen import fp8_ops
from jax.ad_checkpoint import checkpoint_name

from transxssm_jax.cli import MissingPackageError

SMALLEST_SCALE = 2.0**-100  # that of zeros, too
# Word -> the types of x and W, and of dy.
TYPES = {'fp8': (jnp.float8_e4m3fn, jnp.float8_e5m2), 'int8': (jnp.int8, jnp.int8)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, kernel_IO: jax.Array, quantization: str) -> jax.Array:
    """x [..., I] @ kernel [I, O] -> [..., O] in x's dtype, both rounded to 8 bits, accumulated in float32 or int32.

    Args:
      quantization: 'fp8' or 'int8'.
    """
    return _forward(x, kernel_IO, quantization)[0]


def _forward(x, kernel_IO, quantization):
    dtype, _ = TYPES[quantization]
    if quantization == 'fp8':
        x_q, kernel_q = _named(_float8(x, dtype), 'quantized'), _named(_float8(kernel_IO, dtype), 'quantized_weight')
        # No more than the rounded x is needed afterwards, which is half of x.
        return _dot_float8(x_q, kernel_q, (x.ndim - 1,), (0,), x.dtype), (x_q, kernel_q)
    x_q = _named(_int8(x, tuple(range(x.ndim - 1))), 'quantized')
    kernel_q = _named(_int8(kernel_IO, (1,)), 'quantized_weight')
    return _dot_int8(x_q, kernel_q, (x.ndim - 1,), (0,), x.dtype), (x, kernel_q)


def _backward(quantization, residuals, dy):
    x, kernel_q = residuals
    _, dtype = TYPES[quantization]
    tokens = tuple(range(dy.ndim - 1))
    if quantization == 'fp8':
        dy_q = _float8(dy, dtype)
        dx = _dot_float8(dy_q, kernel_q, (dy.ndim - 1,), (1,), dy.dtype)
        return dx, _dot_float8(x, dy_q, tokens, tokens, dy.dtype)
    # The scales of W lie along the axis that dx sums over, so they go into dy before it is rounded.
    scale_O = kernel_q.scale.reshape(-1)
    dy_q = _int8(dy.astype(jnp.float32) * scale_O, tokens)
    dx = _dot_int8(dy_q, kernel_q.qvalue, (dy.ndim - 1,), (1,), dy.dtype)
    return dx, jax.lax.dot_general(x, dy, ((tokens, tokens), ((), ())))


matmul.defvjp(_forward, _backward)


class _Float8(NamedTuple):
    """value * scale: `value` in a type of 8 bits, `scale` a float32 scalar."""

    value: jax.Array
    scale: jax.Array


def _float8(array: jax.Array, dtype) -> _Float8:
    """The array in 8 bits. What is not finite in it makes the scale, and so every product, not finite."""
    largest = jnp.max(jnp.abs(array)).astype(jnp.float32)
    # A power of two: dividing by it is exact in any dtype, and so is multiplying the product by it after the product was
    # rounded to bfloat16, as which it leaves the matrix unit.
    _, exponent = jnp.frexp(jnp.maximum(largest / float(jnp.finfo(dtype).max), SMALLEST_SCALE))
    scale = jnp.where(jnp.isfinite(largest), jnp.ldexp(jnp.float32(1), exponent), largest)
    return _Float8(fp8_ops.quantize(array, dtype, scale, array.dtype), scale)


def _dot_float8(left: _Float8, right: _Float8, left_axes, right_axes, dtype) -> jax.Array:
    dimensions = ((left_axes, right_axes), ((), ()))
    product = jax.lax.dot_general(left.value, right.value, dimensions, preferred_element_type=dtype)
    return product * (left.scale * right.scale).astype(dtype)


def _int8(array: jax.Array, axes: tuple[int, ...]):
    """The array in 8 bits with a float32 scale for each index of `axes`."""
    return qwix().quantize(array.astype(jnp.float32), jnp.int8, channelwise_axes=axes)


def _dot_int8(left, right, left_axes, right_axes, dtype) -> jax.Array:
    dimensions = ((left_axes, right_axes), ((), ()))
    return qwix().dot_general(left, right, dimensions, preferred_element_type=jnp.float32).astype(dtype)


def _named(quantized, name: str):
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, name), quantized)


def qwix():
    """The library. Raises MissingPackageError where it is not installed."""
    try:
        import qwix as library
    except ImportError as error:
        raise MissingPackageError(
            f"model.quantization='int8' needs qwix ({error}): pip install 'transxssm_jax[quantization]', or leave it 'none'"
        ) from error
    return library
