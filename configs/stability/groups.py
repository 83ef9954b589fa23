"""A learning rate of their own for the embedding and the time scales; see ../stability_320m.py."""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '../stability_320m.py')
    config.optimizer.groups = 'embedding: 2; dt: 0.3, 0'
    return config
