"""The D skip, gate and RMSNorm of Mamba-2 in plain JAX, with a gradient that keeps the inputs and a number per token and group.

Each direction passes over its inputs twice: once for the sums over a group, once for the results. What JAX derives
keeps and reads float32 arrays of the inputs' size.

Legend: B batch, L length, H heads, P head width, G groups of H.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_norm import reference


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def skip_gate_norm(y_BLHP, x_BLHP, z_BLHP, d_H, scale_HP, epsilon, num_groups):
    """As `reference.skip_gate_norm`; it computes in float32."""
    return reference.skip_gate_norm(y_BLHP, x_BLHP, z_BLHP, d_H, scale_HP, epsilon, num_groups)


def _forward(y, x, z, d, scale, epsilon, num_groups):
    y, x, z = lax.optimization_barrier((y, x, z))
    gated, *_ = _gated(y, x, z, d)
    inverse_BLG = lax.rsqrt(_mean(jnp.square(gated), num_groups) + epsilon)
    inverse_BLG, gated = _again(inverse_BLG, y, x, z, d)
    out = gated * _per_head(inverse_BLG, y.shape) * scale
    return out.astype(z.dtype), (y, x, z, d, scale, inverse_BLG)


def _backward(epsilon, num_groups, residuals, dout):
    del epsilon
    y, x, z, d, scale, inverse_BLG = residuals
    y, x, z, inverse_BLG, dout = lax.optimization_barrier((y, x, z, inverse_BLG, dout))
    gated, skipped, sigmoid = _gated(y, x, z, d)
    dnormed = dout.astype(jnp.float32) * scale
    inner_BLG = _mean(dnormed * gated, num_groups) * jnp.square(inverse_BLG)
    inner_BLG, y, x, z, dout = lax.optimization_barrier((inner_BLG, y, x, z, dout))
    dout = dout.astype(jnp.float32)
    dnormed = dout * scale
    gated, skipped, sigmoid = _gated(y, x, z, d)
    inverse, inner = _per_head(inverse_BLG, y.shape), _per_head(inner_BLG, y.shape)
    dgated = inverse * (dnormed - gated * inner)
    silu = z.astype(jnp.float32) * sigmoid
    dskipped = dgated * silu
    dz = dgated * skipped * (sigmoid + silu * (1 - sigmoid))
    dscale = jnp.sum(dout * gated * inverse, (0, 1))
    dd = jnp.sum(dskipped * x.astype(jnp.float32), (0, 1))
    dy, dz = lax.optimization_barrier((dskipped.astype(y.dtype), dz.astype(z.dtype)))
    # From dy as it is rounded: XLA then need not write dx, which is always added to another gradient.
    dx = (d[:, None] * dy.astype(jnp.float32)).astype(x.dtype)
    return dy, dx, dz, dd.sum(1).astype(d.dtype), dscale.astype(scale.dtype)


skip_gate_norm.defvjp(_forward, _backward)


def _gated(y, x, z, d):
    """(y + d x) silu(z), y + d x and sigmoid(z)."""
    y, x, z = (v.astype(jnp.float32) for v in (y, x, z))
    skipped, sigmoid = y + d[:, None] * x, jax.nn.sigmoid(z)
    return skipped * (z * sigmoid), skipped, sigmoid


def _again(inverse, y, x, z, d):
    inverse, y, x, z = lax.optimization_barrier((inverse, y, x, z))
    return inverse, _gated(y, x, z, d)[0]


def _mean(v_BLHP, num_groups):
    return jnp.mean(v_BLHP.reshape(*v_BLHP.shape[:2], num_groups, -1), axis=-1)


def _per_head(v_BLG, shape):
    """[B, L, G] -> [B, L, H, 1]"""
    return jnp.repeat(v_BLG, shape[2] // v_BLG.shape[2], axis=2)[..., None]
