"""Causal self-attention with packed documents. See `api.causal_attention`."""

from pallas_kernels.attention.api import IMPLEMENTATIONS, causal_attention, save_residuals

__all__ = ['IMPLEMENTATIONS', 'causal_attention', 'save_residuals']
