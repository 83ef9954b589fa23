"""The rotary scan as Pallas Mosaic GPU kernels for Hopper: decays, cuts, gradients.

Legend: B batch, L length, H heads, G groups, P head width, N state width, C chunks,
Q and S positions in a chunk (query and source side), W spans of a row that are walked at the same time.
"""

import functools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.platforms import of_one_device
from pallas_kernels.ssd import gpu_backward, gpu_chunk, gpu_forward, xla
from pallas_kernels.ssd.gpu_chunk import CHUNK
from pallas_kernels.ssd.residuals import STATES_NAME
from pallas_kernels.ssd.rotation import rotate_heads, unrotate_heads

MULTIPROCESSORS = 132  # of an H100 SXM and an H200
WIDTH = 64  # head width of the kernels: a wider head is computed as several heads with one dt
STATES = (64, 128)  # the N that the kernels take
# The log-decay of every step is clipped to it: exp2 of it is 0 in float32.
MIN_LOG2_DECAY = -150.0
LOG2_E, LN_2 = math.log2(math.e), math.log(2)


class Plan(typing.NamedTuple):
    """How the kernels cut their work. Static under jit."""

    spans: int = 1  # W


def default_plan(shape: tuple[int, ...]) -> Plan:
    """Cuts rows into spans until the walks, two per multiprocessor, fill the device. shape: (B, L, H, P, G, N)."""
    B, L, H, P, _, _ = shape
    walks, chunks, spans = B * H * (P // WIDTH), -(-L // CHUNK), 1
    while walks * spans <= MULTIPROCESSORS and chunks >= 16 * spans:
        spans *= 2
    return Plan(spans)


def scan_chunks(plan, x_BLHP, dt_BLH, a_H, b_BLGN, c_BLGN, rope, run_BL, state_BHPN, interpret=False):
    """y and final state; arguments and results as `reference.scan_tokens`, x bfloat16."""
    B, L, H, P = x_BLHP.shape
    log2_BLH = jnp.maximum(dt_BLH * a_H * LOG2_E, MIN_LOG2_DECAY)
    split = P // WIDTH
    if split > 1:
        x_BLHP = x_BLHP.reshape(B, L, H * split, WIDTH)
        dt_BLH, log2_BLH = (jnp.repeat(v, split, axis=2) for v in (dt_BLH, log2_BLH))
        state_BHPN = state_BHPN.reshape(B, H * split, WIDTH, -1)
    pad = -L % (CHUNK * plan.spans)
    if pad:  # dt 0 and log-decay 0: the state stays as it is

        def longer(v, mode='constant'):
            return None if v is None else jnp.pad(v, ((0, 0), (0, pad)) + ((0, 0),) * (v.ndim - 2), mode=mode)

        x_BLHP, dt_BLH, log2_BLH, b_BLGN, c_BLGN = map(longer, (x_BLHP, dt_BLH, log2_BLH, b_BLGN, c_BLGN))
        rope, run_BL = jax.tree.map(longer, rope), longer(run_BL, 'edge')
    y, final = _scan((plan, interpret), x_BLHP, dt_BLH, log2_BLH, b_BLGN, c_BLGN, rope, run_BL, state_BHPN)
    if y is not None:
        y = y[:, :L].reshape(B, L, H, P)
    return y, final.reshape(B, H, P, -1)


# --- gradients ----------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(static, x, dt, log2, b, c, rope, run, state):
    y, final, *_ = _forward(static, x, dt, log2, b, c, rope, run, state, with_states=False)
    return y, final


def _scan_fwd(static, x, dt, log2, b, c, rope, run, state):
    y, final, *kept = _forward(static, x, dt, log2, b, c, rope, run, state, with_states=True)
    # b and c are kept as the kernels read them: rotated.
    states, b_rotated, c_rotated = (None if v is None else checkpoint_name(v, STATES_NAME) for v in kept)
    return (y, final), (x, dt, log2, b_rotated, c_rotated, rope, run, states)


@of_one_device
def _scan_bwd(static, residuals, cotangents):
    plan, interpret = static
    x, dt, log2, b, c, rope, run, states = residuals
    dy, dfinal = cotangents
    (B, L, H, _), (G, N) = x.shape, b.shape[2:]
    vectors, starts, log2_BCH = _vectors(dt, log2, run)
    cut, join = functools.partial(_cut, plan.spans), functools.partial(_join, plan.spans)
    dfinals = dfinal
    if plan.spans > 1:
        scaled = (None, None) if dy is None else (dy, c)
        dfinals = _received(plan, interpret, *scaled, vectors, log2_BCH, dfinal, reverse=True)
    r = gpu_backward.walk(*map(cut, (x, vectors, b, c, starts, states, dy)), dfinals, interpret=interpret)
    dinitial = join(r['dinitial'])[:, 0]

    def by_group(v):
        # The kernel has rounded each head's gradient once. The sum and its inverse rotation are float32, then rounded.
        v = jnp.sum(v.reshape(B, L, G, H // G, N), axis=3, dtype=jnp.float32)
        return unrotate_heads(v, rope).astype(b.dtype)

    by_source, by_query = (
        jnp.moveaxis(r[name].reshape(B, L // CHUNK, H, -1, CHUNK), 3, 0) for name in ('by_source', 'by_query')
    )
    leaving, passed = by_source[gpu_backward.LEAVING], by_query[gpu_backward.PASSED]
    dlog = jnp.sum(passed, axis=-1, keepdims=True)
    dlog = dlog + _sum_of(leaving * vectors[:, :, :, gpu_chunk.DT], np.tri(CHUNK, k=-1).T)
    ddt = leaving
    if dy is not None:
        ddt = ddt + by_source[gpu_backward.WITHIN]
        dlog = dlog + _sum_of(by_query[gpu_backward.TAKEN] - by_source[gpu_backward.LATER], np.tri(CHUNK))
    ddt, dlog = (v.swapaxes(2, 3).reshape(B, L, H) for v in (ddt, dlog))
    zero_rope = None if rope is None else tuple(jnp.zeros_like(t) for t in rope)
    dc = None if dy is None else by_group(r['dc'])
    return r['dx'].reshape(x.shape), ddt, dlog * LN_2, by_group(r['db']), dc, zero_rope, None, dinitial


_scan.defvjp(_scan_fwd, _scan_bwd)


@of_one_device
def _forward(static, x, dt, log2, b, c, rope, run, state, with_states):
    plan, interpret = static
    b, c = _rotated(b, rope, x.dtype), _rotated(c, rope, x.dtype)
    vectors, starts, log2_BCH = _vectors(dt, log2, run)
    cut, join = functools.partial(_cut, plan.spans), functools.partial(_join, plan.spans)
    states = state
    if plan.spans > 1:
        states = _received(plan, interpret, x, b, vectors, log2_BCH, state)
    keywords = dict(with_states=with_states, interpret=interpret)
    if c is None:
        r = gpu_forward.walk_states(*map(cut, (x, vectors, b)), states, **keywords)
    else:
        r = gpu_forward.walk(*map(cut, (x, vectors, b, c, starts)), states, **keywords)
    y = None if c is None else r['y'].reshape(x.shape)
    states = r['states'].reshape(x.shape[0], -1, *r['states'].shape[2:]) if with_states else None
    return y, join(r['final'])[:, -1], states, b, c


# --- what XLA computes for the kernels ---------------------------------------------------------------


def _rotated(v, rope, dtype):
    return None if v is None else rotate_heads(v, rope).astype(dtype)


def _cut(spans, v):
    """[B, L or C, ...] -> [B W, L / W, ...]"""
    return v if v is None or spans == 1 else v.reshape(v.shape[0] * spans, v.shape[1] // spans, *v.shape[2:])


def _join(spans, v):
    """[B W, ...] -> [B, W, ...]"""
    return v.reshape(v.shape[0] // spans, spans, *v.shape[1:])


def _received(plan, interpret, x, b, vectors, log2_BCH, edge_BHPN, reverse=False):
    """The state that enters each span, [B W, H, P, N], or with reverse the gradient of the state that leaves it.

    x, b: what is added to the state, as x b^T: x and b, or with reverse dy and c. None: nothing is.
    edge_BHPN: the state that enters the row, or with reverse the gradient of the one that leaves it.
    """
    (B, H, P, N), C = edge_BHPN.shape, log2_BCH.shape[1]
    cut = functools.partial(_cut, plan.spans)
    local = jnp.zeros((B * plan.spans, H, P, N), jnp.float32)
    if x is not None:
        scale = gpu_chunk.ENTER if reverse else gpu_chunk.SCALE
        local = gpu_forward.walk_states(
            cut(x), cut(vectors), cut(b), local, scale=scale, reverse=reverse, interpret=interpret
        )['final']
    log_BWH = LN_2 * jnp.sum(log2_BCH.reshape(B, plan.spans, C // plan.spans, H), axis=2)
    received, _ = xla.pass_states(
        _join(plan.spans, local)[:, :, :, None],
        log_BWH[..., None],
        edge_BHPN[:, :, None],
        jnp.float32,
        reverse=reverse,
    )
    return received[:, :, :, 0].reshape(-1, H, P, N)


def _sum_of(v, matrix):
    """v [..., S] @ matrix [S, Q] in float32: running sums, without a loop."""
    return jnp.einsum('...S,SQ->...Q', v, matrix.astype(np.float32), precision=jax.lax.Precision.HIGHEST)


def _vectors(dt_BLH, log2_BLH, run_BL):
    """(vectors [B, C, H, VECTORS, Q] of gpu_forward, starts [B, C, Q] or None, log2 of the chunks' decays [B, C, H])."""
    B, L, H = dt_BLH.shape
    C = L // CHUNK
    dt, log2 = (v.reshape(B, C, CHUNK, H).swapaxes(2, 3) for v in (dt_BLH, log2_BLH))
    cum = _sum_of(log2, np.tri(CHUNK).T)
    last = cum[..., -1:]
    enter, leave, decay, starts = jnp.exp2(cum), jnp.exp2(last - cum), jnp.exp2(last), None
    if run_BL is not None:
        run_BCQ = run_BL.reshape(B, C, CHUNK)
        last_BC = run_BCQ[..., -1]
        before_BC = jnp.concatenate([run_BCQ[:, :1, 0], last_BC[:, :-1]], axis=1)
        enter = jnp.where((run_BCQ == before_BC[..., None])[:, :, None], enter, 0.0)
        leave = jnp.where((run_BCQ == last_BC[..., None])[:, :, None], leave, 0.0)
        whole = (last_BC == before_BC)[:, :, None, None]
        decay, last = jnp.where(whole, decay, 0.0), jnp.where(whole, last, -1e4)
        begins = jnp.diff(run_BCQ, axis=-1, prepend=run_BCQ[..., :1]) != 0
        starts = jax.lax.cummax(jnp.where(begins, jnp.arange(CHUNK, dtype=jnp.int32), 0), axis=2)
    rows = {
        gpu_chunk.CUM: cum, gpu_chunk.DT: dt, gpu_chunk.ENTER: enter, gpu_chunk.SCALE: dt * leave,
        gpu_chunk.DECAY: jnp.broadcast_to(decay, cum.shape), gpu_chunk.LEAVE: leave,
    }  # fmt: skip
    return jnp.stack([rows[i] for i in range(gpu_chunk.VECTORS)], axis=3), starts, last[..., 0]
