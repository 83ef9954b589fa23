"""A hybrid: state-space layers with a convolution and a D skip, attention with RoPE; of table 2, see ../encodings.py."""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '../encodings.py')
    config.model.pattern = '7xssd,attention'
    config.model.ssd_encoding = 'conv1d_d'
    return config
