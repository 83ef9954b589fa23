"""The loss of a global batch and its gradient: pure functions of (params, batch), each one shard_map.

Which gradient is reduced where (embedding and head included), each in the dtype of `reduction_dtypes` unless one is named:

| parameter               | data, context                     | fsdp                                                |
| sharded over fsdp       | all-reduce once per step          | reduce-scatter per layer and microbatch,            |
|                         |                                   | where the weight is gathered (`all_gather_params`)  |
| the others (norms, ...) | all-reduce once per step, float32 | with data and context                               |

Over tensor a sharded weight's gradient is complete on its device. The gradient of an input that several shards read is
summed where it is read (`gather_from_stream`), and that of a parameter which is used on a device's part of the residual
stream, or of its heads, where it is used (`copy_to_stream`, `copy_param_to_tensor_parallel`), in float32.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from transxssm_jax.config import Config
from transxssm_jax.model import parameters
from transxssm_jax.model.loss import next_token_loss
from transxssm_jax.parallel import collectives
from transxssm_jax.parallel.mesh import AXES, BATCH, RULES

Batch = dict  # tokens, targets, segment_ids, positions: int32 [B, L]

_BATCH_AXES = dict.fromkeys(('tokens', 'targets', 'segment_ids', 'positions'), BATCH)
_SUMS_AXES = {'nll': (), 'tokens': ()}
TOKEN_AXES = tuple(axis for name in BATCH for axis in RULES[name])  # mesh axes that shard tokens

# A sum in bfloat16 around a ring of 16 is off by 0.5%, what the tests allow a kernel in bfloat16; docs/numerics.md.
MOST_ROUNDED_MEMBERS = 16


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

    def of_block(params, batch: Batch):
        sizes = dict(jax.sharding.get_abstract_mesh().shape)
        dtypes = reduction_dtypes(config, sizes)
        summed_in = {dtypes[axis] for axis in TOKEN_AXES if sizes.get(axis, 1) > 1}
        # Rounded to model.dtype where it left its layer, and at every sum since: it stays so for the optimizer to read.
        is_rounded = steps == 1 and summed_in <= {config.model.dtype}

        def reduce(grad, axes):
            if 'embed' not in axes:
                return collectives.all_reduce_over_tokens(grad)
            if is_rounded and 'vocab' not in axes:  # the embedding's is a sum of two, rounded apart
                grad = grad.astype(config.model.dtype)
            return collectives.all_reduce_over_tokens(grad, dtypes=dtypes, scattered_over=RULES['embed'])

        # In model.dtype each gradient keeps its own: that of the few maps with a float32 output is float32.
        with collectives.gradient_dtypes({axis: to for axis, to in dtypes.items() if to != config.model.dtype}):
            (_, sums), grads = _over_microbatches(functools.partial(gradient, params), batch, steps)
        return collectives.all_reduce_over_tokens(sums), jax.tree.map(reduce, grads, axes)

    return parameters.on_shards(of_block, config.model, (_BATCH_AXES,), (_SUMS_AXES, axes))


def reduction_dtypes(config: Config, sizes: dict[str, int]) -> dict[str, str]:
    """The dtype in which gradients are summed over each mesh axis: that of its setting, or what 'auto' stands for.

    'auto' is model.dtype, in which gradients are rounded anyway where they leave a layer, for up to
    `MOST_ROUNDED_MEMBERS` members, and float32 for more, because a ring rounds as often as it has members. data and
    context, which share an all-reduce, count together; what was summed over microbatches is float32 and stays so.

    Args:
      sizes: devices along each mesh axis; an axis that is not there has one.
    """
    train, dtype = config.train, config.model.dtype
    sizes = {axis: sizes.get(axis, 1) for axis in AXES}
    members = sizes | dict.fromkeys(('data', 'context'), sizes['data'] * sizes['context'])
    auto = {axis: dtype if members[axis] <= MOST_ROUNDED_MEMBERS else 'float32' for axis in AXES}
    if train.num_microbatches > 1:
        auto |= {'data': 'float32', 'context': 'float32'}
    chosen = {axis: getattr(train, f'gradient_dtype_{axis}') for axis in AXES}
    return {axis: auto[axis] if name == 'auto' else name for axis, name in chosen.items()}


def _loss_of_block(config: Config):
    """The function (params, batch) -> (summed objective, sums) of one device's tokens."""
    graph, _ = parameters.split_model(config.model)

    def loss(params, batch: Batch):
        model = nnx.merge(graph, params)
        with collectives.sequence_parallel(*batch['tokens'].shape):
            hidden_BLD = model(batch['tokens'], segment_ids_BL=batch['segment_ids'], positions_BL=batch['positions'])
            head_VD = collectives.all_gather_params(model.head_VD, ('vocab', 'embed'), hidden_BLD.dtype)
            return next_token_loss(
                hidden_BLD,
                head_VD,
                batch['targets'],
                z_loss=config.optimizer.z_loss,
                chunk_tokens=config.train.loss_chunk_tokens,
                logit_soft_cap=config.model.logit_soft_cap,
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
