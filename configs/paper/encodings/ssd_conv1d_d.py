"""State-space layers with a short convolution and a D skip, of the paper's table 2; see ../encodings.py."""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '../encodings.py')
    config.model.pattern = 'ssd'
    config.model.ssd_encoding = 'conv1d_d'
    return config
