"""The short causal convolution of Mamba-2, one filter per channel, and its D skip.

Shape legend: B batch, L length, W width of the filters in tokens, H heads.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.convolution import causal_convolution, tokens_in_reach
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
        reach_BL = tokens_in_reach(ids_BL, self.width)
        # One exchange for all inputs.
        joined = jnp.concatenate([_flat(u[:, -before:]) for u in inputs], axis=-1)
        joined = collectives.previous_tokens(joined, before)
        outputs, start = [], 0
        for name, u in zip(self.names, inputs, strict=True):
            size = _flat(u[:, :1]).shape[-1]
            previous = joined[..., start : start + size].reshape(u.shape[0], before, *u.shape[2:])
            start += size
            filters = getattr(self, name)
            outputs.append(
                causal_convolution(u, filters.kernel[...], filters.bias[...], before=previous, reach=reach_BL)
            )
        return tuple(outputs)


class _Filters(nnx.Module):
    def __init__(self, width: int, axes: dict[str, int], rngs: nnx.Rngs):
        shape, bound = tuple(axes.values()), width**-0.5
        kernel = jax.random.uniform(rngs.params(), (width, *shape), jnp.float32, -bound, bound)
        self.kernel = nnx.Param(kernel, axes=(None, *axes))
        self.bias = nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound), axes=tuple(axes))


def skip(y_BLHP: jax.Array, x_BLHP: jax.Array, d_H: jax.Array) -> jax.Array:
    """y + d x with one d per head, in float32."""
    return y_BLHP.astype(jnp.float32) + d_H[:, None] * x_BLHP.astype(jnp.float32)


def _flat(u: jax.Array) -> jax.Array:
    return u.reshape(*u.shape[:2], -1)
