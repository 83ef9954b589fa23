"""Llama3: attention with RoPE in every layer, 20M parameters; see ../small_20m.py."""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '../small_20m.py')
    config.model.pattern, config.model.d_mlp = 'attention', 672
    return config
