"""Unified rotary position embedding: one source of angles for attention and SSD.

Frequencies theta^(-2i/d) and the half-split rotation of the paper (section on
Unified RoPE). Q, K of attention rotate over the head width, C, B of the
state-space layer over the state size.

Shape legend: B batch, L length, H heads, K width of what rotates.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from transxssm_jax.config import Model
from transxssm_jax.parallel import collectives

Table = Float32[Array, 'B L half']
Rope = tuple[Table, Table]  # cos, sin; half the width of what rotates


def tables(positions_BL: jax.Array, width: int, model: Model, length_B: jax.Array | None = None) -> Rope:
    """Cosines and sines of every position's angles, to 1e-6 at any position.

    An angle is computed in fixed point, as a number of 2^-32 turns that wraps around: a float32 product of position and
    frequency is off by 0.06 at position 1M.

    Args:
      positions_BL: integer positions within each document, >= 0.
      width: K, even: the width of the vectors that are rotated.
      model: theta and the scaling: 'linear' divides positions by rope_factor
        (position interpolation); 'dynamic' raises theta once a row is longer
        than rope_original_length (NTK-aware, as the transformers library
        computes it from the longest position of the row); 'length' leaves the
        angles alone (see `length_scale`).
      length_B: int32, the length of the row that 'dynamic' computes with; default: the longest
        position, plus 1. Decoding needs it: a state cannot be rotated anew when the row grows.

    Returns:
      cos, sin: float32 [B, L, K/2].
    """
    exponent = np.arange(0, width, 2, dtype=np.float64) / width
    turns = model.rope_theta**-exponent / (2 * np.pi)  # per position, in float64 on the host
    if model.rope_scaling == 'linear':
        turns /= model.rope_factor
    if model.rope_scaling == 'dynamic':
        # By row, so that a row's result does not depend on what else is in the batch. It does depend on the
        # longest document of the row, as in the published code: this scaling is for text beyond the training
        # length, one document per row.
        if length_B is None:
            length_B = collectives.all_reduce_max(jnp.max(positions_BL, axis=-1) + 1, 'length')
        length_B = jnp.maximum(length_B.astype(jnp.float32), model.rope_original_length)
        stretch_B = model.rope_factor * length_B / model.rope_original_length - (model.rope_factor - 1)
        # theta * stretch^(K / (K - 2)) in place of theta. These frequencies are float32.
        power = (exponent * width / (width - 2)).astype(np.float32)
        units = turns.astype(np.float32) * 2.0**32 * stretch_B[:, None, None] ** -power
        high, low = jnp.floor(units).astype(jnp.uint32), units - jnp.floor(units)
    else:
        units = turns * 2.0**32
        high, low = np.floor(units).astype(np.uint32), (units % 1).astype(np.float32)
    positions = positions_BL[..., None]
    # uint32 products wrap around, which drops whole turns; what `low` adds is below 2^32 in itself.
    phase = positions.astype(jnp.uint32) * high + (positions.astype(jnp.float32) * low).astype(jnp.uint32)
    angles = jax.lax.bitcast_convert_type(phase, jnp.int32).astype(jnp.float32) * np.float32(2 * np.pi / 2**32)
    return jnp.cos(angles), jnp.sin(angles)


def side_inputs(model: Model, width: int, positions_BL: jax.Array, length_B: jax.Array | None = None) -> dict:
    """What a mixer takes of the positions: `rope`, tables of its rope width, and `scale_BL`, of `length_scale`.

    Both are None for a width of 0: nothing rotates, and model.rope_scaling has nothing to scale.
    """
    if width == 0:
        return dict(rope=None, scale_BL=None)
    return dict(rope=tables(positions_BL, width, model, length_B), scale_BL=length_scale(positions_BL, model))


def length_scale(positions_BL: jax.Array, model: Model) -> jax.Array | None:
    """max(1, log_base(n)) for the n-th token of its document, or None where rope_scaling is not 'length'.

    The paper's appendix scales C, and Q alike, beyond the training length
    `base`, so that attention stays sharp over more keys. float32 [B, L].
    """
    if model.rope_scaling != 'length':
        return None
    n = positions_BL.astype(jnp.float32) + 1
    return jnp.maximum(1.0, jnp.log(n) / jnp.log(jnp.float32(model.rope_original_length)))


def rotate(x_BLHK: jax.Array, rope: Rope) -> jax.Array:
    """Rotates pairs (i, i + K/2) of every head in float32 and rounds once to x's dtype."""
    cos, sin = (table[..., None, :] for table in rope)
    first, second = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLHK.dtype)
