"""RMSNorm and the weighted residual as their definition, in the widest dtype that they are given."""

import jax
import jax.numpy as jnp


def norm_and_residual(x, scale_D, weight_D, epsilon):
    """(x / sqrt(mean(x^2) + epsilon) scale in x's dtype, weight x)."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x_wide, scale, weight = (v.astype(wide) for v in (x, scale_D, weight_D))
    normed = x_wide * jax.lax.rsqrt(jnp.mean(jnp.square(x_wide), axis=-1, keepdims=True) + epsilon) * scale
    return normed.astype(x.dtype), weight * x_wide
