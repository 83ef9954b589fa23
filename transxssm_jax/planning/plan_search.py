"""Which mesh, remat and number of microbatches serve a config best on a pod: computed first, then compiled.

Every candidate's least memory and least time are computed without the compiler. Those that fit are
compiled in the order of that time, each in a process of its own, until the time is over or no
candidate that is left can be faster than the best that was compiled. A candidate that needs more
memory than another of the same remat that did not fit is passed over.

`nearest_that_fits` changes as few settings as it can of a config that does not fit.
"""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from pallas_kernels.chips import Chip, Tpu
from transxssm_jax import children
from transxssm_jax import config as config_lib
from transxssm_jax.config import Config
from transxssm_jax.model.costs import REMAT
from transxssm_jax.planning import estimate, roofline

LANES = 128  # of a TPU's tile; narrower shards of a matrix are not gathered but summed, at twice the bytes


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings by dotted name, with the seconds of a step and the bytes that a device needs: the least, or the expected."""

    settings: dict[str, int | str]
    seconds: float
    memory: float

    @property
    def overrides(self) -> str:
        return ' '.join(f'--config.{name}={value}' for name, value in self.settings.items())


def candidates(config: Config, chip: Chip, num_devices: int) -> list[Candidate]:
    """Settings that divide what they must and may fit by their least memory, the fastest by their least time first."""
    found = []
    for tried, sizes in _variants(config, _meshes(config, chip, num_devices)):
        memory = sum(roofline.min_memory_bytes(tried, sizes).values())
        if memory <= chip.usable:
            found.append(Candidate(_settings(tried, sizes), _min_seconds(tried, chip, sizes), memory))
    # Of equals the one with less to wait for: fewer microbatches, then less sharding within layers.
    return sorted(
        found,
        key=lambda c: (
            c.seconds,
            c.settings['train.accumulation_steps'],
            c.settings['mesh.tensor'],
            c.settings['mesh.context'],
            c.settings['mesh.fsdp'],
        ),
    )


def nearest_that_fits(
    config: Config,
    chip: Chip,
    sizes: dict[str, int],
    needs: Callable[[Config, dict[str, int]], float],
) -> Candidate | None:
    """The setting that fits and is nearest to a config that does not: by remat, by the number of microbatches, and by
    moving devices from data to fsdp.

    Args:
      config: does not fit.
      chip: of the devices.
      sizes: devices along each mesh axis under config.
      needs: (config, mesh sizes) -> bytes that a device needs.

    Returns:
      The settings that differ, with the expected seconds of a step and the memory that a device needs; of those with the
      fewest differences the one that is expected to be fastest. None where nothing fits.
    """
    num_devices, best = math.prod(sizes.values()), None
    meshes = [
        m for m in _meshes(config, chip, num_devices) if all(m[axis] == sizes[axis] for axis in ('context', 'tensor'))
    ]
    own = _settings(config, sizes)
    for tried, tried_sizes in _variants(config, meshes):
        memory = needs(tried, tried_sizes)
        if memory > chip.usable:
            continue
        changed = {name: value for name, value in _settings(tried, tried_sizes).items() if value != own[name]}
        network = sum(roofline.min_comm_bytes(tried, tried_sizes).values()) / roofline.all_links(chip)
        seconds = sum(estimate.expected_seconds(tried, tried_sizes, chip, network).values())
        # data and fsdp change together.
        rank = (len(changed) - ('mesh.fsdp' in changed), seconds)
        if best is None or rank < best[0]:
            best = rank, Candidate(changed, seconds, memory)
    return best[1] if best else None


def _variants(config: Config, meshes):
    """(config, mesh sizes) of every mesh, number of microbatches and remat policy that the batch divides by."""
    counts = [2**i for i in range(int(math.log2(config.data.global_batch)) + 1)]
    configs = {microbatches: [_with(config, remat, microbatches) for remat in REMAT] for microbatches in counts}
    for sizes in meshes:
        shards = sizes['data'] * sizes['fsdp']
        for microbatches in counts:
            if config.data.global_batch % (microbatches * shards):
                break
            for tried in configs[microbatches]:
                yield tried, sizes


def _settings(config: Config, sizes: dict[str, int]) -> dict[str, int | str]:
    return {f'mesh.{name}': size for name, size in sizes.items()} | {
        'model.remat': config.model.remat,
        'train.accumulation_steps': config.train.num_microbatches,
    }


def _meshes(config: Config, chip: Chip, num_devices: int):
    """Sizes of every mesh of num_devices that the model and the batch divide by."""
    model, slices = config.model, config.mesh.slices
    narrowest = LANES if isinstance(chip, Tpu) and model.d_model >= LANES else 1
    shared = math.gcd(math.gcd(model.num_kv_heads, model.num_ssd_groups), math.gcd(model.d_mlp, model.vocab_size))
    for fsdp, context, tensor in itertools.product(_divisors(num_devices), repeat=3):
        data = num_devices // (fsdp * context * tensor)
        if data * fsdp * context * tensor != num_devices or (data * fsdp) % slices or data % math.gcd(data, slices):
            continue
        if model.d_model % fsdp or (fsdp > 1 and model.d_model // fsdp % narrowest) or shared % tensor:
            continue
        if config.data.seq_len % context or config.data.global_batch % (data * fsdp):
            continue
        yield dict(data=data, fsdp=fsdp, context=context, tensor=tensor)


def _divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


def _with(config: Config, remat: str, microbatches: int) -> Config:
    return config_lib.replace(config, {'model.remat': remat, 'train.accumulation_steps': microbatches})


def _min_seconds(config: Config, chip: Chip, sizes: dict[str, int]) -> float:
    tokens = config.tokens_per_step / math.prod(sizes.values())
    compute = tokens * roofline.executed_flops_per_token(config, sizes) / chip.peak
    hbm = roofline.min_hbm_bytes(config, sizes) / chip.bandwidth
    return max(compute, hbm, sum(roofline.min_comm_bytes(config, sizes).values()) / roofline.all_links(chip))


def search(
    config: Config, chip: Chip, num_devices: int, command: list[str], budget_minutes: float, progress: bool
) -> list[dict]:
    """Compiles candidates, the most promising first.

    Args:
      config: settings to vary.
      chip: of the devices.
      num_devices: of the pod.
      command: argv of the plan of the config, to which a candidate's settings are added.
      budget_minutes: no candidate is compiled after them.
      progress: whether to show a bar.

    Returns:
      What `plan --json` printed for each that fits, with 'overrides', the fastest first.
    """
    started, fitting = time.perf_counter(), []
    too_much = dict.fromkeys(REMAT, math.inf)  # least memory of what did not fit
    tried = candidates(config, chip, num_devices)
    bar = tqdm(tried, disable=None if progress else True, unit='plan', file=sys.stderr)
    for candidate in bar:
        left = 60 * budget_minutes - (time.perf_counter() - started)
        best = fitting[0]['bound_seconds'] if fitting else math.inf
        if left <= 0 or candidate.seconds >= best:
            break
        remat = candidate.settings['model.remat']
        if candidate.memory >= too_much[remat]:
            continue
        try:
            run = children.run([*command, *candidate.overrides.split(), '--json'], timeout=left)
        except subprocess.TimeoutExpired:
            break
        if run.returncode == 0:
            result = json.loads(run.stdout.splitlines()[-1])
            fitting.append(result | {'overrides': candidate.overrides})
            fitting.sort(key=lambda result: result['bound_seconds'])
        elif run.returncode == 3:
            too_much[remat] = candidate.memory
        else:
            reported = run.stderr.strip().splitlines() or ['no reason given']
            bar.write(f'{candidate.overrides}: {reported[-1]}', file=sys.stderr)
        if fitting:
            bar.set_postfix_str(
                f'best bound {1e3 * fitting[0]["bound_seconds"]:.0f} ms, MFU below {100 * fitting[0]["bound_mfu"]:.0f}%'
            )
    bar.close()
    return fitting
