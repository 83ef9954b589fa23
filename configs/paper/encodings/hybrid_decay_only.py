"""A hybrid: state-space layers with their decay alone, attention with RoPE; table 2 of the paper, see ../encodings.py."""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '../encodings.py')
    config.model.pattern = '7xssd,attention'
    config.model.ssd_encoding = 'decay_only'
    return config
