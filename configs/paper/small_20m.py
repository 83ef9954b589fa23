"""What the four models share at about 20M parameters: width 256, 16 layers, rows of 2,048 tokens, 65,536 tokens a step.

python -m transxssm_jax.experiment --configs=configs/paper/small --workdir=DIR --data=PREPARED [--steps=N]

The paper's recipe (table 4), scaled; the two sizes stand to each other as its 320M to its 1.3B, by width at one depth. Data is
prepared with a tokenizer of 32,768 entries. Losses after 1,200 steps are in docs/paper.md.
"""

from transxssm_jax.config import Config, Data, Model, Optimizer, Train


def get_config():
    steps = 3000
    return Config(
        model=Model(
            vocab_size=32768,
            d_model=256,
            num_layers=16,
            num_heads=4,
            num_kv_heads=2,
            num_ssd_groups=2,
            d_state=128,
            d_mlp=0,
        ),
        data=Data(seq_len=2048, global_batch=32),
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=steps // 10),
        train=Train(
            steps=steps, eval_every_steps=steps // 6, eval_batches=8, checkpoint_every_steps=steps // 6, keep_last=1
        ),
    )
