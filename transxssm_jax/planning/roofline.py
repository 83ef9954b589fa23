"""What a step must do at least: bytes between devices, memory, operations, and the time they take.

Shape legend: B rows, L tokens a row, D model, F mlp, H heads, G groups, K attention head width,
P state-space head width, N state, V vocabulary; those of one device unless a name says otherwise.
"""

import dataclasses
import functools
import math

import jax
import numpy as np

from pallas_kernels.chips import Chip, Tpu
from transxssm_jax.config import Config, Model
from transxssm_jax.model import costs, parameters
from transxssm_jax.parallel import mesh

STATE_EVERY = 128  # tokens between the scan's states that are kept for its backward pass
WIRE, MASTER = 2, 4  # bytes of an element that travels (bfloat16), and of a float32 one


def _leaves(config: Config, sizes: dict[str, int]):
    """(elements of all devices, mesh axes that split it) of every parameter."""
    for elements, split in _parameters(*dataclasses.astuple(config.model)):
        yield elements, {axis for axis in split if sizes[axis] > 1}


@functools.cache
def _parameters(*settings):
    """[(elements, mesh axes that may split it), ...] of a model of these settings; a search asks for them very often."""
    model = Model(*settings)
    shapes = jax.tree.leaves(jax.eval_shape(lambda: parameters.init_params(model, 0)))
    axes = jax.tree.leaves(parameters.param_axes(model), is_leaf=lambda node: isinstance(node, tuple))
    return [
        (shape.size, {axis for name in logical for axis in mesh.RULES.get(name, ())})
        for shape, logical in zip(shapes, axes, strict=True)
    ]


def tokens_of_a_device(config: Config, sizes: dict[str, int]) -> int:
    """Tokens of a step, over all its microbatches."""
    return config.tokens_per_step // (sizes['data'] * sizes['fsdp'] * sizes['context'])


def least_wire_bytes(config: Config, sizes: dict[str, int]) -> dict[str, float]:
    """Least bytes a device sends a step, by what they are for, given how the mesh splits the model.

    parameters: matrices split over fsdp are gathered for the forward and for the backward pass, in
    bfloat16, each microbatch. gradients: scattered sums over fsdp, and sums over the other axes that
    split the batch, once a step; with one microbatch and fsdp alone these two are 3 x parameters.
    activations: tensor's sums, two forward and two backward a layer, one each for embedding and head.
    states: one state a state-space layer goes ceil(log2(shards)) times each way. keys_values: K and V
    of every other shard forward and backward in bfloat16, and the sums of their gradients in float32.
    """
    model, microbatches = config.model, config.train.accumulation_steps
    f, c, t = sizes['fsdp'], sizes['context'], sizes['tensor']
    others = sizes['data'] * c
    parameters = gradients = 0.0
    for size, split in _leaves(config, sizes):
        if 'tensor' in split:
            size /= t
        if 'fsdp' in split:
            parameters += 2 * microbatches * WIRE * size * (f - 1) / f
            gradients += WIRE * size * (f - 1) / f + 2 * WIRE * size / f * (others - 1) / others
        else:
            gradients += 2 * WIRE * size * (others * f - 1) / (others * f)
    tokens = tokens_of_a_device(config, sizes)
    activations = (4 * model.num_layers + 2) * 2 * WIRE * tokens * model.d_model * (t - 1) / t
    rows = tokens * c / config.data.seq_len
    modules = model.num_layers // len(model.layer_pattern)
    state = model.num_heads / t * model.head_dim * model.d_state * MASTER
    states = 2 * rows * modules * model.layer_pattern.count('ssd') * state * math.ceil(math.log2(c))
    kv = 2 * tokens * model.num_kv_heads / t * model.head_dim
    keys_values = (2 * WIRE + MASTER) * modules * model.layer_pattern.count('attention') * (c - 1) * kv
    return dict(
        parameters=parameters, gradients=gradients, activations=activations, states=states, keys_values=keys_values
    )


def least_dcn_bytes(config: Config, sizes: dict[str, int]) -> float:
    """Least bytes a device sends to other slices a step: what is left of the gradients after fsdp's sums, summed over slices."""
    slices = config.mesh.slices
    return 2 * WIRE * parameters_of_a_device(config, sizes) * (slices - 1) / slices


# ---- operations ------------------------------------------------------------


def executed_flops_per_token(config: Config, sizes: dict[str, int]) -> float:
    """Forward, backward and what remat and the context axis do again."""
    model, seq_len = config.model, config.data.seq_len
    modules = model.num_layers // len(model.layer_pattern)
    D, F = model.d_model, model.d_mlp
    mixers = sum(costs.mixer_flops_per_token(model, kind, seq_len) for kind in model.layer_pattern)
    kernels = sum(_kernel_flops(model, kind, seq_len) for kind in model.layer_pattern)
    outputs = len(model.layer_pattern) * 2 * model.num_heads * model.head_dim * D
    gate_and_up = len(model.layer_pattern) * 4 * D * F
    again = {'none': 0, 'full': mixers + gate_and_up, 'dots': kernels, 'hybrid': outputs + gate_and_up}[model.remat]
    if sizes['context'] > 1:  # what the state of the tokens before a shard adds, and what its gradient adds
        again += 2 * model.layer_pattern.count('ssd') * 2 * model.num_heads * model.head_dim * model.d_state
    return costs.train_flops_per_token(model, seq_len) + modules * again


def _kernel_flops(model: Model, kind: str, seq_len: int) -> int:
    if kind == 'ssd':
        return costs.scan_flops_per_token(model)
    return 2 * model.num_heads * model.head_dim * (seq_len + 1)


# ---- memory ----------------------------------------------------------------


def parameters_of_a_device(config: Config, sizes: dict[str, int]) -> int:
    return sum(size // math.prod(sizes[axis] for axis in split) for size, split in _leaves(config, sizes))


def least_memory(config: Config, sizes: dict[str, int]) -> dict[str, float]:
    """Bytes a device holds when the backward pass begins, by what they are; a compiled step needs more.

    state: parameters and two moments, float32. gradients: float32. saved: what model.remat keeps of
    every layer. head: the gathered embedding, the gradient that is summed over it and a piece's logits.
    """
    model, train, t = config.model, config.train, sizes['tensor']
    parameters = parameters_of_a_device(config, sizes)
    tokens = tokens_of_a_device(config, sizes) // train.accumulation_steps
    modules = model.num_layers // len(model.layer_pattern)
    per_token = modules * sum(_saved_bytes(model, kind, t) for kind in model.layer_pattern)
    V, D = model.vocab_size // t, model.d_model
    head = V * D * (WIRE + MASTER) + min(train.loss_chunk_tokens, tokens) * V * MASTER
    return dict(state=3 * MASTER * parameters, gradients=MASTER * parameters, saved=per_token * tokens, head=head)


def _saved_bytes(model: Model, kind: str, t: int) -> float:
    """Bytes a token and layer keeps for the backward pass."""
    D, F, HP = model.d_model, model.d_mlp / t, model.num_heads * model.head_dim / t
    size = 2 if model.dtype == 'bfloat16' else 4
    if kind == 'ssd':
        projected = HP + 2 * model.num_ssd_groups * model.d_state / t
        residuals = 4 * model.num_heads / t + size * HP * model.d_state / STATE_EVERY  # dt; boundary states
    else:
        projected = HP + 2 * model.num_kv_heads * model.head_dim / t
        residuals = 4 * model.num_heads / t  # log-sum-exp
    kept = {
        'full': 0,
        'hybrid': projected + HP,
        'dots': projected + 2 * D + 2 * F,
        'none': projected + HP + 4 * D + 3 * F,
    }
    return size * (D + kept[model.remat]) + (residuals if model.remat in ('hybrid', 'none') else 0)


def least_hbm_bytes(config: Config, sizes: dict[str, int]) -> float:
    """Least bytes a device's HBM reads and writes a step: state, gathered weights, saved activations, once each way.

    Every matrix product reads its weights and one side of its activations and writes the other; the
    backward pass does so twice.
    """
    model, microbatches, t = config.model, config.train.accumulation_steps, sizes['tensor']
    parameters = parameters_of_a_device(config, sizes)
    gathered = parameters * sizes['fsdp']
    update = (6 * MASTER + 2 * MASTER) * parameters  # p, mu, nu read and written; gradients written and read
    weights = microbatches * (2 * 2 * WIRE + 2 * WIRE) * gathered  # written and read twice; their gradients
    modules = model.num_layers // len(model.layer_pattern)
    D, F, HP = model.d_model, model.d_mlp / t, model.num_heads * model.head_dim / t
    widths = 0.0
    for kind in model.layer_pattern:
        groups = model.num_ssd_groups * model.d_state if kind == 'ssd' else model.num_kv_heads * model.head_dim
        widths += (D + HP + 2 * groups / t) + (HP + D) + (D + 2 * F) + (F + D)  # in, out, gate and up, down
    return update + weights + 3 * WIRE * tokens_of_a_device(config, sizes) * modules * widths


# ---- time ------------------------------------------------------------------


def network_seconds(chip: Chip, mesh_devices: np.ndarray, collectives) -> dict[str, float]:
    """Least seconds each kind of link is busy a step: '2D torus x', ... , 'DCN' or 'NVLink'; they may work at once.

    Args:
      chip: of the devices.
      mesh_devices: the mesh's devices, with `coords` and `slice_index` on TPUs.
      collectives: of `hlo.collectives`.

    A ring of links is used both ways; where a slice does not wrap around, a line's end has one link.
    """
    devices = list(mesh_devices.flat)
    busy = {}
    for c in collectives:
        for link, seconds in _seconds_of(chip, devices, c):
            busy[link] = busy.get(link, 0.0) + c.runs * seconds
    return busy


def all_links(chip: Chip) -> float:
    """Bytes/s a device sends over all its links at once, within a slice or host; no mesh has more."""
    return 2 * chip.torus * chip.link / chip.chip_devices if isinstance(chip, Tpu) else chip.nvlink


def collective_seconds(chip: Chip, mesh_devices: np.ndarray, collective) -> float:
    """Least seconds of all runs of one collective."""
    return collective.runs * max(seconds for _, seconds in _seconds_of(chip, list(mesh_devices.flat), collective))


def _seconds_of(chip, devices, collective):
    """[(link, seconds of one run), ...] of one collective."""
    permute = collective.kind == 'collective-permute'
    # All groups are alike; of a permute each pair is one, and the slowest counts.
    groups = collective.groups if permute else collective.groups[:1]
    slices = np.array([[getattr(devices[i], 'slice_index', 0) for i in group] for group in groups])
    across = max(len(set(group)) for group in slices.tolist())
    n, wire, links = groups.shape[1], collective.wire_bytes, []
    if across > 1:
        # Within the slices first, so that only a device's share of its slice's sum crosses.
        links.append(('DCN', (wire if permute else wire * (across - 1) / (n - 1)) / chip.dcn))
        wire = 0.0 if permute or n == across else wire * (1 - across / n) * n / (n - 1)
    if not wire:
        return links
    if not isinstance(chip, Tpu):
        return links + [('NVLink', wire / chip.nvlink)]
    coords = np.array([[devices[i].coords for i in group] for group in groups])  # [group, member, dimension]
    extent = np.array([device.coords for device in devices]).max(0) + 1
    spanned = [d for d in range(len(extent)) if np.any(coords[:, :, d] != coords[:, :1, d])]
    rings = [
        d for d in spanned if not permute and extent[d] % chip.ring == 0 and len(set(coords[0, :, d])) == extent[d]
    ]
    ways = len(spanned) + len(rings)  # both ways around a ring; one way at the end of a line
    return links + [('ICI ' + 'xyz'[d], wire * chip.chip_devices / (ways * chip.link)) for d in spanned]
