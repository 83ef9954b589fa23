"""The device mesh and the one table from logical axes to mesh axes.

Parameters and activations name their axes by meaning ('embed', 'heads', ...);
only this file knows which mesh axis shards each.
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

# Logical axis -> mesh axes. An axis that is not here is not sharded.
RULES = {
    'batch': ('data', 'fsdp'),
    'length': ('context',),  # one contiguous part of every row per device, in all layers
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

    Gradients cross data once per step, and fsdp's gathers overlap with work; context and tensor,
    which every layer waits for, stay within a slice.

    Raises:
      ConfigError: see `build`.
    """
    found = len({getattr(device, 'slice_index', 0) for device in devices})
    if found != slices:
        raise ConfigError(
            f'mesh.slices={slices}, but the {len(devices)} devices are of {found}; set mesh.slices={found}'
        )
    between = dict.fromkeys(AXES, 1)
    between['data'] = math.gcd(sizes['data'], slices)
    between['fsdp'] = slices // between['data']
    if sizes['fsdp'] % between['fsdp']:
        raise ConfigError(
            f'mesh.data={sizes["data"]} x mesh.fsdp={sizes["fsdp"]} must be divisible by mesh.slices={slices}, '
            f'for only these two reach across slices; try mesh.data={math.lcm(sizes["data"], slices)}'
        )
    within = [size // between[name] for name, size in sizes.items()]
    # An axis of the torus is split only where no whole one fits.
    if slices == 1:
        return mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(within, list(between.values()), devices, allow_split_physical_axes=True)


def _check_sizes(config: Config, sizes: dict[str, int]) -> None:
    model, seq_len = config.model, config.data.seq_len
    # Ring attention cuts every device's part of a row in two.
    pieces = 2 * sizes['context'] if sizes['context'] > 1 else 1
    if seq_len % pieces:
        lower, upper = seq_len // pieces * pieces, (seq_len // pieces + 1) * pieces
        by = f'2 x mesh.context={sizes["context"]}'
        raise ConfigError(
            f'data.seq_len={seq_len} must be divisible by {by}; try {f"{lower} or {upper}" if lower else upper}'
        )
    shards = sizes['data'] * sizes['fsdp']
    microbatch = config.data.global_batch // config.train.num_microbatches
    if microbatch % shards:
        step = shards * config.train.num_microbatches
        lower, upper = config.data.global_batch // step * step, (config.data.global_batch // step + 1) * step
        by = f'{shards} data shards' + (
            f' x train.accumulation_steps={config.train.accumulation_steps}'
            if config.train.accumulation_steps > 1
            else ''
        )
        raise ConfigError(
            f'data.global_batch={config.data.global_batch} must be divisible by {by}; '
            f'try {f"{lower} or {upper}" if lower else upper}'
        )
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
            raise ConfigError(
                f'{name}={value} must be divisible by mesh.{axis}={sizes[axis]}; try mesh.{axis}={fitting}'
            )


def spec(logical_axes) -> PartitionSpec:
    """Logical axes (None: not split) -> PartitionSpec; one mesh axis stays a plain name."""
    axes = [RULES.get(axis) for axis in logical_axes]
    return PartitionSpec(*(axis[0] if axis and len(axis) == 1 else axis for axis in axes))


def sharding(mesh: Mesh, logical_axes) -> NamedSharding:
    return NamedSharding(mesh, spec(logical_axes))


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
            return local_BL[start : start + last - first, index[1]]

        return jax.make_array_from_callback((size, local_BL.shape[1]), sharding(mesh, BATCH), block)

    return {name: place(local_BL) for name, local_BL in local.items()}
