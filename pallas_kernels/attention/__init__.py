"""Causal self-attention of packed documents.

`api.causal_attention` on one device, `ring.ring_attention` over a sharded sequence, `decode.decode_attention` over a cache.
"""

from pallas_kernels.attention.api import IMPLEMENTATIONS, causal_attention, save_residuals
from pallas_kernels.attention.decode import decode_attention, write_token
from pallas_kernels.attention.ring import ring_attention

__all__ = ['IMPLEMENTATIONS', 'causal_attention', 'decode_attention', 'ring_attention', 'save_residuals', 'write_token']
