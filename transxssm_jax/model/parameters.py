"""The parameters of a model: their values at initialisation, their names, shapes and logical axes."""

import dataclasses

import jax
from flax import nnx

from transxssm_jax.config import Model
from transxssm_jax.model.language_model import LanguageModel
from transxssm_jax.parallel import collectives


def split_model(model: Model):
    """(graph definition, State of abstract Params): the one place where the NNX model is split."""
    return nnx.split(nnx.eval_shape(lambda: LanguageModel(model, rngs=nnx.Rngs(0))))


def split_for_evaluation(model: Model):
    """`split_model` for a forward pass that is compiled for several shapes, each of which may run for seconds only.

    Its layers are a scan also where training unrolls them: unrolled ones of 1.3B compile for 15 to 25 s on an H100.
    """
    loop = 'scan' if model.layer_loop == 'auto' else model.layer_loop
    return split_model(dataclasses.replace(model, remat='none', layer_loop=loop))


def init_params(model: Model, seed: int | jax.Array) -> dict:
    """Nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(LanguageModel(model, rngs=nnx.Rngs(jax.random.key(seed))), nnx.Param))


def param_axes(model: Model) -> dict:
    """Logical axes of every parameter, one tuple per leaf, in the tree of init_params; stacking axes are None."""

    def axes(param):
        stacked = len(param.get_value().shape) - len(param.get_metadata('axes'))
        return (None,) * stacked + tuple(param.get_metadata('axes'))

    _, abstract = split_model(model)
    return nnx.to_pure_dict(jax.tree.map(axes, abstract, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))


def count_params(model: Model) -> int:
    """Parameters, without making them."""
    _, abstract = split_model(model)
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.to_pure_dict(abstract)))


def parameter_table(model: Model) -> dict[str, int]:
    """Parameters by part, without making them: 'embedding', '21 ssd mixers', '21 ssd mlps', ..., 'residual weights'."""
    _, abstract = split_model(model)
    tree = nnx.to_pure_dict(abstract)
    table, residual = {'embedding': 0}, 0
    for kind, parts in tree.pop('layers').items():
        count = model.num_periods * model.layer_pattern.count(kind)
        for part, arrays in parts.items():
            size = sum(leaf.size for leaf in jax.tree.leaves(arrays))
            if part in ('mixer', 'mlp'):
                table[f'{count} {kind} {part}{"s" * (count > 1)}'] = size
            else:
                residual += size
    ends = {name.replace('_', ' '): sum(leaf.size for leaf in jax.tree.leaves(arrays)) for name, arrays in tree.items()}
    return table | ends | {'residual weights': residual}


def on_shards(function, model: Model, in_axes: tuple, out_axes):
    """function(params, *arrays) on each device's block of the parameters and of the arrays, see `collectives.shard_map`.

    Every program that uses a model's parameters is made by this, whether it trains, evaluates or scores.

    Args:
      function: of params in the tree of init_params.
      in_axes: logical axes of each further argument.
      out_axes: logical axes of the outputs.
    """
    return collectives.shard_map(function, (param_axes(model), *in_axes), out_axes)
