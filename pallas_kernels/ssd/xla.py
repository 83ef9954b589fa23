"""The rotary scan as chunked einsums, with a backward pass written by hand.

Legend: B batch, L length, H heads, G groups, R heads per group (H = G R, R-major within a
group), P head width, N state width, C chunks, Q position in a chunk (query side), S position
in the same chunk (source side), Z chunk (source side).

Within a chunk, with l the log-decay dt a and cum its running sum from the chunk's start,

  scores_qs  = (R_q c_q) . (R_s b_s)                      once per group
  weights_qs = scores_qs exp(cum_q - cum_s) dt_s, s <= q  once per head
  y_q        = sum_s weights_qs x_s + exp(cum_q) h_in R_q c_q
  h_out      = exp(cum_last) h_in + sum_s exp(cum_last - cum_s) dt_s x_s (R_s b_s)^T

and `pass_states` passes h_in from chunk to chunk (Mamba-2, "state-space duality", section 6).

Why the backward pass is written by hand:
- Autodiff of a bfloat16 dot that accumulates in float32 yields float32 cotangents, hence
  float32 matmuls; here every matmul has operands in x's dtype and accumulates in float32.
- It saves only the inputs and one state per chunk, in x's dtype, and computes the weights again.
- The gradient of l_k is a sum over all pairs s < k <= q. Autodiff of the running sum computes it
  as a running difference of row and column sums. Where decay is strong, nothing but their rounding
  is left of that difference, and da multiplies it by a large dt; `_sum_across` never subtracts.
A custom gradient has no forward-mode derivative and no second derivative.

Memory: [B, C, H, Q, Q] is the largest array, of B H L Q numbers. A sequence longer than
`Plan.block_length` is computed block after block, so the array is never larger than one block's.
"""

import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.ssd.residuals import STATES_NAME
from pallas_kernels.ssd.rotation import rotate_heads, unrotate_heads

# The log-decay of every step is clipped to it: exp of it is 0 in float32. The clip bounds |cum| by
# 104 Q, so that the coarse sums of `_Decays` are exact.
MIN_LOG_DECAY = -104.0
MAX_CHUNK = 256


class Plan(typing.NamedTuple):
    """How the computation is cut. Static under jit."""

    chunk: int  # Q
    block_length: int = 16384  # positions that are computed at once


def default_plan(platform: str, chunk_size: int | None) -> Plan:
    """The tuning table. Work and traffic within chunks grow with Q, state traffic with 1/Q."""
    chunk = {'cpu': 64, 'gpu': 128, 'tpu': 128}.get(platform, 128)
    return Plan(chunk=chunk_size or chunk)


def scan_chunks(plan, x_BLHP, dt_BLH, a_H, b_BLGN, c_BLGN, rope, run_BL, state_BHPN):
    """y and final state; arguments and results as `reference.scan_tokens`, x float32 or bfloat16."""
    B, L, H, P = x_BLHP.shape
    G, N = b_BLGN.shape[2:]
    log_BLH = jnp.maximum(dt_BLH * a_H, MIN_LOG_DECAY)

    Q = min(plan.chunk, -(-L // 16) * 16)
    chunks = -(-L // Q)
    W = -(-chunks * Q // max(plan.block_length, Q))  # blocks
    C = -(-chunks // W)
    pad = W * C * Q - L

    def split(v, *tail, mode='constant'):
        """[B, L, ...] -> [W, B, C, Q, ...]; padding has x, b, c, dt and log-decay 0."""
        if v is None:
            return None
        if pad:
            v = jnp.pad(v, ((0, 0), (0, pad)) + ((0, 0),) * (v.ndim - 2), mode=mode)
        return jnp.moveaxis(v.reshape(v.shape[0], W, C, Q, *tail), 1, 0)

    segments = None
    if run_BL is not None:
        run = split(run_BL, mode='edge')
        last_BC = jnp.moveaxis(run[..., -1], 0, 1).reshape(B, W * C)
        before_BC = jnp.concatenate([run_BL[:, :1], last_BC[:, :-1]], axis=1)
        segments = (run, jnp.moveaxis(before_BC.reshape(B, W, C), 1, 0))
    R = H // G
    y, final = _scan_blocks(
        split(x_BLHP, G, R, P),
        split(dt_BLH, G, R),
        split(log_BLH, G, R),
        split(b_BLGN, G, N),
        split(c_BLGN, G, N),
        None if rope is None else tuple(split(t, N // 2) for t in rope),
        segments,
        state_BHPN.reshape(B, G, R, P, N),
    )
    if y is not None:
        y = jnp.moveaxis(y, 0, 1).reshape(B, W * C * Q, H, P)[:, :L]
    return y, final.reshape(B, H, P, N)


# --- blocks -------------------------------------------------------------------------------


@jax.custom_vjp
def _scan_blocks(x, dt, log, b, c, rope, segments, state):
    """Arrays [W, B, C, Q, ...], state [B, G, R, P, N] -> (y [W, B, C, Q, G, R, P] or None, state)."""
    (y, _), final = _walk_forward(x, dt, log, b, c, rope, segments, state)
    return y, final


def _walk_forward(x, dt, log, b, c, rope, segments, state):
    def block(state, inputs):
        y, incoming, state = _forward_block(*inputs, state)
        return state, (y, incoming)

    final, outputs = _walk(block, state, (x, dt, log, b, c, rope, segments))
    return outputs, final


def _walk(block, carry, inputs, reverse=False):
    """lax.scan over blocks; without a loop where there is one block."""
    if jax.tree.leaves(inputs)[0].shape[0] > 1:
        return jax.lax.scan(block, carry, inputs, reverse=reverse)
    carry, outputs = block(carry, jax.tree.map(lambda v: v[0], inputs))
    return carry, jax.tree.map(lambda v: v[None], outputs)


def _scan_blocks_fwd(x, dt, log, b, c, rope, segments, state):
    (y, incoming), final = _walk_forward(x, dt, log, b, c, rope, segments, state)
    incoming = checkpoint_name(incoming, STATES_NAME)
    return (y, final), (x, dt, log, b, c, rope, segments, incoming)


def _scan_blocks_bwd(residuals, cotangents):
    x, dt, log, b, c, rope, segments, incoming = residuals
    dy, dfinal = cotangents

    def block(dstate, inputs):
        *gradients, dstate = _backward_block(*inputs, dstate)
        return dstate, gradients

    inputs = (x, dt, log, b, c, rope, segments, incoming, dy)
    dstate, (dx, ddt, dlog, db, dc) = _walk(block, dfinal, inputs, reverse=True)
    return dx, ddt, dlog, db, dc, None, None, dstate


_scan_blocks.defvjp(_scan_blocks_fwd, _scan_blocks_bwd)


# --- one block, its chunks side by side -----------------------------------------------------


def _forward_block(x, dt, log, b, c, rope, segments, state):
    """x [B,C,Q,G,R,P], dt and log [B,C,Q,G,R], b and c [B,C,Q,G,N], state [B,G,R,P,N].

    Returns y (None without c), the state before each chunk in x's dtype, the last state.
    """
    decays = _decays(log, segments)
    b_BCSGN = rotate_heads(b, rope).astype(x.dtype)
    xscaled_BCSGRP = (x * (dt * decays.leave_BCSGR)[..., None]).astype(x.dtype)
    local_BCGRPN = _dot('BCSGRP,BCSGN->BCGRPN', xscaled_BCSGRP, b_BCSGN)
    incoming_BCGRPN, final = pass_states(local_BCGRPN, decays.chunk_BCGR, state, x.dtype)
    if c is None:
        return None, incoming_BCGRPN, final

    c_BCQGN = rotate_heads(c, rope).astype(x.dtype)
    scores_BCGQS = _dot('BCQGN,BCSGN->BCGQS', c_BCQGN, b_BCSGN)
    weights_BCGRQS = scores_BCGQS[:, :, :, None] * _intra_decay(decays) * _per_source(dt)
    y = _dot('BCGRQS,BCSGRP->BCQGRP', weights_BCGRQS.astype(x.dtype), x)
    y += decays.enter_BCQGR[..., None] * _dot('BCQGN,BCGRPN->BCQGRP', c_BCQGN, incoming_BCGRPN)
    return y.astype(x.dtype), incoming_BCGRPN, final


def _backward_block(x, dt, log, b, c, rope, segments, incoming, dy, dfinal):
    """Gradients of `_forward_block`: dx, ddt, dlog, db, dc (None without c), dstate."""
    dtype = x.dtype
    decays = _decays(log, segments)
    b_BCSGN = rotate_heads(b, rope).astype(dtype)
    Q = x.shape[2]
    at_or_after = np.tri(Q, dtype=np.float32)  # [Q, S]: q >= s
    after = np.tri(Q, k=-1, dtype=np.float32)

    # y_q = exp(cum_q) h_in c_q
    if c is None:
        dincoming_BCGRPN = jnp.zeros_like(incoming, dtype=jnp.float32)
    else:
        c_BCQGN = rotate_heads(c, rope).astype(dtype)
        dyscaled_BCQGRP = (dy * decays.enter_BCQGR[..., None]).astype(dtype)
        dincoming_BCGRPN = _dot('BCQGRP,BCQGN->BCGRPN', dyscaled_BCQGRP, c_BCQGN)
        dc = _dot('BCQGRP,BCGRPN->BCQGN', dyscaled_BCQGRP, incoming)
        yin_BCQGRP = _dot('BCQGN,BCGRPN->BCQGRP', c_BCQGN, incoming)
        dcum_BCQGR = decays.enter_BCQGR * jnp.sum(dy * yin_BCQGRP, axis=-1)

    # h_out = exp(cum_last) h_in + sum_s exp(cum_last - cum_s) dt_s x_s b_s^T
    dout_BCGRPN, dstate = pass_states(dincoming_BCGRPN, decays.chunk_BCGR, dfinal, jnp.float32, reverse=True)
    dchunk_BCGR = jnp.exp(decays.chunk_BCGR) * jnp.sum(dout_BCGRPN * incoming, axis=(-2, -1))
    dout_BCGRPN = dout_BCGRPN.astype(dtype)
    scale_BCSGR = dt * decays.leave_BCSGR
    xscaled_BCSGRP = (x * scale_BCSGR[..., None]).astype(dtype)
    db = _dot('BCSGRP,BCGRPN->BCSGN', xscaled_BCSGRP, dout_BCGRPN)
    dxscaled_BCSGRP = _dot('BCSGN,BCGRPN->BCSGRP', b_BCSGN, dout_BCGRPN)
    dx = scale_BCSGR[..., None] * dxscaled_BCSGRP
    dscale_BCSGR = jnp.sum(x * dxscaled_BCSGRP, axis=-1)
    ddt = dscale_BCSGR * decays.leave_BCSGR
    # Every l_k multiplies what entered before it: sums over s < k, and over the whole chunk.
    dlog = dchunk_BCGR[:, :, None] + _dot('QS,BCSGR->BCQGR', after, dscale_BCSGR * scale_BCSGR)
    if c is None:
        return dx.astype(dtype), ddt, dlog, unrotate_heads(db, rope).astype(dtype), None, dstate

    # y_q = sum_s scores_qs exp(cum_q - cum_s) dt_s x_s
    scores_BCGQS = _dot('BCQGN,BCSGN->BCGQS', c_BCQGN, b_BCSGN)
    intra_BCGRQS = _intra_decay(decays)
    weights_BCGRQS = (scores_BCGQS[:, :, :, None] * intra_BCGRQS * _per_source(dt)).astype(dtype)
    dx += _dot('BCGRQS,BCQGRP->BCSGRP', weights_BCGRQS, dy)
    dweights_BCGRQS = _dot('BCQGRP,BCSGRP->BCGRQS', dy, x) * intra_BCGRQS
    dscores_BCGQS = jnp.sum(dweights_BCGRQS * _per_source(dt), axis=3).astype(dtype)
    dc += _dot('BCGQS,BCSGN->BCQGN', dscores_BCGQS, b_BCSGN)
    db += _dot('BCGQS,BCQGN->BCSGN', dscores_BCGQS, c_BCQGN)
    dpairs_BCGRQS = dweights_BCGRQS * scores_BCGQS[:, :, :, None]
    across_BCGRQ, columns_BCGRS = _sum_across(dpairs_BCGRQS, dt, dtype)
    ddt += _by_position(columns_BCGRS)
    dlog += _by_position(across_BCGRQ)
    dlog += _dot('QS,BCQGR->BCSGR', at_or_after, dcum_BCQGR)
    db, dc = (unrotate_heads(v, rope).astype(dtype) for v in (db, dc))
    return dx.astype(dtype), ddt, dlog, db, dc, dstate


def _dot(spec, *operands):
    """Accumulates in float32. Float32 operands stay so: by default TPUs and GPUs would round them."""
    exact = any(v.dtype == jnp.float32 for v in operands)
    precision = jax.lax.Precision.HIGHEST if exact else None
    return jnp.einsum(spec, *operands, precision=precision, preferred_element_type=jnp.float32)


def _by_head(v_BCQGR):
    return jnp.moveaxis(v_BCQGR, 2, -1)


def _by_position(v_BCGRQ):
    return jnp.moveaxis(v_BCGRQ, -1, 2)


def _per_source(dt_BCSGR):
    return _by_head(dt_BCSGR)[..., None, :]


# --- decay ----------------------------------------------------------------------------------


class _Decays(typing.NamedTuple):
    """Decay factors of a block's chunks, float32. Masked where a segment boundary lies between."""

    coarse_BCQGR: jax.Array  # cum = coarse + fine
    fine_BCQGR: jax.Array
    visible: jax.Array  # bool, [Q, S], or [B, C, 1, 1, Q, S] with segments
    enter_BCQGR: jax.Array  # chunk's start -> q
    leave_BCSGR: jax.Array  # s -> chunk's end
    chunk_BCGR: jax.Array  # chunk's start -> end, as a logarithm


def _decays(log_BCQGR, segments) -> _Decays:
    """Running sums of the log-decay from each chunk's start.

    One float32 sum would do where all steps decay alike. Where a strong step (-50) stands
    before weak ones, cum is large and cum_q - cum_s has lost the weak ones' digits. So the
    multiples of 2^-9 are summed separately: below 2^15 = 128 * MAX_CHUNK such sums and their
    differences are exact in float32, and the remainders are small.
    """
    Q = log_BCQGR.shape[2]
    lower = np.tri(Q, dtype=np.float32)
    steps = jnp.round(log_BCQGR * 512.0) / 512.0
    coarse = _dot('QS,BCSGR->BCQGR', lower, steps)
    fine = _dot('QS,BCSGR->BCQGR', lower, log_BCQGR - steps)
    enter = jnp.exp(coarse + fine)
    leave = jnp.exp((coarse[:, :, -1:] - coarse) + (fine[:, :, -1:] - fine))
    chunk = coarse[:, :, -1] + fine[:, :, -1]
    visible = lower > 0
    if segments is not None:
        run_BCQ, before_BC = segments
        last_BC = run_BCQ[..., -1]
        enter = jnp.where((run_BCQ == before_BC[..., None])[..., None, None], enter, 0.0)
        leave = jnp.where((run_BCQ == last_BC[..., None])[..., None, None], leave, 0.0)
        # Finite, because sums of it are masked by multiplication in `_passing_logs`.
        chunk = jnp.where((last_BC == before_BC)[..., None, None], chunk, -1e4)
        visible = visible & (run_BCQ[..., :, None] == run_BCQ[..., None, :])[:, :, None, None]
    return _Decays(coarse, fine, visible, enter, leave, chunk)


def _intra_decay(decays):
    """exp(cum_q - cum_s) where s <= q in one segment, else 0. The exponent is masked: above the
    diagonal it is positive and its exp would overflow."""
    coarse, fine = _by_head(decays.coarse_BCQGR), _by_head(decays.fine_BCQGR)
    exponent_BCGRQS = (coarse[..., :, None] - coarse[..., None, :]) + (fine[..., :, None] - fine[..., None, :])
    return jnp.exp(jnp.where(decays.visible, exponent_BCGRQS, -jnp.inf))


def _sum_across(pairs_BCGRQS, dt_BCSGR, dtype):
    """sum over s < k <= q of pairs_qs dt_s for every k, and sum over q of pairs_qs for every s.

    pairs is 0 above the diagonal. The sums over q >= k are one matmul with a triangle of ones,
    which keeps them on the matrix units and free of subtraction. dtype is that of x: for
    bfloat16, pairs keep some 11 bits and more (tf32, or three bfloat16 passes), because da is a
    sum of them with signs, in which bfloat16's 8 would be too few.
    """
    Q = pairs_BCGRQS.shape[-1]
    at_or_after_KQ = np.triu(np.ones((Q, Q), np.float32))
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.HIGH
    later_BCGRKS = jnp.einsum('KQ,BCGRQS->BCGRKS', at_or_after_KQ, pairs_BCGRQS, precision=precision)
    before_KS = np.tri(Q, k=-1, dtype=np.float32)
    across_BCGRK = jnp.sum(later_BCGRKS * before_KS * _per_source(dt_BCSGR), axis=-1)
    # XLA would fuse the sum into the transpose of its result and read row by row: 8 times slower on a GPU.
    return jax.lax.optimization_barrier(across_BCGRK), later_BCGRKS[..., 0, :]


# --- from chunk to chunk --------------------------------------------------------------------


def pass_states(local_BCGRPN, chunk_BCGR, initial_BGRPN, dtype, reverse=False):
    """h_c = exp(chunk_c) h_{c-1} + local_c, in float32, from the first chunk or from the last.

    Returns the state that each chunk receives, [B, C, G, R, P, N] rounded to dtype, and the
    last state, float32. The gradient of it is itself in the other direction.

    Log-depth: on an H200 at the 1.3B size a `lax.scan` over chunks makes forward and backward
    together 1.36 times slower, a matmul with the matrix of decays between chunks 1.08 times.
    """

    def combine(first, second):
        return first[0] + second[0], jnp.exp(second[0])[..., None, None] * first[1] + second[1]

    logs, sums = jax.lax.associative_scan(combine, (chunk_BCGR, local_BCGRPN), reverse=reverse, axis=1)
    states = sums + jnp.exp(logs)[..., None, None] * initial_BGRPN[:, None]
    if reverse:
        incoming, final = jnp.concatenate([states[:, 1:], initial_BGRPN[:, None]], axis=1), states[:, 0]
    else:
        incoming, final = jnp.concatenate([initial_BGRPN[:, None], states[:, :-1]], axis=1), states[:, -1]
    return incoming.astype(dtype), final
