"""What the TPU compiler's dumps show of a program, on any machine: cycles, units, spills, VMEM and HBM bytes.

  profile = tpu_profile.profile('v5p', 'package.module:case', *arguments)

`case(*arguments)` returns (f, args): a function and a tuple of pytrees of jax.ShapeDtypeStruct.
f is compiled for one device of that TPU in a process of its own, because libtpu reads
LIBTPU_INIT_ARGS once. Needs libtpu (pip install jax[tpu]), no TPU.

The compiler dumps every kernel, that is every op of the scheduled HLO that runs on the core, as
VLIW bundles, and for each bundle how many of each unit's slots are busy. Two dumps are read,
both from before the delay converter: there one bundle is one cycle. In the final bundles the
empty ones that wait for a result are gone, although the hardware waits all the same.

A busy MXU slot is one MXU at work for one cycle, and a matmul that fills its array
counts FLOPs / (peak FLOPs of one MXU and cycle): tests/test_tpu_profile.py holds that against
matmuls of known work. Pushing weights does not count. Waiting for DMA and bank conflicts show
nowhere, so cycles bound the time from below; but branches count as taken (`pl.when`), and loops
inside whose trips are not constant as one.
"""

import importlib
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import typing

import jax
import numpy as np

from pallas_kernels import hlo
from pallas_kernels.chips import COMPILE_ONLY, TPUS, Tpu

UNITS = ('MXU', 'XLU', 'VALU', 'VPOP', 'EUP', 'VLOAD', 'VLOAD:FILL', 'VSTORE', 'VSTORE:SPILL', 'SALU')
DELAY_SLOTS = 4  # bundles after a branch that still belong to it


# --- compiling ----------------------------------------------------------------------------------


def profile(chip: str, case: str, *arguments, keep: str = '') -> 'Profile':
    """Compiles `case(*arguments)` ('module:function', arguments of JSON) for `chip` and reads the dumps.

    keep: a directory for dumps and HLO, to look into; '' for a temporary one.

    Raises:
      RuntimeError: the compiler refused, with its message.
    """
    with tempfile.TemporaryDirectory() as temporary:
        directory = pathlib.Path(keep or temporary)
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise ValueError(f'keep={keep!r} must be empty: the dumps of two programs would mix')
        flags = {
            'xla_jf_dump_to': directory,
            'xla_jf_dump_llo_text': 'true',
            'xla_jf_emit_annotations': 'true',
            # Without it every pass of every kernel is written, gigabytes for the XLA scan.
            'xla_jf_dump_llo_pass_label_regex': 'packed-bundles-post-ra.*|pre-delay.*|deduplication-map.*',
        }
        environment = {
            **os.environ,
            **COMPILE_ONLY,
            'JAX_PLATFORMS': 'cpu',
            'PYTHONPATH': os.pathsep.join(sys.path),
            'LIBTPU_INIT_ARGS': ' '.join(f'--{name}={value}' for name, value in flags.items()),
        }
        command = [
            sys.executable,
            '-m',
            'pallas_kernels.tpu_profile',
            chip,
            str(directory),
            case,
            json.dumps(arguments),
        ]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode:
            errors = re.findall(r'^[\w.]+(?:Error|Exception): .*(?:\n\S.*){0,2}', run.stderr, re.MULTILINE)
            reason = ' '.join((errors or ['no reason given'])[-1].split())
            raise RuntimeError(f'{case}{arguments} does not compile for {chip}: {reason}\n{run.stderr[-4000:]}')
        return read(TPUS[chip], directory)


def compile_here(chip, directory, case, arguments):
    """What the child process does: writes hlo.txt and pallas.json beside the compiler's dumps."""
    from jax.experimental import topologies

    module, name = case.split(':')
    devices = topologies.get_topology_desc(
        platform='tpu', topology_name=TPUS[chip].topology, chip_config_name=TPUS[chip].arrangement
    ).devices
    mesh = jax.sharding.Mesh(np.array(devices)[:1], ('device',))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    # pltpu.get_tpu_info() reads from the mesh which TPU this is for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        f, args = getattr(importlib.import_module(module), name)(*arguments)
        args = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), args)
        traced = jax.jit(f).trace(*args)
    compiled = traced.lower(lowering_platforms=('tpu',)).compile()
    directory = pathlib.Path(directory)
    (directory / 'pallas.json').write_text(json.dumps(hlo.pallas_grids(traced.jaxpr.jaxpr)))
    (directory / 'hlo.txt').write_text(compiled.as_text())


# --- bundles ------------------------------------------------------------------------------------


class Loop(typing.NamedTuple):
    first: int  # bundle
    end: int  # bundle after the last
    trips: int  # 0: not known


class Code(typing.NamedTuple):
    """One kernel's bundles. slots [bundles, UNITS] busy, capacity [UNITS]."""

    slots: np.ndarray
    capacity: np.ndarray
    loops: list[Loop]  # outer before inner
    rare: tuple[tuple[int, int], ...] = ()  # bundles under a branch within a kernel's body, as `pl.when` makes them

    @property
    def outer(self) -> list[Loop]:
        return [a for a in self.loops if not any(b != a and b.first <= a.first and a.end <= b.end for b in self.loops)]

    def work(self, first: int, end: int) -> np.ndarray:
        """[1 + UNITS] cycles and busy slots of these bundles, loops inside multiplied by their trips.

        Bundles under a branch of a kernel's body count nothing: the code does not tell how often it is
        taken, and such branches are for first and last steps.
        """
        times = np.ones(len(self.slots))
        for start, stop in self.rare:
            times[start:stop] = 0
        for loop in self.loops:
            if first <= loop.first and loop.end <= end and (loop.first, loop.end) != (first, end):
                times[loop.first : loop.end] *= max(loop.trips, 1)
        return np.concatenate([times[first:end, None], times[first:end, None] * self.slots[first:end]], axis=1).sum(0)


_BUNDLE = re.compile(r'^ *(0x[0-9a-f]+|0) +(?:[A-Z]{2})? *: ?[> ]*\{')
_BRANCH = re.compile(r'sbr\.rel \(!?%(\w+)\) target bundleno = (\d+)')


def parse_code(bundles: str, utilization: str) -> Code:
    """From the texts of `*-packed-bundles-post-ra.txt` and `*-pre-delay_hlo-static-per-bundle-utilization.txt`.

    A loop whose trips are not constant counts as one.
    """
    texts = []
    for line in bundles.splitlines():
        if match := _BUNDLE.match(line):
            if int(match[1], 16) != len(texts):
                raise ValueError(f'bundle {match[1]} stands where {len(texts):#x} should')
            texts.append(line)
        elif texts:
            texts[-1] += line
    head, _, table = utilization.partition('== UTILIZATION:\n')
    names, capacity = head.splitlines()[1:3]
    if tuple(name.strip() for name in names.split(',')) != UNITS:
        raise ValueError(f'the dump names the units {names!r}, not {UNITS}')
    slots = np.array([line.split() for line in table.splitlines()], int).reshape(-1, len(UNITS))
    if len(slots) != len(texts):
        raise ValueError(f'{len(texts)} bundles but {len(slots)} rows of utilization')
    loops, skips = [], []
    for i, text in enumerate(texts):
        for predicate, target in _BRANCH.findall(text):
            if int(target) > i + 1 + DELAY_SLOTS:
                skips.append((i + 1 + DELAY_SLOTS, int(target)))
            if int(target) <= i:
                end = min(i + 1 + DELAY_SLOTS, len(texts))
                loops.append(Loop(int(target), end, _trips(predicate, texts, int(target), end)))
    loops.sort(key=lambda loop: (loop.first, -loop.end))
    rare = []
    for loop in loops:
        inside = [skip for skip in skips if loop.first <= skip[0] and skip[1] <= loop.end]
        # The longest is the kernel's body, which the pipeline's first and last turns skip.
        body = max(inside, key=lambda skip: skip[1] - skip[0], default=None)
        rare += [skip for skip in inside if skip != body and body[0] <= skip[0] and skip[1] <= body[1]]
    return Code(slots, np.array(capacity.split(), int), loops, tuple(rare))


def _trips(predicate, texts, first, end):
    """Of a loop that counts by a constant between constants; 0 for others."""
    body = '\n'.join(texts[first:end])
    test = re.search(rf'%{predicate} = scmp\.ge[\w.]* %(\w+), (\d+) /\* loop exit test', body)
    step = test and re.search(rf'%{test[1]} = sadd\.s32 (\d+), ', body)
    if not step:
        return 0
    # The counter is a phi of where it begins and what the test looks at; most begin at 0.
    begin = re.search(rf'= sphi %(\w+), %{test[1]}\b', body)
    begin = begin and re.search(rf'%{begin[1]} = smov (?:\(\S+\), )?(\d+)', '\n'.join(texts[:first]))
    return math.ceil((int(test[2]) - int(begin[1] if begin else 0)) / int(step[1]))


# --- the whole program --------------------------------------------------------------------------


class Kernel(typing.NamedTuple):
    """One op of the scheduled program. Cycles are those of one core."""

    name: str
    cycles: float  # all runs of it
    mxu: float  # busy MXU-cycles in them
    step_cycles: float  # one step of the longest outer loop, loops inside it included
    steps: int  # of that loop on one core, without the steps that only fill the pipeline
    busy: dict[str, float]  # unit -> busy share of its slots in that step
    spills: int  # instructions that store a vector register for want of room
    fills: int  # instructions that load it again
    vmem: int  # scoped VMEM, bytes
    hbm: float  # bytes, all runs and cores


class Profile(typing.NamedTuple):
    chip: Tpu
    kernels: list[Kernel]

    def seconds(self, kernel: Kernel) -> float:
        """Lower bound of a kernel: its cycles or its HBM traffic, the longer."""
        return max(kernel.cycles / self.chip.clock, kernel.hbm / self.chip.bandwidth)

    @property
    def hbm(self) -> float:
        return sum(kernel.hbm for kernel in self.kernels)

    @property
    def total_seconds(self) -> float:
        """Lower bound of the program: kernels one after the other, transfers beside them."""
        busy = sum(self.seconds(kernel) for kernel in self.kernels if kernel.cycles)
        return max(busy, self.hbm / self.chip.bandwidth)

    @property
    def mxu_share(self) -> float:
        """Busy MXU-cycles over all cycles of the core, waiting for HBM left out."""
        return sum(k.mxu for k in self.kernels) / (self.chip.mxus * sum(k.cycles for k in self.kernels))


def read(chip: Tpu, directory: pathlib.Path) -> Profile:
    """From the directory that `profile` filled."""
    computations = hlo.parse((directory / 'hlo.txt').read_text())
    grids = json.loads((directory / 'pallas.json').read_text())
    dumps, twins = {}, {}
    for path in directory.glob('*.txt'):
        # Names are TIME-KERNEL-NUMBER-PASS.txt.
        if match := re.fullmatch(
            r'\d+-(.*)-\d+-(packed-bundles-post-ra|pre-delay_hlo-static-per-bundle-utilization)', path.stem
        ):
            dumps.setdefault(match[1], {})[match[2][:3]] = path
        elif path.stem.endswith('-deduplication-map'):
            # Ops of the same code have one dump.
            for name, same in re.findall(r'key:(\S+)\nordinal.*\nequiv.*\n((?:  \S+\n?)*)', path.read_text()):
                twins.update(dict.fromkeys(same.split(), name))
    codes = {name: (files['pac'], files['pre']) for name, files in dumps.items()}

    kernels = []
    for _, ops, runs in hlo.executed(computations):
        shapes = {op.name: op.shape for op in ops}
        for op in ops:
            grid = hlo.grid_of(op, grids)
            if op.custom_call == 'tpu_custom_call' and grid is None:
                raise ValueError(
                    f'{op.name} is the kernel of no pallas_call of the traced function: {", ".join(grids)}'
                )
            hbm = runs * hlo.op_bytes(op, shapes, computations, grid)
            if paths := codes.get(twins.get(op.name, op.name)):
                code = parse_code(*(path.read_text() for path in paths))
                kernels.append(_kernel(chip, op, runs, code, grid, hbm))
            elif op.opcode == 'fusion' or grid:
                raise ValueError(f'no dump holds the code of {op.name}: does this libtpu name its dumps otherwise?')
            elif hbm:  # a transfer beside the core
                kernels.append(Kernel(op.name, 0.0, 0.0, 0.0, 0, dict.fromkeys(UNITS, 0.0), 0, 0, 0, hbm))
    return Profile(chip, kernels)


def _kernel(chip, op, runs, code, grid, hbm):
    steps = grid['steps'] if grid else 1
    if bounds := re.search(r'"iteration_bounds":\[([\d",]*)\]', op.attributes):
        steps = math.prod(map(int, re.findall(r'\d+', bounds[1])))
    total = step = code.work(0, len(code.slots))
    trips = 1
    if outer := code.outer:
        main = max(outer, key=lambda loop: code.work(loop.first, loop.end)[0] * max(loop.trips, 1))
        step, trips = code.work(main.first, main.end), max(main.trips, 1)
        if steps > 1:
            # The loop's own trips count the pipeline's filling, and the share of one core.
            trips = steps if main.trips >= steps else math.ceil(steps / chip.cores)
        total = total + (trips - max(main.trips, 1)) * step
    scoped = op.attributes.partition('"used_scoped_memory_configs"')[2].partition(']')[0]
    vmem = sum(map(int, re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', scoped)))
    spills, fills = (int(code.slots[:, UNITS.index(unit)].sum()) for unit in ('VSTORE:SPILL', 'VLOAD:FILL'))
    busy = dict(zip(UNITS, (step[1:] / (code.capacity * step[0])).tolist()))
    mxu = total[1 + UNITS.index('MXU')]
    return Kernel(op.name, runs * total[0], runs * mxu, step[0], trips, busy, spills, fills, vmem, hbm)


if __name__ == '__main__':
    compile_here(sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
