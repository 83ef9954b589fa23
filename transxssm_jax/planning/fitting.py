"""What a config leaves open (model.remat='auto', train.accumulation_steps=0), chosen for the devices that are here.

The choices are tried in the order of the time that a step is expected to take: compiled, and taken if the compiled step
fits into the devices' memory. What the compiler says decides, the estimate only says what is worth compiling.
"""

import dataclasses
import datetime
import itertools
import math
import os
from collections.abc import Callable, Sequence

import jax

from pallas_kernels import chips
from transxssm_jax import cli
from transxssm_jax import config as config_lib
from transxssm_jax.config import Config
from transxssm_jax.layer_pattern import write_pattern
from transxssm_jax.model.costs import REMAT
from transxssm_jax.model.language_model import is_unrolled
from transxssm_jax.parallel import processes
from transxssm_jax.planning import estimate, roofline

GIB = 2**30
USABLE = 0.98  # share of the memory that arrays get: the allocator's pieces do not fill it
STAND_IN = 'h100'  # ranks the choices on a device that is in no table
# From the fastest policy to the one that keeps least. 'dots' keeps nearly what 'matmuls' does and computes the kernels again.
FASTEST_FIRST = [policy for policy in REMAT if policy != 'dots']
QUARTERS = (1, 2, 3)  # of the layers that have the slower of two policies, where layers may differ
EQUAL_SECONDS = 0.01  # two choices whose expected times differ by less count as equal


class DoesNotFitError(cli.UserError, MemoryError):
    """A step needs more memory than the devices have.

    Attributes:
      largest: the largest temporaries, one line each, where they are known.
    """

    exit_code = cli.ExitCode.DOES_NOT_FIT

    def __init__(self, message: str, largest: Sequence[str] = ()):
        super().__init__(message)
        self.largest = largest


@dataclasses.dataclass(frozen=True)
class Choice:
    """Settings that leave nothing open, with the expected seconds of a step and the expected bytes on a device."""

    config: Config
    seconds: float
    memory: float


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A config that leaves nothing open.

    Attributes:
      config: the settings.
      step: the compiled step, or None where nothing was to be compiled.
      lines: what was chosen and what is expected of it, to print.
    """

    config: Config
    step: jax.stages.Compiled | None
    lines: list[str]


def fit(
    config: Config, device_mesh: jax.sharding.Mesh, compile_step: Callable[[Config], jax.stages.Compiled] | None
) -> Fitted:
    """Chooses what config leaves open. Every process of a run chooses alike.

    Args:
      config: settings.
      device_mesh: the mesh of the run.
      compile_step: compiles the train step of settings that leave nothing open; None: the estimate alone decides.

    Raises:
      DoesNotFitError: no choice fits; the message says what is needed and what there is.
    """
    limit, chip, sizes = usable_bytes(device_mesh), _chip(device_mesh), dict(device_mesh.shape)
    unrolled = is_unrolled(config.model, device_mesh.devices.flat[0].platform)
    if compile_step is None:
        return Fitted(closed(config, sizes, chip, limit, unrolled), None, [])
    # Where nothing is open, there is nothing to estimate for.
    found = choices(config, sizes, chip, unrolled) if is_open(config) else [Choice(config, 0.0, limit)]
    expected_to_fit = [choice for choice in found if choice.memory <= limit]
    smallest = min(found, key=lambda choice: choice.memory)

    scale, least = 0.0, math.inf  # the compiled memory over the expected, and the least compiled memory
    for choice in [*(c for c in expected_to_fit if c is not smallest), smallest]:
        if choice is not smallest and scale * choice.memory > limit:
            continue
        try:
            step = compile_step(choice.config)
            needed = memory_of(step)
        except jax.errors.JaxRuntimeError as error:
            if not cli.is_out_of_memory(error):
                raise
            step, needed = None, math.inf  # a TPU's compiler refuses what does not fit
        if step is not None and needed <= limit:
            return Fitted(choice.config, step, _describe(config, choice, needed, limit, device_mesh))
        # Of a refused step only this is known: it needs more than there is.
        scale, least = max(scale, min(needed, 1.001 * limit) / choice.memory), min(least, needed)
    raise DoesNotFitError(_refusal(config, smallest, least, limit))


def closed(config: Config, sizes: dict[str, int], chip: chips.Chip, limit: float, unrolled: bool) -> Config:
    """config with what it leaves open chosen by the estimate alone: the fastest choice that is expected to fit into `limit`
    bytes per device, or else the smallest. Arguments as for `choices`."""
    if not is_open(config):
        return config
    found = choices(config, sizes, chip, unrolled)
    fitting = (choice for choice in found if choice.memory <= limit)
    return next(fitting, min(found, key=lambda choice: choice.memory)).config


def choices(config: Config, sizes: dict[str, int], chip: chips.Chip, unrolled: bool) -> list[Choice]:
    """Every way to close what config leaves open, the one with the fastest expected step first.

    Args:
      config: settings; what they set is kept.
      sizes: devices along each mesh axis.
      chip: of the devices.
      unrolled: whether the layers are unrolled, so that each may have a policy of its own.
    """
    policies = {config.model.remat: 0.0}
    if config.model.remat == 'auto':
        policies = _policies(config.model.num_layers, unrolled)
    rows = config.data.global_batch // (sizes['data'] * sizes['fsdp'])
    counts = [config.train.accumulation_steps]
    if not counts[0]:
        counts = [n for n in range(1, rows + 1) if rows % n == 0]
    # By the number of microbatches. What a policy sends again is left out: it has products to run beside.
    network = {}
    found = []
    for count in counts:
        for policy in policies:
            settings = {'model.remat': policy, 'train.accumulation_steps': count}
            closed = config_lib.replace(config, settings)
            if count not in network:
                least = config_lib.replace(closed, {'model.remat': 'none'})
                network[count] = sum(roofline.min_comm_bytes(least, sizes).values()) / roofline.all_links(chip)
            seconds = sum(estimate.expected_seconds(closed, sizes, chip, network[count]).values())
            found.append(Choice(closed, seconds, estimate.expected_memory_bytes(closed, sizes, chip)))
    fastest = min(choice.seconds for choice in found)

    def rank(choice):
        times = math.floor((choice.seconds / fastest - 1) / EQUAL_SECONDS)
        return times, choice.config.train.accumulation_steps, policies[choice.config.model.remat]

    return sorted(found, key=rank)


def _policies(num_layers: int, unrolled: bool) -> dict[str, float]:
    """What model.remat may be, with its place from the fastest, 0, to the smallest."""
    found = {policy: float(place) for place, policy in enumerate(FASTEST_FIRST)}
    if unrolled:
        for place, (faster, slower) in enumerate(itertools.pairwise(FASTEST_FIRST)):
            for count in {round(quarter / 4 * num_layers) for quarter in QUARTERS} - {0, num_layers}:
                # The last layers keep more: the backward pass begins with them, while all that is kept is there.
                layers = [slower] * count + [faster] * (num_layers - count)
                found[write_pattern(layers)] = place + count / num_layers
    return found


def usable_bytes(device_mesh: jax.sharding.Mesh) -> float:
    """Bytes of arrays that every device of the mesh can hold: the least of all processes. A CPU device has its share of the
    machine's memory; an accelerator whose allocator has no limit, what the table of chips says, or else no limit."""
    devices = device_mesh.local_devices
    stats = devices[0].memory_stats() or {}
    name = chips.name_of(devices[0].device_kind)
    if 'bytes_limit' in stats:
        own = float(min(device.memory_stats()['bytes_limit'] for device in devices))
    elif devices[0].platform == 'cpu':
        own = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / len(devices)
    else:
        own = float(chips.CHIPS[name].usable) if name else math.inf
    return USABLE * min(processes.all_gather_json(own))


def _chip(device_mesh) -> chips.Chip:
    return chips.CHIPS[chips.name_of(device_mesh.devices.flat[0].device_kind) or STAND_IN]


def memory_of(step: jax.stages.Compiled) -> float:
    """Bytes that a device holds at most while the step runs."""
    m = step.memory_analysis()
    if m is None:
        return 0.0
    return (
        m.argument_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
        + m.temp_size_in_bytes
        + m.generated_code_size_in_bytes
    )


def is_open(config: Config) -> bool:
    """Whether config leaves anything to be chosen."""
    return config.model.remat == 'auto' or not config.train.accumulation_steps


def shown(config: Config) -> str:
    """The settings that may be open, to print."""
    return f'model.remat={config.model.remat} train.accumulation_steps={config.train.accumulation_steps}'


def _describe(config: Config, choice: Choice, needed: float, limit: float, device_mesh: jax.sharding.Mesh) -> list[str]:
    """What a step needs of the devices' memory and, on a device of the table of chips, how long the run should take."""
    chosen = f"chosen for the devices' memory: {shown(choice.config)}; " if is_open(config) else ''
    room = f'{needed / GIB:.1f} of {limit / GIB:.1f} GiB' if math.isfinite(limit) else f'{needed / GIB:.1f} GiB'
    lines = [f'{chosen}a step needs {room} per device']
    name = chips.name_of(device_mesh.devices.flat[0].device_kind)
    if name and device_mesh.devices.flat[0].platform != 'cpu':
        chip, closed_config, sizes = chips.CHIPS[name], choice.config, dict(device_mesh.shape)
        network = sum(roofline.min_comm_bytes(closed_config, sizes).values()) / roofline.all_links(chip)
        seconds = sum(estimate.expected_seconds(closed_config, sizes, chip, network).values())
        whole = datetime.timedelta(seconds=round(seconds * config.train.steps))
        lines.append(
            f'expected: {seconds:.3g} s a step, {config.tokens_per_step / seconds:,.0f} tokens/s, {whole} for '
            f'{config.train.steps:,} steps without evaluations ({estimate.source(chip)})'
        )
    return lines


def _refusal(config: Config, smallest: Choice, least: float, limit: float) -> str:
    needed = f'needs {least / GIB:.1f} GiB per device' if least < 1e18 else 'does not fit, as its compiler says,'
    there_are = f'and there are {limit / GIB:.1f} GiB'
    if not is_open(config):
        return (
            f'a step with {shown(config)} {needed} {there_are}; --config.model.remat=auto '
            '--config.train.accumulation_steps=0 takes what fits'
        )
    return (
        f'a step {needed} even with {shown(smallest.config)} {there_are}; shard the parameters over more devices '
        f'(mesh.fsdp), or lower data.global_batch={config.data.global_batch} or data.seq_len={config.data.seq_len}'
    )
