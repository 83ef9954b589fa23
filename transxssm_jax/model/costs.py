"""Analytic floating-point operations of the model.

XLA's own counts are wrong under scan and custom calls, so the model's work is
counted here: multiply and add are two operations; causal work counts what the
mask keeps; nothing that a backward pass recomputes counts.

Shape legend: D model, F mlp, H heads, G groups, K attention head width,
P state-space head width, N state, Q chunk length, L length, V vocabulary.
"""

from pallas_kernels import chips
from transxssm_jax.config import Model

# Chunk length at which the scan's work is counted: the least-work figures of
# the kernel contract use it, and it keeps MFU comparable between chunk sizes.
SCAN_CHUNK = 128


def peak_flops(device_kind: str) -> float:
    """bfloat16 FLOP/s of a device, 0.0 where it is not known (a CPU)."""
    name = chips.named(device_kind)
    return chips.CHIPS[name].peak if name else 0.0


def scan_flops_per_token(model: Model) -> int:
    """Forward work of the rotary scan: scores, scores times x, state in, state out."""
    H, P, N, G, Q = model.num_heads, model.head_dim, model.d_state, model.num_ssd_groups, SCAN_CHUNK
    return G * N * Q + H * P * Q + 4 * H * N * P


def mixer_flops_per_token(model: Model, kind: str, seq_len: int) -> int:
    """Forward work of one mixer, projections included, at sequence length L."""
    D, H, K, L = model.d_model, model.num_heads, model.head_dim, seq_len
    if kind == 'ssd':
        projections = 2 * D * (H * K + 2 * model.num_ssd_groups * model.d_state + H) + 2 * H * K * D
        return projections + scan_flops_per_token(model)
    projections = 2 * D * (H * K + 2 * model.num_kv_heads * K) + 2 * H * K * D
    return projections + 2 * H * K * (L + 1)  # QK^T and PV over (L + 1) / 2 keys on average


def forward_flops_per_token(model: Model, seq_len: int) -> int:
    """Forward work of the whole model, head included."""
    modules = model.num_layers // len(model.layer_pattern)
    mixers = modules * sum(mixer_flops_per_token(model, kind, seq_len) for kind in model.layer_pattern)
    mlps = model.num_layers * 6 * model.d_model * model.d_mlp
    return mixers + mlps + 2 * model.d_model * model.vocab_size


def train_flops_per_token(model: Model, seq_len: int) -> int:
    """Forward and backward: the backward pass of every product is two products."""
    return 3 * forward_flops_per_token(model, seq_len)
