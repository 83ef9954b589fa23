"""The gradient of RMSNorm and the residual past it as one Pallas Mosaic GPU kernel for Hopper.

The kernel makes the gradient of x by both of its ways, past the layer and through its norm, and the sums over tokens for the
gradients of scale and weight, and reads each array once. A row of tokens is spread over the threads of a warpgroup, or of
one warp where it is short; its one sum goes through shuffles and shared memory. Blocks stay on the device and take every
n-th row. Forward there is nothing to gain: XLA's own kernels read and write as fast, and join what is around them.

Legend: M tokens, D width.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import lanes
from pallas_kernels.platforms import of_one_device
from pallas_kernels.residual_norm import xla

WARPS, LANES = 4, 32
TOKENS = lanes.TOKENS  # M is a multiple of it
BLOCKS = 132 * 4  # as many as a device runs at once
LONGEST = 4096  # D; longer rows do not fit into the registers of a warpgroup


def norm_and_residual(x_MD, scale_D, weight_D, epsilon, *, interpret=False):
    """As `reference.norm_and_residual`; it computes in float32."""
    return _norm_and_residual((epsilon, lanes.interpreter(interpret)), x_MD, scale_D, weight_D)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm_and_residual(static, x, scale, weight):
    return _fwd(static, x, scale, weight)[0]


def _fwd(static, x, scale, weight):
    inverse = xla.inverse_rms(x, static[0])
    return (xla.normed_by(inverse, x, scale), x * weight), (x, inverse, scale, weight)


def _bwd(static, arrays, cotangents):
    x, inverse, scale, weight = arrays
    dnormed, dresidual = cotangents
    # The sum of residual and layer is rounded to x's dtype, so that its gradient has no more bits than that.
    dx, sums = _backward(static, x, inverse[:, 0], scale, weight, dnormed, dresidual.astype(x.dtype))
    dscale, dweight = jnp.sum(sums, axis=(0, 2))
    return dx, dscale, dweight


_norm_and_residual.defvjp(_fwd, _bwd)


@of_one_device
def _backward(static, x, inverse, scale, weight, dnormed, dresidual):
    """dx, and sums [blocks, 2, rows of a turn, D] of the gradients of scale and weight."""

    def body(x, inverse, scale, weight, dnormed, dresidual, dx, sums):
        rows = _Rows(x)
        scale, weight = rows.vector(scale), rows.vector(weight)

        def one(i, carry, x_t, dnormed_t, dresidual_t, inverse_t):
            dscale, dweight = carry
            normed, dscaled = x_t * inverse_t, dnormed_t * scale
            inner = rows.mean(dscaled * normed)
            dx[rows.at(i)] = (weight * dresidual_t + inverse_t * (dscaled - normed * inner)).astype(dx.dtype)
            return dscale + dnormed_t * normed, dweight + dresidual_t * x_t

        zero = scale * 0.0
        for i, v in enumerate(rows.walk(one, (zero, zero), (x, dnormed, dresidual), inverse)):
            sums[rows.block, i, *rows.all] = v

    grid, D = _grid(x), x.shape[1]
    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        jax.ShapeDtypeStruct((grid['block'], 2, rows_of_turn(D), D), jnp.float32),
    ]
    arrays = x, inverse, scale, weight, dnormed, dresidual
    return lanes.launch('residual_norm_backward', body, shapes, grid, static[1], *arrays)


def warps_of_row(D: int) -> int:
    """Over how many warps a row is spread; 0: no kernel serves this width."""
    if D % (WARPS * LANES * 4) == 0 and 1024 <= D <= LONGEST:
        return WARPS
    return 1 if D % (LANES * 4) == 0 and D < 1024 else 0


def rows_of_turn(D: int) -> int:
    """Rows that a block takes at once."""
    return WARPS // warps_of_row(D)


class _Rows:
    """A block's walk over every n-th row, arrays are [D], or every n-th group of four short rows, arrays are [4, D]."""

    def __init__(self, x):
        M, self.D = x.shape
        self.count = rows_of_turn(self.D)
        self.block, self.blocks = lax.axis_index('block'), _grid(x)['block']
        self.turns = (M // self.count - self.block + self.blocks - 1) // self.blocks
        lanes_of_row = warps_of_row(self.D) * LANES
        vector = next(v for v in (8, 4) if v * x.dtype.itemsize <= 16 and self.D % (lanes_of_row * v) == 0)
        tiles = ((WARPS, LANES * vector), (vector,))
        if self.count == 1:
            tiles = ((WARPS * LANES * vector,), (LANES * vector,), (vector,))
        self.layout = plgpu.Layout.TILED(
            fragmented_array.Tiling(tiles), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
        )
        self.all = (0, slice(None)) if self.count == 1 else (slice(None), slice(None))

    def at(self, i):
        return (self._which(i), slice(None))

    def _which(self, i):
        group = self.block + i * self.blocks
        return group if self.count == 1 else pl.ds(group * self.count, self.count)

    def walk(self, one, carry, arrays, numbers):
        """carry = one(turn, carry, *rows, number of each row), of all turns; in float32.

        Args:
          arrays: [M, D] each.
          numbers: float32 [M], which comes as it multiplies with rows.
        """

        def load(i):
            rows = tuple(plgpu.load(v.at[self.at(i)], layout=self.layout, optimized=False) for v in arrays)
            if self.count == 1:
                return (*rows, numbers[self._which(i)])
            return (*rows, plgpu.load(numbers.at[self._which(i)], layout=self.layout.reduce(1), optimized=False))

        def turn(i, carried):
            carry, (*rows, of_row) = carried
            # Those of the next turn are on their way while these are used.
            following = load(jnp.minimum(i + 1, self.turns - 1))
            return one(i, carry, *(v.astype(jnp.float32) for v in rows), self._along(of_row)), following

        return lax.fori_loop(0, self.turns, turn, (carry, load(0)))[0]

    def vector(self, ref):
        if self.count == 1:
            return plgpu.load(ref, layout=self.layout, optimized=False)
        v = plgpu.load(ref, layout=self.layout.reduce(0), optimized=False)
        return plgpu.layout_cast(lax.broadcast_in_dim(v, (self.count, self.D), [1]), self.layout)

    def mean(self, v):
        """Of each row, as it multiplies with rows."""
        return self._along(jnp.sum(v, axis=-1) * (1.0 / self.D))

    def _along(self, v):
        if self.count == 1:
            return v
        return plgpu.layout_cast(lax.broadcast_in_dim(v, (self.count, self.D), [0]), self.layout)


def _grid(x):
    M, D = x.shape
    return dict(block=min(BLOCKS, M // rows_of_turn(D)))
