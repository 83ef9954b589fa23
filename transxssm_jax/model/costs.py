"""What each kind of layer costs, and the floating-point operations of the model.

XLA's own counts are wrong under scan and custom calls, so the model's work is counted here: multiply and add are
two operations, causal work counts what the mask keeps, and nothing that a backward pass recomputes counts. Every
figure elsewhere (MFU, the roofline, plans, the decoding benchmark) only adds up these records.

A mixer states the costs of a layer in its own file (`costs`); a new remat policy is one row of `REMAT`.

Shape legend: B batch, L length, D model, F mlp, H heads, G groups, K attention head width, P state-space head width,
N state, Q chunk length, V vocabulary.
"""

import collections
import math
import typing
from collections.abc import Callable

import numpy as np

from transxssm_jax.config import Model
from transxssm_jax.model.layer_costs import FLOAT32, LayerCosts, dtype_bytes
from transxssm_jax.model.mixers import mixer_of


def costs_of(model: Model, kind: str) -> LayerCosts:
    """Costs of one layer of a kind. Raises NotImplementedError where there is no such mixer."""
    return mixer_of(kind).costs(model)


def layer_costs(model: Model) -> list[tuple[str, int, LayerCosts]]:
    """(kind, how many layers of it the model has, costs of one) of every kind in the model."""
    counts = collections.Counter(model.layer_pattern)
    return [(kind, count * model.num_periods, costs_of(model, kind)) for kind, count in counts.items()]


# ---- remat -----------------------------------------------------------------


class Remat(typing.NamedTuple):
    """What one remat policy keeps of a layer for the backward pass, and what it computes again.

    Attributes:
      mixer: names of the mixer's bytes that are kept, of 'mixer_in', 'mixer_out' and 'residual'.
      d_model: vectors of width D that are kept per token, the layer's input included.
      whole: how many of these are of all tokens of a device also where tensor cuts the residual stream.
      sent: vectors of width D that are communicated once more there: the gathered inputs of mixer and MLP, and the mixer's sum.
      d_mlp: vectors of width F that are kept per token.
      again: products that the backward pass computes again, of 'in_proj', 'kernel', 'out_proj' and 'gate_up'.
      norms: how many norms' statistics are kept, one float32 per token each.
      weights: whether the weights of all layers are kept in model.dtype, gathered.
      rounded: whether the inputs of the MLP's products are kept as model.quantization='fp8' rounds them.
    """

    mixer: tuple[str, ...]
    d_model: int
    d_mlp: int
    again: tuple[str, ...]
    whole: int = 0
    sent: int = 3
    norms: int = 0
    weights: bool = False
    rounded: bool = False


REMAT = {
    'none': Remat(
        ('mixer_in', 'mixer_out', 'residual'), 4, 3, (), whole=2, sent=0, norms=2, weights=True, rounded=True
    ),
    'matmuls': Remat(('mixer_in', 'mixer_out', 'residual'), 2, 2, (), sent=2, norms=2, rounded=True),
    'dots': Remat(('mixer_in',), 2, 2, ('kernel',), whole=1),
    'hybrid': Remat(('mixer_in', 'mixer_out', 'residual'), 1, 0, ('out_proj', 'gate_up')),
    'full': Remat((), 1, 0, ('in_proj', 'kernel', 'out_proj', 'gate_up')),
}


def mean_over_layers(model: Model, of: Callable[[Remat], float], kind: str = '') -> float:
    """The mean of what `of` gives for the remat policies of the layers, or of those of one kind."""
    kinds = model.layer_pattern * model.num_periods
    policies = [policy for policy, own in zip(model.remat_of_layers, kinds, strict=True) if own == kind or not kind]
    return sum(count * of(REMAT[policy]) for policy, count in collections.Counter(policies).items()) / len(policies)


def share_with_kept_weights(model: Model) -> float:
    """Share of the layers that keep their gathered weights for the backward pass."""
    return mean_over_layers(model, lambda remat: remat.weights)


def saved_bytes(model: Model, kind: str, tensor: int = 1) -> float:
    """Bytes per token that a layer of a kind keeps for its backward pass, on one of `tensor` shards; where model.remat differs
    between these layers, their mean.

    The residual stream is cut over the shards as heads are (`collectives.sequence_parallel`).
    """
    costs = costs_of(model, kind)
    return mean_over_layers(model, lambda remat: _saved_bytes(model, costs, tensor, remat), kind)


def _saved_bytes(model: Model, costs: LayerCosts, tensor: int, kept: Remat) -> float:
    size = dtype_bytes(model)
    sharded = sum(getattr(costs, f'{name}_bytes') for name in kept.mixer) + size * kept.d_mlp * model.d_mlp
    halves = 2 if model.d_mlp else 1  # mixer and MLP, or a mixer alone
    whole = kept.whole * halves // 2
    sharded += size * (math.ceil(kept.d_model * halves / 2) - whole) * model.d_model
    sharded += FLOAT32 * kept.norms * halves / 2
    vectors = size * whole * model.d_model
    if model.quantization == 'fp8' and kept.rounded:
        # The inputs of the MLP's products, one byte each: its norm's output and what silu(gate) * up is.
        vectors += model.d_model
        sharded += model.d_mlp
    return vectors + sharded / tensor


def sent_vectors(model: Model) -> tuple[float, int]:
    """Vectors of width D per token and layer, a mean over layers, that tensor gathers, or sums, in a training step: (in all,
    of them gradients that are sums). Each is sent to the other devices once, (tensor - 1) / tensor of it by each."""
    branches = 2 if model.d_mlp else 1
    again = mean_over_layers(model, lambda remat: remat.sent if model.d_mlp else min(remat.sent, 1))
    # Of mixer and MLP alike: the input gathered and the output summed, and their gradients summed and gathered.
    return 4 * branches + again, branches


def recomputed_flops(model: Model, kind: str, attended: float) -> tuple[float, float]:
    """FLOPs per token that a layer's backward pass computes again: (of matmuls, of the kernel); a mean as `saved_bytes`."""
    costs = costs_of(model, kind)
    flops = {
        'in_proj': costs.in_proj_flops,
        'out_proj': costs.out_proj_flops,
        'gate_up': 4 * model.d_model * model.d_mlp,
        'kernel': costs.kernel_flops(attended),
    }
    kernel = flops.pop('kernel') * mean_over_layers(model, lambda remat: 'kernel' in remat.again, kind)
    matmuls = mean_over_layers(model, lambda remat: sum(flops.get(name, 0.0) for name in remat.again), kind)
    return matmuls, kernel


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
