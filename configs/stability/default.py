"""The default that the others are compared with; see ../stability_320m.py."""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '../stability_320m.py')
    return config
