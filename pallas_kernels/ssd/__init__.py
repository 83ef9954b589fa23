"""Rotary state-space duality (SSD): the scan, its decode step and its shard state."""

from pallas_kernels.ssd.api import IMPLEMENTATIONS, rotary_ssd, rotary_ssd_state, rotary_ssd_step

__all__ = ['IMPLEMENTATIONS', 'rotary_ssd', 'rotary_ssd_state', 'rotary_ssd_step']
