"""TransXSSM 1.3B at 1M tokens a row on a v5p-128 slice (128 cores, 64 chips, 4x4x4): two rows, 2M tokens a step.

python -m transxssm_jax.train --config=configs/pods/1p3b_1m_v5p_128.py --workdir=DIR --config.data.path=PREPARED
python -m transxssm_jax.plan --config=configs/pods/1p3b_1m_v5p_128.py --topology=v5p:4x4x4

What plan prints: 48.50 of 95.73 GiB per chip; 36.9 GB sent per chip and step, 1.08 of the least that fsdp's parameters,
gradients, states and keys and values must send; 142 ms of it, 741 ms of HBM and 3327 ms of compute bound a step from below,
which takes more than 3.3 s and stays below 100% MFU. Not run on a TPU.
"""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '../1p3b.py')
    config.data.seq_len, config.data.global_batch = 2**20, 2
    # 32,768 tokens of a row a chip.
    config.mesh.data, config.mesh.fsdp, config.mesh.context = 1, 2, 32
    config.model.remat, config.train.accumulation_steps = 'matmuls', 1  # what the figures above are of
    return config
