"""TransXSSM: one rotary embedding for state-space and attention layers, of the paper's table 2; see ../encodings.py."""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '../encodings.py')
    config.model.pattern = '7xssd,attention'
    return config
