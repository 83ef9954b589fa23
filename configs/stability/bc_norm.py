"""RMSNorm of B and C in the state-space layers; see ../stability_320m.py."""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '../stability_320m.py')
    config.model.bc_norm = True
    return config
