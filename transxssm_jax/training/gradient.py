"""The loss of a global batch and its gradient: pure functions of (params, batch), each one shard_map.

Which gradient is reduced where, and in which dtype (embedding and head included):

| parameter               | data, context                            | fsdp                                              |
| sharded over fsdp       | all-reduce once per step, see `_dtype`   | reduce-scatter per layer and microbatch, in model.dtype, |
|                         |                                          | where the weight is gathered (`all_gather_params`) |
| the others (norms, ...) | all-reduce once per step, float32        | with data and context                             |

Over tensor nothing is reduced here: a sharded weight's gradient is complete on its device, and the gradient of an input
that several shards read is all-reduced where it is read (`copy_to_tensor_parallel`).
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from transxssm_jax.config import Config
from transxssm_jax.model import parameters
from transxssm_jax.model.loss import next_token_loss
from transxssm_jax.parallel import collectives
from transxssm_jax.parallel.mesh import BATCH, RULES

Batch = dict  # tokens, targets, segment_ids, positions: int32 [B, L]

_BATCH_AXES = dict.fromkeys(('tokens', 'targets', 'segment_ids', 'positions'), BATCH)
_SUMS_AXES = {'nll': (), 'tokens': ()}


def summed_loss(config: Config):
    """The function (params, batch) -> {'nll', 'tokens'}: sums in nats and counted tokens, float32."""
    loss = _loss_of_block(config)

    def of_block(params, batch: Batch):
        # In the train step's microbatches: what fits there fits here.
        sums = _over_microbatches(lambda part: loss(params, part)[1], batch, config.train.num_microbatches)
        return collectives.all_reduce_over_tokens(sums)

    return parameters.on_shards(of_block, config.model, (_BATCH_AXES,), _SUMS_AXES)


def summed_gradient(config: Config):
    """The function (params, batch) -> (sums as in `summed_loss`, gradients of the summed loss), over the global batch.

    Every device works on its own tokens, over all microbatches, before gradients are all-reduced over data and context:
    once per step. No device has room for the whole gradient of what fsdp shards.
    """
    gradient = jax.value_and_grad(_loss_of_block(config), has_aux=True)
    axes, steps = parameters.param_axes(config.model), config.train.num_microbatches

    def reduce(grad, axes):
        if 'embed' not in axes:
            return collectives.all_reduce_over_tokens(grad)
        grad = grad.astype(_dtype(config))
        return collectives.all_reduce_over_tokens(grad, _dtype(config), scattered_over=RULES['embed'])

    def of_block(params, batch: Batch):
        (_, sums), grads = _over_microbatches(functools.partial(gradient, params), batch, steps)
        return collectives.all_reduce_over_tokens(sums), jax.tree.map(reduce, grads, axes)

    return parameters.on_shards(of_block, config.model, (_BATCH_AXES,), (_SUMS_AXES, axes))


def _dtype(config: Config) -> str:
    """The dtype in which gradients of matrices cross data and context: that of one microbatch is of a bfloat16 weight."""
    return config.model.dtype if config.train.num_microbatches == 1 else 'float32'


def _loss_of_block(config: Config):
    """The function (params, batch) -> (summed objective, sums) of one device's tokens."""
    graph, _ = parameters.split_model(config.model)

    def loss(params, batch: Batch):
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

    return loss


def _over_microbatches(function, batch: Batch, num_microbatches: int):
    """Sum of function(microbatch), a tree of arrays, over the microbatches of a batch, one after another."""
    if num_microbatches == 1:
        return function(batch)

    def one(total, microbatch):
        return jax.tree.map(jnp.add, total, function(microbatch)), None

    microbatches = jax.tree.map(lambda x_BL: x_BL.reshape(num_microbatches, -1, *x_BL.shape[1:]), batch)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, batch))
    return jax.lax.scan(one, zeros, microbatches)[0]
