"""What modeling_transxssm.py computes with: rotation, RMSNorm, the causal convolution and the scan, in plain PyTorch.

Shape legend: B batch, L length, H heads, G groups, K rotated width, P head width, N state, Q and R tokens of a chunk, W width of
the convolution, C channels.
"""

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # pyright: ignore[reportMissingImports]
except ImportError:
    mamba_chunk_scan_combined = None

CHUNK = 128  # tokens of the scan that are computed at a time


# ---- positions ------------------------------------------------------------------


def rope_tables(config: Any, positions_BL: Tensor, width: int, length_B: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [B, L, 1, width / 2], of angles in float64."""
    wide = torch.float32 if positions_BL.device.type == 'mps' else torch.float64
    exponent = torch.arange(0, width, 2, dtype=wide, device=positions_BL.device) / width
    frequency = config.rotary_base**-exponent / (config.rotary_factor if config.rotary_scaling == 'linear' else 1.0)
    if config.rotary_scaling == 'dynamic':
        longer_B = length_B.to(wide).clamp(min=config.rotary_original_length) / config.rotary_original_length
        stretch_B11 = (config.rotary_factor * longer_B - (config.rotary_factor - 1))[:, None, None]
        frequency = frequency * stretch_B11 ** (-exponent * width / (width - 2))
    angle = (positions_BL.to(wide)[..., None] * frequency)[:, :, None]
    return angle.cos().float(), angle.sin().float()


def rotate(x_BLHK: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """Turns the pairs (i, i + K/2), in float32."""
    if rope is None:
        return x_BLHK
    (first, second), (cos, sin) = x_BLHK.float().chunk(2, dim=-1), rope
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BLHK.dtype)


# ---- layers ---------------------------------------------------------------------


class Norm(nn.Module):
    def __init__(self, features: int, epsilon: float):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(features)), epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (wide * inverse * self.weight.float()).to(x.dtype)


class Convolution(nn.Module):
    """silu of a causal convolution, one filter per channel; `kept` holds the W - 1 inputs before that are no padding."""

    def __init__(self, width: int, features: dict[str, int]):
        super().__init__()
        self.before, self.names = width - 1, tuple(features)
        for name, size in features.items():
            setattr(self, name, nn.Conv1d(size, size, width, groups=size))

    def forward(self, inputs: list[Tensor], kept: SimpleNamespace, valid_BL: Tensor | None) -> list[Tensor]:
        outputs, order, back = [], None, None
        if valid_BL is not None:  # padding goes before all else, so that a token's window is the tokens before it
            order = F.pad(valid_BL.int(), (self.before, 0), value=1).argsort(dim=1, stable=True)[..., None]
            back = valid_BL.int().argsort(dim=1, stable=True).argsort(dim=1)[..., None]
        for name, u_BLC in zip(self.names, inputs):
            tail = getattr(kept, name, u_BLC.new_zeros(u_BLC.shape[0], self.before, u_BLC.shape[2]))
            window = torch.cat([tail, u_BLC], dim=1)
            window = window if order is None else window.take_along_dim(order, dim=1)
            setattr(kept, name, window[:, window.shape[1] - self.before :])
            filters = getattr(self, name)
            y_BCL = F.conv1d(window.float().mT, filters.weight.float(), filters.bias.float(), groups=window.shape[2])
            y_BLC = F.silu(y_BCL).transpose(1, 2).to(u_BLC.dtype)
            outputs.append(y_BLC if back is None else y_BLC.take_along_dim(back, dim=1))
        return outputs


def scan(x_BLHP: Tensor, dt_BLH: Tensor, a_H: Tensor, b_BLGN: Tensor, c_BLGN: Tensor, state_BHPN: Tensor):
    """h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T;  y_t = h_t c_t. Returns y in x's dtype and the last state, float32."""
    if mamba_chunk_scan_combined and x_BLHP.is_cuda and x_BLHP.dtype != torch.float32 and x_BLHP.shape[1] > 1:
        arrays = [v.contiguous() for v in (x_BLHP, dt_BLH, a_H, b_BLGN, c_BLGN)]
        states = dict(initial_states=state_BHPN.contiguous(), return_final_states=True)
        y, state = mamba_chunk_scan_combined(*arrays, chunk_size=256, **states)
        return y.to(x_BLHP.dtype), state.float()
    G, wide = b_BLGN.shape[2], torch.float32 if x_BLHP.device.type == 'mps' else torch.float64
    state = state_BHPN.float().unflatten(1, (G, -1))
    outputs = []
    for x, dt, b, c in zip(*(v.split(CHUNK, dim=1) for v in (x_BLHP, dt_BLH, b_BLGN, c_BLGN))):
        x, b, c = x.float().unflatten(2, (G, -1)), b.float(), c.float()  # x [B, Q, G, heads of a group, P]
        # Sums in float64: where a strong decay stands before weak ones, float32 would lose these.
        cum_BHQ = torch.cumsum((dt * a_H).to(wide), dim=1).transpose(1, 2)
        since = (cum_BHQ[..., :, None] - cum_BHQ[..., None, :]).float()  # [B, H, Q, R]
        causal = torch.ones(since.shape[-2:], dtype=torch.bool, device=since.device).tril()
        decay = torch.exp(since.masked_fill(~causal, -math.inf)) * dt.transpose(1, 2)[:, :, None]
        enter, leave = torch.exp(cum_BHQ).float(), torch.exp(cum_BHQ[..., -1:] - cum_BHQ).float() * dt.transpose(1, 2)
        decay, enter, leave = (v.unflatten(1, (G, -1)) for v in (decay, enter, leave))
        weights = torch.einsum('bqgn,brgn->bgqr', c, b)[:, :, None] * decay
        y = torch.einsum('bghqr,brghp->bqghp', weights, x)
        y = y + torch.einsum('bqgn,bghpn->bqghp', c, state) * enter.permute(0, 3, 1, 2)[..., None]
        local = torch.einsum('brghp,brgn->bghpn', x * leave.permute(0, 3, 1, 2)[..., None], b)
        state = enter[..., -1, None, None] * state + local
        outputs.append(y.flatten(2, 3).to(x_BLHP.dtype))
    return torch.cat(outputs, dim=1), state.flatten(1, 2)
