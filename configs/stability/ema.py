"""The average of the weights, evaluated; see ../stability_320m.py."""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '../stability_320m.py')
    config.optimizer.ema_decay = 0.99
    config.train.eval_weights = 'ema'
    return config
