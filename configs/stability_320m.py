"""What the runs of configs/stability/ share: TransXSSM 320M, 300 steps of 65,536 tokens, rows of 4,096.

python -m transxssm_jax.experiment --configs=configs/stability --workdir=DIR --data=PREPARED --seeds=0

configs/stability_320m.py alone is the default that the others are compared with. What came is in docs/optimizers.md.
"""

from transxssm_jax.config import start_from


def get_config():
    config = start_from(__file__, '320m.py')
    config.data.global_batch = 16
    config.optimizer.warmup_steps = 30
    config.train.steps = 300
    config.train.log_every_steps = 5
    config.train.eval_every_steps = 100
    config.train.eval_batches = 8
    config.train.checkpoint_every_steps = 100
    config.train.keep_last = 1
    config.train.keep_best = 0
    return config
