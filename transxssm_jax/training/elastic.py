"""A run that goes on with another number of devices: the same global batch, in as many microbatches as that takes."""

import jax

from transxssm_jax import config as config_lib
from transxssm_jax.config import Config


def data_shards(device_mesh: jax.sharding.Mesh) -> int:
    """Devices that the rows of a batch are split over."""
    return device_mesh.shape['data'] * device_mesh.shape['fsdp']


def saved(config: Config, device_mesh: jax.sharding.Mesh) -> dict:
    """What a checkpoint keeps for `keep_batch`. config: leaves nothing open."""
    return {'data_shards': data_shards(device_mesh), 'accumulation_steps': config.train.num_microbatches}


def keep_batch(
    config: Config, device_mesh: jax.sharding.Mesh, before: Config, position: dict | None
) -> tuple[Config, list[str]]:
    """The settings for the devices that are here, and a line that says so where they are others than before.

    Where mesh.data is -1 and train.accumulation_steps is given, a device keeps the rows that it has of a microbatch at most:
    with half the devices there are twice as many microbatches. Where train.accumulation_steps is 0, it is chosen for the
    memory anyway.

    Args:
      config: of the run.
      device_mesh: on which it goes on.
      before: config that its checkpoint was trained with.
      position: of the checkpoint; None: it is an import.
    """
    position = position or {}
    now, was = data_shards(device_mesh), position.get('data_shards')
    microbatches = position.get('accumulation_steps')
    if config.mesh.data != -1 or not was or not microbatches or was == now:
        return config, []
    batch, given = config.data.global_batch, config.train.accumulation_steps
    line = f'{was} data shards before, {now} now: the global batch stays {batch} rows, '
    if not given:
        return config, [line + 'train.accumulation_steps is chosen for the memory of the devices']
    if given != before.train.accumulation_steps:
        return config, [line + f'train.accumulation_steps={given} as given']
    rows = batch // (was * microbatches)  # of a device in a microbatch
    own = batch // now
    microbatches = next(number for number in range(1, own + 1) if own % number == 0 and own // number <= max(rows, 1))
    changed = config_lib.replace(config, {'train.accumulation_steps': microbatches})
    return changed, [line + f'in train.accumulation_steps={microbatches} instead of {given}']
