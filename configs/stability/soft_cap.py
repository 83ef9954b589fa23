"""Logits between -30 and 30; see ../stability_320m.py."""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '../stability_320m.py')
    config.model.logit_soft_cap = 30.0
    return config
