"""A hybrid of half a million parameters (one period, 3 state-space layers to 1 attention) that learns bytes on two CPU cores.

make demo
"""

from transxssm_jax.config import Config, Data, Model, Optimizer, Train


def get_config():
    return Config(
        # Narrow, so that a CPU passes over enough text; a matrix this small wants a larger initial std than 0.02.
        model=Model(
            vocab_size=384,
            d_model=96,
            num_layers=4,
            attention_period=4,
            attention_offset=3,
            num_heads=3,
            num_kv_heads=1,
            num_ssd_groups=1,
            d_state=32,
            d_mlp=256,
            init_std=0.06,
            dtype='float32',
            remat='none',
        ),
        data=Data(seq_len=256, global_batch=8),
        optimizer=Optimizer(learning_rate=4e-3, warmup_steps=50, b2=0.95),
        train=Train(steps=600, eval_every_steps=200, eval_batches=16, checkpoint_every_steps=100, sample_tokens=300),
    )
