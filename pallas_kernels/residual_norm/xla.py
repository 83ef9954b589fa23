"""RMSNorm and the weighted residual in plain JAX, with the gradient that JAX derives."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

STATISTICS_NAME = 'norm_statistics'


def norm_and_residual(x, scale_D, weight_D, epsilon):
    """As `reference.norm_and_residual`; the norm is computed in float32."""
    return rms_norm(x, scale_D, epsilon), x * weight_D


def rms_norm(x, scale_D, epsilon):
    """x / sqrt(mean(x^2) + epsilon) scale in float32, in x's dtype."""
    return normed_by(inverse_rms(x, epsilon), x, scale_D)


def inverse_rms(x, epsilon):
    """1 / sqrt(mean(x^2) + epsilon), float32 [..., 1], with a name for remat policies."""
    mean_square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return checkpoint_name(jax.lax.rsqrt(mean_square + epsilon), STATISTICS_NAME)


def normed_by(inverse, x, scale_D):
    """x inverse scale in float32, in x's dtype."""
    return (x.astype(jnp.float32) * inverse * scale_D).astype(x.dtype)
