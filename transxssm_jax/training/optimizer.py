"""Optimizers by name, their schedules, which parameters decay, and the plain form of an optimizer's state.

An optimizer is an optax chain in the table `OPTIMIZERS`. A new one is a function
of the config there and its name among the choices of `optimizer.name` in config.py.

The state of a run holds `opt_state`: what the chain remembers, as a nested dict
of arrays under the names of optax's fields, e.g. {'mu': {...}, 'nu': {...}}.
Optax's own classes are not in it, so a checkpoint outlives their changes, and
nothing outside this file knows what a certain optimizer remembers.
"""

import jax
import jax.numpy as jnp
import optax

from transxssm_jax.config import Config
from transxssm_jax.training import muon as muon_lib
from transxssm_jax.training import parameter_groups
from transxssm_jax.training.parameter_groups import decay_mask

_COUNT = jax.tree_util.GetAttrKey('count')  # optax's field for the number of updates so far, which is the run's step


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


def by_updates(config: Config) -> optax.Schedule:
    """`schedule` by the optimizer's own count, which goes on from the state that a run began with."""
    by_step, before = schedule(config), config.optimizer.updates_before
    return (lambda count: by_step(count - before)) if before else by_step


# ---- optimizers ------------------------------------------------------------


def adamw(config: Config) -> optax.GradientTransformation:
    """Clipping by global norm, Adam, decoupled weight decay, learning rate."""
    o = config.optimizer
    if o.of_group:
        return optax.chain(_clip(config), optax.scale_by_adam(o.b1, o.b2, o.epsilon), *_decay_and_rate(config))
    return optax.chain(
        _clip(config),
        optax.adamw(by_updates(config), b1=o.b1, b2=o.b2, eps=o.epsilon, weight_decay=o.weight_decay, mask=decay_mask),
    )


def muon(config: Config) -> optax.GradientTransformation:
    """Clipping by global norm, Muon for the matrices of layers and Adam for the rest, decoupled weight decay, learning rate."""
    o = config.optimizer

    def labels(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: 'muon' if muon_lib.is_matrix(path) else 'adam', params)

    parts = {'muon': muon_lib.scale_by_muon(config), 'adam': optax.scale_by_adam(o.b1, o.b2, o.epsilon)}
    return optax.chain(_clip(config), optax.partition(parts, labels), *_decay_and_rate(config))


OPTIMIZERS = {'adamw': adamw, 'muon': muon}  # the choices of optimizer.name


def _clip(config: Config) -> optax.GradientTransformation:
    norm = config.optimizer.clip_norm
    return optax.clip_by_global_norm(norm) if norm else optax.identity()


def _decay_and_rate(config: Config) -> tuple[optax.GradientTransformation, ...]:
    """Weight decay, the factors of groups and the learning rate: the end of a chain."""
    o = config.optimizer

    def decay(updates, params):
        return jax.tree.map(lambda u, p, decay: u + decay * p, updates, params, parameter_groups.decays(o, params))

    def factor(updates, params):
        return jax.tree.map(lambda u, factor: factor * u, updates, parameter_groups.factors(o, params))

    return optax.stateless(decay), optax.stateless(factor), optax.scale_by_learning_rate(by_updates(config))


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """The chain that optimizer.name names."""
    return OPTIMIZERS[config.optimizer.name](config)


# ---- state -----------------------------------------------------------------


def init(tx: optax.GradientTransformation, params: dict) -> dict:
    """The plain state of a chain before its first update."""
    return to_plain(tx.init(params))


def update(tx: optax.GradientTransformation, grads: dict, opt_state: dict, params: dict, step) -> tuple[dict, dict]:
    """One update.

    Args:
      step: int32 scalar, the number of updates before this one, optimizer.updates_before included.

    Returns:
      (updates, to be added to params; the new plain state).
    """
    updates, state = tx.update(grads, from_plain(tx, opt_state, params, step), params)
    return updates, to_plain(state)


def to_plain(state) -> dict:
    """An optax state as a nested dict of its arrays.

    An array's name is the path of fields and keys that leads to it; places within a chain are no
    part of the name, so a link without a state may come or go. Counts of updates are left out.

    Raises:
      ValueError: two links of a chain remember something under one name; optax.named_chain tells them apart.
    """
    plain = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if path[-1] == _COUNT:
            continue
        *parents, last = _names(path)
        node = plain
        for name in parents:
            node = node.setdefault(name, {})
        if last in node:
            raise ValueError(
                f'{"/".join([*parents, last])} is the name of two states of one optimizer; build it with optax.named_chain'
            )
        node[last] = leaf
    return plain


def from_plain(tx: optax.GradientTransformation, opt_state: dict, params: dict, step):
    """The inverse of `to_plain`: the optax state of a chain, whose counts of updates are all `step`."""

    def restored(path, leaf):
        if path[-1] == _COUNT:
            return jnp.asarray(step, leaf.dtype)
        node = opt_state
        for name in _names(path):
            node = node[name]
        return node

    return jax.tree_util.tree_map_with_path(restored, jax.eval_shape(tx.init, params))


def like_params(opt_state: dict, params: dict, values: dict, other) -> dict:
    """A tree like opt_state that holds, for every array that belongs to a parameter, that parameter's value.

    An array belongs to a parameter where its path ends with the parameter's whole path and the shapes are equal.

    Args:
      opt_state, params: trees of arrays or of their shapes.
      values: one for each parameter, e.g. its sharding; a tree like params.
      other: the value for arrays that belong to none.
    """
    shapes = {_names(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    of_params = dict(zip(shapes, jax.tree.structure(params).flatten_up_to(values), strict=True))

    def matched(path, leaf):
        names = _names(path)
        for start in range(len(names)):
            if shapes.get(names[start:]) == leaf.shape:
                return of_params[names[start:]]
        return other

    return jax.tree_util.tree_map_with_path(matched, opt_state)


def _names(path) -> tuple[str, ...]:
    """Fields of named tuples and keys of dicts on the way to a leaf, without the places in plain tuples."""
    kinds = jax.tree_util.GetAttrKey, jax.tree_util.DictKey
    return tuple(str(key.name if isinstance(key, kinds[0]) else key.key) for key in path if isinstance(key, kinds))
