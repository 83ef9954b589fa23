"""Every collective, and what a function that runs on one device's block may ask about the mesh.

The programs that use parameters (train step, evaluation, prefill, decoding, scoring) are each one `shard_map`: they
see one device's block of every array, and every collective is written out. Collectives stand where parameters are
used (`model/layers.py`, the embedding, the loss) and where gradients leave the step; a mixer that is built from those
layers contains none. Those by which an optimizer comes to whole matrices are in whole_matrices.py. Outside of
`shard_map`, and on one device, each of them returns its argument.
"""

import contextlib
import contextvars
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from transxssm_jax.config import ConfigError
from transxssm_jax.parallel.mesh import AXES, BATCH, RULES, spec

# Whether the shard_map being traced takes whole rows, although the mesh has a context axis.
_whole_rows = contextvars.ContextVar('whole_rows', default=False)

# How the residual stream is cut, see `sequence_parallel`; None: every device has all of its tokens.
_stream = contextvars.ContextVar('stream', default=None)

# Mesh axis -> dtype in which gradients are summed over it; an axis that is not here: in the gradient's own dtype.
_gradient_dtypes = contextvars.ContextVar('gradient_dtypes', default={})  # noqa: B039  never changed


def num_shards(logical_axis: str) -> int:
    """Number of shards that the mesh in use (jax.set_mesh) cuts a logical axis into; 1 without a mesh."""
    shape = dict(jax.sharding.get_abstract_mesh().shape)
    return math.prod(shape.get(axis, 1) for axis in RULES[logical_axis])


def sharded_over(*logical_axes: str) -> tuple[str, ...]:
    """Mesh axes that shard any of logical_axes, in the shard_map being traced; () outside of one."""
    mesh = jax.sharding.get_abstract_mesh()
    whole = RULES['length'] if _whole_rows.get() else ()
    names = {name for axis in logical_axes for name in RULES.get(axis, ()) if name not in whole}
    return tuple(axis for axis in AXES if axis in names and axis in mesh.manual_axes and mesh.shape[axis] > 1)


def context_axis() -> dict:
    """`axis_name` and `axis_size` of the mesh axis that shards the tokens of a row, as the kernels take them."""
    names = sharded_over('length')
    return dict(axis_name='context', axis_size=jax.sharding.get_abstract_mesh().shape['context'] if names else 1)


def shard_map(function, in_axes, out_axes):
    """Runs function on each device's block of its arguments.

    Where no argument names the axis 'length', rows are whole on every device of the context axis, and functions that
    would communicate along it do not.

    Args:
      function: takes and returns pytrees of arrays.
      in_axes: logical axes (a tuple of names and None) of each argument, in its tree; None for an argument that is None.
      out_axes: the same for the outputs.

    Returns:
      A function of the whole arrays, for the mesh in use where it is called; without one, or with a mesh of one device,
      it is `function`.
    """
    whole_rows = not any('length' in axes for axes in jax.tree.leaves(in_axes, is_leaf=is_axes))

    def of_block(*args):
        with _setting(_whole_rows, whole_rows):
            return function(*args)

    def call(*args):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1 or mesh.manual_axes:
            return function(*args)
        in_specs = jax.tree.map(spec, in_axes, is_leaf=is_axes)
        out_specs = jax.tree.map(spec, out_axes, is_leaf=is_axes)
        # Replication is not tracked: kernels with custom gradients do not declare it.
        return jax.shard_map(of_block, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)

    return call


def gradient_dtypes(dtypes: dict[str, str]):
    """A context in which gradients are communicated and summed in these dtypes, by mesh axis.

    It holds for what is traced within: the gradients of all `all_gather_params`, `copy_to_tensor_parallel` and
    `gather_from_stream`, whose results come back in the dtype that they would have without it (float32 for parameters).
    """
    return _setting(_gradient_dtypes, dtypes)


def sequence_parallel(rows: int, length: int):
    """A context in which the mesh axes that shard heads also shard the tokens of the residual stream, so that norms and
    residuals are a device's share alone (sequence parallelism; Korthikanti et al., arXiv:2205.05198).

    Between layers a device then has [1, rows * length / tensor, D]: of its tokens, row after row, one contiguous part. Cut
    along the length of each row, what is gathered would have to be transposed, which at 1.3B is as long as sending it.
    Where tensor does not divide the tokens, or is 1, nothing is different. It holds for what is traced within, of the
    functions `gather_from_stream`, `reduce_to_stream` and `copy_to_stream`.

    Args:
      rows, length: of the tokens [B, L] of this device.
    """
    names = sharded_over('heads')
    size = math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in names)
    is_cut = names and rows * length % size == 0
    return _setting(_stream, _Stream(names, size, length) if is_cut else None)


class _Stream(NamedTuple):
    """Mesh axes that cut the residual stream, into how many parts, and the tokens of a row."""

    names: tuple[str, ...]
    size: int
    length: int


def num_overlapped_parts(rows: int) -> int:
    """Into how many parts of whole rows a device's batch may be cut within `sequence_parallel`, each a stream of its own, so
    that what one part sends is on its way while another is computed: 2, or 1 where the rows do not divide."""
    stream = _stream.get()
    return num_parts_of_rows(rows, stream.length, stream.size) if stream else 1


def num_parts_of_rows(rows: int, length: int, tensor: int) -> int:
    """The same of rows of so many tokens on a device, where tensor, more than 1, cuts the residual stream."""
    return 2 if rows % 2 == 0 and rows // 2 * length % tensor == 0 else 1


def is_axes(node) -> bool:
    """Whether a node of a tree is the logical axes of one array."""
    return isinstance(node, tuple) and all(axis is None or isinstance(axis, str) for axis in node)


@contextlib.contextmanager
def _setting(variable, value):
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


# ---- activations -----------------------------------------------------------


def all_reduce_max(x: jax.Array, *logical_axes: str) -> jax.Array:
    """The largest x over the devices that shard logical_axes. Not differentiable."""
    names = sharded_over(*logical_axes)
    return jax.lax.pmax(x, names) if names else x


def all_gather(x: jax.Array, logical_axis: str, axis: int) -> jax.Array:
    """x whole along one of its axes, which logical_axis shards. Not differentiable."""
    for name in reversed(sharded_over(logical_axis)):
        x = jax.lax.all_gather(x, name, axis=axis, tiled=True)
    return x


def shard_index(logical_axis: str):
    """Index of this device's shard of a logical axis; 0 where it is not sharded."""
    names = sharded_over(logical_axis)
    return jax.lax.axis_index(names) if names else 0


def previous_tokens(x: jax.Array, count: int) -> jax.Array:
    """The `count` tokens before those of this device, [B, count, ...]; zeros before the first of a row.

    Args:
      x: [B, L, ...]; only the last `count` of its tokens are read. Their gradient is what the next shard makes of them.

    Raises:
      ConfigError: a shard is shorter than that.
    """
    last = x[:, -count:]
    if not sharded_over('length'):
        return jnp.zeros((x.shape[0], count, *x.shape[2:]), x.dtype)
    if last.shape[1] < count:
        raise ConfigError(
            f'model.conv_width={count + 1} needs shards of at least {count} tokens of a row, not {last.shape[1]}; '
            'lower mesh.context or raise data.seq_len'
        )
    (name,) = sharded_over('length')
    size = jax.sharding.get_abstract_mesh().shape[name]
    return jax.lax.ppermute(last, name, [(i, i + 1) for i in range(size - 1)])


def copy_to_tensor_parallel(x: jax.Array, *logical_axes: str) -> jax.Array:
    """Identity whose gradient is all-reduced over the mesh axes that shard logical_axes (Megatron-LM's f)."""
    names = sharded_over(*logical_axes)
    return _copy(x, names, _dtype_over(names, x.dtype)) if names else x


def copy_param_to_tensor_parallel(param: jax.Array, *logical_axes: str) -> jax.Array:
    """The same for a parameter that is whole on every device: its gradient is all-reduced in its own dtype."""
    names = sharded_over(*logical_axes)
    return _copy(param, names, str(param.dtype)) if names else param


def all_reduce(x: jax.Array, *logical_axes: str) -> jax.Array:
    """Sum of x over the mesh axes that shard logical_axes; its gradient passes unchanged (Megatron-LM's g)."""
    names = sharded_over(*logical_axes)
    return _sum(x, names) if names else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _copy(x, names, dtype):
    del names, dtype
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum(x, names):
    return jax.lax.psum(x, names)


def _sum_in(x, names, dtype):
    return jax.lax.psum(x.astype(dtype), names).astype(x.dtype)


def _dtype_over(names, own) -> str:
    """The dtype in which a gradient of dtype `own` is summed over mesh axes."""
    dtypes = {_gradient_dtypes.get().get(name, str(own)) for name in names}
    return 'float32' if 'float32' in dtypes else dtypes.pop()


# Each is the transpose of the other.
_copy.defvjp(lambda x, names, dtype: (x, None), lambda names, dtype, _, cotangent: (_sum_in(cotangent, names, dtype),))
_sum.defvjp(lambda x, names: (jax.lax.psum(x, names), None), lambda names, _, cotangent: (cotangent,))


# ---- the residual stream -------------------------------------------------------
#
# Layers that tensor shards read it by gather_from_stream and add to it by reduce_to_stream; what acts on the stream itself
# uses its parameters by copy_to_stream. A gather and a scatter together send what an all-reduce does.


def gather_from_stream(x: jax.Array, *logical_axes: str) -> jax.Array:
    """The residual stream for layers that logical_axes shard: [B, L, D], all tokens of this device.

    Each shard of logical_axes makes its part of the gradient. It is all-reduced, as by `copy_to_tensor_parallel`; within
    `sequence_parallel` x is this device's part of the stream, which is all-gathered, and its gradient is reduce-scattered.
    """
    stream = _stream.get()
    if not stream:
        return copy_to_tensor_parallel(x, *logical_axes)
    is_partial = bool(sharded_over(*logical_axes))
    dtype = _dtype_over(stream.names, x.dtype) if is_partial else str(x.dtype)
    # Named outside of the rule of its gradient, so that a remat policy may keep it.
    return checkpoint_name(_gather_tokens(x, stream, is_partial, dtype), 'gathered')


def reduce_to_stream(y: jax.Array, *logical_axes: str) -> jax.Array:
    """The sum of y [B, L, D] over the shards of logical_axes, to be added to the residual stream.

    It is all-reduced, as by `all_reduce`; within `sequence_parallel` it is reduce-scattered to this device's part of the
    stream, and its gradient is all-gathered.
    """
    stream = _stream.get()
    return _scatter_tokens(y, stream, bool(sharded_over(*logical_axes))) if stream else all_reduce(y, *logical_axes)


def copy_to_stream(param: jax.Array) -> jax.Array:
    """A parameter, whole on every device, for use on the residual stream.

    Within `sequence_parallel` its gradient is of this device's tokens, and is all-reduced in its own dtype.
    """
    stream = _stream.get()
    return _copy(param, stream.names, str(param.dtype)) if stream else param


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather_tokens(x, stream, is_partial, dtype):
    del is_partial, dtype
    return jax.lax.all_gather(x, stream.names, axis=1, tiled=True).reshape(-1, stream.length, *x.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _scatter_tokens(y, stream, is_partial):
    y = y.reshape(1, -1, *y.shape[2:])
    if is_partial:
        return jax.lax.psum_scatter(y, stream.names, scatter_dimension=1, tiled=True)
    size = y.shape[1] // stream.size
    return jax.lax.dynamic_slice_in_dim(y, jax.lax.axis_index(stream.names) * size, size, axis=1)


def _gather_tokens_backward(stream, is_partial, dtype, _, cotangent):
    return (_scatter_tokens(cotangent.astype(dtype), stream, is_partial).astype(cotangent.dtype),)


# Each is the transpose of the other.
_gather_tokens.defvjp(
    lambda x, stream, is_partial, dtype: (_gather_tokens(x, stream, is_partial, dtype), None), _gather_tokens_backward
)
_scatter_tokens.defvjp(
    lambda y, stream, is_partial: (_scatter_tokens(y, stream, is_partial), None),
    lambda stream, is_partial, _, cotangent: (_gather_tokens(cotangent, stream, is_partial, ''),),
)


# ---- parameters ------------------------------------------------------------


def all_gather_params(param: jax.Array, logical_axes: tuple, dtype) -> jax.Array:
    """A parameter in dtype, all-gathered over D where fsdp shards it.

    It is cast before it is gathered, and its gradient is reduce-scattered in dtype, or in that of `gradient_dtypes`. A
    layer whose backward pass gathers again sends 3 times its size in dtype, with a gradient in float32 4 times.
    """
    names = sharded_over('embed')
    if 'embed' not in logical_axes or not names:
        return param.astype(dtype)
    (name,) = names
    size = jax.sharding.get_abstract_mesh().shape[name]
    gathering = _Gathering(name, size, logical_axes.index('embed'), str(jnp.dtype(dtype)), str(param.dtype))
    return _gather(param, gathering, _dtype_over(names, gathering.dtype))


class _Gathering(NamedTuple):
    """A parameter's mesh axis, its size, the array axis that it shards, and the dtypes in use and of the parameter."""

    name: str
    size: int
    axis: int
    dtype: str
    param_dtype: str


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(shard, gathering, gradient_dtype):
    del gradient_dtype
    return jax.lax.all_gather(shard.astype(gathering.dtype), gathering.name, axis=gathering.axis, tiled=True)


def _gather_forward(shard, gathering, gradient_dtype):
    return _gather(shard, gathering, gradient_dtype), None


def _gather_backward(gathering, gradient_dtype, _, cotangent):
    name, size, axis = gathering[:3]
    # The shards are put first, of three axes in all: otherwise the TPU compiler makes a padded scatter with permutes of
    # the remainder, or a whole all-reduce that is then cut, 1.25 and 2 times the bytes.
    shape, length = cotangent.shape, cotangent.shape[axis] // size
    if axis == 0:
        shards = cotangent.reshape(size, length, -1)
    else:  # the last
        shards = cotangent.reshape(-1, size, length).swapaxes(0, 1)
    shard = jax.lax.psum_scatter(shards.astype(gradient_dtype), name, scatter_dimension=0, tiled=False)
    # The sum is not rounded again on its way to the parameter.
    return (shard.reshape(*shape[:axis], length, *shape[axis + 1 :]).astype(gathering.param_dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


# ---- sums over tokens --------------------------------------------------------


def all_reduce_over_tokens(tree, *, dtypes: dict[str, str] | None = None, scattered_over: tuple[str, ...] = ()):
    """All-reduces every leaf over the axes that shard tokens (data, fsdp, context).

    Args:
      tree: arrays; each keeps its dtype.
      dtypes: mesh axis -> dtype to communicate and sum in, float32 for an axis that is not in it; axes of one dtype share
        an all-reduce, that in float32 comes first.
      scattered_over: mesh axes over which the leaves are reduce-scattered already.
    """
    groups = {}
    for name in sharded_over(*BATCH):
        if name not in scattered_over:
            groups.setdefault((dtypes or {}).get(name, 'float32'), []).append(name)
    for dtype in sorted(groups, key='float32'.__ne__):
        names = tuple(groups[dtype])
        tree = jax.tree.map(lambda leaf: _sum_in(leaf, names, dtype), tree)  # noqa: B023  mapped at once
    return tree
