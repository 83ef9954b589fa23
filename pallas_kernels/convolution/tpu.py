"""The short causal convolution as Pallas Mosaic kernels for TPU.

A grid step takes a block of tokens and channels. The steps of one row and strip of channels follow each other: forward
from the first block to the last, with the last tokens of the block before in VMEM; backward from the last to the first,
with what the block behind sends to its predecessors. Every array is read once and written once.

Legend: B batch, L length, W width, C channels, J = W - 1 tokens before the row, T tokens and X channels of a block.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import in_32_bits
from pallas_kernels.platforms import of_one_device, only_on_tpu_p, shape_like

SUBLANES, LANES = 8, 128
BIAS = SUBLANES - 1  # its row of the parameters, and of their gradients; the rows before are the taps, by tokens back
WIDTHS = range(2, SUBLANES)
LENGTHS, CHANNELS = LANES, LANES  # L and C are multiples of them
OVERLAP = 16  # tokens before a block that are read again, a tile of bfloat16


def convolve(u_BLC, kernel_WC, bias_C, before_BJC, reach_BL, *, interpret=False):
    """As `reference.convolve`, with one axis of channels; it computes in float32 and returns u's dtype."""
    return _convolve((kernel_WC.shape[0], interpret), u_BLC, kernel_WC, bias_C, before_BJC, reach_BL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(static, u, kernel, bias, before, reach):
    return _forward(static, u, kernel, bias, before, reach)


def _convolve_fwd(static, u, kernel, bias, before, reach):
    return _forward(static, u, kernel, bias, before, reach), (u, kernel, bias, before, reach)


def _convolve_bwd(static, residuals, dy):
    width, before = static[0], residuals[3]
    du, dbefore, sums = _backward(static, *residuals, dy)
    sums = jnp.sum(sums, axis=0)
    return du, sums[:width][::-1], sums[BIAS], dbefore[:, SUBLANES - width + 1 :].astype(before.dtype), None


_convolve.defvjp(_convolve_fwd, _convolve_bwd)


@functools.partial(of_one_device, only_p=only_on_tpu_p)
def _forward(static, u, kernel, bias, before, reach):
    width, interpret = static
    (B, L, C), T, X = u.shape, *_block(u)

    def body(u, parameters, before, reach, y, window):
        @pl.when(pl.program_id(2) == 0)
        def _():
            window[:SUBLANES] = before[0]

        window[SUBLANES:] = u[0].astype(jnp.float32)
        for lanes in _columns(X):
            seen = _seen(reach, width)
            pre = _activation(_taps(window, lanes, seen), parameters, lanes)
            y[0, :, lanes] = (pre * jax.nn.sigmoid(pre)).astype(y.dtype)
        window[:SUBLANES] = window[T:]

    tokens, strip, row = _specs(T, X, lambda i: i)
    run = pl.pallas_call(
        in_32_bits(body),
        grid=(B, C // X, L // T),
        in_specs=[tokens, strip, row, pl.BlockSpec((1, 1, T), lambda b, c, i: (b, 0, i))],
        out_specs=tokens,
        out_shape=shape_like(u, u.shape, u.dtype),
        scratch_shapes=[pltpu.VMEM((SUBLANES + T, X), jnp.float32)],
        compiler_params=_compiler_params(),
        interpret=interpret,
        name='causal_convolution_forward',
    )
    return in_32_bits(run)(u, _parameters(kernel, bias), _eight(before), reach[:, None])


@functools.partial(of_one_device, only_p=only_on_tpu_p)
def _backward(static, u, kernel, bias, before, reach, dy):
    """du, the gradient of the 8 tokens before the row, and sums [B, 8, C] of those of the parameters, float32."""
    width, interpret = static
    (B, L, C), T, X = u.shape, *_block(u)
    blocks = L // T

    def body(u, overlap, parameters, before, reach, dy, du, dbefore, sums, window, sent, later):
        step = pl.program_id(2)

        @pl.when(step == 0)
        def _():
            later[...] = jnp.zeros(later.shape, later.dtype)
            sums[0] = jnp.zeros(sums.shape[1:], sums.dtype)

        first = step == blocks - 1
        window[:SUBLANES] = jnp.where(first, before[0], overlap[0, OVERLAP - SUBLANES :].astype(jnp.float32))
        window[SUBLANES:] = u[0].astype(jnp.float32)
        for lanes in _columns(X):
            seen = _seen(reach, width)
            taps = _taps(window, lanes, seen)
            pre = _activation(taps, parameters, lanes)
            sigmoid = jax.nn.sigmoid(pre)
            g = dy[0, :, lanes].astype(jnp.float32) * (sigmoid + pre * sigmoid * (1.0 - sigmoid))
            sums[0, BIAS : BIAS + 1, lanes] += jnp.sum(g, axis=0, keepdims=True)
            result = parameters[0:1, lanes] * g
            outside = jnp.zeros((SUBLANES, LANES), jnp.float32)
            for back, tap in enumerate(taps):
                sums[0, back : back + 1, lanes] += jnp.sum(g * tap, axis=0, keepdims=True)
                if not back:
                    continue
                # What token t sends to token t - back, with those of the block behind.
                g_seen = jnp.where(seen[back], g, 0.0)
                sent[:SUBLANES] = jnp.zeros((SUBLANES, LANES), jnp.float32)
                sent[SUBLANES : SUBLANES + T] = g_seen
                sent[SUBLANES + T :] = later[back - 1, :, lanes]
                later[back - 1, :, lanes] = g_seen[:SUBLANES]
                weight = parameters[back : back + 1, lanes]
                result += weight * sent[SUBLANES + back : SUBLANES + back + T]
                outside += weight * sent[back : SUBLANES + back]
            du[0, :, lanes] = result.astype(du.dtype)
            # That of the row's first block is written last.
            dbefore[0, :, lanes] = outside

    tokens, strip, row = _specs(T, X, lambda i: blocks - 1 - i)
    tiles = T // OVERLAP
    overlap = pl.BlockSpec((1, OVERLAP, X), lambda b, c, i: (b, jnp.maximum((blocks - 1 - i) * tiles - 1, 0), c))
    run = pl.pallas_call(
        in_32_bits(body),
        grid=(B, C // X, blocks),
        in_specs=[
            tokens,
            overlap,
            strip,
            row,
            pl.BlockSpec((1, 1, T), lambda b, c, i: (b, 0, blocks - 1 - i)),
            tokens,
        ],
        out_specs=[tokens, row, row],
        out_shape=[
            shape_like(u, u.shape, u.dtype),
            shape_like(u, (B, SUBLANES, C), jnp.float32),
            shape_like(u, (B, SUBLANES, C), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((SUBLANES + T, X), jnp.float32),
            pltpu.VMEM((SUBLANES + T + SUBLANES, LANES), jnp.float32),
            pltpu.VMEM((width - 1, SUBLANES, X), jnp.float32),
        ],
        compiler_params=_compiler_params(),
        interpret=interpret,
        name='causal_convolution_backward',
    )
    return in_32_bits(run)(u, u, _parameters(kernel, bias), _eight(before), reach[:, None], dy)


def _block(u):
    """(T, X) for u [B, L, C]."""
    _, L, C = u.shape
    return next(n for n in (256, 128) if L % n == 0), next(n for n in (512, 256, 128) if C % n == 0)


def _specs(T, X, block_of):
    """Blocks of the tokens, of the parameters, and of 8 tokens of each row."""
    return (
        pl.BlockSpec((1, T, X), lambda b, c, i: (b, block_of(i), c)),
        pl.BlockSpec((SUBLANES, X), lambda b, c, i: (0, c)),
        pl.BlockSpec((1, SUBLANES, X), lambda b, c, i: (b, 0, c)),
    )


def _compiler_params():
    return pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'arbitrary'))


def _parameters(kernel, bias):
    """[8, C]: the taps by tokens back, and the bias in the last row."""
    rows = jnp.pad(kernel[::-1], ((0, BIAS - kernel.shape[0]), (0, 0)))
    return jnp.concatenate([rows, bias[None]])


def _eight(before):
    """[B, J, C] -> float32 [B, 8, C], filled up with zeros in front."""
    return jnp.pad(before.astype(jnp.float32), ((0, 0), (SUBLANES - before.shape[1], 0), (0, 0)))


def _columns(X):
    return [slice(start, start + LANES) for start in range(0, X, LANES)]


def _seen(reach, width):
    """By tokens back, bool [T, LANES]: whether a token sees that far. That of 0 is None."""
    reach_TX = jnp.broadcast_to(reach[0], (LANES, reach.shape[2])).T
    return [None, *(reach_TX >= back for back in range(1, width))]


def _taps(window, lanes, seen):
    """By tokens back, float32 [T, LANES]: the token that far back, or 0 where it is not seen."""
    length = window.shape[0] - SUBLANES
    taps = [window[SUBLANES - back : SUBLANES - back + length, lanes] for back in range(len(seen))]
    return [taps[0], *(jnp.where(mask, tap, 0.0) for mask, tap in zip(seen[1:], taps[1:]))]


def _activation(taps, parameters, lanes):
    terms = (parameters[back : back + 1, lanes] * tap for back, tap in enumerate(taps))
    return parameters[BIAS : BIAS + 1, lanes] + sum(terms)
