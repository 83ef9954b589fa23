"""TransXSSM: seven rotary state-space layers to one of attention, 60M parameters; see ../small_60m.py."""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '../small_60m.py')
    config.model.pattern, config.model.d_mlp = '7xssd,attention', 1088
    return config
