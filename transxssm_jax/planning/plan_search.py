"""Which mesh, remat and number of microbatches serve a config best on a pod: computed first, then compiled.

Every candidate's least memory and least time are computed without the compiler. Those that fit are
compiled in the order of that time, each in a process of its own, until the time is over or no
candidate that is left can be faster than the best that was compiled. What needs more than one of the
same remat that did not fit is passed over.
"""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
import time

from tqdm import tqdm

from pallas_kernels.chips import Chip, Tpu
from transxssm_jax import config as config_lib
from transxssm_jax.config import Config
from transxssm_jax.planning import roofline

REMAT = ('none', 'dots', 'hybrid', 'full')
LANES = 128  # of a TPU's tile; narrower pieces of a matrix are not gathered but summed, at twice the bytes


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings by dotted name; the least seconds a step with them can take, and the least bytes a device needs."""

    settings: dict[str, int | str]
    seconds: float
    memory: float

    @property
    def overrides(self) -> str:
        return ' '.join(f'--config.{name}={value}' for name, value in self.settings.items())


def candidates(config: Config, chip: Chip, num_devices: int) -> list[Candidate]:
    """Settings that divide what they must and may fit by their least memory, the fastest by their least time first."""
    found = []
    for sizes in _meshes(config, chip, num_devices):
        shards = sizes['data'] * sizes['fsdp']
        for microbatches in (2**i for i in range(int(math.log2(config.data.global_batch)) + 1)):
            if config.data.global_batch % (microbatches * shards):
                break
            for remat in REMAT:
                tried = _with(config, remat, microbatches)
                memory = sum(roofline.least_memory(tried, sizes).values())
                if memory > chip.usable:
                    continue
                settings = {f'mesh.{name}': size for name, size in sizes.items()}
                settings |= {'model.remat': remat, 'train.accumulation_steps': microbatches}
                found.append(Candidate(settings, _least_seconds(tried, chip, sizes), memory))
    # Of equals the one with less to wait for: fewer microbatches, then less split within layers.
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


def _least_seconds(config: Config, chip: Chip, sizes: dict[str, int]) -> float:
    tokens = config.tokens_per_step / math.prod(sizes.values())
    compute = tokens * roofline.executed_flops_per_token(config, sizes) / chip.peak
    hbm = roofline.least_hbm_bytes(config, sizes) / chip.bandwidth
    return max(compute, hbm, sum(roofline.least_wire_bytes(config, sizes).values()) / roofline.all_links(chip))


def search(
    config: Config, chip: Chip, num_devices: int, command: list[str], budget_minutes: float, progress: bool
) -> list[dict]:
    """Compiles candidates, the most promising first.

    Args:
      command: argv of the plan of the config, to which a candidate's settings are added.
      progress: whether to show a bar.

    Returns:
      What `plan --json` said of each that fits, with 'overrides', the fastest first.
    """
    started, fitting = time.perf_counter(), []
    too_much = dict.fromkeys(REMAT, math.inf)  # least memory of what did not fit
    tried = candidates(config, chip, num_devices)
    bar = tqdm(tried, disable=not progress, unit='plan', file=sys.stderr)
    for candidate in bar:
        left = 60 * budget_minutes - (time.perf_counter() - started)
        best = fitting[0]['bound_seconds'] if fitting else math.inf
        if left <= 0 or candidate.seconds >= best:
            break
        remat = candidate.settings['model.remat']
        if candidate.memory >= too_much[remat]:
            continue
        try:
            run = subprocess.run(
                [*command, *candidate.overrides.split(), '--json'], capture_output=True, text=True, timeout=left
            )
        except subprocess.TimeoutExpired:
            break
        if run.returncode == 0:
            result = json.loads(run.stdout.splitlines()[-1])
            fitting.append(result | {'overrides': candidate.overrides})
            fitting.sort(key=lambda result: result['bound_seconds'])
        elif run.returncode == 3:
            too_much[remat] = candidate.memory
        else:
            said = run.stderr.strip().splitlines() or ['no reason given']
            bar.write(f'{candidate.overrides}: {said[-1]}', file=sys.stderr)
        if fitting:
            bar.set_postfix_str(
                f'best {1e3 * fitting[0]["bound_seconds"]:.0f} ms, MFU {100 * fitting[0]["mfu"]:.0f}% at most'
            )
    bar.close()
    return fitting
