"""Jamba: seven Mamba-2 layers to one of attention without an encoding, 60M parameters; see ../small_60m.py."""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '../small_60m.py')
    config.model.pattern, config.model.d_mlp = '7xmamba2,attention', 480
    config.model.attention_encoding = 'none'
    return config
