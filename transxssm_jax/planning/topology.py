"""A pod that need not be attached, and what the compiler makes of the train step for it."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import threading
import time
from collections.abc import Callable

import jax

from pallas_kernels import hlo
from pallas_kernels.chips import CHIPS, COMPILE_ONLY, TPUS, Chip, Tpu
from transxssm_jax import cli
from transxssm_jax.config import Config, ConfigError
from transxssm_jax.planning.fitting import DoesNotFitError
from transxssm_jax.planning.hlo import Collective, collectives, kernels, step_hbm_bytes
from transxssm_jax.training import step

GIB = 2**30
REMINDER_SECONDS = 30.0  # between two lines of a stage that takes long


class Progress:
    """Prints a line for every stage of a plan, with the seconds since the start, and one every 30 seconds within it.

    Args:
      write: takes each line.
    """

    def __init__(self, write: Callable[[str], None]):
        self._write, self._started = write, time.perf_counter()

    def line(self, text: str) -> None:
        self._write(f'[{time.perf_counter() - self._started:5.0f} s] {text}')

    @contextlib.contextmanager
    def stage(self, name: str):
        """Announces a stage before it, and again while it lasts."""
        self.line(name)
        over = threading.Event()

        def remind():
            while not over.wait(REMINDER_SECONDS):
                self.line(f'still {name}')

        reminder = threading.Thread(target=remind, daemon=True)
        reminder.start()
        try:
            yield
        finally:
            over.set()
            reminder.join()


@dataclasses.dataclass(frozen=True)
class Topology:
    """A pod that need not be attached: --topology=v5p:4x4x8 --slices=2, or h200:8."""

    name: str
    slices: int

    def __post_init__(self):
        chip_name, _, shape = self.name.partition(':')
        if chip_name not in CHIPS:
            raise ConfigError(f'--topology={self.name}: {chip_name!r} is not a known chip; known: {", ".join(CHIPS)}')
        if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', shape):
            example = 'v5e:16x16' if chip_name in TPUS else 'h200:8'
            raise ConfigError(f'--topology={self.name}: must be CHIP:SHAPE, e.g. {example}')
        wanted = self.chip.torus if isinstance(self.chip, Tpu) else 1
        if len(self.shape) != wanted:
            raise ConfigError(
                f'--topology={self.name}: {chip_name} has {wanted} dimensions, '
                f'e.g. {self.chip.topology if chip_name in TPUS else chip_name + ":8"}'
            )
        if chip_name not in TPUS and self.shape[0] > self.chip.host_devices:
            most = self.chip.host_devices
            raise ConfigError(
                f'--topology={self.name}: a host has up to {most}; give hosts as --topology={chip_name}:{most} '
                f'--slices={math.ceil(self.shape[0] / most)}'
            )

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name.partition(':')[0]]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(n) for n in self.name.partition(':')[2].split('x'))

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape) * self.slices * (self.chip.chip_devices if isinstance(self.chip, Tpu) else 1)

    def devices(self) -> list:
        """Compile-only TPU devices.

        Raises:
          ConfigError: libtpu is not installed, or there is no such slice.
        """
        from jax.experimental import topologies

        if importlib.util.find_spec('libtpu') is None:
            raise ConfigError(f'--topology={self.name}: the TPU compiler is not installed; pip install -e .[tpu]')
        for name, value in COMPILE_ONLY.items():
            os.environ.setdefault(name, value)
        options = {'num_slices': self.slices} if self.slices > 1 else {}
        try:
            return topologies.get_topology_desc(
                platform='tpu', topology_name=self.name, chip_config_name=self.chip.arrangement, **options
            ).devices
        except Exception as error:  # libtpu raises its own kinds, and none is public
            raise ConfigError(f'--topology={self.name}: {" ".join(str(error).split())}') from error


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of the step. Bytes are those of one device; kernels: how often each runs in a step."""

    seconds: float
    arguments: int
    temporaries: int
    peak: int
    hbm_bytes: int
    collectives: list[Collective]
    kernels: dict[str, int]
    loops_without_trips: int


def compile_step(config: Config, device_mesh: jax.sharding.Mesh, progress: Progress | None = None) -> Compiled:
    """Compiles the train step of a config for a mesh of devices, which need not be attached.

    Args:
      config: settings.
      device_mesh: of the devices.
      progress: told of every stage; default: nobody is.

    Raises:
      DoesNotFitError: with the compiler's message.
    """
    started = time.perf_counter()
    progress = progress or Progress(lambda line: None)
    with progress.stage('tracing the train step'):
        state, batch_sharding = step.abstract_state(config, device_mesh), step.batch_sharding(device_mesh)
        shape = (config.data.global_batch, config.data.seq_len)
        batch = {
            name: jax.ShapeDtypeStruct(shape, 'int32', sharding=batch_sharding)
            for name in ('tokens', 'targets', 'segment_ids', 'positions')
        }
        shardings = step.state_shardings(config, device_mesh)
        with jax.set_mesh(device_mesh):
            traced = jax.jit(
                step.train_step(config),
                donate_argnums=0,
                in_shardings=(shardings, batch_sharding),
                out_shardings=(shardings, None),
            ).trace(state, batch)
    platform = device_mesh.devices.flat[0].platform
    with jax.set_mesh(device_mesh):
        with progress.stage('lowering it'):
            lowered = traced.lower(lowering_platforms=(platform,))
        try:
            with progress.stage(f'compiling it for {device_mesh.size} devices; 2 to 6 minutes at 1.3B'):
                compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if cli.is_out_of_memory(error):
                raise DoesNotFitError(' '.join(str(error).split()), largest_temporaries(traced.jaxpr.jaxpr)) from error
            raise
    with progress.stage('reading what it sends and moves'):
        memory, computations = compiled.memory_analysis(), hlo.parse(compiled.as_text())
        return Compiled(
            seconds=time.perf_counter() - started,
            arguments=memory.argument_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
            peak=memory.peak_memory_in_bytes,
            hbm_bytes=step_hbm_bytes(computations, _grids(traced)),
            collectives=collectives(computations),
            kernels=kernels(computations),
            loops_without_trips=hlo.unknown_loops(computations),
        )


def _grids(traced) -> dict:
    try:
        return hlo.pallas_grids(traced.jaxpr.jaxpr)
    except NotImplementedError:  # a kernel that reads where its blocks are from memory, such as splash attention
        return {}


def largest_temporaries(jaxpr, count: int = 8) -> list[str]:
    """What the outermost loops of the step stack up, the largest first, one line each.

    The compiler names no buffers when it refuses early. What fills the memory then is what the forward
    pass keeps for the backward pass, and the traced step shows that, with the shapes of one device
    where it runs per device (where tensor is 1).
    """
    found = []

    def walk(jaxpr, per_device):
        for eqn in jaxpr.eqns:
            if per_device and eqn.primitive.name == 'scan':
                # What a loop stacks up has one axis more than in its body; what it carries has not.
                stacked, body = eqn.outvars, eqn.params['jaxpr'].jaxpr.outvars
                for whole, one in zip((v.aval for v in stacked), (v.aval for v in body)):
                    if whole.shape != one.shape:
                        found.append((whole.size * whole.dtype.itemsize, whole.str_short(short_dtypes=True)))
                continue
            for inner in hlo.inner_jaxprs(eqn):
                walk(inner, per_device or eqn.primitive.name == 'shard_map')

    walk(jaxpr, False)
    return [f'{size / 2**20:10,.2f} MiB  {shape}' for size, shape in sorted(found, reverse=True)[:count] if size]
