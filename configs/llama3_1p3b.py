"""Llama3 at 1.3B: attention with RoPE in every layer, with the data and the recipe of 1p3b.py and within 1% of its size.

python -m transxssm_jax.train --config=configs/llama3_1p3b.py --workdir=DIR --config.data.path=PREPARED

Measured on one H200, 8 rows of 8,192 tokens (2026-11-27): 46,800 tokens/s.
"""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '1p3b.py')
    config.model.pattern = 'attention'
    config.model.d_mlp = 6400
    return config
