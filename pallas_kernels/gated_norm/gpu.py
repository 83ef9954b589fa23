"""The D skip, gate and RMSNorm of Mamba-2 as Pallas Mosaic GPU kernels for Hopper.

A warp takes the channels of one group of one token, 16 bytes per lane at a time, and sums over them by shuffles: every
array is read once and written once. Four warps, which share nothing, walk over a part of the tokens.

Legend: M tokens (B L), H heads, P head width, C = H P channels, G groups, K = C / G channels of a group.
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

GROUPS = (64, 128, 256, 512)  # K
TOKENS = lanes.TOKENS  # M is a multiple of it
WARPS, LANES = 4, 32
# Tokens of a part, at most.
FORWARD, BACKWARD = 64, 256


def skip_gate_norm(y_BLHP, x_BLHP, z_BLHP, d_H, scale_HP, epsilon, num_groups, *, interpret=False):
    """As `reference.skip_gate_norm`; it computes in float32."""
    B, L, H, P = y_BLHP.shape
    flat = (v.reshape(B * L, H * P) for v in (y_BLHP, x_BLHP, z_BLHP))
    d_C, static = jnp.repeat(d_H, P), (epsilon, lanes.interpreter(interpret), num_groups)
    return _skip_gate_norm(static, *flat, d_C, scale_HP.reshape(-1)).reshape(z_BLHP.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _skip_gate_norm(static, y, x, z, d, scale):
    return _forward(static, y, x, z, d, scale)


def _fwd(static, y, x, z, d, scale):
    return _forward(static, y, x, z, d, scale), (y, x, z, d, scale)


def _bwd(static, residuals, dout):
    y, x, z, d, scale = residuals
    dy, dz, sums = _backward(static, y, x, z, d, scale, dout)
    dscale, dd = jnp.sum(sums, axis=(0, 2))
    # Not written by the kernel: XLA adds it to the scan's gradient of x.
    dx = (d * dy.astype(jnp.float32)).astype(x.dtype)
    return dy, dx, dz, dd, dscale


_skip_gate_norm.defvjp(_fwd, _bwd)


@of_one_device
def _forward(static, y, x, z, d, scale):
    epsilon, interpret, num_groups = static
    tokens, width, grid = _cut(y, num_groups, FORWARD)

    def body(y, x, z, d, scale, out):
        w = _Walk(y, width, tokens)
        d, scale = w.vector(d), w.vector(scale)

        def some_tokens(i, _):
            rows = w.rows(i)
            y_t, x_t, z_t = (w.load(v, rows) for v in (y, x, z))
            gated = (y_t + d * x_t) * (z_t * lanes.sigmoid(z_t))
            inverse = lax.rsqrt(w.mean(gated * gated) + epsilon)
            out[rows, w.channels] = (gated * inverse * scale).astype(out.dtype)

        lax.fori_loop(0, tokens // WARPS, some_tokens, None)

    (out,) = lanes.launch(
        'skip_gate_norm_forward', body, [jax.ShapeDtypeStruct(z.shape, z.dtype)], grid, interpret, y, x, z, d, scale
    )
    return out


@of_one_device
def _backward(static, y, x, z, d, scale, dout):
    """dy, dz, and sums [parts, 2, WARPS, C] of the gradients of scale and d."""
    epsilon, interpret, num_groups = static
    tokens, width, grid = _cut(y, num_groups, BACKWARD)

    def body(y, x, z, d, scale, dout, dy, dz, sums):
        w = _Walk(y, width, tokens)
        d, scale = w.vector(d), w.vector(scale)

        def some_tokens(i, carry):
            dscale, dd = carry
            rows = w.rows(i)
            y_t, x_t, z_t, dout_t = (w.load(v, rows) for v in (y, x, z, dout))
            sigmoid, skipped = lanes.sigmoid(z_t), y_t + d * x_t
            silu = z_t * sigmoid
            gated = skipped * silu
            dnormed = dout_t * scale
            inverse = lax.rsqrt(w.mean(gated * gated) + epsilon)
            inner = w.mean(dnormed * gated) * inverse * inverse
            dgated = inverse * (dnormed - gated * inner)
            dskipped = dgated * silu
            dy[rows, w.channels] = dskipped.astype(dy.dtype)
            dz[rows, w.channels] = (dgated * skipped * (sigmoid + silu * (1.0 - sigmoid))).astype(dz.dtype)
            return dscale + dout_t * gated * inverse, dd + dskipped * x_t

        zero = d * 0.0
        summed = lax.fori_loop(0, tokens // WARPS, some_tokens, (zero, zero))
        for i, v in enumerate(summed):
            sums[w.part, i, :, w.channels] = v

    shapes = [
        jax.ShapeDtypeStruct(y.shape, y.dtype),
        jax.ShapeDtypeStruct(z.shape, z.dtype),
        jax.ShapeDtypeStruct((grid['part'], 2, WARPS, y.shape[1]), jnp.float32),
    ]
    return lanes.launch('skip_gate_norm_backward', body, shapes, grid, interpret, y, x, z, d, scale, dout)


class _Walk:
    """Four warps' walk over a part of the tokens, in the channels of one group; arrays are [WARPS, K]."""

    def __init__(self, like, width, tokens):
        self.part, self.width = lax.axis_index('part'), width
        self.first = self.part * tokens
        self.channels = pl.ds(lax.axis_index('group') * width, width)
        vector = min(width // LANES, 16 // like.dtype.itemsize)
        tiling = fragmented_array.Tiling(((WARPS, LANES * vector), (vector,)))
        self.layout = plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)

    def rows(self, i):
        return pl.ds(self.first + i * WARPS, WARPS)

    def load(self, ref, rows):
        return plgpu.load(ref.at[rows, self.channels], layout=self.layout, optimized=False).astype(jnp.float32)

    def vector(self, ref):
        v = plgpu.load(ref.at[self.channels], layout=self.layout.reduce(0), optimized=False)
        return plgpu.layout_cast(lax.broadcast_in_dim(v, (WARPS, self.width), [1]), self.layout)

    def mean(self, v):
        """Of each row, at all its channels."""
        mean = jnp.sum(v, axis=1) * (1.0 / self.width)
        return plgpu.layout_cast(lax.broadcast_in_dim(mean, v.shape, [0]), self.layout)


def _cut(y, num_groups, most_tokens):
    """(tokens of a part, channels of a group, grid)."""
    M, C = y.shape
    tokens = lanes.tokens_of_part(M, most_tokens)
    return tokens, C // num_groups, dict(group=num_groups, part=M // tokens)
