"""The short causal convolution as Pallas Mosaic GPU kernels for Hopper.

A warpgroup takes a strip of channels, some of them per thread, and walks over a part of a row. It keeps the last W - 1
tokens in registers, so that every token is read once but for those before a part (and, backward, after it). Nothing
passes between threads: there is no shared memory and no barrier.

Legend: B batch, L length, W width, C channels, J = W - 1 tokens before the row, T tokens of a part.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import lanes
from pallas_kernels.platforms import of_one_device

WIDTHS = range(2, 5)  # of filters; every tap takes registers
LENGTHS, CHANNELS = lanes.TOKENS, 128  # L and C are multiples of them
THREADS = 128  # of a warpgroup
# Tokens of a part, channels per thread, and tokens that are read at once, at most.
FORWARD = (64, 8, 4)
BACKWARD = (128, 4, 4)


def convolve(u_BLC, kernel_WC, bias_C, before_BJC, reach_BL, *, interpret=False):
    """As `reference.convolve`, with one axis of channels; it computes in float32 and returns u's dtype."""
    return _convolve((kernel_WC.shape[0], lanes.interpreter(interpret)), u_BLC, kernel_WC, bias_C, before_BJC, reach_BL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(static, u, kernel, bias, before, reach):
    return _forward(static, u, kernel, bias, before, reach)


def _convolve_fwd(static, u, kernel, bias, before, reach):
    return _forward(static, u, kernel, bias, before, reach), (u, kernel, bias, before, reach)


def _convolve_bwd(static, residuals, dy):
    du, dbefore, sums = _backward(static, *residuals, dy)
    dbias, *dkernel = jnp.sum(sums, axis=(0, 1))
    return du, jnp.stack(dkernel[::-1]), dbias, dbefore, None


_convolve.defvjp(_convolve_fwd, _convolve_bwd)


@of_one_device
def _forward(static, u, kernel, bias, before, reach):
    width, interpret = static
    tokens, strip, unroll, grid = _cut(u, *FORWARD)

    def body(u, kernel, bias, before, reach, y):
        w = _Walk(u, kernel, bias, before, reach, width, tokens, strip)

        def some_tokens(i, history):
            first = w.first + i * unroll
            us, reaches = w.tokens(u, first, unroll), w.reaches(first, unroll)
            for j in range(unroll):
                taps = w.seen(reaches[j], [us[j], *history])
                pre = w.activation(taps)
                y[w.row, first + j, w.channels] = (pre * lanes.sigmoid(pre)).astype(y.dtype)
                history = [us[j], *history[:-1]]
            return history

        lax.fori_loop(0, tokens // unroll, some_tokens, w.history())

    shape = jax.ShapeDtypeStruct(u.shape, u.dtype)
    (y,) = lanes.launch('causal_convolution_forward', body, [shape], grid, interpret, u, kernel, bias, before, reach)
    return y


@of_one_device
def _backward(static, u, kernel, bias, before, reach, dy):
    """du, the gradient of before, and sums [B, parts, 1 + W, C] of the gradients of bias and taps, by tokens back."""
    width, interpret = static
    (B, L, C), before_count = u.shape, width - 1
    tokens, strip, unroll, grid = _cut(u, *BACKWARD)

    def body(u, kernel, bias, before, reach, dy, du, dbefore, sums):
        w = _Walk(u, kernel, bias, before, reach, width, tokens, strip)

        def token(reach, u_t, dy_t, history, later, summed):
            """Returns the gradient of the token J back, which this token is the last to see, and what is carried on."""
            taps = w.seen(reach, [u_t, *history])
            pre = w.activation(taps)
            sigmoid = lanes.sigmoid(pre)
            g = dy_t * (sigmoid + pre * sigmoid * (1.0 - sigmoid))
            to_earlier = [w.taps[back] * g_seen for back, g_seen in enumerate(w.seen(reach, [g] * width))]
            *later, done = [a + b for a, b in zip([0.0, *later], to_earlier)]
            summed = [s + v for s, v in zip(summed, [g, *(g * tap for tap in taps)])]
            return done, [u_t, *history[:-1]], later, summed

        def some_tokens(i, carry, first_of_part=False):
            first = w.first + i * unroll
            us, dys = (w.tokens(v, first, unroll) for v in (u, dy))
            reaches = w.reaches(first, unroll)
            for j in range(unroll):
                done, *carry = token(reaches[j], us[j], dys[j], *carry)
                if first_of_part and j < before_count:

                    @pl.when(w.part == 0)
                    def _(j=j, done=done):
                        dbefore[w.row, j, w.channels] = done.astype(dbefore.dtype)
                else:
                    du[w.row, first + j - before_count, w.channels] = done.astype(du.dtype)
            return carry

        zero = jnp.zeros_like(w.bias)
        carry = w.history(), [zero] * before_count, [zero] * (1 + width)
        carry = some_tokens(0, carry, first_of_part=True)
        history, later, summed = lax.fori_loop(1, tokens // unroll, some_tokens, carry)
        for i, v in enumerate(summed):
            sums[w.row, w.part, i, w.channels] = v
        # Tokens of the next part, for the last gradients of this one.
        end = w.first + tokens
        for j in range(before_count):
            t = jnp.minimum(end + j, L - 1)
            u_t, dy_t = (w.load(v.at[w.row, t, w.channels]) for v in (u, dy))
            dy_t = jnp.where(end + j < L, dy_t, 0.0)
            done, history, later, _ = token(reach[w.row, t], u_t, dy_t, history, later, summed)
            du[w.row, end + j - before_count, w.channels] = done.astype(du.dtype)

    shapes = [
        jax.ShapeDtypeStruct(u.shape, u.dtype),
        jax.ShapeDtypeStruct(before.shape, before.dtype),
        jax.ShapeDtypeStruct((B, L // tokens, 1 + width, C), jnp.float32),
    ]
    return lanes.launch(
        'causal_convolution_backward', body, shapes, grid, interpret, u, kernel, bias, before, reach, dy
    )


class _Walk:
    """One warpgroup's walk over a part of a row, in a strip of channels."""

    def __init__(self, u, kernel, bias, before, reach, width, tokens, strip):
        self.row, self.part = lax.axis_index('row'), lax.axis_index('part')
        self.channels = pl.ds(lax.axis_index('strip') * strip, strip)
        self.first = self.part * tokens
        self.u, self.before, self.reach, self.width = u, before, reach, width
        self.layout = plgpu.Layout.WG_STRIDED((strip,), vec_size=strip // THREADS)
        # By tokens back.
        self.taps = [self.load(kernel.at[width - 1 - back, self.channels]) for back in range(width)]
        self.bias = self.load(bias.at[self.channels])

    def load(self, ref):
        return plgpu.load(ref, layout=self.layout).astype(jnp.float32)

    def history(self):
        """The W - 1 tokens before the part, the last of them first."""
        found = []
        for back in range(1, self.width):
            inside = self.load(self.u.at[self.row, jnp.maximum(self.first - back, 0), self.channels])
            outside = self.load(self.before.at[self.row, self.width - 1 - back, self.channels])
            found.append(jnp.where(self.part == 0, outside, inside))
        return found

    def tokens(self, ref, first, count):
        return [self.load(ref.at[self.row, first + j, self.channels]) for j in range(count)]

    def reaches(self, first, count):
        return [self.reach[self.row, first + j] for j in range(count)]

    def seen(self, reach, values):
        """values, by tokens back; 0 beyond reach."""
        return [values[0], *(jnp.where(reach >= back, values[back], 0.0) for back in range(1, self.width))]

    def activation(self, taps):
        return self.bias + sum(weight * tap for weight, tap in zip(self.taps, taps))


def _cut(u, most_tokens, channels, unroll):
    """(tokens of a part, channels of a strip, tokens read at once, grid) for u [B, L, C]."""
    B, L, C = u.shape
    tokens = lanes.tokens_of_part(L, most_tokens)
    # 16 bytes per thread at most.
    most = min(channels, 16 // u.dtype.itemsize)
    strip = next(n * THREADS for n in (8, 4, 2, 1) if n <= most and C % (n * THREADS) == 0)
    return tokens, strip, unroll, dict(strip=C // strip, part=L // tokens, row=B)
