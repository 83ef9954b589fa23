"""Every collective of the step, written for one device's block of the arrays."""

import functools
import math

import jax

from transxssm_jax.parallel.mesh import AXES, RULES, spec


def axis_size(axis: str) -> int:
    """Devices along an axis of the mesh in use; 1 without a mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(axis, 1)


def num_shards(logical_axis: str) -> int:
    """Parts into which the mesh in use cuts a logical axis; 1 without a mesh."""
    return math.prod(map(axis_size, RULES[logical_axis]))


def manual_axes() -> tuple[str, ...]:
    """Axes of the mesh in use over which the function being traced sees only its device's part, see `shard_map`."""
    return tuple(axis for axis in AXES if axis in jax.sharding.get_abstract_mesh().manual_axes)


def sharded_over(*logical_axes: str) -> tuple[str, ...]:
    """The mesh axes that cut any of logical_axes into parts, of which the function being traced sees its device's."""
    rules = {name for axis in logical_axes for name in RULES.get(axis, ())}
    return tuple(name for name in manual_axes() if name in rules and axis_size(name) > 1)


def constrain(x: jax.Array, *logical_axes) -> jax.Array:
    """Pins an activation's layout under the mesh in use (jax.set_mesh); no mesh: returns x as it is."""
    if jax.sharding.get_abstract_mesh().empty or manual_axes():
        return x
    return jax.lax.with_sharding_constraint(x, spec(logical_axes))


def shard_map(function, in_axes, out_axes):
    """Runs function on each device's block of its arguments.

    The custom kernels need it, for a kernel call is opaque to the partitioner, which would gather
    its operands; and the step, whose collectives are written out (see `all_gather_params`, `copy_to_tensor_parallel` and
    `all_reduce`). Within it, this returns the function as it is: the blocks are cut already.

    Args:
      function: takes and returns arrays; names the axes of the mesh in collectives.
      in_axes: logical axes of each argument; None for an argument that is None.
      out_axes: logical axes of each output, a tuple of tuples, or of the one output.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or manual_axes():
        return function
    in_specs = jax.tree.map(spec, in_axes, is_leaf=_is_axes)
    out_specs = jax.tree.map(spec, out_axes, is_leaf=_is_axes)
    # Replication is not tracked: kernels with custom gradients do not declare it.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def of_whole_rows(axes):
    """Logical axes as `shard_map` takes them, with every row whole on its devices: for what passes nothing along a row."""
    return jax.tree.map(
        lambda names: tuple(None if name == 'length' else name for name in names), axes, is_leaf=_is_axes
    )


def _is_axes(node) -> bool:
    return isinstance(node, tuple) and all(axis is None or isinstance(axis, str) for axis in node)


# ---- collectives of what is written for one device's block: outside of shard_map, they leave arrays as they are ----


def all_reduce_max(x: jax.Array, *logical_axes: str) -> jax.Array:
    """The largest x of the devices that split logical_axes. Not differentiable."""
    names = sharded_over(*logical_axes)
    return jax.lax.pmax(x, names) if names else x


def copy_to_tensor_parallel(x: jax.Array, *logical_axes: str) -> jax.Array:
    """x, which every device has whole and uses for its part of logical_axes: its gradient is the sum of theirs."""
    names = sharded_over(*logical_axes)
    return _copy_to_tensor_parallel(x, names) if names else x


def all_reduce(x: jax.Array, *logical_axes: str) -> jax.Array:
    """The sum of what every device has of its part of logical_axes; the gradient of each is that of the sum."""
    names = sharded_over(*logical_axes)
    return _all_reduce(x, names) if names else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _copy_to_tensor_parallel(x, names):
    del names
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _all_reduce(x, names):
    return jax.lax.psum(x, names)


# Each is the transpose of the other.
_copy_to_tensor_parallel.defvjp(
    lambda x, names: (x, None), lambda names, _, cotangent: (jax.lax.psum(cotangent, names),)
)
_all_reduce.defvjp(lambda x, names: (jax.lax.psum(x, names), None), lambda names, _, cotangent: (cotangent,))


def all_gather_params(param: jax.Array, logical_axes: tuple, dtype) -> jax.Array:
    """A parameter in dtype, whole over D where a device has only its part of 'embed'.

    It is rounded before it is all_gather_params, and its gradient is all_reduce and scattered in dtype: for
    a layer whose backward pass gathers again, 3 x its size in dtype cross the network.
    """
    param, names = param.astype(dtype), sharded_over('embed')
    if 'embed' not in logical_axes or not names:
        return param
    (name,) = names
    return _gather(param, name, axis_size(name), logical_axes.index('embed'))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(part, name, size, axis):
    del size
    return jax.lax.all_gather(part, name, axis=axis, tiled=True)


def _gather_forward(part, name, size, axis):
    return _gather(part, name, size, axis), None


def _gather_backward(name, size, axis, _, cotangent):
    # The parts are put first, of three axes in all: otherwise the TPU compiler makes a padded scatter with permutes of
    # what is left over, or a whole sum that is then cut, 1.25 and 2 times the bytes.
    shape, length = cotangent.shape, cotangent.shape[axis] // size
    if axis == 0:
        parts = cotangent.reshape(size, length, -1)
    else:  # the last
        parts = cotangent.reshape(-1, size, length).swapaxes(0, 1)
    part = jax.lax.psum_scatter(parts, name, scatter_dimension=0, tiled=False)
    return (part.reshape(*shape[:axis], length, *shape[axis + 1 :]),)


_gather.defvjp(_gather_forward, _gather_backward)
