"""Jamba at 1.3B: seven Mamba-2 layers to one of attention, without a position encoding that they share.

python -m transxssm_jax.train --config=configs/jamba_1p3b.py --workdir=DIR --config.data.path=PREPARED

Data and recipe are those of 1p3b.py, and the size is within 1% of its. Measured on one
H100, 4 rows of 4,096 tokens (2026-11-27): 53,200 tokens/s.
"""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '1p3b.py')
    config.model.pattern = '7xmamba2,attention'
    config.model.attention_encoding = 'none'
    config.model.d_mlp = 3712
    return config
