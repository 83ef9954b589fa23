"""Plans a pod before it is paid for: compiles the real train step for devices that are not here.

  python -m transxssm_jax.plan --config=configs/pods/1p3b_v5e_256.py --topology=v5e:16x16
  python -m transxssm_jax.plan --config=configs/1p3b.py --topology=v5p:4x4x8 --slices=2 --config.mesh.fsdp=16
  python -m transxssm_jax.plan --config=configs/1p3b.py --topology=v5e:16x16 --search --budget_minutes=30
  python -m transxssm_jax.plan --chips

TPU topologies are compiled by the real TPU compiler (pip install -e .[tpu]), no TPU needed. There is
no such compiler for GPUs without one: of `h200:8` only what is computed without compiling is printed,
and the report tells so.

Exit codes: 0 it fits; 2 wrong input, with one line; 3 it does not fit.
"""

from transxssm_jax import cli

if __name__ == '__main__':
    cli.start('transxssm_jax.plan')

import functools
import json
import sys

import jax

from pallas_kernels.chips import Tpu
from transxssm_jax import config as config_lib
from transxssm_jax.cli import ExitCode, Flag
from transxssm_jax.config import Config, ConfigError
from transxssm_jax.parallel import mesh
from transxssm_jax.planning import estimate, fitting, plan_search
from transxssm_jax.planning.report import compiled_report, refused_report, report, show, show_chips
from transxssm_jax.planning.topology import DoesNotFitError, Progress, Topology, compile_step

COMMAND = cli.Command(
    'transxssm_jax.plan',
    __doc__,
    [
        Flag('topology', '', 'CHIP:SHAPE, e.g. v5p:4x4x8 or h200:8; needed unless --chips is given.'),
        Flag('slices', 0, 'TPU slices, or GPU hosts, of that shape; 0: mesh.slices.', minimum=0, maximum=1 << 20),
        Flag('json', False, 'Whether to print JSON.'),
        Flag('chips', False, 'Whether to print the table of chips, and nothing else.'),
        Flag('search', False, 'Whether to try meshes, remat and microbatches.'),
        Flag('budget_minutes', 30.0, 'Time for --search.', minimum=0.0),
    ],
    settings=config_lib.describe,
)


def main(argv: list[str] | None = None) -> int:
    """The command; see --help. Returns its exit code."""
    return cli.run(COMMAND, _plan, argv)


def _plan(flags) -> int:
    if flags.chips:
        print(show_chips())
        return ExitCode.FINISHED
    config = config_lib.from_flags(flags)
    if not flags.topology:
        raise ConfigError('--topology=CHIP:SHAPE is missing, e.g. --topology=v5e:16x16; --chips lists the chips')
    topology = Topology(flags.topology, flags.slices or config.mesh.slices)
    config = config_lib.replace(config, {'mesh.slices': topology.slices})
    jax.config.update('jax_platforms', 'cpu')  # nothing runs, and a TPU of this machine stays free
    return _search(config, topology, flags) if flags.search else _plan_one(config, topology, flags.json)


def _plan_one(config: Config, topology: Topology, as_json: bool) -> int:
    # What does not divide is refused before the compiler is looked for.
    sizes = mesh.axis_sizes(config, topology.num_devices)
    if fitting.is_open(config):
        config = fitting.closed(
            config, sizes, topology.chip, topology.chip.usable, estimate.is_unrolled_on(config, topology.chip)
        )
        print(f'expected to fit, and taken here: {fitting.shown(config)}', file=sys.stderr, flush=True)
    if not isinstance(topology.chip, Tpu):
        result = report(config, topology)
        print(json.dumps(result) if as_json else show(result))
        return ExitCode.FINISHED if result['fits'] else ExitCode.DOES_NOT_FIT
    device_mesh = mesh.build(config, topology.devices())
    progress = Progress(functools.partial(print, file=sys.stderr, flush=True))
    try:
        result = compiled_report(config, topology, device_mesh, compile_step(config, device_mesh, progress))
    except DoesNotFitError as error:
        result = refused_report(config, topology, error)
    print(json.dumps(result) if as_json else show(result))
    return ExitCode.FINISHED if result['fits'] else ExitCode.DOES_NOT_FIT


def _search(config: Config, topology: Topology, flags) -> int:
    command = [
        *(sys.executable, '-m', 'transxssm_jax.plan', f'--config={flags.config_file}'),
        *(f'--config.{name}={value}' for name, value in flags.overrides.items()),
        *(f'--topology={flags.topology}', f'--slices={flags.slices}'),
    ]
    found = plan_search.search(
        config, topology.chip, topology.num_devices, command, flags.budget_minutes, not flags.json
    )
    if flags.json:
        print(json.dumps(found))
    elif found:
        rows = [
            f'bound {1e3 * result["bound_seconds"]:.0f} ms, expected {1e3 * result["expected_seconds"]:.0f} ms  '
            f'{result["overrides"]}'
            for result in found
        ]
        print('\n'.join([*reversed(rows), '', show(found[0]), '', 'the best as overrides:', found[0]['overrides']]))
    else:
        print(
            f'nothing that was tried in {flags.budget_minutes:g} minutes fits; raise --budget_minutes, or take a larger '
            '--topology'
        )
    return ExitCode.FINISHED if found else ExitCode.DOES_NOT_FIT
