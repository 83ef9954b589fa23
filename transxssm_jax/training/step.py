"""The state of a run and the pure functions that change it.

A state is a plain nested dict of arrays with stable names: {'step': int32
scalar, 'params': {...}, 'opt_state': {...}}. What opt_state holds is the
optimizer's own affair (optimizer.py).
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from transxssm_jax.config import Config
from transxssm_jax.model.loss import next_token_loss
from transxssm_jax.model.parameters import init_params, param_axes, split_model
from transxssm_jax.parallel import collectives, mesh
from transxssm_jax.training import optimizer

State = dict

Batch = dict  # tokens, targets, segment_ids, positions: int32 [B, L]

_SUMS = {'nll': (), 'tokens': ()}  # logical axes of what a loss sums


def state_shardings(config: Config, device_mesh: jax.sharding.Mesh) -> State:
    """The sharding of every array of a state; what the optimizer keeps of a parameter is sharded as the parameter is."""
    shapes = jax.eval_shape(functools.partial(init_state, config), 0)
    params = jax.tree.map(
        functools.partial(mesh.sharding, device_mesh),
        param_axes(config.model),
        is_leaf=lambda node: isinstance(node, tuple),
    )
    replicated = mesh.sharding(device_mesh, ())
    return {
        'step': replicated,
        'params': params,
        'opt_state': optimizer.like_params(shapes['opt_state'], shapes['params'], params, replicated),
    }


def batch_sharding(device_mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    return mesh.sharding(device_mesh, mesh.BATCH)


def init_state(config: Config, seed: int | jax.Array) -> State:
    """A fresh state; jit it with out_shardings=state_shardings(...) so that no device ever holds all of it."""
    params = init_params(config.model, seed)
    opt_state = optimizer.init(optimizer.make_optimizer(config), params)
    return {'step': jnp.zeros((), jnp.int32), 'params': params, 'opt_state': opt_state}


def create_state(config: Config, device_mesh: jax.sharding.Mesh) -> State:
    """init_state, created in its shards; the values do not depend on the mesh."""
    shardings = state_shardings(config, device_mesh)
    with jax.set_mesh(device_mesh):
        return jax.jit(functools.partial(init_state, config), out_shardings=shardings)(config.train.seed)


def abstract_state(config: Config, device_mesh: jax.sharding.Mesh) -> State:
    """ShapeDtypeStructs with shardings, to restore or to compile for."""
    shapes = jax.eval_shape(functools.partial(init_state, config), 0)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(config, device_mesh),
    )


def abstract_params(config: Config) -> dict:
    """ShapeDtypeStructs of the parameters, in their shards of the mesh in use, or on the first device without one."""
    shapes = jax.eval_shape(functools.partial(init_params, config.model), 0)
    device_mesh = jax.sharding.get_mesh()
    if device_mesh.empty:
        shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)
    else:
        shardings = state_shardings(config, device_mesh)['params']
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def _summed_loss(graph, config: Config, params, batch: Batch):
    model = nnx.merge(graph, params)
    hidden_BLD = model(batch['tokens'], segment_ids_BL=batch['segment_ids'], positions_BL=batch['positions'])
    head_VD = collectives.all_gather_params(model.head_VD, ('vocab', 'embed'), hidden_BLD.dtype)
    return next_token_loss(
        hidden_BLD,
        head_VD,
        batch['targets'],
        z_loss=config.optimizer.z_loss,
        chunk_tokens=config.train.loss_chunk_tokens,
    )


def train_step(config: Config):
    """The function (state, batch) -> (state, metrics), to be jitted with the state donated.

    Gradients are those of the mean loss over every counted token of the global
    batch, whatever the mesh and accumulation_steps.

    metrics: float32 scalars 'loss' (cross-entropy in nats a token), 'tokens'
    (counted), 'grad_norm' (before clipping), 'update_norm', 'param_norm',
    'learning_rate', and 'grad_norms': each parameter's own, [modules, layers]
    where stacked.
    """
    tx = optimizer.make_optimizer(config)
    learning_rate = optimizer.schedule(config)
    gradient = summed_gradient(config)

    def step(state: State, batch: Batch):
        params = state['params']
        sums, grads = gradient(params, batch)
        tokens = jnp.maximum(sums['tokens'], 1.0)
        grads = jax.tree.map(lambda g: g / tokens, grads)
        updates, opt_state = optimizer.update(tx, grads, state['opt_state'], params, state['step'])
        metrics = {
            'loss': sums['nll'] / tokens,
            'tokens': sums['tokens'],
            'grad_norm': optax.global_norm(grads),
            'update_norm': optax.global_norm(updates),
            'param_norm': optax.global_norm(params),
            'learning_rate': jnp.asarray(learning_rate(state['step']), jnp.float32),
            'grad_norms': jax.tree_util.tree_map_with_path(_norm_by_layer, grads),
        }
        state = {
            'step': state['step'] + 1,
            'params': optax.apply_updates(params, updates),
            'opt_state': opt_state,
        }
        return state, metrics

    return step


def _norm_by_layer(path, grad):
    stacked = 2 if path[0].key == 'layers' else 0
    return jnp.sqrt(jnp.sum(jnp.square(grad), axis=tuple(range(stacked, grad.ndim))))


def _on_tokens(function, config: Config, out_axes):
    """function(params, batch) on each device's tokens and its parts of the parameters."""

    def call(params, batch: Batch):
        in_axes = param_axes(config.model), dict.fromkeys(batch, mesh.BATCH)
        return collectives.shard_map(function, in_axes, out_axes)(params, batch)

    return call


def _over_tokens(tree, but=(), dtype='float32'):
    """The sum of each leaf, float32, over the devices that hold other tokens; it travels in dtype."""
    names = tuple(name for name in collectives.sharded_over(*mesh.BATCH) if name not in but)
    if not names:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.psum(leaf.astype(dtype), names).astype(leaf.dtype), tree)


def summed_gradient(config: Config):
    """The function (params, batch) -> (sums, gradients of the summed loss), over the global batch.

    Every device works on its own tokens, over all microbatches, and only then are gradients
    summed over data and context: once a step. What fsdp splits is gathered, and its gradient
    scattered, a layer and a microbatch at a time (`collectives.all_gather_params`): no device has room for it
    whole.
    """
    graph, _ = split_model(config.model)
    gradient = jax.value_and_grad(functools.partial(_summed_loss, graph, config), has_aux=True)
    accumulation_steps, axes = config.train.accumulation_steps, param_axes(config.model)

    def summed(grad, axes):
        if 'embed' not in axes:
            return _over_tokens(grad)
        # Of one microbatch it is the gradient of a weight in model.dtype.
        dtype = config.model.dtype if accumulation_steps == 1 else 'float32'
        return _over_tokens(grad, but=mesh.RULES['embed'], dtype=dtype)

    def of_device(params, batch: Batch):
        (_, sums), grads = _over_microbatches(functools.partial(gradient, params), batch, accumulation_steps)
        return _over_tokens(sums), jax.tree.map(summed, grads, axes)

    return _on_tokens(of_device, config, (_SUMS, axes))


def _over_microbatches(function, batch: Batch, accumulation_steps: int):
    """Sum of function(microbatch), a tree of arrays, over the microbatches of a batch, one after another."""
    if accumulation_steps == 1:
        return function(batch)

    def one(total, microbatch):
        return jax.tree.map(jnp.add, total, function(microbatch)), None

    microbatches = jax.tree.map(lambda x_BL: x_BL.reshape(accumulation_steps, -1, *x_BL.shape[1:]), batch)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, batch))
    return jax.lax.scan(one, zeros, microbatches)[0]


def eval_step(config: Config):
    """The function (params, batch) -> {'nll', 'tokens'}: sums in nats and counted tokens."""
    graph, _ = split_model(config.model)

    def of_device(params, batch: Batch):
        # In the train step's microbatches: what fits there fits here.
        return _over_tokens(
            _over_microbatches(
                lambda microbatch: _summed_loss(graph, config, params, microbatch)[1],
                batch,
                config.train.accumulation_steps,
            )
        )

    return _on_tokens(of_device, config, _SUMS)
