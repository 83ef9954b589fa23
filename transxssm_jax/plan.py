"""Plans a pod before it is paid for: compiles the real train step for devices that are not here.

  python -m transxssm_jax.plan --config=configs/pods/1p3b_v5e_256.py --topology=v5e:16x16
  python -m transxssm_jax.plan --config=configs/1p3b.py --topology=v5p:4x4x8 --slices=2 --config.mesh.fsdp=16
  python -m transxssm_jax.plan --config=configs/1p3b.py --topology=v5e:16x16 --search --budget_minutes=30
  python -m transxssm_jax.plan --chips

TPU topologies are compiled by the real TPU compiler (pip install -e .[tpu]), no TPU needed. There is
no such compiler for GPUs without one: of `h200:8` only what is computed without compiling is printed,
and says so.

Exit codes: 0 it fits; 2 wrong input, said in one line; 3 it does not fit.
"""

import dataclasses
import importlib.util
import json
import math
import os
import re
import sys
import time

import jax
from absl import flags

from pallas_kernels import tpu_traffic
from pallas_kernels.chips import CHIPS, COMPILE_ONLY, TPUS, Chip, Tpu
from transxssm_jax import bounds, flops, hlo, mesh, search, step
from transxssm_jax import config as config_lib
from transxssm_jax.config import Config, ConfigError

FITS, WRONG_INPUT, DOES_NOT_FIT = 0, 2, 3
GIB = 2**30


class DoesNotFitError(MemoryError):
    """The compiler refused the step for want of memory: its own words, and the largest temporaries, a line each."""

    def __init__(self, message: str, largest: list[str]):
        super().__init__(message)
        self.largest = largest


@dataclasses.dataclass(frozen=True)
class Topology:
    """A pod that need not be here: --topology=v5p:4x4x8 --slices=2, or h200:8."""

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
            raise ConfigError(f'--topology={self.name}: {chip_name} has {wanted} dimensions, '
                              f'e.g. {self.chip.topology if chip_name in TPUS else chip_name + ":8"}')
        if chip_name not in TPUS and self.shape[0] > self.chip.host_devices:
            most = self.chip.host_devices
            raise ConfigError(f'--topology={self.name}: a host has up to {most}; give hosts as --topology={chip_name}:{most} '
                              f'--slices={math.ceil(self.shape[0] / most)}')

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
                platform='tpu', topology_name=self.name, chip_config_name=self.chip.arrangement, **options).devices
        except Exception as error:  # libtpu raises its own kinds, and none is public
            raise ConfigError(f'--topology={self.name}: {" ".join(str(error).split())}') from error


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of the step. Bytes are those of one device."""

    seconds: float
    arguments: int
    temporaries: int
    peak: int
    hbm_bytes: int
    collectives: list[hlo.Collective]
    loops_without_trips: int


def compile_step(config: Config, device_mesh: jax.sharding.Mesh) -> Compiled:
    """Compiles the train step of a config for a mesh of devices, which need not be attached.

    Raises:
      DoesNotFitError: with the compiler's words.
    """
    started = time.perf_counter()
    state, batch_sharding = step.abstract_state(config, device_mesh), step.batch_sharding(device_mesh)
    shape = (config.data.global_batch, config.data.seq_len)
    batch = {name: jax.ShapeDtypeStruct(shape, 'int32', sharding=batch_sharding)
             for name in ('tokens', 'targets', 'segment_ids', 'positions')}
    shardings = step.state_shardings(config, device_mesh)
    with jax.set_mesh(device_mesh):
        traced = jax.jit(step.train_step(config), donate_argnums=0, in_shardings=(shardings, batch_sharding),
                         out_shardings=(shardings, None)).trace(state, batch)
        try:
            compiled = traced.lower(lowering_platforms=(device_mesh.devices.flat[0].platform,)).compile()
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' in str(error):
                raise DoesNotFitError(' '.join(str(error).split()), largest_temporaries(traced.jaxpr.jaxpr)) from error
            raise
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Compiled(
        seconds=time.perf_counter() - started, arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes, peak=memory.peak_memory_in_bytes, hbm_bytes=hlo.hbm_bytes(text, _grids(traced)),
        collectives=hlo.collectives(text), loops_without_trips=hlo.loops_without_trips(text))


def _grids(traced) -> dict:
    try:
        return tpu_traffic.pallas_grids(traced.jaxpr.jaxpr)
    except NotImplementedError:  # a kernel that reads where its blocks are from memory, such as splash attention
        return {}


def largest_temporaries(jaxpr, count: int = 8) -> list[str]:
    """What the outermost loops of the step stack up, the largest first, a line each.

    The compiler names no buffers when it refuses early. What fills the memory then is what the forward
    pass keeps for the backward pass, and that the traced step shows, with the shapes of one device
    where it runs by device (where tensor is 1).
    """
    found = []

    def walk(jaxpr, here):
        for eqn in jaxpr.eqns:
            if here and eqn.primitive.name == 'scan':
                # What a loop stacks up has one axis more than in its body; what it carries has not.
                for whole, one in zip((v.aval for v in eqn.outvars), (v.aval for v in eqn.params['jaxpr'].jaxpr.outvars)):
                    if whole.shape != one.shape:
                        found.append((whole.size * whole.dtype.itemsize, whole.str_short(short_dtypes=True)))
                continue
            for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, 'eqns') or hasattr(p, 'jaxpr')):
                inner = getattr(inner, 'jaxpr', inner)
                if hasattr(inner, 'eqns'):
                    walk(inner, here or eqn.primitive.name == 'shard_map')

    walk(jaxpr, False)
    return [f'{size / 2**20:10,.2f} MiB  {shape}' for size, shape in sorted(found, reverse=True)[:count] if size]


# ---- the report ------------------------------------------------------------


def report(config: Config, topology: Topology) -> dict:
    """What is known without the compiler, as plain values, all of them bounds from below."""
    chip, sizes = topology.chip, mesh.axis_sizes(config, topology.num_devices)
    tokens = config.tokens_per_step / topology.num_devices
    model_flops = tokens * flops.train_flops_per_token(config.model, config.data.seq_len)
    executed = tokens * bounds.executed_flops_per_token(config, sizes)
    wire = bounds.least_wire_bytes(config, sizes)
    memory = {name: int(size) for name, size in bounds.least_memory(config, sizes).items()}
    hbm_bytes = bounds.least_hbm_bytes(config, sizes)
    result = dict(
        topology=topology.name, slices=topology.slices, devices=topology.num_devices, mesh=sizes, compiled=False,
        scan=config.model.ssd_implementation, attention=config.model.attention_implementation,
        parameters=step.count_params(config.model), tokens_per_step=config.tokens_per_step,
        model_flops=model_flops, executed_flops=executed, hbm_bytes=hbm_bytes, usable_bytes=chip.usable,
        least_memory_bytes=memory, least_wire_bytes=wire, fits=sum(memory.values()) <= chip.usable)
    network = {'links': sum(wire.values()) / bounds.all_links(chip)}
    if topology.slices > 1:
        network['DCN'] = bounds.least_dcn_bytes(config, sizes) / chip.dcn
    return _with_times(result, chip, network)


def compiled_report(config: Config, topology: Topology, device_mesh: jax.sharding.Mesh, compiled: Compiled) -> dict:
    """The same, with what the compiler made of it."""
    chip, collectives = topology.chip, compiled.collectives
    result = report(config, topology) | dict(
        compiled=True, compile_seconds=compiled.seconds, argument_bytes=compiled.arguments,
        temporary_bytes=compiled.temporaries, peak_bytes=compiled.peak, fits=True, hbm_bytes=compiled.hbm_bytes,
        loops_without_trips=compiled.loops_without_trips, collectives=_table(chip, device_mesh, collectives),
        wire_bytes=sum(c.runs * c.wire_bytes for c in collectives))
    return _with_times(result, chip, bounds.network_seconds(chip, device_mesh.devices, collectives))


def _with_times(result: dict, chip: Chip, network: dict[str, float]) -> dict:
    seconds = {'compute': result['executed_flops'] / chip.peak, 'HBM': result['hbm_bytes'] / chip.bandwidth, **network}
    bound = max(seconds.values())
    return result | dict(
        seconds=seconds, bound_seconds=bound, bound_by=max(seconds, key=seconds.get),
        mfu=result['model_flops'] / chip.peak / bound, tokens_per_second=result['tokens_per_step'] / bound)


def _table(chip, device_mesh, collectives):
    """Rows of collectives of a kind, axis and dtype together, the longest first."""
    rows = {}
    for c in collectives:
        key = (c.kind, '+'.join(c.axes(dict(device_mesh.shape))), c.arrays[0][0])
        row = rows.setdefault(key, dict(kind=key[0], axis=key[1], dtype=key[2], count=0, bytes=0.0, seconds=0.0))
        row['count'] += c.runs
        row['bytes'] += c.runs * c.wire_bytes
        row['seconds'] += bounds.collective_seconds(chip, device_mesh.devices, c)
    return sorted(rows.values(), key=lambda row: -row['seconds'])


def show(result: dict) -> str:
    """The report as text."""
    def gib(size):
        return f'{size / GIB:.2f} GiB'

    axes = ' x '.join(f'{name} {size}' for name, size in result['mesh'].items() if size > 1) or 'one device'
    lines = [
        f'{result["topology"]}{f" x {result['slices']} slices" if result["slices"] > 1 else ""}: '
        f'{result["devices"]} devices, {axes}',
        f'parameters      {result["parameters"]:,}',
        f'tokens a step   {result["tokens_per_step"]:,}',
        f'kernels         scan {result["scan"]}, attention {result["attention"]}']
    memory = ', '.join(f'{name} {gib(size)}' for name, size in result['least_memory_bytes'].items())
    if result['compiled']:
        lines += [f'compiled in     {result["compile_seconds"]:.0f} s',
                  f'a device needs  {gib(result["peak_bytes"])} of {gib(result["usable_bytes"])}: arguments '
                  f'{gib(result["argument_bytes"])}, temporaries {gib(result["temporary_bytes"])}, not all at a time',
                  f'  computed      {memory}']
    else:
        lines += ['not compiled    all below is computed, and a bound from below',
                  f'a device needs  {gib(sum(result["least_memory_bytes"].values()))} of {gib(result["usable_bytes"])}: {memory}']
    least = result['least_wire_bytes']
    lines.append('sent a device   least ' + f'{sum(least.values()) / 1e6:,.0f} MB: '
                 + ', '.join(f'{name} {size / 1e6:,.0f}' for name, size in least.items() if size))
    if result['compiled']:
        ratio = result['wire_bytes'] / sum(least.values()) if any(least.values()) else 1.0
        lines.append(f'  compiled      {result["wire_bytes"] / 1e6:,.0f} MB, {ratio:.2f} of the least')
        lines.append(f'  {"collective":19}{"axis":20}{"dtype":7}{"count":>7}{"MB":>11}{"ms":>9}')
        lines += [f'  {row["kind"]:19}{row["axis"]:20}{row["dtype"]:7}{row["count"]:7}{row["bytes"] / 1e6:11,.1f}'
                  f'{1e3 * row["seconds"]:9.2f}' for row in result['collectives']]
        if result['loops_without_trips']:
            lines.append(f'  {result["loops_without_trips"]} loops whose trips are not known count as one')
    lines += [f'TFLOP a device  {result["model_flops"] / 1e12:.2f}; with what is computed again '
              f'{result["executed_flops"] / 1e12:.2f}',
              f'HBM a device    {result["hbm_bytes"] / 1e9:.1f} GB',
              'lower bounds    ' + ', '.join(f'{name} {1e3 * s:.0f} ms' for name, s in result['seconds'].items()),
              f'at best         {1e3 * result["bound_seconds"]:.0f} ms a step ({result["bound_by"]}), '
              f'{result["tokens_per_second"]:,.0f} tokens/s, MFU {100 * result["mfu"]:.0f}%',
              'it does not fit' if not result['fits'] else 'it fits' if result['compiled'] else 'it may fit']
    return '\n'.join(lines)


def show_chips() -> str:
    """The table of chips: one device a row."""
    head = f'{"chip":10}{"bf16":>9}{"HBM":>9}{"usable":>9}{"HBM":>9}{"link":>9}{"DCN":>9}{"a host":>8}'
    units = f'{"":10}{"TFLOP/s":>9}{"GiB":>9}{"GiB":>9}{"GB/s":>9}{"GB/s":>9}{"GB/s":>9}{"devices":>8}'
    rows = [f'{name:10}{c.peak / 1e12:9.1f}{c.hbm / GIB:9.1f}{c.usable / GIB:9.2f}{c.bandwidth / 1e9:9.0f}'
            f'{(c.link if isinstance(c, Tpu) else c.nvlink) / 1e9:9.0f}{c.dcn / 1e9:9.2f}{c.host_devices:8}'
            for name, c in CHIPS.items()]
    return '\n'.join([head, units, *rows, 'link: one ICI link, one way; GPUs: all of NVLink, one way. '
                      'Sources: pallas_kernels/chips.py'])


# ---- the command -----------------------------------------------------------


def main(argv: list[str]) -> int:
    flag_values = _flags()
    if {'--help', '-h'} & set(argv[1:]):
        described = '\n'.join(f'--{name}={flag_values[name].default}  {flag_values[name].help}' for name in _FLAGS)
        print(f'{__doc__}\nFlags, with their defaults:\n{described}\n\nSettings, with their defaults:\n{config_lib.describe()}')
        return FITS
    if '--chips' in argv:
        print(show_chips())
        return FITS
    try:
        config = config_lib.parse_flags(argv, flag_values)
        if not flag_values.topology:
            raise ConfigError('--topology=CHIP:SHAPE is missing, e.g. --topology=v5e:16x16; --chips lists the chips')
        topology = Topology(flag_values.topology, flag_values.slices or config.mesh.slices)
        # Once more, with what the pod asks for.
        config = config_lib.parse_flags(argv + _settings_of(topology, config), _flags())
        jax.config.update('jax_platforms', 'cpu')  # nothing runs, and a TPU of this machine stays free
        if flag_values.search:
            return _search(config, topology, argv, flag_values)
        return _plan(config, topology, flag_values.json)
    except (ConfigError, NotImplementedError) as error:  # the latter: a kernel that does not serve the shape
        print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
        return WRONG_INPUT


_FLAGS = ('topology', 'slices', 'json', 'chips', 'search', 'budget_minutes')


def _flags() -> flags.FlagValues:
    flag_values = flags.FlagValues()
    flags.DEFINE_string('topology', '', 'CHIP:SHAPE, e.g. v5p:4x4x8 or h200:8.', flag_values=flag_values)
    flags.DEFINE_integer(
        'slices', 0, 'TPU slices, or GPU hosts, of that shape; 0: config.mesh.slices.', lower_bound=0, flag_values=flag_values)
    flags.DEFINE_boolean('json', False, 'Whether to print JSON.', flag_values=flag_values)
    flags.DEFINE_boolean('chips', False, 'Whether to print the table of chips.', flag_values=flag_values)
    flags.DEFINE_boolean('search', False, 'Whether to try meshes, remat and microbatches.', flag_values=flag_values)
    flags.DEFINE_float('budget_minutes', 30.0, 'Time for --search.', flag_values=flag_values)
    return flag_values


def _settings_of(topology: Topology, config: Config) -> list[str]:
    """Overrides that the pod asks for: slices, and the kernels that 'auto' would pick on it."""
    settings = {'mesh.slices': topology.slices}
    if isinstance(topology.chip, Tpu):
        # 'auto' looks at the devices of this process, which are not the pod's.
        if config.model.ssd_implementation == 'auto':
            settings['model.ssd_implementation'] = 'mosaic_tpu'
        if config.model.attention_implementation == 'auto':
            settings['model.attention_implementation'] = 'splash' if config.model.dtype == 'bfloat16' else 'xla'
    return [f'--config.{name}={value}' for name, value in settings.items()]


def _plan(config: Config, topology: Topology, as_json: bool) -> int:
    if not isinstance(topology.chip, Tpu):
        result = report(config, topology)
        print(json.dumps(result) if as_json else show(result))
        return FITS if result['fits'] else DOES_NOT_FIT
    mesh.axis_sizes(config, topology.num_devices)  # what does not divide is said before the compiler is looked for
    device_mesh = mesh.build(config, topology.devices())
    try:
        compiled = compile_step(config, device_mesh)
    except DoesNotFitError as error:
        result = report(config, topology) | dict(fits=False, message=str(error), largest=error.largest)
        print(json.dumps(result) if as_json else '\n'.join(
            [show(result), f'the compiler: {error}', 'largest temporaries:', *error.largest]))
        return DOES_NOT_FIT
    result = compiled_report(config, topology, device_mesh, compiled)
    print(json.dumps(result) if as_json else show(result))
    return FITS


def _search(config: Config, topology: Topology, argv: list[str], flag_values) -> int:
    command = [sys.executable, '-m', 'transxssm_jax.plan', *(a for a in argv[1:] if not re.match('--(search|budget|json)', a))]
    found = search.search(config, topology.chip, topology.num_devices, command, flag_values.budget_minutes, not flag_values.json)
    if flag_values.json:
        print(json.dumps(found))
    elif found:
        rows = [f'{1e3 * result["bound_seconds"]:7.0f} ms  MFU {100 * result["mfu"]:3.0f}%  {result["overrides"]}'
                for result in found]
        print('\n'.join([*reversed(rows), '', show(found[0]), '', 'the best as overrides:', found[0]['overrides']]))
    else:
        print(f'nothing that was tried in {flag_values.budget_minutes:g} minutes fits; raise --budget_minutes, or take a larger '
              '--topology')
    return FITS if found else DOES_NOT_FIT


if __name__ == '__main__':
    sys.exit(main(sys.argv))
