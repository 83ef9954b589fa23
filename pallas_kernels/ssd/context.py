"""The rotary scan of a sequence that is split over devices.

Every device holds one contiguous piece of every row. It computes what its piece passes on
(`rotary_ssd_state`), gets the state that enters its piece from all pieces before it, and scans
once. The backward pass goes the same way from right to left: what a piece's output owes to the
state that enters it, then an exchange, then one backward scan, whose last state has the gradient
of all later pieces. Nothing is scanned twice, and the state pass keeps nothing for backward.

The exchange moves the state in 1 + ceil(log2(n - 1)) shifts of B H P N float32 each: 1, 3, 4, 5,
7 for 2, 4, 8, 16, 64 devices, where an all-gather would bring 1, 3, 7, 15, 63 and hold as many.
(A chain from neighbour to neighbour moves 1, in n - 1 steps that wait for each other.) Decays and
the ids at the borders are gathered: a number a head, two a row.

Legend: B batch, L length of a piece, H heads, G groups, R heads a group, P head width, N state
width, Z pieces of the sequence.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.ssd.api import STATES_NAME, Rope, rotary_ssd, rotary_ssd_state
from pallas_kernels.ssd.rotation import rotate_heads


def rotary_ssd_in_context(
    x: Float[Array, 'B L H P'],
    dt: Float32[Array, 'B L H'],
    a: Float32[Array, 'H'],
    b: Float[Array, 'B L G N'],
    c: Float[Array, 'B L G N'],
    rope: Rope = None,
    *,
    axis_name: str,
    axis_size: int,
    segment_ids: Int32[Array, 'B L'] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Float[Array, 'B L H P']:
    """`rotary_ssd` on a row whose pieces lie along a mesh axis, in order; inside jax.shard_map.

    Arguments, dtypes and errors as `rotary_ssd`, each of this device's piece; the rope tables are
    those of the piece's positions. Differentiable (reverse mode) in x, dt, a, b and c.

    Args:
      axis_name: mesh axis, manual in the shard_map, along which the length is split.
      axis_size: its size n; 1: `rotary_ssd`.
      segment_ids: [B, L] int32. A document may span any number of pieces: the state crosses a
        border between pieces where the ids on both sides are equal.

    Returns:
      y [B, L, H, P] of the piece, in x's dtype.
    """
    kwargs = dict(segment_ids=segment_ids, chunk_size=chunk_size, implementation=implementation)
    if axis_size == 1:
        return rotary_ssd(x, dt, a, b, c, rope, **kwargs)[0]
    # No gradient flows through what is exchanged here: `_owed_to_state` and the exchange in
    # `_with_later_pieces` are its transpose.
    of_state = lax.stop_gradient((x, dt, a, b, rope))
    decay_BH, state_BHPN = rotary_ssd_state(*of_state, **kwargs)
    decay_ZBH = lax.all_gather(decay_BH, axis_name)
    joined_ZB = _joined(segment_ids, x.shape[0], axis_name, axis_size)
    entering_BHPN = _exchange(decay_ZBH, joined_ZB, state_BHPN, axis_name, axis_size)
    y, leaving_BHPN = rotary_ssd(x, dt, a, b, c, rope, initial_state=lax.stop_gradient(entering_BHPN), **kwargs)
    # Saved with the scan's own states, lest rematerialisation run the state pass for it.
    decay_ZBH, joined_ZB = (checkpoint_name(v, STATES_NAME) for v in (decay_ZBH, joined_ZB))
    of_output = lax.stop_gradient((dt, a, c, rope))
    return _with_later_pieces(axis_name, axis_size, y, leaving_BHPN, (decay_ZBH, joined_ZB, of_output, segment_ids))


# --- backward ---------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_later_pieces(axis_name, axis_size, y, leaving_BHPN, context):
    """y. Its gradient goes to y, and by way of the exchange to the state that leaves the piece before."""
    del axis_name, axis_size, leaving_BHPN, context
    return y


def _with_later_pieces_fwd(axis_name, axis_size, y, leaving_BHPN, context):
    del axis_name, axis_size, leaving_BHPN
    return y, context


def _with_later_pieces_bwd(axis_name, axis_size, context, dy):
    decay_ZBH, joined_ZB, of_output, segment_ids = context
    owed_BHPN = _owed_to_state(dy, *of_output, segment_ids)
    # From the last piece to the first: a piece is joined to the next where that is joined to it.
    joined_ZB = jnp.concatenate([joined_ZB[1:], jnp.zeros_like(joined_ZB[:1])])
    dleaving_BHPN = _exchange(decay_ZBH, joined_ZB, owed_BHPN, axis_name, axis_size, reverse=True)
    zeros = jax.tree.map(_zero_cotangent, context)
    return dy, dleaving_BHPN, zeros


_with_later_pieces.defvjp(_with_later_pieces_fwd, _with_later_pieces_bwd)


def _zero_cotangent(v):
    return None if jnp.issubdtype(v.dtype, jnp.integer) else jnp.zeros_like(v)


def _owed_to_state(dy_BLHP, dt_BLH, a_H, c_BLGN, rope, segment_ids):
    """Gradient of the state that enters the piece through the piece's own output, float32 [B, H, P, N].

    y_t = ... + exp(sum_{s <= t} dt_s a) h_in R_t c_t in the piece's first segment, so it is one
    product over the whole piece: the sums grow from 0, and where they are large their exp is 0.
    """
    B, _, H, P = dy_BLHP.shape
    G, N = c_BLGN.shape[2:]
    decay_BLH = jnp.exp(jnp.cumsum(dt_BLH * a_H, axis=1))
    if segment_ids is not None:
        # Numbers of runs, because an id may come back after another one.
        cut_BL = jnp.cumsum(segment_ids[:, 1:] != segment_ids[:, :-1], axis=1, dtype=jnp.int32) > 0
        decay_BLH = jnp.where(jnp.pad(cut_BL, ((0, 0), (1, 0)))[..., None], 0.0, decay_BLH)
    scaled = (dy_BLHP * decay_BLH[..., None]).astype(dy_BLHP.dtype).reshape(B, -1, G, H // G, P)
    precision = lax.Precision.HIGHEST if dy_BLHP.dtype == jnp.float32 else None
    owed = jnp.einsum(
        'BLGRP,BLGN->BGRPN',
        scaled,
        rotate_heads(c_BLGN, rope).astype(dy_BLHP.dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return owed.reshape(B, H, P, N)


# --- exchange ---------------------------------------------------------------------------------


def _joined(segment_ids, B, axis_name, axis_size):
    """Whether each piece goes on with the document that the piece before ends with, float32 [Z, B]."""
    if segment_ids is None:
        return jnp.ones((axis_size, B), jnp.float32).at[0].set(0)
    first_ZB, last_ZB = jnp.moveaxis(lax.all_gather(segment_ids[:, (0, -1)], axis_name), 2, 0)
    joined = (first_ZB[1:] == last_ZB[:-1]).astype(jnp.float32)
    return jnp.pad(joined, ((1, 0), (0, 0)))


def _exchange(decay_ZBH, joined_ZB, state_BHPN, axis_name, axis_size, reverse=False):
    """The state that enters each piece: joined_z H_{z-1}, where H_z = state_z + decay_z joined_z H_{z-1}.

    Args:
      decay_ZBH: of every piece.
      joined_ZB: 1 where H_{z-1} enters piece z, else 0; the first is 0. With reverse the pieces are
        taken from the last to the first: what enters piece z comes from z + 1.
      state_BHPN: this piece's own.
    """
    place = lax.axis_index(axis_name)
    if reverse:
        decay_ZBH, joined_ZB, place = decay_ZBH[::-1], joined_ZB[::-1], axis_size - 1 - place

    def shifted(v, by):
        pairs = [(i, i + by) for i in range(axis_size - by)]
        if reverse:
            pairs = [(axis_size - 1 - i, axis_size - 1 - j) for i, j in pairs]
        return lax.ppermute(v, axis_name, pairs)  # zeros where nobody sends

    def at_place(v_ZBH):
        return lax.dynamic_index_in_dim(v_ZBH, place, keepdims=False)

    def delayed(v_ZBH, by):
        return jnp.pad(v_ZBH, ((by, 0), (0, 0), (0, 0)))[:axis_size]

    # carried: H_{z-1} as far as it comes from the `reach` pieces before z; left: what those leave of what enters them.
    carried_BHPN, reach = shifted(state_BHPN, 1), 1
    left_ZBH = delayed(decay_ZBH * joined_ZB[..., None], 1)
    for _ in range(math.ceil(math.log2(max(axis_size - 1, 1)))):
        carried_BHPN += at_place(left_ZBH)[..., None, None] * shifted(carried_BHPN, reach)
        left_ZBH = left_ZBH * delayed(left_ZBH, reach)
        reach *= 2
    return at_place(jnp.broadcast_to(joined_ZB[..., None], decay_ZBH.shape))[..., None, None] * carried_BHPN
