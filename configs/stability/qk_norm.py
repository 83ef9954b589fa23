"""RMSNorm of Q and K in attention; see ../stability_320m.py."""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '../stability_320m.py')
    config.model.qk_norm = True
    return config
