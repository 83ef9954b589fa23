"""TransXSSM 1.3B on one host of 8 H200: 4K tokens a row, 2M tokens a step in 8 microbatches of 8 rows a GPU.

python -m transxssm_jax.train --config=configs/pods/1p3b_h200_8.py --workdir=DIR --config.data.path=PREPARED
python -m transxssm_jax.plan --config=configs/pods/1p3b_h200_8.py --topology=h200:8

What plan computes, without a compiler: at least 17.93 of 98.49 GiB per GPU, 44 GiB expected; at least 38.9 GB sent per
GPU and step, 86 ms of NVLink; a step takes more than 2.5 s, and 4.9 s (43% MFU) are expected. One H200 alone ran these
microbatches at 38% MFU; eight together: not measured.
"""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '../1p3b.py')
    config.mesh.data, config.mesh.fsdp = 1, 8
    config.train.accumulation_steps = 8
    return config
