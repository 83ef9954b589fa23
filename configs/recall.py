"""Multi-query associative recall: 32 pairs in rows of 256 tokens, two layers, one state-space and one attention.

python -m transxssm_jax.evals.mqar --config=configs/recall.py [--pattern=hybrid,attention,ssd]

One H100: the hybrid 99.9% after 1,250 steps and 37 s, 28 of them before step 250 (start and compilation). Attention alone and
Mamba-2 need a learning rate of 3e-3: 99.3% after 4,000 and 98.9% after 1,500 steps (docs/evaluation.md).
"""

from transxssm_jax.config import Config, Data, Model, Optimizer, Train


def get_config():
    return Config(
        # dt reaches 1, so that some heads forget within a token: they show a value which key came before it, which
        # elsewhere is a short convolution's work. The attention layer then looks the key up.
        model=Model(
            vocab_size=8192,
            d_model=128,
            num_layers=2,
            attention_period=2,
            attention_offset=1,
            num_heads=4,
            num_kv_heads=4,
            num_ssd_groups=4,
            d_state=64,
            d_mlp=256,
            dt_max=1.0,
            init_std=0.05,
            remat='none',
        ),
        data=Data(seq_len=256, global_batch=128),
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=200, b2=0.95, weight_decay=0.1),
        train=Train(steps=4000, eval_every_steps=250, eval_batches=4),
    )
