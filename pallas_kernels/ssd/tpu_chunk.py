"""What the TPU kernels of the rotary scan share: geometry, decays, masks, rotation.

Legend: H heads of a grid step, G groups of it, R heads per group, P head width, N state width,
Q chunk length, M = P positions per block, X = 128 lanes of a tile, T tiles of a grid step.

Heads lie side by side in lanes: x is [Q, H P], the state is held as [N, H P]. Work is cut into
tiles of 128 lanes, one head of width 128 or two of width 64, so that the matrix unit's columns
are full. Positions are cut into blocks of M = P, so that the weights of a block of queries and a
block of sources, one [M, M] per head, fill the same 128 lanes: `pack` lays what belongs to
positions out in the same way. Between two blocks a decay splits into a factor of the query and
one of the source, with the last position before the query's block between them, so that both
are at most 1 and only the blocks on the diagonal need an exponential for each pair.
"""

import typing

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 8
LOG2_E = 1.4426950408889634
# The log-decay of every step is clipped to it: exp2 of it is 0 in float32.
MIN_LOG2_DECAY = -150.0
HIDDEN = -1e30  # exponent of a masked pair


class Tile(typing.NamedTuple):
    """Heads that share 128 lanes of x."""

    index: int
    groups: tuple[tuple[int, tuple[int, ...]], ...]  # (group, its heads), in order of lanes
    P: int

    @property
    def heads(self):
        return tuple(h for _, heads in self.groups for h in heads)

    @property
    def lanes(self):
        return slice(self.index * LANES, (self.index + 1) * LANES)


class Geometry(typing.NamedTuple):
    """One grid step. P is 64 or 128, Q and N are multiples of 128, H P is one of 128."""

    Q: int
    H: int
    R: int
    P: int
    N: int
    L: int  # length of the sequence
    exact: bool  # float32 operands
    interpret: bool  # on CPU, where not every bfloat16 product has a float32 result
    rotated: bool
    segmented: bool

    @property
    def G(self):
        return -(-self.H // self.R)

    @property
    def M(self):
        return self.P

    @property
    def blocks(self):
        return self.Q // self.M

    @property
    def pairs(self):
        """(query block, source block) with the sources before or on the diagonal."""
        return [(q, s) for q in range(self.blocks) for s in range(q + 1)]

    @property
    def T(self):
        return self.H * self.P // LANES

    @property
    def each(self):
        """Heads of a tile."""
        return LANES // self.P

    @property
    def rows(self):
        """H rounded up to whole sublanes: the distance of arrays stacked in rows."""
        return -(-self.H // SUBLANES) * SUBLANES

    @property
    def ragged(self):
        return self.L % self.Q != 0

    @property
    def tiles(self):
        result = []
        for t in range(self.T):
            heads = range(t * self.each, (t + 1) * self.each)
            groups = sorted({h // self.R for h in heads})
            result.append(Tile(t, tuple((g, tuple(h for h in heads if h // self.R == g)) for g in groups), self.P))
        return result

    def block(self, q):
        return slice(q * self.M, (q + 1) * self.M)

    def dot(self, spec, left, right):
        """Matmul of 2-D operands with float32 accumulation; float32 operands are not rounded.

        spec tells which operand is transposed: 'nn' left @ right, 'nt' left @ right.T.
        """
        contract = {'nn': ((1,), (0,)), 'nt': ((1,), (1,))}[spec]
        if self.interpret:
            left, right = left.astype(jnp.float32), right.astype(jnp.float32)
        precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
        return jax.lax.dot_general(
            left, right, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
        )

    def difference(self, first, first_fine, second, second_fine):
        """Of two sums of `Decays`, each coarse and fine; the fine ones are None where not exact."""
        return (first - second) + (first_fine - second_fine) if self.exact else first - second

    def group_lanes(self, g):
        return slice(g * self.N, (g + 1) * self.N)

    def columns(self):
        """Lanes of the turned decays, see `turn_columns`."""
        return -(-(3 if self.exact else 2) * self.rows // LANES) * LANES


# --- small functions ---------------------------------------------------------------------------


def iota(shape, axis):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def triangle(Q, keep):
    """float32 [Q, Q], 1 where keep(row, column)."""
    return jnp.where(keep(iota((Q, Q), 0), iota((Q, Q), 1)), 1.0, 0.0)


def only(v, tile, heads):
    """v [rows, X] with the lanes of the tile's other heads zeroed."""
    if heads == tile.heads:
        return v
    lane = iota(v.shape, 1)
    first = (heads[0] - tile.heads[0]) * tile.P
    return jnp.where((lane >= first) & (lane < first + len(heads) * tile.P), v, jnp.zeros_like(v))


def join(values, tile):
    """[rows, X] of each group of the tile (or of each head) -> every head's lanes from its own."""
    if len(values) == 1:
        return values[0]
    first, second = values
    return jnp.where(iota(first.shape, 1) < tile.P, first, second)


def stack_heads(v, tile):
    """[M, X] -> [X, X]: rows of head 0 with the other's lanes zeroed, below them those of head 1.

    The right operand of a product with weights packed as (head, position) in lanes.
    """
    return jnp.concatenate([only(v, tile, (h,)) for h in tile.heads], axis=0)


def rotate(v_QN, cos_QN, sin_QN):
    """Half-split rotation in float32; cos doubled, sin as (-sin, sin). The inverse takes -sin_QN."""
    v = v_QN.astype(jnp.float32)
    return v * cos_QN + pltpu.roll(v, v.shape[1] // 2, axis=1) * sin_QN


def spread(columns, first, tile):
    """Lane first + i of columns [rows, lanes] over the lanes of the tile's head i: [rows, X]."""
    slab = first // LANES * LANES
    v = columns[:, slab : slab + LANES]
    index = first - slab + jax.lax.div(iota(v.shape, 1), tile.P)
    return jnp.take_along_axis(v, index, axis=1, mode='promise_in_bounds')


def spread_one(numbers_H1, tile):
    """One number per head, [H, 1], over the heads' lanes: [1, X]."""
    return join([jnp.broadcast_to(numbers_H1[h : h + 1], (1, LANES)) for h in tile.heads], tile)


def double(v_1Q, g, block):
    """Positions of a block, once for each head of a tile: [1, Q] -> [1, X]."""
    return jnp.concatenate([v_1Q[:, g.block(block)]] * g.each, axis=1)


def pack(v_HQ, fold_ref, g):
    """[H, Q] -> [T, X] for each block: every head's positions of the block side by side.

    fold_ref: scratch [rows, Q].
    """
    if g.each == 1:
        return [v_HQ[:, g.block(block)] for block in range(g.blocks)]
    fold_ref[: g.H, :] = v_HQ
    first, second = (fold_ref[pl.ds(h, g.T, stride=2), :] for h in range(2))
    lower = iota((g.T, LANES), 1) < g.M
    packed = []
    for slab in range(0, g.Q, LANES):
        one, two = first[:, slab : slab + LANES], second[:, slab : slab + LANES]
        packed.append(jnp.where(lower, one, pltpu.roll(two, g.M, axis=1)))
        packed.append(jnp.where(lower, pltpu.roll(one, g.M, axis=1), two))
    return packed


def unpack(packed, fold_ref, g):
    """The inverse of `pack`."""
    if g.each == 1:
        return jnp.concatenate(packed, axis=1)
    lower = iota((g.T, LANES), 1) < g.M
    first, second = [], []
    for one, two in zip(packed[::2], packed[1::2]):
        first.append(jnp.where(lower, one, pltpu.roll(two, g.M, axis=1)))
        second.append(jnp.where(lower, pltpu.roll(one, g.M, axis=1), two))
    return interleave([jnp.concatenate(first, axis=1), jnp.concatenate(second, axis=1)], fold_ref, g)


def interleave(values, fold_ref, g):
    """[T, Q] for each head of a tile -> [H, Q]."""
    if g.each == 1:
        return values[0]
    for h, v in enumerate(values):
        fold_ref[pl.ds(h, g.T, stride=2), :] = v
    return fold_ref[: g.H, :]


# --- decays, masks and tables of a chunk ----------------------------------------------------------


class Decays(typing.NamedTuple):
    """With positions in lanes; float32. Sums are logarithms of base 2 from the chunk's start."""

    coarse_HQ: jax.Array  # sum = coarse + fine
    fine_HQ: jax.Array | None
    scale_HQ: jax.Array  # dt times the factor s -> chunk's end; 0 across a segment's border
    enter_HQ: jax.Array  # factor, chunk's start -> q
    chunk_H1: jax.Array  # factor, chunk's start -> end


def decays(g, dt_HQ, a_H1, runs):
    """runs: None, or int32 (run of each token [1, Q], of the token before the chunk [1, 1])."""
    Q = g.Q
    until = triangle(Q, lambda s, q: s <= q)
    log_HQ = jnp.maximum(dt_HQ * (a_H1 * LOG2_E), MIN_LOG2_DECAY)
    fine_HQ = None
    if g.exact:
        # Sums of multiples of 2^-8 and their differences are exact in float32 (they stay below
        # 2^16), so that weak steps after a strong one keep their digits.
        steps_HQ = jnp.round(log_HQ * 256.0) / 256.0
        coarse_HQ, fine_HQ = g.dot('nn', steps_HQ, until), g.dot('nn', log_HQ - steps_HQ, until)
        sum_HQ = coarse_HQ + fine_HQ
        rest_HQ = (coarse_HQ[:, Q - 1 :] - coarse_HQ) + (fine_HQ[:, Q - 1 :] - fine_HQ)
    else:
        coarse_HQ = sum_HQ = g.dot('nn', log_HQ, until)
        rest_HQ = coarse_HQ[:, Q - 1 :] - coarse_HQ
    enter_HQ, leave_HQ = jnp.exp2(sum_HQ), jnp.exp2(rest_HQ)
    chunk_H1 = enter_HQ[:, Q - 1 :]
    if runs is not None:
        run_1Q, before_11 = runs
        last_11 = run_1Q[:, Q - 1 :]
        enter_HQ = jnp.where(run_1Q == before_11, enter_HQ, 0.0)
        leave_HQ = jnp.where(run_1Q == last_11, leave_HQ, 0.0)
        chunk_H1 = jnp.where(last_11 == before_11, chunk_H1, 0.0)
    return Decays(coarse_HQ, fine_HQ, dt_HQ * leave_HQ, enter_HQ, chunk_H1)


def load_runs(g, run_ref):
    return (run_ref[0, 0, 0:1, :], run_ref[0, 0, 1:2, 0:1]) if g.segmented else None


def turn_columns(g, arrays):
    """[H, Q] arrays stacked at distances of g.rows and turned: [Q, lanes]."""
    stacked = []
    for v in arrays:
        stacked.append(v)
        if g.rows > g.H:
            stacked.append(jnp.zeros((g.rows - g.H, g.Q), jnp.float32))
    rest = -len(arrays) * g.rows % LANES
    if rest:
        stacked.append(jnp.zeros((rest, g.Q), jnp.float32))
    return jnp.concatenate(stacked, axis=0).T


def masks(g, runs, queries_in_rows):
    """Additive masks of exponents, float32.

    Returns diagonal [Q, X]: rows of one side, the other side's positions of the same block in lanes;
    enter [Q, X]: the row's position belongs to the segment that enters the chunk, leave: to the one
    that leaves it; and for each (q, s) with s < q, rows [M, X] and lanes [1, X]: the row's, or the
    lane's, position belongs to the segment of the last position before block q.
    """
    Q, M = g.Q, g.M
    row, lane = iota((Q, LANES), 0), iota((Q, LANES), 1)
    if M < LANES:
        row, lane = jax.lax.rem(row, M), jax.lax.rem(lane, M)
    visible = row >= lane if queries_in_rows else row <= lane
    if runs is None:
        return jnp.where(visible, 0.0, HIDDEN), None, None, {}
    run_1Q, before_11 = runs
    run_QX = jnp.broadcast_to(run_1Q, (LANES, Q)).T
    same = (
        jnp.concatenate([jnp.broadcast_to(double(run_1Q, g, i), (M, LANES)) for i in range(g.blocks)], axis=0) == run_QX
    )
    across = {}
    for q, s in g.pairs:
        if s < q:
            edge = run_1Q[:, q * M - 1 : q * M]
            rows, lanes = (q, s) if queries_in_rows else (s, q)
            across[q, s] = (
                jnp.where(run_QX[g.block(rows)] == edge, 0.0, HIDDEN),
                jnp.where(double(run_1Q, g, lanes) == edge, 0.0, HIDDEN),
            )
    enter = jnp.where(run_QX == before_11, 0.0, HIDDEN)
    leave = jnp.where(run_QX == run_1Q[:, Q - 1 :], 0.0, HIDDEN)
    return jnp.where(visible & same, 0.0, HIDDEN), enter, leave, across


def tables(g, cos, sin):
    """cos and sin [Q, N] of `rotate`, from [N/2, Q]."""
    return jnp.concatenate([cos, cos], axis=0).T, jnp.concatenate([-sin, sin], axis=0).T


def load_rows(g, ref, lanes, chunk):
    """[Q, lanes] of a block, 0 beyond the sequence's end, where the block holds anything."""
    v = ref[0, :, lanes]
    if g.ragged:
        v = jnp.where(iota(v.shape, 0) < g.L - chunk * g.Q, v, jnp.zeros_like(v))
    return v


def load_lanes(g, ref, chunk):
    """[rows, Q] of a block that holds positions in lanes, 0 beyond the sequence's end."""
    v = ref[0]
    if g.ragged:
        v = jnp.where(iota(v.shape, 1) < g.L - chunk * g.Q, v, jnp.zeros_like(v))
    return v
