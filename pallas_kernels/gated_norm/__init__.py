"""The D skip, gate and RMSNorm at the end of a Mamba-2 mixer."""

from pallas_kernels.gated_norm.api import IMPLEMENTATIONS, skip_gate_norm

__all__ = ['IMPLEMENTATIONS', 'skip_gate_norm']
