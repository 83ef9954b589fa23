"""Muon (Jordan et al., 2024): the momentum of a matrix, with all its singular values brought near 1, is its update.

A matrix is a kernel as its layer multiplies by it: that of one layer of a stack, with heads and their width as one axis.
Its update is scaled by 0.2 sqrt(max(inputs, outputs)), so that an element moves as far as with AdamW and both take one
learning rate (Liu et al., 2025, Muon is scalable for LLM training). Momentum and orthogonalisation are those of
`optax.contrib.scale_by_muon`; here stands how devices come to whole matrices (`parallel/whole_matrices.py`). They are
orthogonalised, and travel, in model.dtype.
"""

import functools
import math
import typing

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from transxssm_jax.config import Config, Model
from transxssm_jax.model.parameters import init_params, param_axes
from transxssm_jax.parallel import collectives, mesh
from transxssm_jax.parallel.whole_matrices import Choice, choose, on_whole
from transxssm_jax.training import parameter_groups

RMS = 0.2  # of an update's elements, about that of AdamW's
STACKED = 2  # leading axes of a kernel: periods, layers
STEPS = 5  # of the Newton-Schulz iteration


def is_matrix(path) -> bool:
    """Whether Muon updates a parameter: a kernel of a layer's linear map."""
    return path[0].key == 'layers' and parameter_groups.group_of(path) == 'matrices'


def num_inputs(axes: tuple) -> int:
    """How many axes of a kernel are inputs, of its logical axes without those of the stack: 'embed' is one side."""
    return 1 if axes[0] == 'embed' else len(axes) - 1


class MomentumState(typing.NamedTuple):
    """How many updates there were, and the mean of their gradients."""

    count: jax.Array
    momentum: optax.Updates


def scale_by_muon(config: Config) -> optax.GradientTransformation:
    """From gradients to orthogonalised momentum, scaled; of trees in which everything but matrices is masked out."""
    beta = config.optimizer.momentum

    def init(params):
        return MomentumState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(grads, state, params=None):
        del params
        count = state.count + 1
        momentum = optax.tree.update_moment(grads, state.momentum, beta, 1)
        # Nesterov's, each mean free of its bias towards 0.
        ahead = optax.tree.bias_correction(momentum, beta, count + 1)
        now = optax.tree.bias_correction(grads, beta, count)
        wanted = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, now)
        return orthogonalize(config.model, wanted), MomentumState(count, momentum)

    return optax.GradientTransformation(init, update)


def orthogonalize(model: Model, tree):
    """Every matrix of a tree of kernels with its singular values near 1, scaled as above; float32, in its shards."""
    all_axes = param_axes(model)

    def of_leaf(path, kernel):
        axes = functools.reduce(lambda node, key: node[key.key], path, all_axes)
        of_block = functools.partial(_orthogonalize_block, axes=axes[STACKED:], dtype=model.dtype)
        return collectives.shard_map(of_block, (axes,), axes)(kernel)

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def _orthogonalize_block(kernel, *, axes, dtype):
    stack = kernel.reshape(-1, *kernel.shape[STACKED:]).astype(dtype)
    result = on_whole(functools.partial(_orthogonalize_whole, inputs=num_inputs(axes)), stack, axes)
    return result.astype(jnp.float32).reshape(kernel.shape)


def _orthogonalize_whole(stack, inputs):
    """Of [n, *inputs, *outputs], whole."""
    rows, columns = (math.prod(part) for part in (stack.shape[1 : 1 + inputs], stack.shape[1 + inputs :]))
    matrices = stack.reshape(-1, rows, columns)
    # Without momentum it is the orthogonalisation alone.
    tx = contrib.scale_by_muon(
        ns_steps=STEPS, beta=0.0, nesterov=False, weight_dimension_numbers=contrib.MuonDimensionNumbers(1, 2)
    )
    matrices, _ = tx.update(matrices, tx.init(matrices))
    return (matrices * (RMS * math.sqrt(max(rows, columns)))).astype(stack.dtype).reshape(stack.shape)


# ---- what it costs -----------------------------------------------------------


class Stack(typing.NamedTuple):
    """A stack of matrices on a mesh: its elements, the devices that shard it, the shape of a matrix, how it becomes whole."""

    elements: int
    devices: int
    rows: int
    columns: int
    choice: Choice


def stacks(model: Model, sizes: dict[str, int]) -> list[Stack]:
    """Every stack of matrices that Muon updates, on a mesh with these devices along its axes."""
    shapes = jax.eval_shape(lambda: init_params(model, 0))
    axes_of = jax.tree.leaves(param_axes(model), is_leaf=collectives.is_axes)
    found = []
    for (path, leaf), axes in zip(jax.tree_util.tree_leaves_with_path(shapes), axes_of, strict=True):
        if not is_matrix(path):
            continue
        names = {name for axis in axes for name in mesh.RULES.get(axis, ())}
        count, split = math.prod(leaf.shape[:STACKED]), STACKED + num_inputs(axes[STACKED:])
        rows, columns = math.prod(leaf.shape[STACKED:split]), math.prod(leaf.shape[split:])
        devices = math.prod(sizes.get(name, 1) for name in names)
        found.append(Stack(leaf.size, devices, rows, columns, choose(count, leaf.size, devices)))
    return found


def flops(stack: Stack) -> float:
    """FLOPs of a device in a step."""
    short, long = sorted((stack.rows, stack.columns))
    return stack.choice.matrices * STEPS * (4 * short**2 * long + 2 * short**3)
