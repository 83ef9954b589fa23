"""The device mesh and the one table from logical axes to mesh axes.

Parameters and activations name their axes by meaning ('embed', 'heads', ...);
only this file knows which mesh axis each is split over.
"""

import functools
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from transxssm_jax.config import Config, ConfigError

# From the slowest links to the fastest: slices are laid along data, and neighbours in tensor are neighbours in the machine.
AXES = ('data', 'fsdp', 'context', 'tensor')

# Logical axis -> mesh axes. An axis that is not here is not split.
RULES = {
    'batch': ('data', 'fsdp'),
    'length': ('context',),  # one contiguous piece of every row a device, in all layers
    'embed': ('fsdp',),  # D of every matrix; activations keep D whole
    'heads': ('tensor',),
    'groups': ('tensor',),  # of B and C, or of K and V
    'mlp': ('tensor',),
    'vocab': ('tensor',),
}

BATCH = ('batch', 'length')  # logical axes of a batch's arrays


def build(config: Config, devices=None) -> Mesh:
    """Arranges devices (default: all) into the mesh that config.mesh asks for.

    Raises:
      ConfigError: the axes do not multiply to the number of devices, the devices
        are of another number of slices, or a size of the model or the batch does
        not divide by its axis.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(config, len(devices))
    arranged = arrange(devices, sizes, config.mesh.slices)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_sizes(config: Config, num_devices: int) -> dict[str, int]:
    """Devices along each axis, in the order of AXES, with -1 worked out.

    Raises:
      ConfigError: they do not multiply to num_devices, or a size of the model or the batch does not divide by its axis.
    """
    sizes = {name: getattr(config.mesh, name) for name in AXES}
    rest = num_devices // math.prod(size for size in sizes.values() if size != -1)
    sizes = {name: rest if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != num_devices:
        shape = ' x '.join(f'mesh.{name}={getattr(config.mesh, name)}' for name in AXES)
        raise ConfigError(f'{shape} must multiply to the {num_devices} devices that are here; set one of them to -1')
    _check_sizes(config, sizes)
    return sizes


def arrange(devices, sizes: dict[str, int], slices: int) -> np.ndarray:
    """Devices as an array with the axes of AXES: along the links within a slice, slices along data, then fsdp.

    Gradients cross data once a step, and fsdp's gathers overlap with work; context and tensor,
    which every layer waits for, stay within a slice.

    Raises:
      ConfigError: see `build`.
    """
    found = len({getattr(device, 'slice_index', 0) for device in devices})
    if found != slices:
        raise ConfigError(f'mesh.slices={slices}, but the {len(devices)} devices are of {found}; set mesh.slices={found}')
    between = dict.fromkeys(AXES, 1)
    between['data'] = math.gcd(sizes['data'], slices)
    between['fsdp'] = slices // between['data']
    if sizes['fsdp'] % between['fsdp']:
        raise ConfigError(f'mesh.data={sizes["data"]} x mesh.fsdp={sizes["fsdp"]} must be divisible by mesh.slices={slices}, '
                          f'for only these two reach across slices; try mesh.data={math.lcm(sizes["data"], slices)}')
    within = [size // between[name] for name, size in sizes.items()]
    # An axis of the torus is split only where no whole one fits.
    if slices == 1:
        return mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(within, list(between.values()), devices, allow_split_physical_axes=True)


def _check_sizes(config: Config, sizes: dict[str, int]) -> None:
    model, seq_len = config.model, config.data.seq_len
    # The ring of attention gives every device an early and a late piece of a row.
    pieces = 2 * sizes['context'] if sizes['context'] > 1 and 'attention' in model.layer_kinds else sizes['context']
    if seq_len % pieces:
        lower, upper = seq_len // pieces * pieces, (seq_len // pieces + 1) * pieces
        by = f'mesh.context={sizes["context"]}' + (' x 2 pieces of attention' if pieces > sizes['context'] else '')
        raise ConfigError(f'data.seq_len={seq_len} must be divisible by {by}; try {f"{lower} or {upper}" if lower else upper}')
    shards = sizes['data'] * sizes['fsdp']
    microbatch = config.data.global_batch // config.train.accumulation_steps
    if microbatch % shards:
        step = shards * config.train.accumulation_steps
        lower, upper = config.data.global_batch // step * step, (config.data.global_batch // step + 1) * step
        by = f'{shards} data shards' + (
            f' x train.accumulation_steps={config.train.accumulation_steps}' if config.train.accumulation_steps > 1 else '')
        raise ConfigError(f'data.global_batch={config.data.global_batch} must be divisible by {by}; '
                          f'try {f"{lower} or {upper}" if lower else upper}')
    for name, value, axis in (
        ('model.d_model', model.d_model, 'fsdp'),
        ('model.num_heads', model.num_heads, 'tensor'),
        ('model.num_kv_heads', model.num_kv_heads, 'tensor'),
        ('model.num_ssd_groups', model.num_ssd_groups, 'tensor'),
        ('model.d_mlp', model.d_mlp, 'tensor'),
        ('model.vocab_size', model.vocab_size, 'tensor'),
    ):
        if value % sizes[axis]:
            fitting = max(size for size in range(1, sizes[axis]) if value % size == 0)
            raise ConfigError(f'{name}={value} must be divisible by mesh.{axis}={sizes[axis]}; try mesh.{axis}={fitting}')


def spec(logical_axes) -> PartitionSpec:
    """Logical axes (None: not split) -> PartitionSpec; one mesh axis stays a plain name."""
    axes = [RULES.get(axis) for axis in logical_axes]
    return PartitionSpec(*(axis[0] if axis and len(axis) == 1 else axis for axis in axes))


def sharding(mesh: Mesh, logical_axes) -> NamedSharding:
    return NamedSharding(mesh, spec(logical_axes))


def size_in_use(axis: str) -> int:
    """Devices along an axis of the mesh in use; 1 without a mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(axis, 1)


def parts_in_use(logical_axis: str) -> int:
    """Parts into which the mesh in use cuts a logical axis; 1 without a mesh."""
    return math.prod(map(size_in_use, RULES[logical_axis]))


def manual_axes() -> tuple[str, ...]:
    """Axes of the mesh in use over which the function being traced sees only its device's part, see `on_shards`."""
    return tuple(axis for axis in AXES if axis in jax.sharding.get_abstract_mesh().manual_axes)


def splitting(*logical_axes: str) -> tuple[str, ...]:
    """The mesh axes that cut any of logical_axes into parts, of which the function being traced sees its device's."""
    rules = {name for axis in logical_axes for name in RULES.get(axis, ())}
    return tuple(name for name in manual_axes() if name in rules and size_in_use(name) > 1)


def constrain(x: jax.Array, *logical_axes) -> jax.Array:
    """Pins an activation's layout under the mesh in use (jax.set_mesh); no mesh: returns x as it is."""
    if jax.sharding.get_abstract_mesh().empty or manual_axes():
        return x
    return jax.lax.with_sharding_constraint(x, spec(logical_axes))


def on_shards(function, in_axes, out_axes):
    """Runs function on each device's block of its arguments.

    The custom kernels need it, for a kernel call is opaque to the partitioner, which would gather
    its operands; and the step, whose collectives are written out (see `gathered`, `shared` and
    `summed`). Within it, this returns the function as it is: the blocks are cut already.

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
    """Logical axes as `on_shards` takes them, with every row whole on its devices: for what passes nothing along a row."""
    return jax.tree.map(lambda names: tuple(None if name == 'length' else name for name in names), axes, is_leaf=_is_axes)


def _is_axes(node) -> bool:
    return isinstance(node, tuple) and all(axis is None or isinstance(axis, str) for axis in node)


# ---- collectives of what is written for one device's block: outside of on_shards, they leave arrays as they are ----


def max_over(x: jax.Array, *logical_axes: str) -> jax.Array:
    """The largest x of the devices that split logical_axes. Not differentiable."""
    names = splitting(*logical_axes)
    return jax.lax.pmax(x, names) if names else x


def shared(x: jax.Array, *logical_axes: str) -> jax.Array:
    """x, which every device has whole and uses for its part of logical_axes: its gradient is the sum of theirs."""
    names = splitting(*logical_axes)
    return _shared(x, names) if names else x


def summed(x: jax.Array, *logical_axes: str) -> jax.Array:
    """The sum of what every device has of its part of logical_axes; the gradient of each is that of the sum."""
    names = splitting(*logical_axes)
    return _summed(x, names) if names else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _shared(x, names):
    del names
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _summed(x, names):
    return jax.lax.psum(x, names)


# Each is the transpose of the other.
_shared.defvjp(lambda x, names: (x, None), lambda names, _, cotangent: (jax.lax.psum(cotangent, names),))
_summed.defvjp(lambda x, names: (jax.lax.psum(x, names), None), lambda names, _, cotangent: (cotangent,))


def gathered(param: jax.Array, logical_axes: tuple, dtype) -> jax.Array:
    """A parameter in dtype, whole over D where a device has only its part of 'embed'.

    It is rounded before it is gathered, and its gradient is summed and scattered in dtype: for
    a layer whose backward pass gathers again, 3 x its size in dtype cross the network.
    """
    param, names = param.astype(dtype), splitting('embed')
    if 'embed' not in logical_axes or not names:
        return param
    name, = names
    return _gather(param, name, size_in_use(name), logical_axes.index('embed'))


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
    return part.reshape(*shape[:axis], length, *shape[axis + 1:]),


_gather.defvjp(_gather_forward, _gather_backward)


# ---- batches ---------------------------------------------------------------


def rows_of_this_process(mesh: Mesh, global_batch: int) -> np.ndarray:
    """Which rows of the global batch this process's devices hold a part of, in order.

    Where rows are split over the devices of several processes (context), each of these reads them whole.
    """
    return np.array(_rows_of_this_process(mesh, global_batch))


@functools.lru_cache  # asked for at every step
def _rows_of_this_process(mesh, global_batch):
    placement = sharding(mesh, ('batch', None)).addressable_devices_indices_map((global_batch, 1))
    rows = {row for index in placement.values() for row in range(*index[0].indices(global_batch))}
    return sorted(rows)


def global_batch(mesh: Mesh, local: dict[str, np.ndarray], size: int) -> dict[str, jax.Array]:
    """The global batch on the devices, of what each process read.

    Args:
      mesh: from `build`.
      local: arrays [rows, L] of whole rows: those of `rows_of_this_process(mesh, size)`, in that order.
      size: rows of the global batch.

    Returns:
      arrays [size, L] split over batch and length.
    """
    rows = rows_of_this_process(mesh, size)

    def place(local_BL):
        def block(index):
            first, last, _ = index[0].indices(size)
            start = np.searchsorted(rows, first)
            return local_BL[start:start + last - first, index[1]]
        return jax.make_array_from_callback((size, local_BL.shape[1]), sharding(mesh, BATCH), block)

    return {name: place(local_BL) for name, local_BL in local.items()}
