"""TransXSSM 1.3B on a v6e-256 slice (16x16): 4K tokens a row, 2M tokens a step.

python -m transxssm_jax.train --config=configs/pods/1p3b_v6e_256.py --workdir=DIR --config.data.path=PREPARED
python -m transxssm_jax.plan --config=configs/pods/1p3b_v6e_256.py --topology=v6e:16x16

What plan prints: 12.82 of 31.24 GiB per chip; 7.66 GB sent per chip and step, 1.00 of the least that fsdp and data must
send; 37 ms of it, 71 ms of HBM and 72 ms of compute bound a step from below, which takes more than 72 ms and stays
below 100% MFU. Not run on a TPU.
"""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '../1p3b.py')
    # 2048 / 16 is a whole tile of 128: narrower pieces of a matrix are not gathered but summed, at twice the bytes.
    config.mesh.data, config.mesh.fsdp = 16, 16
    config.model.remat, config.train.accumulation_steps = 'matmuls', 1  # what the figures above are of
    # HBM is what this chip has least of: the sum of the head's gradient is read and written once instead of four times.
    config.train.loss_chunk_tokens = 8192
    return config
