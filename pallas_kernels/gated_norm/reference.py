"""The D skip, gate and RMSNorm of Mamba-2 as their definition, in the widest dtype that they are given."""

import jax
import jax.numpy as jnp


def skip_gate_norm(y_BLHP, x_BLHP, z_BLHP, d_H, scale_HP, epsilon, num_groups):
    """norm((y + d x) silu(z)) scale, an RMSNorm over the heads of each group; in z's dtype."""
    wide = jnp.promote_types(z_BLHP.dtype, jnp.float32)
    y, x, z, d, scale = (v.astype(wide) for v in (y_BLHP, x_BLHP, z_BLHP, d_H, scale_HP))
    gated_BLHP = (y + d[:, None] * x) * jax.nn.silu(z)
    gated = gated_BLHP.reshape(*gated_BLHP.shape[:2], num_groups, -1)
    normed = gated * jax.lax.rsqrt(jnp.mean(jnp.square(gated), axis=-1, keepdims=True) + epsilon)
    return (normed.reshape(gated_BLHP.shape) * scale).astype(z_BLHP.dtype)
