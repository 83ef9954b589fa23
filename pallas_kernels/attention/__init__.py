"""Causal self-attention with packed documents, `api.causal_attention`, over a split sequence, `ring.ring_attention`,
and over a cache, `decode.decode_attention`."""

from pallas_kernels.attention.api import IMPLEMENTATIONS, causal_attention, save_residuals
from pallas_kernels.attention.decode import decode_attention, write_token
from pallas_kernels.attention.ring import ring_attention

__all__ = ['IMPLEMENTATIONS', 'causal_attention', 'decode_attention', 'ring_attention', 'save_residuals', 'write_token']
