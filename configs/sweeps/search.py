"""A search that learns from its trials (pip install optuna): learning rate, weight decay, warmup and the place of attention.

python -m transxssm_jax.sweep --sweep=search --config=tiny --output=runs/search --pruner=median \
    --config.data.path=runs/demo/data --config.train.eval_every_steps=50
"""

from transxssm_jax.config_sweep import Search, choice, integers, log_uniform


def get_sweep():
    return Search(
        space={
            'optimizer.learning_rate': log_uniform(5e-4, 2e-2),
            'optimizer.weight_decay': log_uniform(1e-3, 0.3),
            'optimizer.warmup_steps': integers(10, 100),
            ('model.attention_period', 'model.attention_offset'): choice((4, 3), (4, 1), (2, 1), (1, 0)),
        },
        trials=24,
        first=(
            {
                'optimizer.learning_rate': 4e-3,
                'optimizer.weight_decay': 0.01,
                'optimizer.warmup_steps': 50,
                'model.attention_period': 4,
                'model.attention_offset': 3,
            },
        ),
    )
