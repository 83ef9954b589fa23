"""The forward walks over heads' chunks, as Pallas Mosaic GPU kernels for Hopper.

Legend: B rows, L length, H heads, G groups, R heads per group, P head width, N state width,
C chunks, Q position in a chunk (query side), S position in the same chunk (source side).
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
    FORWARD_VECTORS,
    SCALE,
    SLOTS,
    add_product,
    decay_QS,
    launch,
    load_matrix,
    of_columns,
    of_rows,
    products,
    tiles,
    transposed,
)


class Refs(typing.NamedTuple):
    """Memory of the walk with y. E heads and F groups per CTA; a slot holds what was fetched of one chunk."""

    # Inputs and outputs, in global memory.
    x: typing.Any  # [B, L, H, P] bfloat16
    vectors: typing.Any  # [B, C, H, VECTORS, Q] float32
    b: typing.Any  # [B, L, G, N] bfloat16
    c: typing.Any  # [B, L, G, N] bfloat16
    initial: typing.Any  # [B, H, P, N] float32
    y: typing.Any  # [B, L, H, P] bfloat16
    final: typing.Any  # [B, H, P, N] float32
    # Scratch, in shared memory.
    x_s: typing.Any  # [SLOTS, E, S, P] bfloat16
    vectors_s: typing.Any  # [SLOTS, E, FORWARD_VECTORS, Q] float32
    b_s: typing.Any  # [SLOTS, F, S, N] bfloat16
    c_s: typing.Any  # [SLOTS, F, Q, N] bfloat16
    state_s: typing.Any  # [E, P, N] bfloat16
    scaled_s: typing.Any  # [E, Q, P] bfloat16: x as it enters the state, then y
    # Barriers. The last four are of each head: the two warpgroups hand on the matrix of its state, and that of x and y.
    fetched: typing.Any  # [SLOTS]
    read: typing.Any  # [SLOTS]
    state_written: typing.Any  # [E]
    state_read: typing.Any  # [E]
    scaled_read: typing.Any  # [E]
    y_copied: typing.Any  # [E]
    # Where they are wanted.
    states: typing.Any = None  # [B, C, H, P, N] bfloat16, output
    starts: typing.Any = None  # [B, C, Q] int32, input
    starts_s: typing.Any = None  # [SLOTS, 1, Q] int32


class Fetched(typing.NamedTuple):
    """Shared memory with one chunk of one head."""

    x: typing.Any  # [S, P] bfloat16
    vectors: typing.Any  # [FORWARD_VECTORS, Q] float32
    b: typing.Any  # [S, N] bfloat16
    c: typing.Any  # [Q, N] bfloat16
    starts: typing.Any = None  # [Q] int32


class _Cta(typing.NamedTuple):
    """What the warpgroups of a CTA share."""

    refs: Refs
    row: typing.Any  # int32, of the batch
    first: typing.Any  # int32, its first head
    R: int
    C: int
    loads: tuple[tuple[str, int], ...]  # what a slot receives, and how many of it: one per head, or one per group
    interpret: typing.Any


def walk(x, vectors, b, c, starts, initial, *, with_states=False, interpret=False):
    """One walk over every head of every row.

    A CTA walks two heads (one, where their number is odd), each by two warpgroups: one makes y, the
    other keeps the state, [P, N], as an accumulator in registers for the whole walk and rounds it
    once per chunk, for the product with c and as boundary state. Heads of one group share b and c.

    Args:
      x: [B, L, H, P] bfloat16, L a multiple of CHUNK.
      vectors: [B, C, H, VECTORS, Q] float32, see gpu_chunk.py.
      b, c: [B, L, G, N] bfloat16, rotated.
      starts: [B, C, Q] int32, where in its chunk a token's segment starts, or None: one segment.
      initial: [B, H, P, N] float32.
      with_states: whether to write the state before each chunk.

    Returns:
      dict of y [B, L, H, P], final [B, H, P, N] float32, and with_states states [B, C, H, P, N] bfloat16.
    """
    B, L, H, P = x.shape
    G, N = b.shape[2:]
    C, R = L // CHUNK, H // G
    heads = 2 if H % 2 == 0 else 1  # per CTA
    groups = 1 if R % heads == 0 else heads
    inputs = {'x': x, 'vectors': vectors, 'b': b, 'c': c, 'initial': initial}
    outputs = {'y': jax.ShapeDtypeStruct(x.shape, x.dtype), 'final': jax.ShapeDtypeStruct((B, H, P, N), jnp.float32)}
    if with_states:
        outputs['states'] = jax.ShapeDtypeStruct((B, C, H, P, N), x.dtype)
    scratch = {
        'x_s': tiles(SLOTS, heads, CHUNK, P),
        'vectors_s': plgpu.SMEM((SLOTS, heads, FORWARD_VECTORS, CHUNK), jnp.float32),
        'b_s': tiles(SLOTS, groups, CHUNK, N),
        'c_s': tiles(SLOTS, groups, CHUNK, N),
        'state_s': tiles(heads, P, N),
        'scaled_s': tiles(heads, CHUNK, P),
    }
    loads = [('x', heads), ('vectors', heads), ('b', groups), ('c', groups)]
    if starts is not None:
        inputs['starts'], scratch['starts_s'] = starts, plgpu.SMEM((SLOTS, 1, CHUNK), jnp.int32)
        loads.append(('starts', 1))
    scratch |= {
        'fetched': plgpu.Barrier(num_arrivals=sum(count for _, count in loads), num_barriers=SLOTS),
        'read': plgpu.Barrier(num_arrivals=2 * heads, num_barriers=SLOTS),
        'state_written': plgpu.Barrier(num_barriers=heads),
        'state_read': plgpu.Barrier(num_barriers=heads),
        'scaled_read': plgpu.Barrier(num_barriers=heads),
        'y_copied': plgpu.Barrier(num_barriers=heads),
    }
    names = (*inputs, *outputs, *scratch)

    def body(*refs):
        refs = Refs(**dict(zip(names, refs, strict=True)))
        first, row, warpgroup = lax.axis_index('head') * heads, lax.axis_index('row'), lax.axis_index('warpgroup')
        cta = _Cta(refs, row, first, R, C, tuple(loads), interpret)
        for j in range(heads):
            pl.when(warpgroup == 2 * j)(functools.partial(_walk_outputs, cta, j))
            pl.when(warpgroup == 2 * j + 1)(functools.partial(_walk_state, cta, j))

    return launch(body, inputs, (H // heads, B), 'forward', outputs, scratch, interpret, 2 * heads)


def _slot(step):
    return lax.rem(step, jnp.int32(SLOTS))


def _positions(step):
    return pl.ds(step * CHUNK, CHUNK)


def _fetch(cta, step):
    """Starts the copies of a chunk into its slot."""
    slot, rows = _slot(step), _positions(step)
    for name, count in cta.loads:
        for j in range(count):
            head = cta.first + j
            of_group = cta.row, rows, lax.div(head, jnp.int32(cta.R))
            source = {
                'x': (cta.row, rows, head), 'vectors': (cta.row, step, head, pl.ds(0, FORWARD_VECTORS)),
                'b': of_group, 'c': of_group, 'starts': (cta.row, step),
            }[name]  # fmt: skip
            target = getattr(cta.refs, name + '_s').at[slot, j]
            plgpu.copy_gmem_to_smem(getattr(cta.refs, name).at[source], target, cta.refs.fetched.at[slot])


def _await_chunk(cta, j, step):
    """Waits for a step's chunk: its slot, and what the slot holds for head j of the CTA."""
    slot = _slot(step)
    plgpu.barrier_wait(cta.refs.fetched.at[slot])
    views = {name: getattr(cta.refs, name + '_s').at[slot, min(j, count - 1)] for name, count in cta.loads}
    return slot, Fetched(**views)


def _walk_outputs(cta, j):
    """The warpgroup that makes y of head j."""
    lax.fori_loop(0, cta.C, functools.partial(_output_chunk, cta, j), None)
    plgpu.wait_smem_to_gmem(0)
    plgpu.barrier_arrive(cta.refs.y_copied.at[j])


def _output_chunk(cta, j, step, _):
    r = cta.refs
    slot, chunk = _await_chunk(cta, j, step)
    P = chunk.x.shape[1]
    plgpu.barrier_wait(r.state_written.at[j])
    scores_QS, y_QP = products(
        cta.interpret, (chunk.c, transposed(chunk.b)), (chunk.c, transposed(r.state_s.at[j]))
    )  # fmt: skip
    assert scores_QS.shape == (CHUNK, CHUNK) and y_QP.shape == (CHUNK, P)
    plgpu.barrier_arrive(r.state_read.at[j])

    @pl.when(step > 0)
    def _():
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(r.y_copied.at[j])

    weights_QS = scores_QS * decay_QS(chunk.vectors, chunk.starts) * of_columns(chunk.vectors.at[DT], CHUNK)
    y_QP = y_QP * of_rows(chunk.vectors.at[ENTER], P)
    y_QP = add_product(cta.interpret, y_QP, weights_QS.astype(jnp.bfloat16), chunk.x)
    plgpu.barrier_arrive(r.read.at[slot])
    plgpu.barrier_wait(r.scaled_read.at[j])
    r.scaled_s.at[j][...] = y_QP.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(r.scaled_s.at[j], r.y.at[cta.row, _positions(step), cta.first + j])


def _walk_state(cta, j):
    """The warpgroup that keeps the state of head j; that of the first head also fetches."""
    r, C = cta.refs, cta.C
    if j == 0:
        for step in range(min(SLOTS, C)):
            _fetch(cta, jnp.int32(step))
    state_PN = plgpu.load(r.initial.at[cta.row, cta.first + j], layout=plgpu.Layout.WGMMA, optimized=False)
    state_PN = lax.fori_loop(0, C, functools.partial(_state_chunk, cta, j), state_PN)
    r.final.at[cta.row, cta.first + j][...] = state_PN
    plgpu.wait_smem_to_gmem(0)
    # No barrier may be left with an arrival that nobody has waited for.
    plgpu.barrier_wait(r.state_read.at[j])
    plgpu.barrier_wait(r.y_copied.at[j])
    if j == 0:
        for step in range(max(C - SLOTS, 0), C):
            plgpu.barrier_wait(r.read.at[step % SLOTS])


def _state_chunk(cta, j, step, state_PN):
    r = cta.refs

    @pl.when(step > 0)
    def _():
        plgpu.barrier_wait(r.state_read.at[j])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    r.state_s.at[j][...] = state_PN.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.barrier_arrive(r.state_written.at[j])
    if r.states is not None:
        plgpu.copy_smem_to_gmem(r.state_s.at[j], r.states.at[cta.row, step, cta.first + j])
    if j == 0:

        @pl.when((step > 0) & (step + 1 < cta.C))
        def _():
            plgpu.barrier_wait(r.read.at[_slot(step + 1)])
            _fetch(cta, step + 1)

    slot, chunk = _await_chunk(cta, j, step)
    scaled_SP = load_matrix(chunk.x) * of_rows(chunk.vectors.at[SCALE], chunk.x.shape[1])
    assert scaled_SP.shape == chunk.x.shape
    pl.when(step > 0)(lambda: plgpu.barrier_wait(r.y_copied.at[j]))
    r.scaled_s.at[j][...] = scaled_SP.astype(jnp.bfloat16)
    plgpu.commit_smem()
    state_PN = state_PN * of_rows(chunk.vectors.at[DECAY], chunk.b.shape[1])
    state_PN = add_product(cta.interpret, state_PN, transposed(r.scaled_s.at[j]), chunk.b)
    plgpu.barrier_arrive(r.scaled_read.at[j])
    plgpu.barrier_arrive(r.read.at[slot])
    return state_PN


# --- the walk without y -----------------------------------------------------------------------


class StateRefs(typing.NamedTuple):
    """Memory of the walk without y."""

    # Inputs and output, in global memory.
    x: typing.Any  # [B, L, H, P] bfloat16
    vectors: typing.Any  # [B, C, H, VECTORS, Q] float32
    b: typing.Any  # [B, L, G, N] bfloat16
    initial: typing.Any  # [B, H, P, N] float32
    final: typing.Any  # [B, H, P, N] float32
    # Scratch, in shared memory.
    x_s: typing.Any  # [SLOTS, S, P] bfloat16
    b_s: typing.Any  # [SLOTS, S, N] bfloat16
    vectors_s: typing.Any  # [SLOTS, FORWARD_VECTORS, Q] float32
    scaled_s: typing.Any  # [S, P] bfloat16
    fetched: typing.Any  # barriers [SLOTS]
    # Where they are wanted.
    states: typing.Any = None  # [B, C, H, P, N] bfloat16, output
    state_s: typing.Any = None  # [P, N] bfloat16


class _StateWalk(typing.NamedTuple):
    refs: StateRefs
    row: typing.Any  # int32, of the batch
    head: typing.Any  # int32
    R: int
    C: int
    scale: int
    reverse: bool
    interpret: typing.Any


def walk_states(x, vectors, b, initial, *, scale=SCALE, reverse=False, with_states=False, interpret=False):
    """The walk without y: one warpgroup per head, several CTAs per multiprocessor.

    Args and results as `walk`, without c, starts and y, besides:
      scale: which vector multiplies x where it enters the state.
      reverse: from the last chunk to the first.
    """
    B, L, H, P = x.shape
    G, N = b.shape[2:]
    C, R = L // CHUNK, H // G
    inputs = {'x': x, 'vectors': vectors, 'b': b, 'initial': initial}
    outputs = {'final': jax.ShapeDtypeStruct((B, H, P, N), jnp.float32)}
    scratch = {
        'x_s': tiles(SLOTS, CHUNK, P),
        'b_s': tiles(SLOTS, CHUNK, N),
        'vectors_s': plgpu.SMEM((SLOTS, FORWARD_VECTORS, CHUNK), jnp.float32),
        'scaled_s': tiles(CHUNK, P),
        'fetched': plgpu.Barrier(num_arrivals=3, num_barriers=SLOTS),
    }
    if with_states:
        outputs['states'], scratch['state_s'] = jax.ShapeDtypeStruct((B, C, H, P, N), x.dtype), tiles(P, N)
    names = (*inputs, *outputs, *scratch)

    def body(*refs):
        refs = StateRefs(**dict(zip(names, refs, strict=True)))
        head, row = lax.axis_index('head'), lax.axis_index('row')
        w = _StateWalk(refs, row, head, R, C, scale, reverse, interpret)
        _fetch_for_state(w, jnp.int32(0))
        state_PN = plgpu.load(refs.initial.at[row, head], layout=plgpu.Layout.WGMMA, optimized=False)
        refs.final.at[row, head][...] = lax.fori_loop(0, C, functools.partial(_state_only_chunk, w), state_PN)
        plgpu.wait_smem_to_gmem(0)

    return launch(body, inputs, (H, B), 'state', outputs, scratch, interpret)


def _chunk_of(w, step):
    return w.C - 1 - step if w.reverse else step


def _fetch_for_state(w, step):
    i, slot = _chunk_of(w, step), _slot(step)
    rows = _positions(i)
    source = {
        'x': (w.row, rows, w.head), 'b': (w.row, rows, lax.div(w.head, jnp.int32(w.R))),
        'vectors': (w.row, i, w.head, pl.ds(0, FORWARD_VECTORS)),
    }  # fmt: skip
    for name, where in source.items():
        target = getattr(w.refs, name + '_s').at[slot]
        plgpu.copy_gmem_to_smem(getattr(w.refs, name).at[where], target, w.refs.fetched.at[slot])


def _state_only_chunk(w, step, state_PN):
    r, slot = w.refs, _slot(step)
    plgpu.barrier_wait(r.fetched.at[slot])
    pl.when(step + 1 < w.C)(lambda: _fetch_for_state(w, step + 1))
    x, b, vectors = r.x_s.at[slot], r.b_s.at[slot], r.vectors_s.at[slot]
    if r.states is not None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        r.state_s[...] = state_PN.astype(jnp.bfloat16)
    scaled_SP = load_matrix(x) * of_rows(vectors.at[w.scale], x.shape[1])
    r.scaled_s[...] = scaled_SP.astype(jnp.bfloat16)
    plgpu.commit_smem()
    if r.states is not None:
        plgpu.copy_smem_to_gmem(r.state_s, r.states.at[w.row, _chunk_of(w, step), w.head])
    state_PN = state_PN * of_rows(vectors.at[DECAY], b.shape[1])
    return add_product(w.interpret, state_PN, transposed(r.scaled_s), b)
