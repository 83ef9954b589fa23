"""The state of a run and the pure functions that change it.

A state is a plain nested dict of arrays with stable names: {'step': int32
scalar, 'params': {...}, 'opt_state': {...}}. What opt_state holds is the
optimizer's own affair (optimizer.py). With optimizer.ema_decay there is 'ema' too, a
tree like params: their average over steps, in which a step's weight falls by
ema_decay with each later one; over the first steps the average is of fewer
(`ema_decay_at`), so that it does not hold on to the initial values.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from transxssm_jax.config import Config
from transxssm_jax.model.parameters import init_params, param_axes
from transxssm_jax.parallel import collectives, mesh
from transxssm_jax.training import optimizer
from transxssm_jax.training.gradient import Batch, summed_gradient, summed_loss

State = dict


def state_shardings(config: Config, device_mesh: jax.sharding.Mesh) -> State:
    """The sharding of every array of a state; what the optimizer keeps of a parameter is sharded as the parameter is."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, device_mesh))


def param_shardings(config: Config, device_mesh: jax.sharding.Mesh) -> dict:
    """The sharding of every parameter."""
    place = functools.partial(mesh.sharding, device_mesh)
    return jax.tree.map(place, param_axes(config.model), is_leaf=collectives.is_axes)


def batch_sharding(device_mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    return mesh.sharding(device_mesh, mesh.BATCH)


def init_state(config: Config, seed: int | jax.Array) -> State:
    """A fresh state; jit it with out_shardings=state_shardings(...) so that no device ever holds all of it."""
    params = init_params(config.model, seed)
    opt_state = optimizer.init(optimizer.make_optimizer(config), params)
    return {'step': jnp.zeros((), jnp.int32), 'params': params, 'opt_state': opt_state} | first_average(config, params)


def first_average(config: Config, params: dict) -> dict:
    """{'ema': ...} of a state that begins with these parameters; {} where there is none."""
    # Arrays of their own: a state that is donated holds none twice.
    return {'ema': jax.tree.map(jnp.copy, params)} if config.optimizer.ema_decay else {}


def average_in_shards(config: Config, params: dict) -> dict:
    """`first_average` of parameters that are on the devices, in their shards."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    shardings = {'ema': shardings} if config.optimizer.ema_decay else {}
    return jax.jit(functools.partial(first_average, config), out_shardings=shardings)(params)


def ema_decay_at(config: Config, step):
    """The decay of the average at a step, counted from 0: optimizer.ema_decay, but (1 + step) / (10 + step) at most."""
    return jnp.minimum(config.optimizer.ema_decay, (1.0 + step) / (10.0 + step))


def create_state(config: Config, device_mesh: jax.sharding.Mesh) -> State:
    """init_state, created in its shards; the values do not depend on the mesh."""
    shardings = state_shardings(config, device_mesh)
    with jax.set_mesh(device_mesh):
        return jax.jit(functools.partial(init_state, config), out_shardings=shardings)(config.train.seed)


def abstract_state(config: Config, device_mesh: jax.sharding.Mesh) -> State:
    """ShapeDtypeStructs with shardings, to restore or to compile for."""
    shapes = jax.eval_shape(functools.partial(init_state, config), 0)
    params, replicated = param_shardings(config, device_mesh), mesh.sharding(device_mesh, ())
    opt_state = optimizer.like_params(shapes['opt_state'], shapes['params'], params, replicated)
    shardings = {'step': replicated, 'params': params, 'opt_state': opt_state}
    return _with_shardings(shapes, shardings | ({'ema': params} if 'ema' in shapes else {}))


def abstract_params(config: Config) -> dict:
    """ShapeDtypeStructs of the parameters, in their shards of the mesh in use, or on the first device without one."""
    shapes = jax.eval_shape(functools.partial(init_params, config.model), 0)
    device_mesh = jax.sharding.get_mesh()
    if device_mesh.empty:
        shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)
    else:
        shardings = param_shardings(config, device_mesh)
    return _with_shardings(shapes, shardings)


def _with_shardings(shapes, shardings):
    def place(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, shapes, shardings)


def train_step(config: Config):
    """The function (state, batch, limits=None) -> (state, metrics), to be jitted with the state donated.

    Gradients are those of the mean loss over every counted token of the global
    batch, whatever the mesh and accumulation_steps.

    metrics: float32 scalars 'loss' (cross-entropy in nats per token), 'tokens'
    (counted), 'grad_norm' (before clipping), 'update_norm', 'param_norm',
    'learning_rate', and 'grad_norms': each parameter's own, [periods, layers]
    where stacked.

    limits: float32 [2], the most that the loss and the gradient norm may be. Where one is above its limit or not finite,
    parameters and opt_state stay as they are, the step counts all the same, and the metric 'skipped' is 1, else 0. The
    update norm takes no part: to wait for it would take another pass over the parameters. None: every step is applied.
    """
    tx = optimizer.make_optimizer(config)
    learning_rate = optimizer.schedule(config)
    gradient = summed_gradient(config)
    updates_before = config.optimizer.updates_before

    def step(state: State, batch: Batch, limits: jax.Array | None = None):
        params = state['params']
        # The barrier: with the pieces of a stacked gradient fused into the optimizer, its one pass ran at a third of the
        # memory's speed. And the parameters' norm: in that pass it would need the old values behind the new ones, so that
        # XLA wrote all parameters elsewhere and copied them back.
        (sums, grads), param_norm = jax.lax.optimization_barrier((gradient(params, batch), optax.global_norm(params)))
        tokens = jnp.maximum(sums['tokens'], 1.0)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / tokens, grads)
        updates, opt_state = optimizer.update(tx, grads, state['opt_state'], params, state['step'] + updates_before)
        metrics = {
            'loss': sums['nll'] / tokens,
            'tokens': sums['tokens'],
            'grad_norm': optax.global_norm(grads),
            'update_norm': optax.global_norm(updates),
            'param_norm': param_norm,
            'learning_rate': jnp.asarray(learning_rate(state['step']), jnp.float32),
            'grad_norms': jax.tree_util.tree_map_with_path(_norm_by_layer, grads),
        }
        after = {'params': optax.apply_updates(params, updates), 'opt_state': opt_state}
        if 'ema' in state:
            decay = ema_decay_at(config, state['step'])
            after['ema'] = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state['ema'], after['params'])
        if limits is not None:
            watched = jnp.stack([metrics['loss'], metrics['grad_norm']])
            is_good = jnp.all(jnp.isfinite(watched) & (watched <= limits))
            metrics['skipped'] = 1.0 - is_good.astype(jnp.float32)
            # A choice for each number, in the pass that writes it; what is not chosen may be NaN.
            after = jax.tree.map(
                lambda new, old: jnp.where(is_good, new, old), after, {name: state[name] for name in after}
            )
        return {'step': state['step'] + 1, **after}, metrics

    return step


def evaluated_weights(config: Config, state: State) -> dict:
    """Those that train.eval_weights names."""
    return state['ema' if config.train.eval_weights == 'ema' else 'params']


def _norm_by_layer(path, grad):
    stacked = 2 if path[0].key == 'layers' else 0
    return jnp.sqrt(jnp.sum(jnp.square(grad), axis=tuple(range(stacked, grad.ndim))))


def eval_step(config: Config):
    """The function (params, batch) -> {'nll', 'tokens'}: sums in nats and counted tokens."""
    return summed_loss(config)
