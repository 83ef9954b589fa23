"""The short causal convolution in plain JAX, with a gradient that keeps its input alone.

Forward it is one pass over memory. Backward the derivative by the pre-activation, g, is computed from the input again and
written once, in the input's dtype; a second pass sums it to the gradients of kernel and bias, and a third makes the
input's gradient of it. What JAX derives writes and reads g in float32, and passes over it once per tap.

Legend: B batch, L length, W width, C channels (any number of axes), J = W - 1 tokens before the row.
"""

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_vjp
def convolve(u_BLC, kernel_WC, bias_C, before_BJC, reach_BL):
    """As `reference.convolve`; it computes in float32 and returns u's dtype."""
    y = _activation(u_BLC, kernel_WC, bias_C, before_BJC, reach_BL)
    return jax.nn.silu(y).astype(u_BLC.dtype)


def _forward(u, kernel, bias, before, reach):
    y = lax.optimization_barrier(convolve(u, kernel, bias, before, reach))
    return y, (u, kernel, bias, before, reach)


def _backward(residuals, dy):
    u, kernel, bias, before, reach = residuals
    width = kernel.shape[0]
    u, before, dy = lax.optimization_barrier((u, before, dy))
    y = _activation(u, kernel, bias, before, reach)
    sigmoid = jax.nn.sigmoid(y)
    g = dy.astype(jnp.float32) * (sigmoid * (1 + y * (1 - sigmoid)))
    # Without the barrier XLA keeps float32 intermediates for the sums.
    u, before, g = lax.optimization_barrier((u, before, g.astype(u.dtype)))
    g32 = g.astype(jnp.float32)
    dbias = jnp.sum(g32, (0, 1))
    dkernel = jnp.stack([jnp.sum(g32 * tap, (0, 1)) for tap in _taps(u, width, before, reach)][::-1])
    length = u.shape[1]
    sent = [_where_seen(g, reach, back).astype(jnp.float32) for back in range(width)]
    sent = [_padded(v, 0, width - 1) for v in sent]
    du = sum(kernel[width - 1 - back] * sent[back][:, back : back + length] for back in range(width))
    # Token -i of those before the row is i + t back from token t.
    dbefore = [
        sum(kernel[width - 1 - back] * sent[back][:, back - i] for back in range(i, width)) for i in range(1, width)
    ]
    dbefore = jnp.stack(dbefore[::-1], axis=1)
    return (
        du.astype(u.dtype),
        dkernel.astype(kernel.dtype),
        dbias.astype(bias.dtype),
        dbefore.astype(before.dtype),
        None,
    )


convolve.defvjp(_forward, _backward)


def _activation(u, kernel, bias, before, reach):
    y = bias
    for back, tap in enumerate(_taps(u, kernel.shape[0], before, reach)):
        y = y + kernel[kernel.shape[0] - 1 - back] * tap
    return y


def _taps(u, width, before, reach):
    """For 0 to W - 1 tokens back, float32 [B, L, *channels]: the token that far back, or 0 where it is not seen."""
    taps = []
    for back in range(width):
        # A sum of padded parts, and no concatenation, which XLA would write to memory.
        inside = _padded(u, back, -back)
        outside = _padded(before[:, width - 1 - back :], 0, u.shape[1] - back) if back else 0
        taps.append(_where_seen((inside + outside).astype(jnp.float32), reach, back))
    return taps


def _padded(v, low, high):
    """high < 0: that many tokens less at the end."""
    return lax.pad(v, jnp.zeros((), v.dtype), [(0, 0, 0), (low, high, 0), *[(0, 0, 0)] * (v.ndim - 2)])


def _where_seen(v, reach, back):
    if not back:
        return v
    seen = (reach >= back).reshape(*reach.shape, *(1,) * (v.ndim - 2))
    return jnp.where(seen, v, 0)
