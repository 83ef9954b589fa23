"""The backward walk over one head's chunks, as a Pallas Mosaic GPU kernel for Hopper.

Legend: B rows, L length, H heads, G groups, R heads a group, P head width, N state width,
C chunks, Q position in a chunk (query side), S position in the same chunk (source side).

From the last chunk to the first. One CTA of three warpgroups walks one head of one row: one fetches,
one works by source ([S, ...]: dx, db) and one by query ([Q, ...]: dc) and on the gradient of the
state, [P, N], which it keeps as an accumulator in registers. Matrices of pairs are made by both,
[S, Q] and [Q, S], by swapping the operands of their products: what a product takes from registers
must be its left operand, and an accumulator is never transposed. The decays of both have the same
bits, because the gradient of a decay is a difference of sums of the one and of the other.
"""

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
    places,
    products,
    tiles,
    transposed,
)  # fmt: skip

# Rows of the per-chunk sums, float32, that gpu.py makes ddt and da of. By source, [B, C, H, 3, S]:
#   LEAVING: what it adds to the chunk's last state, without dt
#   WITHIN: its pairs, without dt
#   LATER: its pairs with later queries
LEAVING, WITHIN, LATER = range(3)
# By query, [B, C, H, 2, Q]:
#   TAKEN: its pairs with earlier sources, and what it takes from the chunk's first state
#   PASSED: in the place of p, the sum over n of what the chunk's first state adds to its last
TAKEN, PASSED = range(2)
# A thread's: 2 x 232 + 40 is the 3 x 168 that a launch of 384 threads is given; to ask for more would wait for ever.
REGISTERS = {'work': 232, 'fetch': 40}
BY_SOURCE, BY_QUERY, FETCH = range(3)  # warpgroups


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
        'dx': jax.ShapeDtypeStruct(x.shape, bfloat16), 'db': jax.ShapeDtypeStruct((B, L, H, N), bfloat16),
        'by_source': jax.ShapeDtypeStruct((B, C, H, 3, CHUNK), jnp.float32),
        'by_query': jax.ShapeDtypeStruct((B, C, H, 2, CHUNK), jnp.float32),
        'dinitial': jax.ShapeDtypeStruct((B, H, P, N), jnp.float32),
    }  # fmt: skip
    scratch = {
        'x_s': tiles(SLOTS, CHUNK, P), 'b_s': tiles(SLOTS, CHUNK, N),
        'states_s': tiles(SLOTS, P, N), 'dstate_s': tiles(SLOTS, P, N),
        'vectors_s': plgpu.SMEM((SLOTS, VECTORS, CHUNK), jnp.float32),
        'dx_s': tiles(CHUNK, P), 'db_s': tiles(CHUNK, N),
        'by_source_s': plgpu.SMEM((3, CHUNK), jnp.float32), 'by_query_s': plgpu.SMEM((2, CHUNK), jnp.float32),
    }  # fmt: skip
    if dy is not None:
        inputs |= {'c': c, 'dy': dy}
        outputs['dc'] = jax.ShapeDtypeStruct((B, L, H, N), bfloat16)
        scratch |= {
            'c_s': tiles(SLOTS, CHUNK, N), 'dy_s': tiles(SLOTS, CHUNK, P),
            'dyscaled_s': tiles(CHUNK, P), 'dc_s': tiles(CHUNK, N),
        }  # fmt: skip
        if starts is not None:
            inputs['starts'], scratch['starts_s'] = starts, plgpu.SMEM((SLOTS, CHUNK), jnp.int32)
    loads = [name for name in ('x', 'vectors', 'b', 'c', 'states', 'dy', 'starts') if name in inputs]
    scratch |= {
        'fetched': plgpu.Barrier(num_arrivals=len(loads), num_barriers=SLOTS),
        'read': plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),  # a slot's inputs, by both
        'dstate_written': plgpu.Barrier(num_barriers=SLOTS),
        'dstate_read': plgpu.Barrier(num_barriers=SLOTS),
    }
    names = (*inputs, *outputs, *scratch)

    def body(*references):
        r = dict(zip(names, references, strict=True))
        head, row = lax.axis_index('head'), lax.axis_index('row')
        warpgroup = lax.axis_index('warpgroup')
        group = lax.div(head, jnp.int32(R))

        def place(step):
            """(chunk, its positions, slot) of a step."""
            i = C - 1 - step
            return i, pl.ds(i * CHUNK, CHUNK), lax.rem(step, jnp.int32(SLOTS))

        def drain(barrier):
            for step in range(max(C - SLOTS, 0), C):
                plgpu.barrier_wait(barrier.at[step % SLOTS])

        def fetch(step, _):
            i, rows, slot = place(step)
            pl.when(step >= SLOTS)(lambda: plgpu.barrier_wait(r['read'].at[slot]))
            source = {
                'x': (row, rows, head), 'dy': (row, rows, head), 'b': (row, rows, group), 'c': (row, rows, group),
                'vectors': (row, i, head), 'states': (row, i, head), 'starts': (row, i),
            }  # fmt: skip
            for name in loads:
                plgpu.copy_gmem_to_smem(r[name].at[source[name]], r[name + '_s'].at[slot], r['fetched'].at[slot])

        def arrived(slot):
            """Waits for the slot's inputs: name -> reference."""
            plgpu.barrier_wait(r['fetched'].at[slot])
            return {name: r[name + '_s'].at[slot] for name in loads}

        def by_source(step, _):
            i, rows, slot = place(step)
            s = arrived(slot)
            vector, dstate_s = s['vectors'], r['dstate_s'].at[slot]
            if dy is not None:
                scores_SQ, dpairs_SQ = products(interpret, (s['b'], transposed(s['c'])), (s['x'], transposed(s['dy'])))
                decays_SQ = decay_SQ(vector, s.get('starts'))
                decayed_SQ = scores_SQ * decays_SQ
                pairs_SQ = decayed_SQ * dpairs_SQ
                within = pairs_SQ.sum(axis=1)
                later = jnp.where(places(1) > places(0), pairs_SQ, 0.0).sum(axis=1) * column(vector.at[DT])
                dt = of_rows(vector.at[DT], CHUNK)
                weights_SQ, dscores_SQ = (
                    (decayed_SQ * dt).astype(bfloat16),
                    (dpairs_SQ * decays_SQ * dt).astype(bfloat16),
                )
            plgpu.barrier_wait(r['dstate_written'].at[slot])
            (dscaled_SP,) = products(interpret, (s['b'], transposed(dstate_s)))
            x_SP = load_matrix(s['x'])
            leaving = (x_SP * dscaled_SP).sum(axis=1) * column(vector.at[LEAVE])
            scale_SP = of_rows(vector.at[SCALE], P)
            dx_SP = dscaled_SP * scale_SP
            (db_SN,) = products(interpret, ((x_SP * scale_SP).astype(bfloat16), dstate_s))
            plgpu.barrier_arrive(r['dstate_read'].at[slot])
            if dy is not None:
                dx_SP = add_product(interpret, dx_SP, weights_SQ, s['dy'])
                db_SN = add_product(interpret, db_SN, dscores_SQ, s['c'])
            plgpu.barrier_arrive(r['read'].at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the last step's results
            r['by_source_s'].at[LEAVING][...] = leaving
            if dy is not None:
                r['by_source_s'].at[WITHIN][...] = within
                r['by_source_s'].at[LATER][...] = later
            r['dx_s'][...] = dx_SP.astype(bfloat16)
            r['db_s'][...] = db_SN.astype(bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(r['dx_s'], r['dx'].at[row, rows, head])
            plgpu.copy_smem_to_gmem(r['db_s'], r['db'].at[row, rows, head])
            plgpu.copy_smem_to_gmem(r['by_source_s'], r['by_source'].at[row, i, head])

        def by_query(step, dstate):
            i, rows, slot = place(step)
            pl.when(step >= SLOTS)(lambda: plgpu.barrier_wait(r['dstate_read'].at[slot]))
            r['dstate_s'].at[slot][...] = dstate.astype(bfloat16)
            s = arrived(slot)
            vector = s['vectors']
            if dy is not None:
                dyscaled_QP = load_matrix(s['dy']) * of_rows(vector.at[ENTER], P)
                r['dyscaled_s'][...] = dyscaled_QP.astype(bfloat16)
            plgpu.commit_smem()
            plgpu.barrier_arrive(r['dstate_written'].at[slot])
            passed = (dstate * load_matrix(s['states'])).sum(axis=1) * column(vector.at[DECAY])
            dstate = dstate * of_rows(vector.at[DECAY], N)
            if dy is not None:
                dstate = add_product(interpret, dstate, transposed(r['dyscaled_s']), s['c'])
                scores_QS, dpairs_QS = products(interpret, (s['c'], transposed(s['b'])), (s['dy'], transposed(s['x'])))
                dscores_QS = dpairs_QS * decay_QS(vector, s.get('starts')) * of_columns(vector.at[DT], CHUNK)
                taken = jnp.where(places(0) > places(1), dscores_QS * scores_QS, 0.0).sum(axis=1)
                (dc_QN,) = products(interpret, (r['dyscaled_s'], s['states']))
                taken = taken + (dc_QN * load_matrix(s['c'])).sum(axis=1)
                dc_QN = add_product(interpret, dc_QN, dscores_QS.astype(bfloat16), s['b'])
            plgpu.barrier_arrive(r['read'].at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            r['by_query_s'].at[PASSED][...] = passed
            if dy is not None:
                r['by_query_s'].at[TAKEN][...] = taken
                r['dc_s'][...] = dc_QN.astype(bfloat16)
            plgpu.commit_smem()
            if dy is not None:
                plgpu.copy_smem_to_gmem(r['dc_s'], r['dc'].at[row, rows, head])
            plgpu.copy_smem_to_gmem(r['by_query_s'], r['by_query'].at[row, i, head])
            return dstate

        @pl.when(warpgroup == BY_SOURCE)
        def _():
            plgpu.set_max_registers(REGISTERS['work'], action='increase')
            lax.fori_loop(0, C, by_source, None)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == BY_QUERY)
        def _():
            plgpu.set_max_registers(REGISTERS['work'], action='increase')
            dstate = plgpu.load(r['dfinal'].at[row, head], layout=plgpu.Layout.WGMMA, optimized=False)
            dstate = lax.fori_loop(0, C, by_query, dstate)
            r['dinitial'].at[row, head][...] = dstate
            drain(r['dstate_read'])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == FETCH)
        def _():
            plgpu.set_max_registers(REGISTERS['fetch'], action='decrease')
            lax.fori_loop(0, C, fetch, None)
            drain(r['read'])

    return launch(body, inputs, (H, B), 'backward', outputs, scratch, interpret, warpgroups=3)
