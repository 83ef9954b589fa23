"""What a step is expected to take, beside its lower bounds: the roofline's work at measured efficiencies, and its memory.

The efficiencies were measured on Hopper (H100, H200) on 2026-11-26, in bfloat16. With them the estimate is within 6% of
these measured steps: with the layers unrolled, on an H100, 1.3B with remat 'matmuls' in 2 and 8 microbatches of 4 x 4096
(551 and 2,147 ms), the Transformer of the same sizes (634) and 320M in 2 of 16 x 2048 (325); in a scan, 1.3B with 8 x 4096 and
remat 'hybrid' (632 ms on an H200, 677 on an H100) and 'dots' (588), the Transformer (690), and 320M (385). Over tensor=2
and 4 it is within 6% too (16 x 4096, 'none', 621 ms; 32 x 4096, 'matmuls', 768; H100, 2026-11-28). The expected memory is that of
1.3B: in a scan the temporaries of 8 x 4096 tokens with 'hybrid' and 'dots', and of 1 x 65,536 with 'hybrid' (52, 68,
97 GB), as measured; unrolled those that XLA's GPU compiler counts (8 x 4096: 'hybrid' 28, 'matmuls' 50, 'none' 64; 1 x 65,536:
'hybrid' 48, 'full' 19; over tensor=4 32 x 4096: 'matmuls' 45, 'none' 80, and 8 x 4096: 'matmuls' 12), within 10% of a step's
whole memory. On TPUs it is that of the compiled steps of configs/pods, unrolled and in a scan, within 7%.
tests/test_plan.py holds all to these figures.
"""

from pallas_kernels.chips import Chip, Tpu
from transxssm_jax.config import Config
from transxssm_jax.model import costs
from transxssm_jax.model.language_model import is_unrolled
from transxssm_jax.parallel import collectives
from transxssm_jax.planning import roofline

MATMUL_EFFICIENCY = 0.75  # share of the peak: 740 of 989 TFLOP/s
# HBM traffic beside matmuls and kernels (elementwise work, reductions, the layer loop's slices), over the least.
HBM_FACTOR_SCAN, HBM_FACTOR_UNROLLED = 4.1, 2.3
# Share of the links' speed. Nothing is taken to overlap (with that fsdp loses 4%, measured 2%), but over tensor on GPUs,
# where one half of the rows is worked on while the other is sent: of 470 ms of sending a step, 4 H100 wait for 153, and
# what runs beside it takes 66 longer.
NETWORK_EFFICIENCY, WAITED_FOR_HALVES = 0.5, 0.5
# The backward pass's working set, in layers' worth of activations, by platform: of a scan, as GPUs ran it and as the TPU
# compiler plans it, and of unrolled layers, as both compilers plan them.
WORKING_LAYERS_SCAN, WORKING_LAYERS_UNROLLED = dict(gpu=15, tpu=5), dict(gpu=3, tpu=1)


def source(chip: Chip) -> str:
    """Where the estimate's efficiencies come from, for a reader of it."""
    if isinstance(chip, Tpu):
        return "Hopper's efficiencies; no step has been measured on a TPU"
    return 'efficiencies measured on H100 and H200'


def expected_seconds(
    config: Config, sizes: dict[str, int], chip: Chip, network_seconds: float, compiled_hbm_bytes: float = 0.0
) -> dict[str, float]:
    """Seconds that a step is expected to spend on matmuls, kernels, the rest of HBM traffic and the network; they add up.

    Args:
      config: settings.
      sizes: devices along each mesh axis.
      chip: of the devices.
      network_seconds: least seconds that the links are busy.
      compiled_hbm_bytes: what a compiled step reads and writes; 0 where it has not been compiled.
    """
    tokens = roofline.tokens_per_device(config, sizes) / sizes['tensor']
    work = {name: tokens * flops / chip.peak for name, flops in roofline.executed_flops_by_unit(config, sizes).items()}
    kernels = sum(work[kind] / layer.kernel_efficiency for kind, _, layer in costs.layer_costs(config.model))
    factor = HBM_FACTOR_UNROLLED if is_unrolled_on(config, chip) else HBM_FACTOR_SCAN
    hbm_bytes = compiled_hbm_bytes or factor * roofline.min_hbm_bytes(config, sizes)
    waited_for = WAITED_FOR_HALVES if _platform(chip) == 'gpu' and _in_halves(config, sizes, chip) else 1.0
    return {
        'matmuls': work['matmul'] / MATMUL_EFFICIENCY,
        'kernels': kernels,
        'other HBM traffic': hbm_bytes / chip.bandwidth,
        'network': waited_for * network_seconds / NETWORK_EFFICIENCY,
    }


def expected_memory_bytes(config: Config, sizes: dict[str, int], chip: Chip) -> float:
    """Bytes that a device is expected to need: the least, and the working set of the backward pass."""
    model, least = config.model, roofline.min_memory_bytes(config, sizes)
    tokens = roofline.tokens_per_device(config, sizes) // config.train.num_microbatches
    layer = costs.dtype_bytes(model) * (5 * model.d_model + 3 * model.d_mlp / sizes['tensor']) * tokens
    if is_unrolled_on(config, chip):
        layers = WORKING_LAYERS_UNROLLED[_platform(chip)] / (2 if _in_halves(config, sizes, chip) else 1)
    else:
        layers = WORKING_LAYERS_SCAN[_platform(chip)]
    needed = sum(least.values()) + layers * layer
    # The sum over microbatches is a loop's carry, beside the gradient of the microbatch that is under way.
    return needed + (2 * least['gradients'] if config.train.num_microbatches > 1 else 0.0)


def _in_halves(config: Config, sizes: dict[str, int], chip: Chip) -> bool:
    """Whether one half of the rows of a microbatch is worked on while the other is sent over tensor."""
    length = config.data.seq_len // sizes['context']
    rows = roofline.tokens_per_device(config, sizes) // config.train.num_microbatches // length
    overlaps = is_unrolled_on(config, chip) and sizes['tensor'] > 1
    return overlaps and collectives.num_parts_of_rows(rows, length, sizes['tensor']) == 2


def is_unrolled_on(config: Config, chip: Chip) -> bool:
    """Whether the layers of a config are unrolled there."""
    return is_unrolled(config.model, _platform(chip))


def _platform(chip: Chip) -> str:
    return 'tpu' if isinstance(chip, Tpu) else 'gpu'
