"""Products of a linear map with 8-bit operands, model.quantization: quantised as they are multiplied, by qwix.

    forward       y  = Q(x) Q(W)
    backward      dx = Q(dy) Q(W)^T,   dW = Q(x)^T Q(dy)

'fp8' rounds x and W to float8_e4m3fn and dy, whose range is wider, to float8_e5m2, each with one scale per matrix: its
largest magnitude over the largest number of the type (Micikevicius et al., arXiv:2209.05433, with the scale of the very
matrix instead of an earlier step's). Hopper multiplies these twice as fast as bfloat16.

'int8' rounds to int8 with one scale per token of x and dy and one per output of W; dW, whose sum over tokens has no such
scales, stays a product in x's dtype. TPU v5e and v6e multiply int8 twice as fast as bfloat16.

Parameters, their gradients and the optimizer are what they are without it; the rounding passes gradients as the identity
would. A scale is that of the part of a matrix that a device holds.

Shape legend: ... batch axes, I inputs, O outputs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from transxssm_jax.cli import MissingPackageError

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
    by_token = tuple(range(x.ndim - 1)) if quantization == 'int8' else ()
    by_output = (1,) if quantization == 'int8' else ()
    x_bits = _named(_as_bits(_quantize(x, dtype, by_token)), 'quantized')
    kernel_bits = _named(_as_bits(_quantize(kernel_IO, dtype, by_output)), 'quantized_weight')
    # 'fp8' needs no more than the rounded x afterwards, which is half of x.
    kept = x if quantization == 'int8' else x_bits
    y = _dot(_of_bits(x_bits, dtype), _of_bits(kernel_bits, dtype), (x.ndim - 1,), (0,), x.dtype)
    return y, (kept, kernel_bits)


def _backward(quantization, residuals, dy):
    x, kernel_bits = residuals
    of_inputs, dtype = TYPES[quantization]
    kernel_q = _of_bits(kernel_bits, of_inputs)
    tokens = tuple(range(dy.ndim - 1))
    if quantization == 'fp8':
        dy_q = _quantize(dy, dtype)
        dx = _dot(dy_q, kernel_q, (dy.ndim - 1,), (1,), dy.dtype)
        return dx, _dot(_of_bits(x, of_inputs), dy_q, tokens, tokens, dy.dtype)
    # The scales of W lie along the axis that dx sums over, so they go into dy before it is rounded.
    scale_O = kernel_q.scale.reshape(-1)
    dy_q = _quantize(dy.astype(jnp.float32) * scale_O, dtype, tokens)
    dx = _dot(dy_q, kernel_q.qvalue, (dy.ndim - 1,), (1,), dy.dtype)
    return dx, jax.lax.dot_general(x, dy, ((tokens, tokens), ((), ())))


matmul.defvjp(_forward, _backward)


def _quantize(array: jax.Array, dtype, axes: tuple[int, ...] = ()):
    """The array in 8 bits with a float32 scale for each index of `axes`."""
    return qwix().quantize(array.astype(jnp.float32), dtype, channelwise_axes=axes)


def _as_bits(quantized):
    """The same with its 8-bit numbers as int8.

    What a backward pass keeps is kept so: jax.checkpoint puts a reduce_precision behind kept floats, with the exponent bits
    of their type. It takes the largest exponent for infinity, where float8_e4m3fn has its numbers from 256 to 448, and
    where XLA does not remove it, as on CPUs, they become NaN.
    """
    return dataclasses.replace(quantized, qvalue=jax.lax.bitcast_convert_type(quantized.qvalue, jnp.int8))


def _of_bits(quantized, dtype):
    return dataclasses.replace(quantized, qvalue=jax.lax.bitcast_convert_type(quantized.qvalue, dtype))


def _named(quantized, name: str):
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, name), quantized)


def _dot(left, right, left_axes, right_axes, dtype) -> jax.Array:
    dimensions = ((left_axes, right_axes), ((), ()))
    if jnp.issubdtype(left.qvalue.dtype, jnp.floating):
        # It leaves the matrix unit in dtype, and is scaled by what reads it. In float32, as qwix takes it, XLA writes and
        # reads twice the bytes. The second rounding to bfloat16 is 0.2%, beside the 4% of the operands.
        product = jax.lax.dot_general(left.qvalue, right.qvalue, dimensions, preferred_element_type=dtype)
        return (product * (left.scale.reshape(()) * right.scale.reshape(()))).astype(dtype)
    return qwix().dot_general(left, right, dimensions, preferred_element_type=jnp.float32).astype(dtype)


def qwix():
    """The library. Raises MissingPackageError where it is not installed."""
    try:
        import qwix as library
    except ImportError as error:
        raise MissingPackageError(
            f"model.quantization needs qwix ({error}): pip install 'transxssm_jax[quantization]', or leave it 'none'"
        ) from error
    return library
