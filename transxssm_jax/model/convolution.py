"""The short causal convolution of Mamba-2, one filter per channel, and its D skip.

Shape legend: B batch, L length, W width of the filters in tokens, H heads.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from transxssm_jax.parallel import collectives


class CausalConvolution(nnx.Module):
    """silu(sum_j kernel_j u_{t-W+1+j} + bias) of several inputs, within each document (Dao and Gu, 2024).

    The last of the W taps is the token's own. Where the mesh shards the tokens of a row, the W - 1 tokens before a shard
    come from the shard before it.

    Args:
      width: W, at least 2.
      inputs: name of an input -> its channel axes, as the outputs of `layers.Linear`. The parameters of input 'x' are
        `x/kernel` [W, *channels] and `x/bias` [*channels], uniform in +-1/sqrt(W) at first (PyTorch's Conv1d).
    """

    def __init__(self, width: int, inputs: dict[str, dict[str, int]], *, rngs: nnx.Rngs):
        self.width, self.names = width, tuple(inputs)
        for name, axes in inputs.items():
            setattr(self, name, _Filters(width, axes, rngs))

    def __call__(self, inputs: Sequence[jax.Array], segment_ids_BL: jax.Array) -> tuple[jax.Array, ...]:
        """One [B, L, *channels] per input, in its dtype, computed in float32.

        Args:
          inputs: [B, L, *channels] in the order of the constructor.
          segment_ids_BL: a document begins where the id changes; nothing before that is seen.
        """
        before = self.width - 1
        ids_BL = jnp.concatenate([collectives.previous_tokens(segment_ids_BL, before), segment_ids_BL], axis=1)
        same = within_document(ids_BL, self.width)
        # One exchange for all inputs.
        joined = jnp.concatenate([_flat(u[:, -before:]) for u in inputs], axis=-1)
        joined = collectives.previous_tokens(joined, before)
        outputs, start = [], 0
        for name, u in zip(self.names, inputs, strict=True):
            size = _flat(u[:, :1]).shape[-1]
            previous = joined[..., start : start + size].reshape(u.shape[0], before, *u.shape[2:])
            start += size
            filters = getattr(self, name)
            window = jnp.concatenate([previous, u], axis=1)
            outputs.append(convolve(window, filters.kernel[...], filters.bias[...], same))
        return tuple(outputs)


class _Filters(nnx.Module):
    def __init__(self, width: int, axes: dict[str, int], rngs: nnx.Rngs):
        shape, bound = tuple(axes.values()), width**-0.5
        kernel = jax.random.uniform(rngs.params(), (width, *shape), jnp.float32, -bound, bound)
        self.kernel = nnx.Param(kernel, axes=(None, *axes))
        self.bias = nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound), axes=tuple(axes))


def convolve(window: jax.Array, kernel: jax.Array, bias: jax.Array, same: Sequence[jax.Array] = ()) -> jax.Array:
    """The convolution and its SiLU, as W shifted products, which XLA fuses into one pass.

    Args:
      window: [B, W - 1 + L, *channels]; its first W - 1 tokens are those before the row, or 0.
      kernel, bias: float32 [W, *channels] and [*channels].
      same: of `within_document`; (): each row is one document.

    Returns:
      [B, L, *channels] in window's dtype.
    """
    width = kernel.shape[0]
    length = window.shape[1] - width + 1
    y = bias
    for back in range(width):
        u = window[:, width - 1 - back :][:, :length].astype(jnp.float32)
        if back and same:
            u = jnp.where(same[back - 1].reshape(*u.shape[:2], *(1,) * (u.ndim - 2)), u, 0)
        y = y + kernel[width - 1 - back] * u
    return jax.nn.silu(y).astype(window.dtype)


def within_document(ids_BL: jax.Array, width: int) -> list[jax.Array]:
    """For 1 to W - 1 tokens back, bool [B, L]: whether no document begins in between.

    Args:
      ids_BL: segment ids [B, W - 1 + L], with the W - 1 tokens before the row.
      width: W.
    """
    goes_on = ids_BL[:, 1:] == ids_BL[:, :-1]
    length = ids_BL.shape[1] - width + 1
    found = []
    for back in range(1, width):
        step = goes_on[:, width - 1 - back :][:, :length]
        found.append(found[-1] & step if found else step)
    return found


def skip(y_BLHP: jax.Array, x_BLHP: jax.Array, d_H: jax.Array) -> jax.Array:
    """y + d x with one d per head, in float32."""
    return y_BLHP.astype(jnp.float32) + d_H[:, None] * x_BLHP.astype(jnp.float32)


def _flat(u: jax.Array) -> jax.Array:
    return u.reshape(*u.shape[:2], -1)
