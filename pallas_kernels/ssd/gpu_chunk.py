"""What the Hopper kernels share: layout of a chunk's data, products, decays, launch.

Legend: B rows, L length, H heads, P head width, N state width, C chunks, Q position in a chunk
(query side), S position in the same chunk (source side).

JAX lowers these kernels lane by lane (LoweringSemantics.Lane). The other semantics, which infers the
layouts of a whole kernel, did not finish within five minutes.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import in_32_bits

CHUNK = 64  # Q: the rows of one wgmma
SLOTS = 2  # chunks in flight

# Rows of the per-chunk vectors, [B, C, H, VECTORS, Q] float32:
#   CUM: running sum of the log-decay, in base 2, from the chunk's start
#   DT
#   ENTER: decay from the chunk's start to q; 0 if a segment starts between
#   SCALE: dt and the decay from s to the chunk's end; 0 if a segment starts between
#   DECAY: decay of the whole chunk, at every position; 0 if a segment starts in it
#   LEAVE: SCALE without dt
# The forward walks take the first FORWARD_VECTORS.
CUM, DT, ENTER, SCALE, DECAY, LEAVE = range(6)
VECTORS, FORWARD_VECTORS = 6, 5


def tiles(*shape):
    """Shared bfloat16 matrices, [..., rows, columns], that both the copy engine and wgmma read."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def load_matrix(ref):
    """[rows, columns] float32 from shared bfloat16."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def column(ref):
    """A vector of shared memory, laid out as the sums of a matrix along its rows are."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1))


def of_rows(ref, columns):
    """A vector of shared memory by the rows of a matrix."""
    vector = column(ref)
    return lax.broadcast_in_dim(vector, (vector.shape[0], columns), [0])


def of_columns(ref, rows):
    vector = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0))
    return lax.broadcast_in_dim(vector, (rows, vector.shape[0]), [1])


def positions(dimension):
    return plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), dimension, layout=plgpu.Layout.WGMMA)


def products(interpret, *operands):
    """float32 a @ b for each (a, b), issued together; a in registers or shared memory, b in shared memory."""
    if interpret:  # JAX's interpreter knows neither left operands in registers nor accumulators with a value
        return tuple(_plain_product(a, b) for a, b in operands)
    shapes = [plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32) for a, b in operands]

    def issue(*accumulators):
        for accumulator, (a, b) in zip(accumulators, operands):
            plgpu.wgmma(accumulator, a, b)
        return tuple(accumulator[...] for accumulator in accumulators)

    return pl.run_scoped(issue, *shapes)


def add_product(interpret, accumulated, a, b):
    """accumulated + a @ b."""
    if interpret:
        return accumulated + _plain_product(a, b)

    def issue(accumulator):
        plgpu.wgmma(accumulator, a, b)

    return pl.run_state(issue)(plgpu.ACC.init(accumulated))


def _plain_product(a, b):
    return jnp.dot(a if isinstance(a, jax.Array) else a[...], b[...], preferred_element_type=jnp.float32)


def transposed(ref):
    return ref.transpose((1, 0))


def decay_QS(vector, start):
    """exp of the decay from s to q where s <= q in one segment, else 0."""
    exponent = of_rows(vector.at[CUM], CHUNK) - of_columns(vector.at[CUM], CHUNK)
    seen = positions(0) >= positions(1)
    if start is not None:
        seen = seen & (positions(1) >= of_rows(start, CHUNK))
    return jnp.exp2(jnp.where(seen, exponent, -jnp.inf))


def decay_SQ(vector, start):
    """Its transpose, of the same bits."""
    exponent = of_columns(vector.at[CUM], CHUNK) - of_rows(vector.at[CUM], CHUNK)
    seen = positions(1) >= positions(0)
    if start is not None:
        seen = seen & (positions(0) >= of_columns(start, CHUNK))
    return jnp.exp2(jnp.where(seen, exponent, -jnp.inf))


def launch(body, inputs, grid, name, outputs, scratch, interpret, warpgroups=1):
    """Runs a kernel. inputs, outputs and scratch: name -> array, shape and memory. Returns name -> array."""
    body.__name__ = 'rotary_ssd_' + name
    run = plgpu.kernel(
        in_32_bits(body),  # under vmap it is traced again, after the call
        out_type=list(outputs.values()),
        scratch_types=list(scratch.values()),
        grid=grid,
        grid_names=('head', 'row'),
        interpret=interpret,
        **(dict(num_threads=warpgroups, thread_name='warpgroup') if warpgroups > 1 else {}),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return dict(zip(outputs, in_32_bits(run)(*inputs.values()), strict=True))
