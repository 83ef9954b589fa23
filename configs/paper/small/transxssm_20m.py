"""TransXSSM: seven rotary state-space layers to one of attention, 20M parameters; see ../small_20m.py."""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '../small_20m.py')
    config.model.pattern, config.model.d_mlp = '7xssd,attention', 608
    return config
