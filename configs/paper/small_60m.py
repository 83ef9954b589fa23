"""What the four models share at about 60M parameters: as small_20m.py, twice as wide.

python -m transxssm_jax.experiment --configs=configs/paper/small --workdir=DIR --data=PREPARED [--steps=N]

The learning rate falls as the paper's does from 320M to 1.3B. Losses after 1,200 steps are in docs/paper.md.
"""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, 'small_20m.py')
    config.model.d_model = 512
    config.model.num_heads, config.model.num_kv_heads, config.model.num_ssd_groups = 8, 4, 4
    config.optimizer.learning_rate = 7e-4
    return config
