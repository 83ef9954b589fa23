"""Jamba: seven Mamba-2 layers to one of attention without an encoding, 20M parameters; see ../small_20m.py."""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '../small_20m.py')
    config.model.pattern, config.model.d_mlp = '7xmamba2,attention', 320
    config.model.attention_encoding = 'none'
    return config
