"""The forward kernel of the rotary scan on TPU.

A grid step works on two chunks: on the outputs and the state of one, and on the decays, the
rotation and the scores of the next, so that the chain of small dependent operations of the
second fills what the first leaves idle. Hence a sequence of C chunks takes C + 1 steps: the
first one's outputs are of nothing and are overwritten by the second's.

Legend: as in tpu_chunk.py.
"""

import types

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ssd import tpu_chunk as chunk

# Tiles whose steps alternate in the program, see `_emit`.
TILES_AT_ONCE = 2


def scratch_shapes(g, dtype, with_y):
    """Name -> scratch memory. What `staged` names is written for the next chunk and copied for this one."""
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
    return {name: pltpu.VMEM(*shape) for name, shape in shapes.items()}, tuple(staged)


def kernel(g, names, staged, *refs):
    """One grid step. names: of refs, inputs and outputs as in tpu.py, then scratch; absent: not wanted."""
    r = types.SimpleNamespace(y=None, states=None, c=None, cos=None, run=None)
    for name, ref in zip(names, refs, strict=True):
        setattr(r, name, ref)
    step, last_step = pl.program_id(2), pl.num_programs(2) - 1

    @pl.when(step == 1)
    def _():
        r.state[...] = r.initial[0].T

    for name in staged:
        getattr(r, name)[...] = getattr(r, 'next_' + name)[...]
    upcoming = jnp.minimum(step, last_step - 1)
    _emit(g, r, step - 1, upcoming)

    @pl.when(step == last_step)
    def _():
        r.final[0] = r.state[...].T


def _emit(g, r, index, upcoming):
    """Writes the program of a step in an order that the compiler's scheduler makes good use of.

    It looks ahead over a limited stretch of the program, so that what is to run side by side must
    stand side by side: several tiles, and the next chunk's decays and scores.
    """
    done = set()

    def beside():
        yield from _prepare(g, r, upcoming)
        for group in range(g.G):
            while group not in done:
                yield
            yield from _score(g, r, group, upcoming)

    last = {group: tile.index for tile in g.tiles for group, _ in tile.parts}
    side, waiting, running = beside(), list(g.tiles), []
    while waiting or running:
        while waiting and len(running) < TILES_AT_ONCE:
            tile = waiting.pop(0)
            running.append((tile, _advance(g, r, tile, index)))
        for tile, generator in list(running):
            if next(generator, running) is running:
                running.remove((tile, generator))
                done |= {group for group, _ in tile.parts if last[group] == tile.index}
        next(side, None)
    for _ in side:
        pass


def _prepare(g, r, index):
    runs = chunk.load_runs(g, r.run)
    dt_HQ = chunk.load_lanes(g, r.dt, index)
    d = chunk.decays(g, dt_HQ, r.a[0], runs)
    r.next_decay[: g.H] = jnp.broadcast_to(d.chunk_H1, (g.H, chunk.LANES))
    columns = [d.scale_HQ, d.coarse_HQ] + ([d.fine_HQ] if g.exact else [])
    r.next_columns[...] = chunk.turn_columns(g, columns)
    yield
    if r.y is None:
        return
    if g.rotated:
        r.table[0], r.table[1] = chunk.tables(g, chunk.load_lanes(g, r.cos, index), chunk.load_lanes(g, r.sin, index))
    yield
    for i, v in enumerate([dt_HQ, d.coarse_HQ] + ([d.fine_HQ] if g.exact else [])):
        for block, packed in enumerate(chunk.pack(v, r.fold, g)):
            r.next_packed[block, i] = packed
    yield
    r.next_diagonal[...], enter, _, across = chunk.masks(g, runs, queries_in_rows=True)
    if g.segmented:
        r.next_enter[...] = enter
        for i, (rows, lanes) in enumerate(across.values()):
            r.next_across_rows[i], r.next_across_lanes[i] = rows, lanes


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
    r.b[group] = b_NQ
    if r.y is None:
        return
    yield
    c_QN = chunk.load_rows(g, r.c_in, lanes, index)
    if g.rotated:
        c_QN = chunk.rotate(c_QN, r.table[0], r.table[1]).astype(r.b.dtype)
    r.c[group] = c_QN
    for s in range(g.blocks):
        yield
        scores = g.dot('nn', c_QN[s * g.M :], jnp.concatenate([b_NQ[:, g.block(s)]] * g.each, axis=1))
        for q in range(s, g.blocks):
            r.scores[group, g.pairs.index((q, s))] = scores[(q - s) * g.M : (q - s + 1) * g.M]


def _advance(g, r, tile, index):
    """Outputs of a tile's heads, and their state."""
    dtype, t = r.x.dtype, tile.index
    columns = r.columns[...]
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
    update_NX = sum(g.dot('nn', r.b[group], chunk.only(scaled_QX, tile, heads)) for group, heads in tile.parts)
    r.state[:, tile.lanes] = chunk.spread_one(r.decay[:, 0:1], tile) * state_NX + update_NX
    if r.y is None:
        return

    def row(kind, block):
        return r.packed[block, kind, t : t + 1]

    def scores(q, s):
        return chunk.join([r.scores[group, g.pairs.index((q, s))] for group, _ in tile.parts], tile)

    cum_QX = chunk.spread(columns, g.rows + tile.heads[0], tile)
    inter_QX = sum(g.dot('nn', r.c[group], chunk.only(rounded_NX, tile, heads)) for group, heads in tile.parts)
    off = 0
    edge = fine_edge = None  # of the block before
    for q in range(g.blocks):
        yield
        rows = g.block(q)
        cum = cum_QX[rows]
        fine = chunk.spread(columns[rows], 2 * g.rows + tile.heads[0], tile) if g.exact else None
        enter = cum + fine if g.exact else cum
        enter = jnp.exp2(enter + r.enter[rows] if g.segmented else enter)
        y = enter * inter_QX[rows]
        exponent = g.difference(cum, fine, row(1, q), row(2, q) if g.exact else None)
        weights = (scores(q, q) * jnp.exp2(exponent + r.diagonal[rows]) * row(0, q)).astype(dtype)
        y += g.dot('nn', weights, stacked[q])
        for s in range(q):
            after = g.difference(cum, fine, edge, fine_edge)
            before = g.difference(edge, fine_edge, row(1, s), row(2, s) if g.exact else None)
            if g.segmented:
                after, before = after + r.across_rows[off], before + r.across_lanes[off]
            off += 1
            weights = (scores(q, s) * (jnp.exp2(before) * row(0, s))).astype(dtype)
            y += jnp.exp2(after) * g.dot('nn', weights, stacked[s])
        r.y[0, rows, tile.lanes] = y.astype(dtype)
        edge, fine_edge = cum[g.M - 1 :], fine[g.M - 1 :] if g.exact else None
