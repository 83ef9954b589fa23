"""Rotation of b and c by position, half-split layout. Legend: N state width."""

import jax
import jax.numpy as jnp


def rotate(v: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (v[i], v[i + N/2]) by the table's angles, in the table's dtype.

    Source: the paper's unified RoPE, in the published code's `rotate_half` layout. The
    caller rounds the result, once. The inverse rotation is `rotate(v, cos, -sin)`.

    Args:
      v: [..., N], any float dtype.
      cos, sin: broadcastable to [..., N/2], float32 (float64 in the oracle).

    Returns:
      [..., N] in the promoted dtype of v and the table.
    """
    v1, v2 = jnp.split(v, 2, axis=-1)
    return jnp.concatenate([v1 * cos - v2 * sin, v2 * cos + v1 * sin], axis=-1)


def rotate_heads(v: jax.Array, rope) -> jax.Array:
    """Rotates v [..., L, G, N] by rope = (cos, sin), each [..., L, N/2], or returns v if None."""
    if rope is None:
        return v
    cos, sin = rope
    return rotate(v, cos[..., None, :], sin[..., None, :])


def unrotate_heads(v: jax.Array, rope) -> jax.Array:
    """The inverse, hence also the transpose, of `rotate_heads`."""
    if rope is None:
        return v
    cos, sin = rope
    return rotate_heads(v, (cos, -sin))
