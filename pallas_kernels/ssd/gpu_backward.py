"""The backward walk over one head's chunks, as a Pallas Mosaic GPU kernel for Hopper.

Legend: B rows, L length, H heads, G groups, R heads per group, P head width, N state width,
C chunks, Q position in a chunk (query side), S position in the same chunk (source side).

The walk goes from the last chunk to the first. One CTA of three warpgroups walks one head of one
row. One warpgroup fetches. One works by source ([S, ...]) and computes dx and db. One works by query
([Q, ...]): it computes dc and the gradient of the state, [P, N], which it keeps as an accumulator in
registers. Both compute the matrices of pairs, one as [S, Q] and one as [Q, S], with the operands of
their products swapped: an operand in registers must be the left one, and an accumulator cannot be
transposed. Both must compute the same bits for the decays, because the gradient of a decay is a
difference of a sum over [S, Q] and a sum over [Q, S].
"""

import functools
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssd.gpu_chunk import (
    CHUNK,
    DECAY,
    DT,
    ENTER,
    LEAVE,
    SCALE,
    SLOTS,
    VECTORS,
    add_product,
    column,
    decay_QS,
    decay_SQ,
    launch,
    load_matrix,
    of_columns,
    of_rows,
    positions,
    products,
    tiles,
    transposed,
)  # fmt: skip

# Rows of the per-chunk sums, float32, that gpu.py makes ddt and da of. By source, [B, C, H, 3, S]:
#   LEAVING: the source's term in the chunk's last state, without dt
#   WITHIN: the sum over its pairs with queries, without dt
#   LATER: the sum over its pairs with later queries
LEAVING, WITHIN, LATER = range(3)
# By query, [B, C, H, 2, Q]:
#   TAKEN: the sum over its pairs with earlier sources, plus its term from the chunk's first state
#   PASSED: at position p, the sum over n of the first state's terms in the last
TAKEN, PASSED = range(2)
# Per thread: 2 x 232 + 40 is the 3 x 168 that a launch of 384 threads is given; a request for more would wait forever.
REGISTERS = {'work': 232, 'fetch': 40}
BY_SOURCE, BY_QUERY, FETCH = range(3)  # warpgroups


class Refs(typing.NamedTuple):
    """Memory of the kernel. A slot holds what belongs to one chunk."""

    # Inputs and outputs, in global memory.
    x: typing.Any  # [B, L, H, P] bfloat16
    vectors: typing.Any  # [B, C, H, VECTORS, Q] float32
    b: typing.Any  # [B, L, G, N] bfloat16
    states: typing.Any  # [B, C, H, P, N] bfloat16
    dfinal: typing.Any  # [B, H, P, N] float32
    dx: typing.Any  # [B, L, H, P] bfloat16
    db: typing.Any  # [B, L, H, N] bfloat16
    by_source: typing.Any  # [B, C, H, 3, S] float32
    by_query: typing.Any  # [B, C, H, 2, Q] float32
    dinitial: typing.Any  # [B, H, P, N] float32
    # Scratch, in shared memory.
    x_s: typing.Any  # [SLOTS, S, P] bfloat16
    b_s: typing.Any  # [SLOTS, S, N] bfloat16
    states_s: typing.Any  # [SLOTS, P, N] bfloat16
    dstate_s: typing.Any  # [SLOTS, P, N] bfloat16
    vectors_s: typing.Any  # [SLOTS, VECTORS, Q] float32
    dx_s: typing.Any  # [S, P] bfloat16
    db_s: typing.Any  # [S, N] bfloat16
    by_source_s: typing.Any  # [3, S] float32
    by_query_s: typing.Any  # [2, Q] float32
    # Barriers, [SLOTS] each.
    fetched: typing.Any
    read: typing.Any
    dstate_written: typing.Any
    dstate_read: typing.Any
    # Where there was a y.
    c: typing.Any = None  # [B, L, G, N] bfloat16, input
    dy: typing.Any = None  # [B, L, H, P] bfloat16, input
    dc: typing.Any = None  # [B, L, H, N] bfloat16, output
    c_s: typing.Any = None  # [SLOTS, Q, N] bfloat16
    dy_s: typing.Any = None  # [SLOTS, Q, P] bfloat16
    dyscaled_s: typing.Any = None  # [Q, P] bfloat16
    dc_s: typing.Any = None  # [Q, N] bfloat16
    # Where there are segments.
    starts: typing.Any = None  # [B, C, Q] int32, input
    starts_s: typing.Any = None  # [SLOTS, Q] int32


class Fetched(typing.NamedTuple):
    """Shared memory with one chunk."""

    x: typing.Any  # [S, P] bfloat16
    vectors: typing.Any  # [VECTORS, Q] float32
    b: typing.Any  # [S, N] bfloat16
    states: typing.Any  # [P, N] bfloat16: the state before the chunk
    c: typing.Any = None  # [Q, N] bfloat16
    dy: typing.Any = None  # [Q, P] bfloat16
    starts: typing.Any = None  # [Q] int32


class _Cta(typing.NamedTuple):
    """What the warpgroups of a CTA share."""

    refs: Refs
    row: typing.Any  # int32, of the batch
    head: typing.Any  # int32
    group: typing.Any  # int32
    C: int
    loads: tuple[str, ...]  # what a slot receives
    interpret: typing.Any


def walk(x, vectors, b, c, starts, states, dy, dfinal, *, interpret=False):
    """Gradients of gpu_forward.walk.

    Args:
      x, vectors, b, c, starts: as there.
      states: [B, C, H, P, N] bfloat16, before each chunk.
      dy: [B, L, H, P] bfloat16. None, as c: there was no y.
      dfinal: [B, H, P, N] float32.

    Returns:
      dict of dx [B, L, H, P], db and dc [B, L, H, N] (rotated, of each head) in bfloat16; by_source
      [B, C, H, 3, S], by_query [B, C, H, 2, Q] and dinitial [B, H, P, N] float32. Without dy there is no dc, and of the
      sums only LEAVING and PASSED are written.
    """
    B, L, H, P = x.shape
    G, N = b.shape[2:]
    C, R = L // CHUNK, H // G
    bfloat16 = x.dtype
    inputs = {'x': x, 'vectors': vectors, 'b': b, 'states': states, 'dfinal': dfinal}
    outputs = {
        'dx': jax.ShapeDtypeStruct(x.shape, bfloat16),
        'db': jax.ShapeDtypeStruct((B, L, H, N), bfloat16),
        'by_source': jax.ShapeDtypeStruct((B, C, H, 3, CHUNK), jnp.float32),
        'by_query': jax.ShapeDtypeStruct((B, C, H, 2, CHUNK), jnp.float32),
        'dinitial': jax.ShapeDtypeStruct((B, H, P, N), jnp.float32),
    }
    scratch = {
        'x_s': tiles(SLOTS, CHUNK, P),
        'b_s': tiles(SLOTS, CHUNK, N),
        'states_s': tiles(SLOTS, P, N),
        'dstate_s': tiles(SLOTS, P, N),
        'vectors_s': plgpu.SMEM((SLOTS, VECTORS, CHUNK), jnp.float32),
        'dx_s': tiles(CHUNK, P),
        'db_s': tiles(CHUNK, N),
        'by_source_s': plgpu.SMEM((3, CHUNK), jnp.float32),
        'by_query_s': plgpu.SMEM((2, CHUNK), jnp.float32),
    }
    if dy is not None:
        inputs |= {'c': c, 'dy': dy}
        outputs['dc'] = jax.ShapeDtypeStruct((B, L, H, N), bfloat16)
        scratch |= {
            'c_s': tiles(SLOTS, CHUNK, N),
            'dy_s': tiles(SLOTS, CHUNK, P),
            'dyscaled_s': tiles(CHUNK, P),
            'dc_s': tiles(CHUNK, N),
        }
        if starts is not None:
            inputs['starts'], scratch['starts_s'] = starts, plgpu.SMEM((SLOTS, CHUNK), jnp.int32)
    loads = tuple(name for name in ('x', 'vectors', 'b', 'c', 'states', 'dy', 'starts') if name in inputs)
    scratch |= {
        'fetched': plgpu.Barrier(num_arrivals=len(loads), num_barriers=SLOTS),
        'read': plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),  # a slot's inputs, by both
        'dstate_written': plgpu.Barrier(num_barriers=SLOTS),
        'dstate_read': plgpu.Barrier(num_barriers=SLOTS),
    }
    names = (*inputs, *outputs, *scratch)

    def body(*refs):
        refs = Refs(**dict(zip(names, refs, strict=True)))
        head, row = lax.axis_index('head'), lax.axis_index('row')
        warpgroup = lax.axis_index('warpgroup')
        cta = _Cta(refs, row, head, lax.div(head, jnp.int32(R)), C, loads, interpret)
        pl.when(warpgroup == BY_SOURCE)(functools.partial(_walk_by_source, cta))
        pl.when(warpgroup == BY_QUERY)(functools.partial(_walk_by_query, cta))
        pl.when(warpgroup == FETCH)(functools.partial(_walk_fetching, cta))

    return launch(body, inputs, (H, B), 'backward', outputs, scratch, interpret, warpgroups=3)


# --- the three warpgroups -----------------------------------------------------------------------


def _walk_by_source(cta):
    plgpu.set_max_registers(REGISTERS['work'], action='increase')
    lax.fori_loop(0, cta.C, functools.partial(_source_chunk, cta), None)
    plgpu.wait_smem_to_gmem(0)


def _walk_by_query(cta):
    r = cta.refs
    plgpu.set_max_registers(REGISTERS['work'], action='increase')
    dstate_PN = plgpu.load(r.dfinal.at[cta.row, cta.head], layout=plgpu.Layout.WGMMA, optimized=False)
    dstate_PN = lax.fori_loop(0, cta.C, functools.partial(_query_chunk, cta), dstate_PN)
    r.dinitial.at[cta.row, cta.head][...] = dstate_PN
    _drain(r.dstate_read, cta.C)
    plgpu.wait_smem_to_gmem(0)


def _walk_fetching(cta):
    plgpu.set_max_registers(REGISTERS['fetch'], action='decrease')
    lax.fori_loop(0, cta.C, functools.partial(_fetch, cta), None)
    _drain(cta.refs.read, cta.C)


def _drain(barrier, C):
    """No barrier may be left with an arrival that nobody has waited for."""
    for step in range(max(C - SLOTS, 0), C):
        plgpu.barrier_wait(barrier.at[step % SLOTS])


# --- one chunk of each ----------------------------------------------------------------------------


def _chunk_of(cta, step):
    """(chunk, its positions, slot) of a step."""
    i = cta.C - 1 - step
    return i, pl.ds(i * CHUNK, CHUNK), lax.rem(step, jnp.int32(SLOTS))


def _fetch(cta, step, _):
    i, rows, slot = _chunk_of(cta, step)
    row, head, group = cta.row, cta.head, cta.group
    pl.when(step >= SLOTS)(lambda: plgpu.barrier_wait(cta.refs.read.at[slot]))
    source = {
        'x': (row, rows, head), 'dy': (row, rows, head), 'b': (row, rows, group), 'c': (row, rows, group),
        'vectors': (row, i, head), 'states': (row, i, head), 'starts': (row, i),
    }  # fmt: skip
    for name in cta.loads:
        target = getattr(cta.refs, name + '_s').at[slot]
        plgpu.copy_gmem_to_smem(getattr(cta.refs, name).at[source[name]], target, cta.refs.fetched.at[slot])


def _await_chunk(cta, slot):
    """Waits for the slot's inputs."""
    plgpu.barrier_wait(cta.refs.fetched.at[slot])
    return Fetched(**{name: getattr(cta.refs, name + '_s').at[slot] for name in cta.loads})


def _source_chunk(cta, step, _):
    """dx, db and the sums by source of a chunk."""
    r, with_y = cta.refs, cta.refs.dy is not None
    i, rows, slot = _chunk_of(cta, step)
    chunk = _await_chunk(cta, slot)
    P, vectors, dstate_s = chunk.x.shape[1], chunk.vectors, r.dstate_s.at[slot]
    bfloat16 = r.dx.dtype
    if with_y:
        scores_SQ, dpairs_SQ = products(
            cta.interpret, (chunk.b, transposed(chunk.c)), (chunk.x, transposed(chunk.dy))
        )  # fmt: skip
        assert scores_SQ.shape == dpairs_SQ.shape == (CHUNK, CHUNK)
        decays_SQ = decay_SQ(vectors, chunk.starts)
        decayed_SQ = scores_SQ * decays_SQ
        pairs_SQ = decayed_SQ * dpairs_SQ
        within_S = pairs_SQ.sum(axis=1)
        later_S = jnp.where(positions(1) > positions(0), pairs_SQ, 0.0).sum(axis=1) * column(vectors.at[DT])
        dt_SQ = of_rows(vectors.at[DT], CHUNK)
        weights_SQ = (decayed_SQ * dt_SQ).astype(bfloat16)
        dscores_SQ = (dpairs_SQ * decays_SQ * dt_SQ).astype(bfloat16)
    plgpu.barrier_wait(r.dstate_written.at[slot])
    (dscaled_SP,) = products(cta.interpret, (chunk.b, transposed(dstate_s)))
    x_SP = load_matrix(chunk.x)
    assert dscaled_SP.shape == x_SP.shape == (CHUNK, P)
    leaving_S = (x_SP * dscaled_SP).sum(axis=1) * column(vectors.at[LEAVE])
    scale_SP = of_rows(vectors.at[SCALE], P)
    dx_SP = dscaled_SP * scale_SP
    (db_SN,) = products(cta.interpret, ((x_SP * scale_SP).astype(bfloat16), dstate_s))
    plgpu.barrier_arrive(r.dstate_read.at[slot])
    if with_y:
        dx_SP = add_product(cta.interpret, dx_SP, weights_SQ, chunk.dy)
        db_SN = add_product(cta.interpret, db_SN, dscores_SQ, chunk.c)
    plgpu.barrier_arrive(r.read.at[slot])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the last step's results
    r.by_source_s.at[LEAVING][...] = leaving_S
    if with_y:
        r.by_source_s.at[WITHIN][...] = within_S
        r.by_source_s.at[LATER][...] = later_S
    r.dx_s[...] = dx_SP.astype(bfloat16)
    r.db_s[...] = db_SN.astype(bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(r.dx_s, r.dx.at[cta.row, rows, cta.head])
    plgpu.copy_smem_to_gmem(r.db_s, r.db.at[cta.row, rows, cta.head])
    plgpu.copy_smem_to_gmem(r.by_source_s, r.by_source.at[cta.row, i, cta.head])


def _query_chunk(cta, step, dstate_PN):
    """dc and the sums by query of a chunk; the gradient of the state after it -> before it."""
    r, with_y = cta.refs, cta.refs.dy is not None
    i, rows, slot = _chunk_of(cta, step)
    P, N = dstate_PN.shape
    bfloat16 = r.dx.dtype
    pl.when(step >= SLOTS)(lambda: plgpu.barrier_wait(r.dstate_read.at[slot]))
    r.dstate_s.at[slot][...] = dstate_PN.astype(bfloat16)
    chunk = _await_chunk(cta, slot)
    vectors = chunk.vectors
    if with_y:
        dyscaled_QP = load_matrix(chunk.dy) * of_rows(vectors.at[ENTER], P)
        r.dyscaled_s[...] = dyscaled_QP.astype(bfloat16)
    plgpu.commit_smem()
    plgpu.barrier_arrive(r.dstate_written.at[slot])
    passed_P = (dstate_PN * load_matrix(chunk.states)).sum(axis=1) * column(vectors.at[DECAY])
    dstate_PN = dstate_PN * of_rows(vectors.at[DECAY], N)
    if with_y:
        dstate_PN = add_product(cta.interpret, dstate_PN, transposed(r.dyscaled_s), chunk.c)
        scores_QS, dpairs_QS = products(
            cta.interpret, (chunk.c, transposed(chunk.b)), (chunk.dy, transposed(chunk.x))
        )  # fmt: skip
        assert scores_QS.shape == dpairs_QS.shape == (CHUNK, CHUNK)
        dscores_QS = dpairs_QS * decay_QS(vectors, chunk.starts) * of_columns(vectors.at[DT], CHUNK)
        taken_Q = jnp.where(positions(0) > positions(1), dscores_QS * scores_QS, 0.0).sum(axis=1)
        (dc_QN,) = products(cta.interpret, (r.dyscaled_s, chunk.states))
        assert dc_QN.shape == (CHUNK, N)
        taken_Q = taken_Q + (dc_QN * load_matrix(chunk.c)).sum(axis=1)
        dc_QN = add_product(cta.interpret, dc_QN, dscores_QS.astype(bfloat16), chunk.b)
    plgpu.barrier_arrive(r.read.at[slot])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    r.by_query_s.at[PASSED][...] = passed_P
    if with_y:
        r.by_query_s.at[TAKEN][...] = taken_Q
        r.dc_s[...] = dc_QN.astype(bfloat16)
    plgpu.commit_smem()
    if with_y:
        plgpu.copy_smem_to_gmem(r.dc_s, r.dc.at[cta.row, rows, cta.head])
    plgpu.copy_smem_to_gmem(r.by_query_s, r.by_query.at[cta.row, i, cta.head])
    return dstate_PN
