"""The forward kernel of the rotary scan on TPU.

A grid step works on two chunks: it computes the outputs and the state of one, and the decays, the
rotation and the scores of the next. The chain of small dependent operations of the next chunk fills
the units that the current one leaves idle. A sequence of C chunks therefore takes C + 1 steps: the
outputs of the first step belong to no chunk, and the second step overwrites them.

Legend: as in tpu_chunk.py.
"""

import typing

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ssd import tpu_chunk as chunk

# Tiles whose steps alternate in the program, see `_emit`.
TILES_AT_ONCE = 2


class Staged(typing.NamedTuple):
    """Decays and masks of one chunk, in VMEM, float32. E: pairs of blocks off the diagonal; X: LANES."""

    columns: typing.Any  # [Q, g.columns()]: see turn_columns
    decay: typing.Any  # [g.rows, X]: decay of the whole chunk per head, in all lanes
    # Where there is a y:
    packed: typing.Any = None  # [g.blocks, 2 or (exact) 3, T, X]: dt and the sums of the log-decay, see pack
    diagonal: typing.Any = None  # [Q, X]: additive masks, see chunk.masks
    enter: typing.Any = None  # [Q, X], where there are segments
    across_rows: typing.Any = None  # [E, M, X], where there are segments
    across_lanes: typing.Any = None  # [E, 1, X], where there are segments


class Refs(typing.NamedTuple):
    """Memory of a grid step. Blocks of the inputs and outputs, then scratch in VMEM; None: not wanted."""

    # Inputs. x is of the chunk that is worked on, the others but `initial` of the next.
    x: typing.Any  # [1, Q, H P]
    dt: typing.Any  # [1, H, Q] float32
    a: typing.Any  # [1, H, 1] float32
    b_in: typing.Any  # [1, Q, G N], x's dtype, not rotated
    initial: typing.Any  # [1, H P, N] float32
    # Outputs.
    final: typing.Any  # [1, H P, N] float32
    # Scratch.
    state: typing.Any  # [N, H P] float32
    b: typing.Any  # [G, N, Q], x's dtype, rotated
    now: Staged  # of the chunk that is worked on
    next: Staged  # of the next
    # Where they are wanted.
    c_in: typing.Any = None  # input [1, Q, G N], x's dtype, not rotated
    cos: typing.Any = None  # input [1, N / 2, Q] float32
    sin: typing.Any = None  # input [1, N / 2, Q] float32
    run: typing.Any = None  # input [1, 1, 2, Q] int32: the segment of each token, and of the token before it
    y: typing.Any = None  # output [1, Q, H P], x's dtype
    states: typing.Any = None  # output [1, 1, N, H P], x's dtype: the state before the chunk
    fold: typing.Any = None  # scratch [g.rows, Q] float32, see pack
    c: typing.Any = None  # scratch [G, Q, N], x's dtype, rotated
    scores: typing.Any = None  # scratch [G, pairs of blocks, M, X] float32
    table: typing.Any = None  # scratch [2, Q, N] float32: cos and sin


def scratch_shapes(g, dtype, with_y):
    """Name -> scratch memory; those of `Refs.next` are named next_ and the field."""
    f32, X = jnp.float32, chunk.LANES
    staged = {'columns': ((g.Q, g.columns()), f32), 'decay': ((g.rows, X), f32)}
    shapes = {'state': ((g.N, g.H * g.P), f32), 'b': ((g.G, g.N, g.Q), dtype)}
    if with_y:
        off = max(1, len(g.pairs) - g.blocks)
        staged |= {'packed': ((g.blocks, 3 if g.exact else 2, g.T, X), f32), 'diagonal': ((g.Q, X), f32)}
        if g.segmented:
            staged |= {
                'enter': ((g.Q, X), f32),
                'across_rows': ((off, g.M, X), f32),
                'across_lanes': ((off, 1, X), f32),
            }
        shapes |= {
            'fold': ((g.rows, g.Q), f32),
            'c': ((g.G, g.Q, g.N), dtype),
            'scores': ((g.G, len(g.pairs), g.M, X), f32),
        }
        if g.rotated:
            shapes['table'] = ((2, g.Q, g.N), f32)
    shapes |= staged | {'next_' + name: shape for name, shape in staged.items()}
    return {name: pltpu.VMEM(*shape) for name, shape in shapes.items()}


def named_refs(names, refs):
    """Refs from what Pallas passes; names: of the inputs, the outputs and the scratch."""
    refs = dict(zip(names, refs, strict=True))
    now, upcoming = (
        Staged(**{name: refs.pop(prefix + name) for name in Staged._fields if prefix + name in refs})
        for prefix in ('', 'next_')
    )
    return Refs(now=now, next=upcoming, **refs)


def kernel(g, names, *refs):
    """One grid step. names: see `named_refs`."""
    r = named_refs(names, refs)
    step, last_step = pl.program_id(2), pl.num_programs(2) - 1

    @pl.when(step == 1)
    def _():
        r.state[...] = r.initial[0].T

    for ref, upcoming_ref in zip(r.now, r.next, strict=True):
        if ref is not None:
            ref[...] = upcoming_ref[...]
    upcoming = jnp.minimum(step, last_step - 1)
    _emit(g, r, step - 1, upcoming)

    @pl.when(step == last_step)
    def _():
        r.final[0] = r.state[...].T


def _emit(g, r, index, upcoming):
    """Writes the program of a step in an order that suits the compiler's scheduler.

    The scheduler looks ahead over a limited stretch of the program. Operations that are to run at the
    same time must therefore stand close together: those of several tiles, and the next chunk's decays
    and scores.
    """
    done = set()  # groups whose scores may be overwritten
    last = {group: tile.index for tile in g.tiles for group, _ in tile.groups}
    side, waiting, running = _prepare_and_score(g, r, upcoming, done), list(g.tiles), []
    while waiting or running:
        while waiting and len(running) < TILES_AT_ONCE:
            tile = waiting.pop(0)
            running.append((tile, _advance(g, r, tile, index)))
        for tile, generator in list(running):
            if next(generator, running) is running:
                running.remove((tile, generator))
                done |= {group for group, _ in tile.groups if last[group] == tile.index}
        next(side, None)
    for _ in side:
        pass


def _prepare_and_score(g, r, upcoming, done):
    """What a step does for the next chunk; a group is scored when it is in `done`."""
    yield from _prepare(g, r, upcoming)
    for group in range(g.G):
        while group not in done:
            yield
        yield from _score(g, r, group, upcoming)


def _prepare(g, r, index):
    runs = chunk.load_runs(g, r.run)
    dt_HQ = chunk.load_lanes(g, r.dt, index)
    d = chunk.decays(g, dt_HQ, r.a[0], runs)
    r.next.decay[: g.H] = jnp.broadcast_to(d.chunk_H1, (g.H, chunk.LANES))
    columns = [d.scale_HQ, d.coarse_HQ] + ([d.fine_HQ] if g.exact else [])
    r.next.columns[...] = chunk.turn_columns(g, columns)
    yield
    if r.y is None:
        return
    if g.rotated:
        r.table[0], r.table[1] = chunk.tables(g, chunk.load_lanes(g, r.cos, index), chunk.load_lanes(g, r.sin, index))
    yield
    for i, v in enumerate([dt_HQ, d.coarse_HQ] + ([d.fine_HQ] if g.exact else [])):
        for block, packed in enumerate(chunk.pack(v, r.fold, g)):
            r.next.packed[block, i] = packed
    yield
    r.next.diagonal[...], enter, _, across = chunk.masks(g, runs, queries_in_rows=True)
    if g.segmented:
        r.next.enter[...] = enter
        for i, (rows, lanes) in enumerate(across.values()):
            r.next.across_rows[i], r.next.across_lanes[i] = rows, lanes


def _score(g, r, group, index):
    """Rotates b and c of the next chunk and takes their products."""
    lanes = g.group_lanes(group)
    b_NQ = chunk.load_rows(g, r.b_in, lanes, index).T
    if g.rotated:
        # With the state width in rows the rotation moves no lanes.
        cos_TQ, sin_TQ = chunk.load_lanes(g, r.cos, index), chunk.load_lanes(g, r.sin, index)
        first, second = b_NQ[: g.N // 2].astype(jnp.float32), b_NQ[g.N // 2 :].astype(jnp.float32)
        b_NQ = jnp.concatenate([first * cos_TQ - second * sin_TQ, second * cos_TQ + first * sin_TQ], axis=0)
        b_NQ = b_NQ.astype(r.b.dtype)
    assert b_NQ.shape == (g.N, g.Q)
    r.b[group] = b_NQ
    if r.y is None:
        return
    yield
    c_QN = chunk.load_rows(g, r.c_in, lanes, index)
    if g.rotated:
        c_QN = chunk.rotate(c_QN, r.table[0], r.table[1]).astype(r.b.dtype)
    assert c_QN.shape == (g.Q, g.N)
    r.c[group] = c_QN
    for s in range(g.blocks):
        yield
        scores = g.dot('nn', c_QN[s * g.M :], jnp.concatenate([b_NQ[:, g.block(s)]] * g.each, axis=1))
        for q in range(s, g.blocks):
            r.scores[group, g.pairs.index((q, s))] = scores[(q - s) * g.M : (q - s + 1) * g.M]


def _advance(g, r, tile, index):
    """Outputs of a tile's heads, and their state."""
    dtype, t = r.x.dtype, tile.index
    columns = r.now.columns[...]
    x_QX = chunk.load_rows(g, r.x, tile.lanes, index)
    scaled, stacked = [], []
    for s in range(g.blocks):
        rows = g.block(s)
        scaled.append((x_QX[rows] * chunk.spread(columns[rows], tile.heads[0], tile)).astype(dtype))
        if r.y is not None:
            stacked.append(chunk.stack_heads(x_QX[rows], tile))
    yield
    state_NX = r.state[:, tile.lanes]
    rounded_NX = state_NX.astype(dtype)
    if r.states is not None:
        r.states[0, 0, :, tile.lanes] = rounded_NX
    scaled_QX = jnp.concatenate(scaled, axis=0)
    assert state_NX.shape == (g.N, chunk.LANES) and scaled_QX.shape == (g.Q, chunk.LANES)
    update_NX = sum(g.dot('nn', r.b[group], chunk.only(scaled_QX, tile, heads)) for group, heads in tile.groups)
    r.state[:, tile.lanes] = chunk.spread_one(r.now.decay[:, 0:1], tile) * state_NX + update_NX
    if r.y is None:
        return

    def row(kind, block):
        return r.now.packed[block, kind, t : t + 1]

    def scores(q, s):
        return chunk.join([r.scores[group, g.pairs.index((q, s))] for group, _ in tile.groups], tile)

    cum_QX = chunk.spread(columns, g.rows + tile.heads[0], tile)
    inter_QX = sum(g.dot('nn', r.c[group], chunk.only(rounded_NX, tile, heads)) for group, heads in tile.groups)
    off = 0
    edge = fine_edge = None  # of the block before
    for q in range(g.blocks):
        yield
        rows = g.block(q)
        cum = cum_QX[rows]
        fine = chunk.spread(columns[rows], 2 * g.rows + tile.heads[0], tile) if g.exact else None
        enter = cum + fine if g.exact else cum
        enter = jnp.exp2(enter + r.now.enter[rows] if g.segmented else enter)
        assert enter.shape == (g.M, chunk.LANES)
        y = enter * inter_QX[rows]
        exponent = g.difference(cum, fine, row(1, q), row(2, q) if g.exact else None)
        weights = (scores(q, q) * jnp.exp2(exponent + r.now.diagonal[rows]) * row(0, q)).astype(dtype)
        y += g.dot('nn', weights, stacked[q])
        for s in range(q):
            after = g.difference(cum, fine, edge, fine_edge)
            before = g.difference(edge, fine_edge, row(1, s), row(2, s) if g.exact else None)
            if g.segmented:
                after, before = after + r.now.across_rows[off], before + r.now.across_lanes[off]
            off += 1
            weights = (scores(q, s) * (jnp.exp2(before) * row(0, s))).astype(dtype)
            y += jnp.exp2(after) * g.dot('nn', weights, stacked[s])
        r.y[0, rows, tile.lanes] = y.astype(dtype)
        edge, fine_edge = cum[g.M - 1 :], fine[g.M - 1 :] if g.exact else None
