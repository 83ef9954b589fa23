"""TransXSSM 1.3B on a v5e-256 slice (16x16): 4K tokens a row, 2M tokens a step.

python -m transxssm_jax.train --config=configs/pods/1p3b_v5e_256.py --workdir=DIR --config.data.path=PREPARED
python -m transxssm_jax.plan --config=configs/pods/1p3b_v5e_256.py --topology=v5e:16x16

What plan prints: 11.44 of 15.75 GiB per chip; 7.66 GB sent per chip and step, 1.00 of the least that fsdp and data must
send; 73 ms of it, 143 ms of HBM and 336 ms of compute bound a step from below, which takes more than 336 ms and stays
below 100% MFU. Not run on a TPU.
"""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '../1p3b.py')
    # 2048 / 16 is a whole tile of 128: narrower pieces of a matrix are not gathered but summed, at twice the bytes.
    config.mesh.data, config.mesh.fsdp = 16, 16
    config.model.remat, config.train.accumulation_steps = 'matmuls', 1  # what the figures above are of
    return config
