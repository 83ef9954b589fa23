"""The forward walks over heads' chunks, as Pallas Mosaic GPU kernels for Hopper.

Legend: B rows, L length, H heads, G groups, R heads a group, P head width, N state width,
C chunks, Q position in a chunk (query side), S position in the same chunk (source side).
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


def walk(x, vectors, b, c, starts, initial, *, with_states=False, interpret=False):
    """One walk over every head of every row.

    A CTA walks two heads (one, where their number is odd), each by two warpgroups: one makes y, the
    other keeps the state, [P, N], as an accumulator in registers for the whole walk and rounds it
    once a chunk, for the product with c and as boundary state. Heads of one group share b and c.

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
    heads = 2 if H % 2 == 0 else 1  # of a CTA
    groups = 1 if R % heads == 0 else heads
    inputs = {'x': x, 'vectors': vectors, 'b': b, 'c': c, 'initial': initial}
    outputs = {'y': jax.ShapeDtypeStruct(x.shape, x.dtype), 'final': jax.ShapeDtypeStruct((B, H, P, N), jnp.float32)}
    if with_states:
        outputs['states'] = jax.ShapeDtypeStruct((B, C, H, P, N), x.dtype)
    scratch = {
        'x_s': tiles(SLOTS, heads, CHUNK, P), 'vectors_s': plgpu.SMEM((SLOTS, heads, FORWARD_VECTORS, CHUNK), jnp.float32),
        'b_s': tiles(SLOTS, groups, CHUNK, N), 'c_s': tiles(SLOTS, groups, CHUNK, N),
        'state_s': tiles(heads, P, N),
        'scaled_s': tiles(heads, CHUNK, P),  # x as it enters the state, then y
    }  # fmt: skip
    loads = [('x', heads), ('vectors', heads), ('b', groups), ('c', groups)]
    if starts is not None:
        inputs['starts'], scratch['starts_s'] = starts, plgpu.SMEM((SLOTS, 1, CHUNK), jnp.int32)
        loads.append(('starts', 1))
    scratch |= {
        'fetched': plgpu.Barrier(num_arrivals=sum(count for _, count in loads), num_barriers=SLOTS),
        'read': plgpu.Barrier(num_arrivals=2 * heads, num_barriers=SLOTS),
        # Of each head: the state's matrix and that of x and y, which the two warpgroups hand on.
        'state_written': plgpu.Barrier(num_barriers=heads), 'state_read': plgpu.Barrier(num_barriers=heads),
        'scaled_read': plgpu.Barrier(num_barriers=heads), 'y_copied': plgpu.Barrier(num_barriers=heads),
    }  # fmt: skip
    names = (*inputs, *outputs, *scratch)

    def body(*references):
        r = dict(zip(names, references, strict=True))
        first, row, warpgroup = lax.axis_index('head') * heads, lax.axis_index('row'), lax.axis_index('warpgroup')

        def fetch(step):
            slot, rows = lax.rem(step, jnp.int32(SLOTS)), pl.ds(step * CHUNK, CHUNK)
            for name, count in loads:
                for j in range(count):
                    head = first + j
                    of_group = row, rows, lax.div(head, jnp.int32(R))
                    source = {
                        'x': (row, rows, head), 'vectors': (row, step, head, pl.ds(0, FORWARD_VECTORS)),
                        'b': of_group, 'c': of_group, 'starts': (row, step),
                    }[name]  # fmt: skip
                    plgpu.copy_gmem_to_smem(r[name].at[source], r[name + '_s'].at[slot, j], r['fetched'].at[slot])

        def chunk_of(j, step):
            """Waits for a step's data: (slot, name -> reference) of head j of the CTA."""
            slot = lax.rem(step, jnp.int32(SLOTS))
            plgpu.barrier_wait(r['fetched'].at[slot])
            return slot, {name: r[name + '_s'].at[slot, min(j, count - 1)] for name, count in loads}

        def outputs_of(j):
            def chunk(step, _):
                slot, s = chunk_of(j, step)
                vector = s['vectors']
                plgpu.barrier_wait(r['state_written'].at[j])
                scores_QS, y_QP = products(
                    interpret, (s['c'], transposed(s['b'])), (s['c'], transposed(r['state_s'].at[j]))
                )
                plgpu.barrier_arrive(r['state_read'].at[j])

                @pl.when(step > 0)
                def _():
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.barrier_arrive(r['y_copied'].at[j])

                weights_QS = scores_QS * decay_QS(vector, s.get('starts')) * of_columns(vector.at[DT], CHUNK)
                y_QP = y_QP * of_rows(vector.at[ENTER], P)
                y_QP = add_product(interpret, y_QP, weights_QS.astype(jnp.bfloat16), s['x'])
                plgpu.barrier_arrive(r['read'].at[slot])
                plgpu.barrier_wait(r['scaled_read'].at[j])
                r['scaled_s'].at[j][...] = y_QP.astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(r['scaled_s'].at[j], r['y'].at[row, pl.ds(step * CHUNK, CHUNK), first + j])

            lax.fori_loop(0, C, chunk, None)
            plgpu.wait_smem_to_gmem(0)
            plgpu.barrier_arrive(r['y_copied'].at[j])

        def states_of(j):
            def chunk(step, state):
                @pl.when(step > 0)
                def _():
                    plgpu.barrier_wait(r['state_read'].at[j])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                r['state_s'].at[j][...] = state.astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.barrier_arrive(r['state_written'].at[j])
                if with_states:
                    plgpu.copy_smem_to_gmem(r['state_s'].at[j], r['states'].at[row, step, first + j])
                if j == 0:

                    @pl.when((step > 0) & (step + 1 < C))
                    def _():
                        plgpu.barrier_wait(r['read'].at[lax.rem(step + 1, jnp.int32(SLOTS))])
                        fetch(step + 1)

                slot, s = chunk_of(j, step)
                vector = s['vectors']
                scaled_SP = load_matrix(s['x']) * of_rows(vector.at[SCALE], P)
                pl.when(step > 0)(lambda: plgpu.barrier_wait(r['y_copied'].at[j]))
                r['scaled_s'].at[j][...] = scaled_SP.astype(jnp.bfloat16)
                plgpu.commit_smem()
                state = state * of_rows(vector.at[DECAY], N)
                state = add_product(interpret, state, transposed(r['scaled_s'].at[j]), s['b'])
                plgpu.barrier_arrive(r['scaled_read'].at[j])
                plgpu.barrier_arrive(r['read'].at[slot])
                return state

            if j == 0:
                for step in range(min(SLOTS, C)):
                    fetch(jnp.int32(step))
            state = plgpu.load(r['initial'].at[row, first + j], layout=plgpu.Layout.WGMMA, optimized=False)
            state = lax.fori_loop(0, C, chunk, state)
            r['final'].at[row, first + j][...] = state
            plgpu.wait_smem_to_gmem(0)
            # No barrier may be left with an arrival that nobody has waited for.
            plgpu.barrier_wait(r['state_read'].at[j])
            plgpu.barrier_wait(r['y_copied'].at[j])
            if j == 0:
                for step in range(max(C - SLOTS, 0), C):
                    plgpu.barrier_wait(r['read'].at[step % SLOTS])

        for j in range(heads):
            pl.when(warpgroup == 2 * j)(lambda j=j: outputs_of(j))
            pl.when(warpgroup == 2 * j + 1)(lambda j=j: states_of(j))

    return launch(body, inputs, (H // heads, B), 'forward', outputs, scratch, interpret, 2 * heads)


def walk_states(x, vectors, b, initial, *, scale=SCALE, reverse=False, with_states=False, interpret=False):
    """The walk without y: one warpgroup a head, several CTAs a multiprocessor.

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
        'x_s': tiles(SLOTS, CHUNK, P), 'b_s': tiles(SLOTS, CHUNK, N),
        'vectors_s': plgpu.SMEM((SLOTS, FORWARD_VECTORS, CHUNK), jnp.float32), 'scaled_s': tiles(CHUNK, P),
        'fetched': plgpu.Barrier(num_arrivals=3, num_barriers=SLOTS),
    }  # fmt: skip
    if with_states:
        outputs['states'], scratch['state_s'] = jax.ShapeDtypeStruct((B, C, H, P, N), x.dtype), tiles(P, N)
    names = (*inputs, *outputs, *scratch)

    def body(*references):
        r = dict(zip(names, references, strict=True))
        head, row = lax.axis_index('head'), lax.axis_index('row')

        def place(step):
            return C - 1 - step if reverse else step

        def fetch(step):
            i, slot = place(step), lax.rem(step, jnp.int32(SLOTS))
            rows = pl.ds(i * CHUNK, CHUNK)
            source = {
                'x': (row, rows, head), 'b': (row, rows, lax.div(head, jnp.int32(R))),
                'vectors': (row, i, head, pl.ds(0, FORWARD_VECTORS)),
            }  # fmt: skip
            for name, where in source.items():
                plgpu.copy_gmem_to_smem(r[name].at[where], r[name + '_s'].at[slot], r['fetched'].at[slot])

        def chunk(step, state):
            slot = lax.rem(step, jnp.int32(SLOTS))
            plgpu.barrier_wait(r['fetched'].at[slot])
            pl.when(step + 1 < C)(lambda: fetch(step + 1))
            vector = r['vectors_s'].at[slot]
            if with_states:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                r['state_s'][...] = state.astype(jnp.bfloat16)
            scaled_SP = load_matrix(r['x_s'].at[slot]) * of_rows(vector.at[scale], P)
            r['scaled_s'][...] = scaled_SP.astype(jnp.bfloat16)
            plgpu.commit_smem()
            if with_states:
                plgpu.copy_smem_to_gmem(r['state_s'], r['states'].at[row, place(step), head])
            state = state * of_rows(vector.at[DECAY], N)
            return add_product(interpret, state, transposed(r['scaled_s']), r['b_s'].at[slot])

        fetch(jnp.int32(0))
        state = plgpu.load(r['initial'].at[row, head], layout=plgpu.Layout.WGMMA, optimized=False)
        r['final'].at[row, head][...] = lax.fori_loop(0, C, chunk, state)
        plgpu.wait_smem_to_gmem(0)

    return launch(body, inputs, (H, B), 'state', outputs, scratch, interpret)
