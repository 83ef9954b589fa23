"""A hybrid of 1.7M parameters that learns bytes in minutes on two CPU cores.

make demo
"""

from transxssm_jax.config import Config, Data, Model, Optimizer, Train


def get_config():
    return Config(
        model=Model(vocab_size=384, d_model=128, num_layers=8, num_heads=4, num_kv_heads=2, num_ssd_groups=2, d_state=32,
                    d_mlp=384, dtype='float32', remat='none'),
        data=Data(seq_len=256, global_batch=8),
        optimizer=Optimizer(learning_rate=4e-3, warmup_steps=40, b2=0.98, weight_decay=0.1),
        train=Train(steps=600, eval_every_steps=300, eval_batches=16, checkpoint_every_steps=100, sample_tokens=200),
    )
