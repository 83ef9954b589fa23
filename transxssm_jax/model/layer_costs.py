"""The record in which a mixer states what one layer of it costs.

Multiply and add are two operations, causal work counts what the mask keeps, and nothing that a backward pass recomputes
counts. costs.py adds the records up.
"""

import dataclasses
from collections.abc import Callable

from transxssm_jax.config import Model

STATE_INTERVAL = 128  # tokens between the scan's states that are kept for its backward pass
BFLOAT16, FLOAT32 = 2, 4  # bytes of an element


@dataclasses.dataclass(frozen=True)
class LayerCosts:
    """What the mixer of one layer costs. All heads count together, so a tensor shard has its share of every figure.

    Attributes:
      in_proj_flops: forward FLOPs per token of the linear maps of the mixer's input.
      out_proj_flops: forward FLOPs per token of the output projection.
      kernel_flops: mean attended tokens (see `mean_attended`) -> forward FLOPs per token of the sequence kernel.
      kernel_efficiency: share of the device's peak at which the kernel does this work in training, as measured.
      context_flops: FLOPs per token, forward and backward, that are added where `context` shards the sequence.
      mixer_in_bytes: what the input projections write per token.
      mixer_out_bytes: what the output projection reads per token.
      residual_bytes: what the kernel keeps per token for its backward pass besides its inputs and outputs.
      state_bytes: decoding state of one row, whatever its length.
      cache_bytes: decoding cache of one row per token.
      handed_over: name of what travels along `context`.
      context_bytes: (context shards, tokens of a row in one shard) -> bytes that a device sends for one row in a
        training step, forward and backward.
    """

    in_proj_flops: int
    out_proj_flops: int
    kernel_flops: Callable[[float], float]
    kernel_efficiency: float
    context_flops: int
    mixer_in_bytes: int
    mixer_out_bytes: int
    residual_bytes: float
    state_bytes: int
    cache_bytes: int
    handed_over: str
    context_bytes: Callable[[int, int], float]

    def forward_flops(self, attended: float) -> float:
        """Forward FLOPs of the mixer per token."""
        return self.in_proj_flops + self.kernel_flops(attended) + self.out_proj_flops


def dtype_bytes(model: Model) -> int:
    """Bytes of an activation."""
    return {'bfloat16': BFLOAT16, 'float32': FLOAT32}[model.dtype]
