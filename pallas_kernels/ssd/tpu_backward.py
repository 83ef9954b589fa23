"""The backward kernel of the rotary scan on TPU: chunks in reverse, from their boundary states.

Legend: as in tpu_chunk.py. Weights are held transposed, sources in rows and (head, query) in
lanes. With T_qs the term of y_q . dy_q that source s contributes, the gradient of the log-decay of
step k is the sum of T_qs over s < k <= q. It is taken block by block, from triangles on the
diagonal and from sums of rows and columns off it, and never as a difference of two sums.
"""

import typing

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ssd import tpu_chunk as chunk

# Tiles whose steps alternate in the program: the compiler's scheduler looks ahead over a limited
# stretch of it. On v5e, cycles a grid step (32 heads, G 8): 1 tile 22,100, 2 15,100, 4 14,700, 8 13,400.
TILES_AT_ONCE = 8
GROUPS_AT_ONCE = 8  # keeps their sums within VMEM where every head has a group of its own
# Rows of `sums`: head sums with positions in lanes.
DIRECT, SOURCE, QUERY, COLUMN = range(4)


def _batches(g):
    tiles, each = g.tiles, min(TILES_AT_ONCE, max(1, GROUPS_AT_ONCE * g.R // g.each))
    return [tiles[first : first + each] for first in range(0, g.T, each)]


def _slots(g):
    """Groups whose sums are under way at a time."""
    return max(len({group for tile in tiles for group, _ in tile.groups}) for tiles in _batches(g))


class Refs(typing.NamedTuple):
    """Memory of a grid step. Blocks of the inputs and outputs, then scratch in VMEM; None: not wanted.

    X: LANES; E: pairs of blocks, `g.pairs`; K: groups whose sums are under way at a time, `_slots(g)`.
    """

    # Inputs.
    x: typing.Any  # [1, Q, H P]
    dt: typing.Any  # [1, H, Q] float32
    a: typing.Any  # [1, H, 1] float32
    b_in: typing.Any  # [1, Q, G N], x's dtype, not rotated
    states: typing.Any  # [1, 1, N, H P], x's dtype: the state before the chunk
    dfinal: typing.Any  # [1, H P, N] float32
    # Outputs.
    dx: typing.Any  # [1, Q, H P], x's dtype
    ddt: typing.Any  # [1, H, Q] float32
    da: typing.Any  # [1, 1, H, 1] float32
    db: typing.Any  # [1, Q, G N], b's dtype, or float32 where blocks of heads share a group
    dinitial: typing.Any  # [1, H P, N] float32
    # Scratch, float32 unless noted.
    dstate: typing.Any  # [N, H P]
    columns: typing.Any  # [Q, g.columns()]: see turn_columns
    fold: typing.Any  # [g.rows, Q]: see pack
    sums: typing.Any  # [4, g.rows, Q]: DIRECT, SOURCE, QUERY, COLUMN
    products: typing.Any  # [T, X]: of the state and its gradient, summed over N
    b: typing.Any  # [G, Q, N], x's dtype, rotated
    db_sum: typing.Any  # [K, Q, N]
    # Where there was a y.
    c_in: typing.Any = None  # input [1, Q, G N], x's dtype, not rotated
    dy: typing.Any = None  # input [1, Q, H P], x's dtype
    dc: typing.Any = None  # output, as db
    packed: typing.Any = None  # [g.blocks, 1 or (exact) 2, T, X]: sums of the log-decay, see pack
    row_sums: typing.Any = None  # [g.blocks, T, X]
    straddling: typing.Any = None  # [g.blocks, T, X]: see _straddling
    diagonal: typing.Any = None  # [Q, X]: additive mask, see chunk.masks
    c: typing.Any = None  # [G, Q, N], x's dtype, rotated
    c_turned: typing.Any = None  # [G, N, Q], x's dtype: its transpose
    scores: typing.Any = None  # [G, E, M, X]
    dscores: typing.Any = None  # [K, E, M, X]
    dc_sum: typing.Any = None  # [K, Q, N]
    # Where b and c are rotated, and where there are segments.
    cos: typing.Any = None  # input [1, N / 2, Q] float32
    sin: typing.Any = None  # input [1, N / 2, Q] float32
    table: typing.Any = None  # [2, Q, N]: cos and sin
    run: typing.Any = None  # input [1, 1, 2, Q] int32: the segment of each token, and of the token before it


def scratch_shapes(g, dtype, with_y):
    f32, X = jnp.float32, chunk.LANES
    shapes = {
        'dstate': ((g.N, g.H * g.P), f32),
        'columns': ((g.Q, g.columns()), f32),
        'fold': ((g.rows, g.Q), f32),
        'sums': ((4, g.rows, g.Q), f32),
        'products': ((g.T, X), f32),
        'b': ((g.G, g.Q, g.N), dtype),
        'db_sum': ((_slots(g), g.Q, g.N), f32),
    }
    if with_y:
        shapes |= {
            'packed': ((g.blocks, 2 if g.exact else 1, g.T, X), f32),
            'row_sums': ((g.blocks, g.T, X), f32),
            'straddling': ((g.blocks, g.T, X), f32),
            'diagonal': ((g.Q, X), f32),
            'c': ((g.G, g.Q, g.N), dtype),
            'c_turned': ((g.G, g.N, g.Q), dtype),
            'scores': ((g.G, len(g.pairs), g.M, X), f32),
            'dscores': ((_slots(g), len(g.pairs), g.M, X), f32),
            'dc_sum': ((_slots(g), g.Q, g.N), f32),
        }
    if g.rotated:
        shapes['table'] = ((2, g.Q, g.N), f32)
    return {name: pltpu.VMEM(*shape) for name, shape in shapes.items()}


def kernel(g, names, *refs):
    """One grid step. names: of the inputs, the outputs and the scratch."""
    r = Refs(**dict(zip(names, refs, strict=True)))
    step, last_step = pl.program_id(2), pl.num_programs(2) - 1
    index = last_step - step

    @pl.when(step == 0)
    def _():
        r.dstate[...] = r.dfinal[0].T
        r.da[0, 0] = jnp.zeros_like(r.da[0, 0])

    runs = chunk.load_runs(g, r.run)
    dt_HQ = chunk.load_lanes(g, r.dt, index)
    d = chunk.decays(g, dt_HQ, r.a[0], runs)
    columns = [dt_HQ, d.coarse_HQ] + ([d.fine_HQ] if g.exact else [])
    r.columns[...] = chunk.turn_columns(g, columns)
    masks = chunk.masks(g, runs, queries_in_rows=False)
    if r.dy is not None:
        r.diagonal[...] = masks[0]
        for i, v in enumerate(columns[1:]):
            for block, packed in enumerate(chunk.pack(v, r.fold, g)):
                r.packed[block, i] = packed
    if g.rotated:
        r.table[0], r.table[1] = chunk.tables(g, chunk.load_lanes(g, r.cos, index), chunk.load_lanes(g, r.sin, index))
    for group in range(g.G):
        _score(g, r, group, index)
    ends = {group: tile.index for tile in g.tiles for group, _ in tile.groups}
    started = set()
    for tiles in _batches(g):
        _alternate(_tile(g, r, tile, index, d, masks, started) for tile in tiles)
        for tile in tiles:
            for group, _ in tile.groups:
                if ends[group] == tile.index:
                    _close_group(g, r, group)
    _close_chunk(g, r, dt_HQ, d)

    @pl.when(step == last_step)
    def _():
        r.dinitial[0] = r.dstate[...].T


def _score(g, r, group, index):
    def rotated(ref):
        v = chunk.load_rows(g, ref, g.group_lanes(group), index)
        return chunk.rotate(v, r.table[0], r.table[1]).astype(r.b.dtype) if g.rotated else v

    b_QN = rotated(r.b_in)
    r.b[group] = b_QN
    if r.dy is None:
        return
    c_QN = rotated(r.c_in)
    c_NQ = c_QN.T
    r.c[group], r.c_turned[group] = c_QN, c_NQ
    for q in range(g.blocks):
        right = jnp.concatenate([c_NQ[:, g.block(q)]] * g.each, axis=1)
        scores = g.dot('nn', b_QN[: (q + 1) * g.M], right)
        for s in range(q + 1):
            r.scores[group, g.pairs.index((q, s))] = scores[g.block(s)]


def _alternate(generators):
    """Runs generators in turns, from one yield to the next, until all are done."""
    running = list(generators)
    while running:
        for generator in list(running):
            try:
                next(generator)
            except StopIteration:
                running.remove(generator)


def _accumulate(ref, where, value, started, key):
    ref[where] = value + ref[where] if key in started else value
    started.add(key)


class _Steps(typing.NamedTuple):
    """dt and the sums of the log-decay of a tile, per position in rows, over the lanes of the position's head."""

    dt_QX: jax.Array
    cum_QX: jax.Array
    fine_QX: jax.Array | None  # only where exact


def _tile(g, r, tile, index, d, masks, started):
    """Gradients through a tile's heads. d: `chunk.Decays`; started: what `_accumulate` has begun to sum."""
    dtype, t = r.x.dtype, tile.index
    _, enter_mask, leave_mask, across = masks
    columns = r.columns[...]
    dt_QX = chunk.spread(columns, tile.heads[0], tile)
    cum_QX = chunk.spread(columns, g.rows + tile.heads[0], tile)
    fine_QX = chunk.spread(columns, 2 * g.rows + tile.heads[0], tile) if g.exact else None
    assert dt_QX.shape == cum_QX.shape == (g.Q, chunk.LANES)
    last = slice(g.Q - 1, g.Q)

    leave_QX = g.difference(cum_QX[last], fine_QX[last] if g.exact else None, cum_QX, fine_QX)
    leave_QX = jnp.exp2(leave_QX + leave_mask if g.segmented else leave_QX)
    x = chunk.load_rows(g, r.x, tile.lanes, index)
    x_QX = x.astype(jnp.float32)
    scaled_QX = (x_QX * (dt_QX * leave_QX)).astype(dtype)
    dstate_NX = r.dstate[:, tile.lanes]
    dstate = dstate_NX.astype(dtype)
    state_NX = r.states[0, 0, :, tile.lanes]
    assert x.shape == (g.Q, chunk.LANES) and state_NX.shape == dstate.shape == (g.N, chunk.LANES)
    r.products[t : t + 1] = jnp.sum(dstate_NX * state_NX, axis=0, keepdims=True)

    yield
    dx_QX = sum(g.dot('nn', r.b[group], chunk.only(dstate, tile, heads)) for group, heads in tile.groups)
    yield
    _head_sums(g, r, SOURCE, tile, x_QX * dx_QX)
    dx_QX = leave_QX * dx_QX
    for group, heads in tile.groups:
        db_QN = g.dot('nt', chunk.only(scaled_QX, tile, heads), dstate)
        _accumulate(r.db_sum, group % _slots(g), db_QN, started, ('db', group))
    decayed_NX = chunk.spread_one(d.chunk_H1, tile) * dstate_NX
    if r.dy is None:
        r.dstate[:, tile.lanes] = decayed_NX
        _head_sums(g, r, DIRECT, tile, x_QX * dx_QX)
        r.dx[0, :, tile.lanes] = (dt_QX * dx_QX).astype(dtype)
        return

    dy = chunk.load_rows(g, r.dy, tile.lanes, index)
    dy_QX = dy.astype(jnp.float32)
    enter_QX = cum_QX + fine_QX if g.exact else cum_QX
    enter_QX = jnp.exp2(enter_QX + enter_mask if g.segmented else enter_QX)
    entering_QX = (dy_QX * enter_QX).astype(dtype)
    yield
    y_QX = sum(g.dot('nn', r.c[group], chunk.only(state_NX, tile, heads)) for group, heads in tile.groups)
    yield
    _head_sums(g, r, QUERY, tile, dy_QX * y_QX)
    for group, heads in tile.groups:
        mine = chunk.only(entering_QX, tile, heads)
        decayed_NX += g.dot('nn', r.c_turned[group], mine)
        _accumulate(r.dc_sum, group % _slots(g), g.dot('nt', mine, state_NX), started, ('dc', group))
    r.dstate[:, tile.lanes] = decayed_NX
    yield from _pairs_of_blocks(g, r, tile, x, x_QX, dy, dx_QX, _Steps(dt_QX, cum_QX, fine_QX), across, started)


def _pairs_of_blocks(g, r, tile, x, x_QX, dy, dx_QX, steps, across, started):
    """What each pair of a block of queries and a block of sources adds to the gradients.

    x, dy: [Q, X]; x_QX: x in float32; dx_QX: what the state adds to the gradient of dt x; across: see `chunk.masks`.
    """
    dtype, t = x.dtype, tile.index
    dt_QX, cum_QX, fine_QX = steps
    stacked = [chunk.stack_heads(dy[g.block(q)], tile) for q in range(g.blocks)]
    row_sums, straddling, dx_rows = [None] * g.blocks, [], []

    def row(kind, block):
        return r.packed[block, kind, t : t + 1]

    for s in range(g.blocks):
        rows = g.block(s)
        fine_rows = fine_QX[rows] if g.exact else None
        dx, columns_s = dx_QX[rows], None
        for q in range(s, g.blocks):
            yield
            i = g.pairs.index((q, s))
            scores = chunk.join([r.scores[group, i] for group, _ in tile.groups], tile)
            fine_q = row(1, q) if g.exact else None
            if q == s:
                decay = jnp.exp2(g.difference(row(0, q), fine_q, cum_QX[rows], fine_rows) + r.diagonal[rows])
                dx += g.dot('nn', (scores * decay).astype(dtype), stacked[q])
            else:
                edge = slice(q * g.M - 1, q * g.M)
                fine_edge = fine_QX[edge] if g.exact else None
                before = g.difference(cum_QX[edge], fine_edge, cum_QX[rows], fine_rows)
                after = g.difference(row(0, q), fine_q, cum_QX[edge], fine_edge)
                if g.segmented:
                    before, after = before + across[q, s][0], after + across[q, s][1]
                before, after = jnp.exp2(before), jnp.exp2(after)
                dx += before * g.dot('nn', (scores * after).astype(dtype), stacked[q])
                decay = before * after
            assert scores.shape == decay.shape == (g.M, chunk.LANES)
            dscores = g.dot('nt', x[rows], stacked[q]) * (decay * dt_QX[rows])
            for group, heads in tile.groups:
                _accumulate(
                    r.dscores, (group % _slots(g), i), chunk.only(dscores, tile, heads), started, ('ds', group, i)
                )
            yield
            terms = dscores * scores
            if q == s:
                straddling.append(_straddling(g, terms))
            else:
                sums = jnp.sum(terms, axis=0, keepdims=True)
                row_sums[q] = sums if row_sums[q] is None else row_sums[q] + sums
                columns_s = terms if columns_s is None else columns_s + terms
        if columns_s is not None:
            _head_sums(g, r, COLUMN, tile, columns_s, rows)
        r.dx[0, rows, tile.lanes] = (dt_QX[rows] * dx).astype(dtype)
        dx_rows.append(dx)
    yield
    _head_sums(g, r, DIRECT, tile, x_QX * jnp.concatenate(dx_rows, axis=0))
    for q in range(g.blocks):
        r.straddling[q, t : t + 1] = straddling[q]
        if row_sums[q] is not None:
            r.row_sums[q, t : t + 1] = row_sums[q]


def _same_head(g, keep):
    """[X, X], 1 where both lanes, as (head, position), are of one head and keep(position, position)."""
    row, column = chunk.iota((chunk.LANES, chunk.LANES), 0), chunk.iota((chunk.LANES, chunk.LANES), 1)
    same = jax.lax.div(row, g.M) == jax.lax.div(column, g.M)
    return jnp.where(same & keep(row, column), 1.0, 0.0)


def _straddling(g, terms):
    """Sums of [M, (head, query)] over sources before k and queries from k on, for every k: [1, (head, k)].

    Without subtraction: where decay is strong the diagonal is nearly all there is, and the
    difference of two sums that hold it would be their rounding.
    """
    later = _exact_dot(g, 'nn', terms, _same_head(g, lambda q, k: q >= k))
    source = chunk.iota(later.shape, 0)
    k = jax.lax.rem(chunk.iota(later.shape, 1), g.M)
    return jnp.sum(jnp.where(source < k, later, 0.0), axis=0, keepdims=True)


def _exact_dot(g, spec, v, ones):
    """Product of v and a matrix of zeros and ones, which is the right operand ('nn') or the left ('nt').

    v is float32 and keeps 16 bits or more.
    """
    if g.exact:
        return g.dot(spec, v, ones) if spec == 'nn' else g.dot(spec, ones, v)
    high = v.astype(jnp.bfloat16)
    low = (v - high.astype(jnp.float32)).astype(jnp.bfloat16)
    v, ones = jnp.concatenate([high, low], axis=1), ones.astype(jnp.bfloat16)
    if spec == 'nn':
        return g.dot(spec, v, jnp.concatenate([ones, ones], axis=0))
    return g.dot(spec, jnp.concatenate([ones, ones], axis=1), v)


def _head_sums(g, r, kind, tile, v, rows=slice(None)):
    """Sums over each head's lanes -> r.sums, with positions (`rows`) in lanes, by the matrix unit."""
    lane = chunk.iota((2 * chunk.SUBLANES, chunk.LANES), 1)
    chosen = jnp.where(jax.lax.div(lane, g.P) == chunk.iota(lane.shape, 0), 1.0, 0.0)
    r.sums[kind, tile.heads[0] : tile.heads[-1] + 1, rows] = _exact_dot(g, 'nt', v, chosen)[: g.each]


def _close_group(g, r, group):
    """Gradients of a group's b and c, from those of its heads' scores."""
    slot, lanes = group % _slots(g), g.group_lanes(group)
    dtype = r.x.dtype

    def store(ref, v):
        if g.rotated:
            v = chunk.rotate(v, r.table[0], -r.table[1])
        ref[0, :, lanes] = v.astype(ref.dtype)  # float32 where blocks of heads share a group

    if r.dy is None:
        store(r.db, r.db_sum[slot])
        return
    db, dc = [], []
    for i in range(g.blocks):
        rows = g.block(i)
        db_i, dc_i = r.db_sum[slot, rows], r.dc_sum[slot, rows]
        for q in range(i, g.blocks):  # as a source
            c_q = r.c[group, g.block(q)]
            left = r.dscores[slot, g.pairs.index((q, i))].astype(dtype)
            db_i += g.dot('nn', left, jnp.concatenate([c_q] * g.each, axis=0))
        for s in range(i + 1):  # as a query
            turned = r.dscores[slot, g.pairs.index((i, s))].T
            left = sum(turned[h * g.M : (h + 1) * g.M] for h in range(g.each)).astype(dtype)
            dc_i += g.dot('nn', left, r.b[group, g.block(s)])
        db.append(db_i)
        dc.append(dc_i)
    store(r.db, jnp.concatenate(db, axis=0))
    store(r.dc, jnp.concatenate(dc, axis=0))


def _close_chunk(g, r, dt_HQ, d):
    """Gradients of dt and a, with positions in lanes."""
    H = g.H
    lane = chunk.iota((g.T, chunk.LANES), 1)
    totals = []
    for h in range(g.each):
        mine = jnp.where((lane >= h * g.P) & (lane < (h + 1) * g.P), r.products[...], 0.0)
        totals.append(jnp.broadcast_to(jnp.sum(mine, axis=1, keepdims=True), (g.T, g.Q)))
    through_HQ = d.chunk_H1 * chunk.interleave(totals, r.fold, g)
    before = chunk.triangle(g.Q, lambda s, k: s < k)
    dlog_HQ = through_HQ + g.dot('nn', d.scale_HQ * r.sums[SOURCE, :H], before)
    if r.dy is not None:
        from_k = _same_head(g, lambda q, k: q >= k)
        packed = [r.straddling[0]]
        for q in range(1, g.blocks):
            packed.append(r.straddling[q] + g.dot('nn', r.row_sums[q], from_k))
        dlog_HQ += chunk.unpack(packed, r.fold, g)
        dlog_HQ += g.dot('nn', d.enter_HQ * r.sums[QUERY, :H], chunk.triangle(g.Q, lambda q, k: q >= k))
        if g.blocks > 1:  # sources of the first block, queries of the second
            first = chunk.iota((H, g.Q), 1) < g.M
            across_HQ = jnp.where(first, r.sums[COLUMN, :H], 0.0)
            dlog_HQ += jnp.where(first, g.dot('nn', across_HQ, before), 0.0)
    a_H1 = r.a[0]
    dlog_HQ = jnp.where(dt_HQ * (a_H1 * chunk.LOG2_E) > chunk.MIN_LOG2_DECAY, dlog_HQ, 0.0)
    r.ddt[0] = r.sums[DIRECT, :H] + a_H1 * dlog_HQ
    r.da[0, 0] += jnp.sum(dt_HQ * dlog_HQ, axis=1, keepdims=True)
