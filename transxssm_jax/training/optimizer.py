"""AdamW, its schedules, and which parameters decay."""

import jax
import optax

from transxssm_jax.config import Config

DECAYED = ('kernel', 'embedding', 'head')  # matrices; never norms, biases, a_log, dt_bias or learned residuals


def schedule(config: Config) -> optax.Schedule:
    """Learning rate by step: linear warmup from 0, then the shape that optimizer.schedule names.

    'wsd' (warmup, stable, decay) holds the peak and falls linearly over the last decay_steps.
    """
    o, steps = config.optimizer, config.train.steps
    peak, last = o.learning_rate, o.learning_rate * o.final_fraction
    rest = max(steps - o.warmup_steps, 1)
    if o.schedule == 'cosine':
        after = optax.cosine_decay_schedule(peak, rest, alpha=o.final_fraction)
    elif o.schedule == 'linear':
        after = optax.linear_schedule(peak, last, rest)
    elif o.schedule == 'wsd':
        after = optax.linear_schedule(peak, last, max(o.decay_steps, 1), transition_begin=rest - o.decay_steps)
    else:
        after = optax.constant_schedule(peak)
    if not o.warmup_steps:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, o.warmup_steps), after], [o.warmup_steps])


def decay_mask(params):
    """Tree of bool like params: whether weight decay applies."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def optimizer(config: Config) -> optax.GradientTransformation:
    """Clipping by global norm, Adam, decoupled weight decay, learning rate."""
    o = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity(),
        optax.adamw(schedule(config), b1=o.b1, b2=o.b2, eps=o.epsilon, weight_decay=o.weight_decay, mask=decay_mask),
    )
