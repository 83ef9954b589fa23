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

import functools
import json
import re
import sys

import jax
from absl import flags

from pallas_kernels.chips import Tpu
from transxssm_jax import config as config_lib
from transxssm_jax.config import Config, ConfigError
from transxssm_jax.parallel import mesh
from transxssm_jax.planning import plan_search
from transxssm_jax.planning.report import compiled_report, refused_report, report, show, show_chips
from transxssm_jax.planning.topology import DoesNotFitError, Progress, Topology, compile_step

FITS, WRONG_INPUT, DOES_NOT_FIT = 0, 2, 3


def main(argv: list[str]) -> int:
    flag_values = _flags()
    if {'--help', '-h'} & set(argv[1:]):
        described = '\n'.join(f'--{name}={flag_values[name].default}  {flag_values[name].help}' for name in _FLAGS)
        print(
            f'{__doc__}\nFlags, with their defaults:\n{described}\n\nSettings, with their defaults:\n{config_lib.describe()}'
        )
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
        'slices',
        0,
        'TPU slices, or GPU hosts, of that shape; 0: config.mesh.slices.',
        lower_bound=0,
        flag_values=flag_values,
    )
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
    mesh.axis_sizes(config, topology.num_devices)  # what does not divide is refused before the compiler is looked for
    device_mesh = mesh.build(config, topology.devices())
    progress = Progress(functools.partial(print, file=sys.stderr, flush=True))
    try:
        result = compiled_report(config, topology, device_mesh, compile_step(config, device_mesh, progress))
    except DoesNotFitError as error:
        result = refused_report(config, topology, error)
    print(json.dumps(result) if as_json else show(result))
    return FITS if result['fits'] else DOES_NOT_FIT


def _search(config: Config, topology: Topology, argv: list[str], flag_values) -> int:
    command = [
        sys.executable,
        '-m',
        'transxssm_jax.plan',
        *(a for a in argv[1:] if not re.match('--(search|budget|json)', a)),
    ]
    found = plan_search.search(
        config, topology.chip, topology.num_devices, command, flag_values.budget_minutes, not flag_values.json
    )
    if flag_values.json:
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
            f'nothing that was tried in {flag_values.budget_minutes:g} minutes fits; raise --budget_minutes, or take a larger '
            '--topology'
        )
    return FITS if found else DOES_NOT_FIT


if __name__ == '__main__':
    sys.exit(main(sys.argv))
