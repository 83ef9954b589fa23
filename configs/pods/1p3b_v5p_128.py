"""TransXSSM 1.3B on a v5p-128 slice (128 cores, 64 chips, 4x4x4): 4K tokens a row, 2M tokens a step.

python -m transxssm_jax.train --config=configs/pods/1p3b_v5p_128.py --workdir=DIR --config.data.path=PREPARED
python -m transxssm_jax.plan --config=configs/pods/1p3b_v5p_128.py --topology=v5p:4x4x4

What plan prints: 39.18 of 95.73 GiB per chip; 7.60 GB sent per chip and step, 1.00 of the least that fsdp and data must
send; 18 ms of it, 183 ms of HBM and 577 ms of compute bound a step from below, which takes more than 577 ms and stays
below 100% MFU. Not run on a TPU.
"""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '../1p3b.py')
    # 16 chips are a plane of the torus.
    config.mesh.data, config.mesh.fsdp = 4, 16
    config.model.remat, config.train.accumulation_steps = 'matmuls', 1  # what the figures above are of
    return config
