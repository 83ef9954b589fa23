"""What each kind of layer costs, and the floating-point operations of the model.

XLA's own counts are wrong under scan and custom calls, so the model's work is counted here: multiply and add are
two operations, causal work counts what the mask keeps, and nothing that a backward pass recomputes counts. Every
figure elsewhere (MFU, the roofline, plans, the decoding benchmark) only adds up these records.

A new kind of layer states its costs in one function and one row of `COSTS`; a new remat policy is one row of `REMAT`.

Shape legend: B batch, L length, D model, F mlp, H heads, G groups, K attention head width, P state-space head width,
N state, Q chunk length, V vocabulary.
"""

import collections
import dataclasses
import math
import typing
from collections.abc import Callable

import numpy as np

from transxssm_jax.config import Model

# Chunk length at which the scan's work is counted: the least-work figures of the kernel contract use it, and it keeps
# MFU comparable between chunk sizes.
SCAN_CHUNK = 128
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


def ssd_costs(model: Model) -> LayerCosts:
    """Costs of the rotary state-space mixer (`ssd.RotarySSD`)."""
    D, H, P, N, G, Q = (
        model.d_model, model.num_heads, model.head_dim, model.d_state, model.num_ssd_groups, SCAN_CHUNK,
    )  # fmt: skip
    size = dtype_bytes(model)
    state = FLOAT32 * H * P * N
    return LayerCosts(
        in_proj_flops=2 * D * (H * P + 2 * G * N + H),  # x; B and C; dt
        out_proj_flops=2 * H * P * D,
        # Scores and scores times x over half a chunk; state in and state out.
        kernel_flops=lambda attended: G * N * Q + H * P * Q + 4 * H * N * P,
        kernel_efficiency=0.115,  # H100, 8 x 4096 at 1.3B: 21 layers forward and backward in 27 ms
        context_flops=2 * 2 * H * P * N,  # what the state before a shard adds to y, and its gradient
        mixer_in_bytes=size * (H * P + 2 * G * N) + FLOAT32 * H,
        mixer_out_bytes=size * H * P,
        residual_bytes=size * H * P * N / STATE_INTERVAL,
        state_bytes=state,
        cache_bytes=0,
        handed_over='states',
        # The prefix scan over shards passes one state on in each of its rounds, forward and backward.
        context_bytes=lambda shards, tokens: 2 * state * math.ceil(math.log2(shards)),
    )


def attention_costs(model: Model) -> LayerCosts:
    """Costs of the self-attention mixer (`attention.Attention`)."""
    D, H, K, G = model.d_model, model.num_heads, model.head_dim, model.num_kv_heads
    size = dtype_bytes(model)
    return LayerCosts(
        in_proj_flops=2 * D * (H * K + 2 * G * K),
        out_proj_flops=2 * H * K * D,
        kernel_flops=lambda attended: 4 * H * K * attended,  # QK^T and PV
        kernel_efficiency=0.33,  # H200, 8 x 4096 at 1.3B, cuDNN: one layer forward and backward in 5.1 ms
        context_flops=0,
        mixer_in_bytes=size * (H * K + 2 * G * K),
        mixer_out_bytes=size * H * K,
        residual_bytes=FLOAT32 * H,  # log-sum-exp
        state_bytes=0,
        cache_bytes=size * 2 * G * K,
        handed_over='keys_values',
        # Every other shard's K and V, forward and backward, in bfloat16, and the sums of their gradients in float32.
        context_bytes=lambda shards, tokens: (2 * BFLOAT16 + FLOAT32) * (shards - 1) * tokens * 2 * G * K,
    )


COSTS: dict[str, Callable[[Model], LayerCosts]] = {'ssd': ssd_costs, 'attention': attention_costs}


def costs_of(model: Model, kind: str) -> LayerCosts:
    """Costs of one layer of a kind.

    Raises:
      NotImplementedError: the kind states no costs.
    """
    if kind not in COSTS:
        raise NotImplementedError(
            f'layers of kind {kind!r} state no costs, only {", ".join(COSTS)} do; add them to COSTS in '
            'transxssm_jax/model/costs.py'
        )
    return COSTS[kind](model)


def layer_costs(model: Model) -> list[tuple[str, int, LayerCosts]]:
    """(kind, how many layers of it the model has, costs of one) of every kind in the model."""
    counts = collections.Counter(model.layer_pattern)
    return [(kind, count * model.num_periods, costs_of(model, kind)) for kind, count in counts.items()]


def dtype_bytes(model: Model) -> int:
    """Bytes of an activation."""
    return {'bfloat16': BFLOAT16, 'float32': FLOAT32}[model.dtype]


# ---- remat -----------------------------------------------------------------


class Remat(typing.NamedTuple):
    """What one remat policy keeps of a layer for the backward pass, and what it computes again.

    Attributes:
      mixer: names of the mixer's bytes that are kept, of 'mixer_in', 'mixer_out' and 'residual'.
      d_model: vectors of width D that are kept per token, the layer's input included.
      d_mlp: vectors of width F that are kept per token.
      again: products that the backward pass computes again, of 'in_proj', 'kernel', 'out_proj' and 'gate_up'.
    """

    mixer: tuple[str, ...]
    d_model: int
    d_mlp: int
    again: tuple[str, ...]


REMAT = {
    'none': Remat(('mixer_in', 'mixer_out', 'residual'), 5, 3, ()),
    'dots': Remat(('mixer_in',), 2, 2, ('kernel',)),
    'hybrid': Remat(('mixer_in', 'mixer_out', 'residual'), 1, 0, ('out_proj', 'gate_up')),
    'full': Remat((), 1, 0, ('in_proj', 'kernel', 'out_proj', 'gate_up')),
}


def saved_bytes(model: Model, costs: LayerCosts, tensor: int = 1) -> float:
    """Bytes per token that one layer keeps for its backward pass under model.remat, on one of `tensor` shards."""
    kept, size = REMAT[model.remat], dtype_bytes(model)
    sharded = sum(getattr(costs, f'{name}_bytes') for name in kept.mixer) + size * kept.d_mlp * model.d_mlp
    return size * kept.d_model * model.d_model + sharded / tensor


def recomputed_flops(model: Model, costs: LayerCosts, attended: float) -> tuple[float, float]:
    """FLOPs per token that one layer's backward pass computes again under model.remat: (of matmuls, of the kernel)."""
    flops = {
        'in_proj': costs.in_proj_flops,
        'out_proj': costs.out_proj_flops,
        'gate_up': 4 * model.d_model * model.d_mlp,
        'kernel': costs.kernel_flops(attended),
    }
    again = {name: flops[name] for name in REMAT[model.remat].again}
    kernel = again.pop('kernel', 0.0)
    return sum(again.values()), kernel


# ---- attended tokens -------------------------------------------------------


def row_attended(seq_len: int) -> float:
    """Mean tokens that a token attends to, itself included, where one document fills every row."""
    return (seq_len + 1) / 2


def mean_attended(lengths: np.ndarray, seq_len: int) -> float:
    """Mean tokens that a token attends to, itself included, in packed rows of documents of these lengths.

    Documents are laid end to end in a random order and cut every seq_len tokens, so a document begins anywhere in a
    row: of a document of n tokens, the n - d pairs at distance d lie in one row with probability 1 - d / seq_len.

    Args:
      lengths: integers [documents], tokens of each document; may be memory-mapped.
      seq_len: tokens of a row.

    Returns:
      The mean over tokens; `row_attended(seq_len)` for documents that are much longer than rows.
    """
    pairs = tokens = 0.0
    for start in range(0, len(lengths), _BLOCK):
        n = np.asarray(lengths[start : start + _BLOCK], np.float64)
        m = np.minimum(n, seq_len)  # distances 0 to m - 1: the sum of (n - d) (seq_len - d) / seq_len over them
        sums = m * n * seq_len - (n + seq_len) * m * (m - 1) / 2 + m * (m - 1) * (2 * m - 1) / 6
        pairs, tokens = pairs + float(sums.sum()) / seq_len, tokens + float(n.sum())
    return pairs / tokens


_BLOCK = 1 << 20  # documents at a time


# ---- the model -------------------------------------------------------------


def mlp_flops(model: Model) -> int:
    """Forward FLOPs of one SwiGLU per token."""
    return 6 * model.d_model * model.d_mlp


def head_flops(model: Model) -> int:
    """Forward FLOPs of the head per token."""
    return 2 * model.d_model * model.vocab_size


def kernel_flops_per_token(model: Model, attended: float) -> float:
    """Forward FLOPs of all sequence kernels per token: what no matrix multiplication does."""
    return sum(count * costs.kernel_flops(attended) for _, count, costs in layer_costs(model))


def forward_flops_per_token(model: Model, attended: float) -> float:
    """Forward FLOPs of the whole model per token, head included.

    Args:
      model: sizes.
      attended: mean tokens that a token attends to, of `row_attended` or `mean_attended`.
    """
    mixers = sum(count * costs.forward_flops(attended) for _, count, costs in layer_costs(model))
    return mixers + model.num_layers * mlp_flops(model) + head_flops(model)


def train_flops_per_token(model: Model, attended: float) -> float:
    """FLOPs of a training step per token: the backward pass of every product is two products."""
    return 3 * forward_flops_per_token(model, attended)
