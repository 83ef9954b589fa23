"""The short causal convolution as its definition, in the widest dtype that it is given."""

import jax
import jax.numpy as jnp


def convolve(u_BLC, kernel_WC, bias_C, before_BJC, reach_BL):
    """silu(bias + sum_j kernel_{W-1-j} u_{t-j}) over the tokens j <= reach_t back.

    Args:
      u_BLC: [B, L, *channels]; the other arrays have the same channels.
      kernel_WC, bias_C: [W, *channels], [*channels].
      before_BJC: [B, W - 1, *channels], the tokens before the row.
      reach_BL: int32 [B, L], how many tokens back a token sees, at most W - 1.
    """
    width, length = kernel_WC.shape[0], u_BLC.shape[1]
    wide = jnp.promote_types(u_BLC.dtype, jnp.float32)
    window = jnp.concatenate([before_BJC, u_BLC], axis=1).astype(wide)
    y = bias_C.astype(wide)
    for back in range(width):
        start = width - 1 - back
        seen = (reach_BL >= back).reshape(*reach_BL.shape, *(1,) * (u_BLC.ndim - 2))
        y = y + kernel_WC[start].astype(wide) * jnp.where(seen, window[:, start : start + length], 0)
    return jax.nn.silu(y).astype(u_BLC.dtype)
