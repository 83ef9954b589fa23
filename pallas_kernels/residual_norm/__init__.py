"""RMSNorm of the residual stream, and the stream itself on its way past the layer that reads the norm."""

from pallas_kernels.residual_norm.api import IMPLEMENTATIONS, norm_and_residual
from pallas_kernels.residual_norm.xla import STATISTICS_NAME, rms_norm

__all__ = ['IMPLEMENTATIONS', 'STATISTICS_NAME', 'norm_and_residual', 'rms_norm']
