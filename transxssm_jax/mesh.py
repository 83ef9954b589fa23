"""The device mesh and the one table from logical axes to mesh axes.

Parameters and activations name their axes by meaning ('embed', 'heads', ...);
only this file knows which mesh axis each is split over.
"""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from transxssm_jax.config import Config, ConfigError

AXES = ('data', 'fsdp', 'tensor')

# Logical axis -> mesh axes. An axis that is not here is not split.
RULES = {
    'batch': ('data', 'fsdp'),
    'embed': ('fsdp',),  # D of every matrix; activations keep D whole
    'heads': ('tensor',),
    'groups': ('tensor',),  # of B and C, or of K and V
    'mlp': ('tensor',),
    'vocab': ('tensor',),
}


def build(config: Config, devices=None) -> Mesh:
    """Arranges devices (default: all) into the mesh that config.mesh asks for.

    Raises:
      ConfigError: the axes do not multiply to the number of devices, or a
        size of the model or the batch does not divide by its axis.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {name: getattr(config.mesh, name) for name in AXES}
    given = math.prod(size for size in sizes.values() if size != -1)
    rest = len(devices) // given
    if -1 in sizes.values():
        sizes = {name: rest if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        shape = ' x '.join(f'mesh.{name}={getattr(config.mesh, name)}' for name in AXES)
        raise ConfigError(f'{shape} must multiply to the {len(devices)} devices that are here; set one of them to -1')
    _check_sizes(config, sizes)
    # make_mesh orders the devices of a TPU slice along its links; the given order serves elsewhere.
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _check_sizes(config: Config, sizes: dict[str, int]) -> None:
    model = config.model
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


def constrain(x: jax.Array, *logical_axes) -> jax.Array:
    """Pins an activation's layout under the mesh in use (jax.set_mesh); no mesh: returns x as it is."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(logical_axes))


def on_shards(function, in_axes, out_axes):
    """Runs function on each device's block of its arguments, as the custom kernels need.

    A kernel call is opaque to the partitioner, which would gather its operands;
    the model's kernels are independent over batch and heads, so no device needs
    another's data.

    Args:
      function: takes and returns arrays.
      in_axes: logical axes of each argument; None for an argument that is None.
      out_axes: logical axes of each output, a tuple of tuples, or of the one output.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    in_specs = jax.tree.map(spec, in_axes, is_leaf=_is_axes)
    out_specs = jax.tree.map(spec, out_axes, is_leaf=_is_axes)
    # Replication is not tracked: kernels with custom gradients do not declare it.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _is_axes(node) -> bool:
    return isinstance(node, tuple) and all(axis is None or isinstance(axis, str) for axis in node)


def rows_of_this_process(mesh: Mesh, global_batch: int) -> np.ndarray:
    """Which rows of the global batch this process's devices hold, in order."""
    placement = sharding(mesh, ('batch', None)).addressable_devices_indices_map((global_batch, 1))
    rows = {row for index in placement.values() for row in range(*index[0].indices(global_batch))}
    return np.array(sorted(rows))
