"""RMSNorm and the weighted residual as their definition, in the widest dtype that they are given."""

import jax
import jax.numpy as jnp


def norm_and_residual(x_MD, scale_D, weight_D, epsilon):
    """(x / sqrt(mean(x^2) + epsilon) scale in x's dtype, weight x)."""
    wide = jnp.promote_types(x_MD.dtype, jnp.float32)
    x, scale, weight = (v.astype(wide) for v in (x_MD, scale_D, weight_D))
    normed = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon) * scale
    return normed.astype(x_MD.dtype), weight * x
