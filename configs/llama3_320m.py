"""Llama3 at 320M: attention with RoPE in every layer, with the data and the recipe of 320m.py and within 1% of its size.

python -m transxssm_jax.train --config=configs/llama3_320m.py --workdir=DIR --config.data.path=PREPARED

Not measured.
"""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '320m.py')
    config.model.pattern = 'attention'
    config.model.d_mlp = 4352
    return config
