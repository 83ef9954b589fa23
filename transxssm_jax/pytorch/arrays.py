"""Step 0 of an imported run, written array by array: a checkpoint whose state is never in memory as a whole."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable

import jax
import jax.extend
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import nnx

from transxssm_jax.config import Config
from transxssm_jax.pytorch.tensors import Path
from transxssm_jax.training import checkpoint, optimizer

Layers = Iterable[tuple[tuple[int, ...], np.ndarray]]  # (index of a layer of an array, its values); (): the whole array


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that is made layer by layer while it is written.

    Attributes:
      layers: gives (index, values) of every layer.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    layers: Callable[[], Layers]

    size = property(lambda self: math.prod(self.shape))
    nbytes = property(lambda self: self.size * self.dtype.itemsize)

    def read(self) -> np.ndarray:
        """The whole array."""
        array = np.empty(self.shape, self.dtype)
        for index, layer in self.layers():
            array[index] = layer
        return array


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes LazyArrays one after another and layer by layer; they read as any array. Orbax's own copies all first."""

    async def serialize(self, values, infos, args=None):
        for value, info, arg in zip(values, infos, args):
            await self._background_serialize([value], [info], [arg])
        return []

    async def _open_and_write(self, value, tspec, ts_context):
        store = await tensorstore.open(tensorstore.Spec(tspec), create=True, open=True, context=ts_context)
        for index, layer in value.layers():
            await store[index].write(layer)


def write_first(workdir: pathlib.Path, params: dict[Path, LazyArray], config: Config) -> None:
    """Writes a checkpoint of step 0 whose optimizer has yet made no update.

    Args:
      workdir: of a run without checkpoints.
      params: path -> every array of the parameters.
      config: of the run.

    Raises:
      checkpoint.CheckpointError: it could not be written; its __cause__ is the first error.
    """
    step = LazyArray((), np.dtype(np.int32), lambda: [((), np.zeros((), np.int32))])
    state = {
        'step': step,
        'params': nnx.traversals.unflatten_mapping(params),
        'opt_state': _init_opt_state(config, params),
    }
    if config.optimizer.ema_decay:  # the average of what is there so far
        state['ema'] = state['params']
    # A chunk of the file holds one layer, so that no more than it is encoded at a time; small arrays are one chunk.
    layers = {leaf: leaf.nbytes // math.prod(leaf.shape[:2]) for leaf in jax.tree.leaves(state) if len(leaf.shape) > 2}
    layouts = jax.tree.map(
        lambda leaf: (
            ocp.SaveArgs(chunk_byte_size=layers[leaf], shard_axes=(0, 1))
            if layers.get(leaf, 0) >= 1 << 20
            else ocp.SaveArgs()
        ),
        state,
    )
    types = ocp.type_handlers.create_type_handler_registry((LazyArray, _LazyHandler()))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=types)
    checkpoint.write_first(workdir, state, config, handler, layouts)


def _init_opt_state(config: Config, params: dict[Path, LazyArray]) -> dict:
    """What the optimizer begins with, as LazyArrays: each is made by itself, of those parameters that it depends on."""
    tx = optimizer.make_optimizer(config)
    abstract = {path: jax.ShapeDtypeStruct(array.shape, array.dtype) for path, array in params.items()}

    def init(params):
        return optimizer.init(tx, nnx.traversals.unflatten_mapping(params))

    def lazy(shape, keys, function):
        def layers() -> Layers:
            value = np.asarray(function(*(params[path].read() for path in keys)))
            for index in np.ndindex(value.shape[:2] if value.ndim > 2 else ()):
                yield index, value[index]

        return LazyArray(shape.shape, np.dtype(shape.dtype), layers)

    shapes, tree = jax.tree.flatten(jax.eval_shape(init, abstract))
    return tree.unflatten(
        lazy(shape, *output) for shape, output in zip(shapes, each_output(init, abstract), strict=True)
    )


def each_output(function, arguments: dict) -> list[tuple[list, Callable]]:
    """A function of several arrays, cut into one function for each array that it returns.

    Args:
      function: of a dict of arrays; returns a tree of arrays.
      arguments: the dict, or the shapes of its arrays.

    Returns:
      (keys of the arguments that an output depends on, function of these alone that computes it), for every output.
    """
    closed = jax.make_jaxpr(function)(arguments)
    jaxpr = closed.jaxpr
    names = [path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(arguments)]
    found = []
    for output in jaxpr.outvars:
        needed, equations = {id(output)}, []
        for equation in reversed(jaxpr.eqns):
            if any(id(variable) in needed for variable in equation.outvars):
                needed |= {id(variable) for variable in equation.invars}
                equations.insert(0, equation)
        inputs = {name: var for name, var in zip(names, jaxpr.invars, strict=True) if id(var) in needed}
        reduced = jaxpr.replace(eqns=equations, invars=list(inputs.values()), outvars=[output], debug_info=None)
        compute = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(reduced, closed.consts))
        found.append((list(inputs), lambda *values, compute=compute: compute(*values)[0]))
    return found
