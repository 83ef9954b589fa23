"""The short causal convolution of packed documents."""

from pallas_kernels.convolution.api import IMPLEMENTATIONS, causal_convolution, tokens_in_reach

__all__ = ['IMPLEMENTATIONS', 'causal_convolution', 'tokens_in_reach']
