"""Kernels of transxssm_jax. Imports jax and numpy only, never transxssm_jax."""
