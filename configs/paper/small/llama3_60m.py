"""Llama3: attention with RoPE in every layer, 60M parameters; see ../small_60m.py."""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '../small_60m.py')
    config.model.pattern, config.model.d_mlp = 'attention', 1248
    return config
