"""Causal self-attention with packed documents, `api.causal_attention`, and over a cache, `decode.decode_attention`."""

from pallas_kernels.attention.api import IMPLEMENTATIONS, causal_attention, save_residuals
from pallas_kernels.attention.decode import decode_attention, write_token

__all__ = ['IMPLEMENTATIONS', 'causal_attention', 'decode_attention', 'save_residuals', 'write_token']
