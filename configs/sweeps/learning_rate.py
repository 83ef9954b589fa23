"""Four learning rates with two seeds each.

python -m transxssm_jax.sweep --sweep=learning_rate --config=tiny --output=runs/rates --config.data.path=runs/demo/data
"""

from transxssm_jax.config_sweep import product, vary


def get_sweep():
    return product(
        vary('optimizer.learning_rate', [1e-3, 2e-3, 4e-3, 8e-3]),
        vary(('train.seed', 'data.seed'), [(0, 0), (1, 1)]),
    )
