"""TransXSSM 1.3B on one host of 8 H200: 4K tokens a row, 2M tokens a step, in as few microbatches as fit.

python -m transxssm_jax.train --config=configs/pods/1p3b_h200_8.py --workdir=DIR --config.data.path=PREPARED
python -m transxssm_jax.plan --config=configs/pods/1p3b_h200_8.py --topology=h200:8

What plan computes, without a compiler: remat 'none' in 4 microbatches of 16 rows a GPU, 118.6 of 122.12 GiB per GPU
expected; at least 11.4 GB sent per GPU and step, 25 ms of NVLink; a step takes more than 2.1 s, and 3.8 s (57% MFU) are
expected. Eight GPUs together: not measured.
"""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '../1p3b.py')
    config.mesh.data, config.mesh.fsdp = 1, 8
    return config
