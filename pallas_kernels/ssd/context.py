"""The rotary scan of a sequence that is split over devices.

Every device holds one contiguous shard of every row. The forward pass has three steps:

1. The device computes what its shard passes on (`rotary_ssd_state`).
2. An exchange gives it the state that enters its shard, which comes from all shards before it.
3. The device scans its shard once, from that state.

The backward pass does the same from right to left: the gradient of the entering state through the
shard's own output, the exchange, and one backward scan that starts from the gradient of all later
shards. No pass scans a shard twice, and step 1 saves nothing for the backward pass.

The exchange sends the state in 1 + ceil(log2(n - 1)) collective permutes of B H P N float32 each:
1, 3, 4, 5, 7 for 2, 4, 8, 16, 64 devices. An all-gather would receive, and hold, 1, 3, 7, 15, 63
states. (A chain from neighbour to neighbour sends 1, but in n - 1 steps, each of which waits for
the one before.) The decays, one number per head, and the ids at the borders of the shards, two per
row, are all-gathered.

Legend: B batch, L length of a shard, H heads, G groups, R heads per group, P head width, N state
width, Z shards of the sequence.
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
    """`rotary_ssd` on rows that are sharded along their length; called inside jax.shard_map.

    Arguments, dtypes and errors are those of `rotary_ssd`, for this device's shard; the rope tables
    hold the shard's positions. Differentiable (reverse mode) in x, dt, a, b and c.

    Args:
      axis_name: mesh axis, manual in the shard_map, that shards the length in order.
      axis_size: its size n. With 1 the call is `rotary_ssd`.
      segment_ids: [B, L] int32. A document may span any number of shards: the state crosses a
        border between shards where the ids on both sides are equal.

    Returns:
      y [B, L, H, P] of the shard, in x's dtype.
    """
    kwargs = dict(segment_ids=segment_ids, chunk_size=chunk_size, implementation=implementation)
    if axis_size == 1:
        return rotary_ssd(x, dt, a, b, c, rope, **kwargs)[0]
    # No gradient flows through this exchange: `_gradient_of_entering` and the exchange in
    # `_with_later_shards` are its transpose.
    of_state = lax.stop_gradient((x, dt, a, b, rope))
    decay_BH, state_BHPN = rotary_ssd_state(*of_state, **kwargs)
    decay_ZBH = lax.all_gather(decay_BH, axis_name)
    joined_ZB = _joined(segment_ids, x.shape[0], axis_name, axis_size)
    entering_BHPN = _exchange(decay_ZBH, joined_ZB, state_BHPN, axis_name, axis_size)
    y, leaving_BHPN = rotary_ssd(x, dt, a, b, c, rope, initial_state=lax.stop_gradient(entering_BHPN), **kwargs)
    # Saved with the scan's own states; otherwise rematerialisation would compute step 1 again for them.
    decay_ZBH, joined_ZB = (checkpoint_name(v, STATES_NAME) for v in (decay_ZBH, joined_ZB))
    of_output = lax.stop_gradient((dt, a, c, rope))
    return _with_later_shards(axis_name, axis_size, y, leaving_BHPN, (decay_ZBH, joined_ZB, of_output, segment_ids))


# --- backward ---------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_later_shards(axis_name, axis_size, y, leaving_BHPN, residuals):
    """Returns y. The gradient of y also goes, through the exchange, to the state that leaves the shard before."""
    del axis_name, axis_size, leaving_BHPN, residuals
    return y


def _with_later_shards_fwd(axis_name, axis_size, y, leaving_BHPN, residuals):
    del axis_name, axis_size, leaving_BHPN
    return y, residuals


def _with_later_shards_bwd(axis_name, axis_size, residuals, dy):
    decay_ZBH, joined_ZB, of_output, segment_ids = residuals
    dentering_BHPN = _gradient_of_entering(dy, *of_output, segment_ids)
    # From the last shard to the first: a shard is joined to the next one where the next is joined to it.
    joined_ZB = jnp.concatenate([joined_ZB[1:], jnp.zeros_like(joined_ZB[:1])])
    dleaving_BHPN = _exchange(decay_ZBH, joined_ZB, dentering_BHPN, axis_name, axis_size, reverse=True)
    zeros = jax.tree.map(_zero_cotangent, residuals)
    return dy, dleaving_BHPN, zeros


_with_later_shards.defvjp(_with_later_shards_fwd, _with_later_shards_bwd)


def _zero_cotangent(v):
    return None if jnp.issubdtype(v.dtype, jnp.integer) else jnp.zeros_like(v)


def _gradient_of_entering(dy_BLHP, dt_BLH, a_H, c_BLGN, rope, segment_ids):
    """Gradient of the state that enters the shard, through the shard's own output. float32 [B, H, P, N].

    y_t = ... + exp(sum_{s <= t} dt_s a) h_in R_t c_t in the shard's first segment, so the gradient is
    one product over the whole shard: the sums only fall from 0, and where they are large their exp is 0.
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
    dentering = jnp.einsum(
        'BLGRP,BLGN->BGRPN',
        scaled,
        rotate_heads(c_BLGN, rope).astype(dy_BLHP.dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return dentering.reshape(B, H, P, N)


# --- exchange ---------------------------------------------------------------------------------


def _joined(segment_ids, B, axis_name, axis_size):
    """float32 [Z, B]: 1 where a shard begins inside the document that the shard before ends with, else 0."""
    if segment_ids is None:
        return jnp.ones((axis_size, B), jnp.float32).at[0].set(0)
    first_ZB, last_ZB = jnp.moveaxis(lax.all_gather(segment_ids[:, (0, -1)], axis_name), 2, 0)
    joined = (first_ZB[1:] == last_ZB[:-1]).astype(jnp.float32)
    return jnp.pad(joined, ((1, 0), (0, 0)))


def _exchange(decay_ZBH, joined_ZB, state_BHPN, axis_name, axis_size, reverse=False):
    """The state that enters this shard: joined_z H_{z-1}, where H_z = state_z + decay_z joined_z H_{z-1}.

    Args:
      decay_ZBH: decay of every shard.
      joined_ZB: 1 where H_{z-1} enters shard z, else 0; the first is 0. With reverse the recurrence
        runs from the last shard to the first: what enters shard z comes from z + 1.
      state_BHPN: this shard's own state.
    """
    z = lax.axis_index(axis_name)
    if reverse:
        decay_ZBH, joined_ZB, z = decay_ZBH[::-1], joined_ZB[::-1], axis_size - 1 - z

    def shifted(v, by):
        pairs = [(i, i + by) for i in range(axis_size - by)]
        if reverse:
            pairs = [(axis_size - 1 - i, axis_size - 1 - j) for i, j in pairs]
        return lax.ppermute(v, axis_name, pairs)  # zeros where no shard sends

    def of_shard(v_ZBH):
        return lax.dynamic_index_in_dim(v_ZBH, z, keepdims=False)

    def delayed(v_ZBH, by):
        return jnp.pad(v_ZBH, ((by, 0), (0, 0), (0, 0)))[:axis_size]

    # carried: what the `reach` shards before z add to H_{z-1}; left: the decay through those shards.
    carried_BHPN, reach = shifted(state_BHPN, 1), 1
    left_ZBH = delayed(decay_ZBH * joined_ZB[..., None], 1)
    for _ in range(math.ceil(math.log2(max(axis_size - 1, 1)))):
        carried_BHPN += of_shard(left_ZBH)[..., None, None] * shifted(carried_BHPN, reach)
        left_ZBH = left_ZBH * delayed(left_ZBH, reach)
        reach *= 2
    return of_shard(jnp.broadcast_to(joined_ZB[..., None], decay_ZBH.shape))[..., None, None] * carried_BHPN
