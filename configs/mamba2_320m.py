"""Mamba-2 at 320M: a Mamba-2 mixer in every layer, with the data and the recipe of 320m.py and within 1% of its size.

python -m transxssm_jax.train --config=configs/mamba2_320m.py --workdir=DIR --config.data.path=PREPARED

The MLP, which Mamba-2 alone does not need, makes it as deep as the others. Not measured.
"""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '320m.py')
    config.model.pattern = 'mamba2'
    config.model.d_mlp = 3200
    return config
