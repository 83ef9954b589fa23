"""Mamba-2 at 1.3B: a Mamba-2 mixer in every layer, with the data and the recipe of 1p3b.py and within 1% of its size.

python -m transxssm_jax.train --config=configs/mamba2_1p3b.py --workdir=DIR --config.data.path=PREPARED

The MLP, which Mamba-2 alone does not need, makes it as deep as the others. Measured on
one H100, 4 rows of 4,096 tokens (2026-11-27): 53,500 tokens/s.
"""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '1p3b.py')
    config.model.pattern = 'mamba2'
    config.model.d_mlp = 3328
    return config
