"""What the seven models of the paper's table 2 share: width 256, 8 layers, rows of 8,192 tokens, 65,536 tokens a step.

python -m transxssm_jax.experiment --configs=configs/paper/encodings --workdir=DIR --data=PREPARED [--steps=N]

Data is prepared with a tokenizer of 32,768 entries; --config.model.vocab_size=50304 takes GPT-NeoX's. The paper gives the
width, the length and 8,000 steps, and not the layers, the heads and the batch. Results: docs/paper.md.
"""

from transxssm_jax.config import Config, Data, Model, Optimizer, Train


def get_config():
    steps = 2000
    return Config(
        model=Model(
            vocab_size=32768,
            d_model=256,
            num_layers=8,
            num_heads=4,
            num_kv_heads=2,
            num_ssd_groups=2,
            d_state=128,
            d_mlp=1024,
        ),
        data=Data(seq_len=8192, global_batch=8),
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=steps // 10),
        train=Train(
            steps=steps, eval_every_steps=steps // 4, eval_batches=8, checkpoint_every_steps=steps // 4, keep_last=1
        ),
    )
