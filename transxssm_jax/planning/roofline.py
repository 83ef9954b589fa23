"""Lower bounds of a training step: bytes between devices, memory, operations, and the time they take.

Shape legend: D model, F mlp; those of one device unless a name says otherwise.
"""

import dataclasses
import functools
import math

import jax
import numpy as np

from pallas_kernels.chips import Chip, Tpu
from transxssm_jax.config import Config, Model
from transxssm_jax.model import costs, parameters
from transxssm_jax.model.costs import row_attended
from transxssm_jax.model.layer_costs import BFLOAT16, FLOAT32
from transxssm_jax.parallel import mesh
from transxssm_jax.training import muon
from transxssm_jax.training.gradient import reduction_dtypes


def _leaves(config: Config, sizes: dict[str, int]):
    """(elements over all devices, mesh axes that shard it) of every parameter."""
    for elements, axes in _parameters(*_settings(config.model)):
        yield elements, {axis for axis in axes if sizes[axis] > 1}


@functools.cache
def _parameters(*settings):
    """[(elements, mesh axes that may shard it), ...] of a model of these settings; a search asks for them very often."""
    model = Model(*settings)
    shapes = jax.tree.leaves(jax.eval_shape(lambda: parameters.init_params(model, 0)))
    axes = jax.tree.leaves(parameters.param_axes(model), is_leaf=lambda node: isinstance(node, tuple))
    return [
        (shape.size, {axis for name in logical for axis in mesh.RULES.get(name, ())})
        for shape, logical in zip(shapes, axes, strict=True)
    ]


def tokens_per_device(config: Config, sizes: dict[str, int]) -> int:
    """Tokens of a step on one device, over all its microbatches; tensor shards share them."""
    return config.tokens_per_step // (sizes['data'] * sizes['fsdp'] * sizes['context'])


def params_per_device(config: Config, sizes: dict[str, int]) -> int:
    """Parameters that one device holds."""
    return sum(size // math.prod(sizes[axis] for axis in axes) for size, axes in _leaves(config, sizes))


# ---- communication ---------------------------------------------------------


def min_comm_bytes(config: Config, sizes: dict[str, int]) -> dict[str, float]:
    """Least bytes that a device sends in a step, by what they are for, given how the mesh shards the model.

    parameters: matrices sharded over fsdp are all-gathered for the forward and, where model.remat does not keep them, for
    the backward pass, in bfloat16, in each microbatch. gradients: see `gradient_bytes`; in bfloat16, with one microbatch
    and fsdp alone, these two are 3 x parameters, or 2 x. activations: what tensor gathers and scatters of the residual
    stream, of every layer (`costs.sent_vectors`), the embedding and the head. Then, by kind of layer, what the mixers hand
    over along context (`LayerCosts.handed_over`). muon, where it is the optimizer: momentum on its way to whole matrices,
    and back, in the way that sends less (`whole_matrices.choose`).
    """
    model, microbatches = config.model, config.train.num_microbatches
    f, c, t = sizes['fsdp'], sizes['context'], sizes['tensor']
    params, passes = 0.0, 2 - costs.share_with_kept_weights(model)
    for size, axes in _leaves(config, sizes):
        if 'fsdp' in axes:
            params += passes * microbatches * BFLOAT16 * size / (t if 'tensor' in axes else 1) * (f - 1) / f
    tokens = tokens_per_device(config, sizes)
    backward = _width(reduction_dtypes(config, sizes)['tensor'])
    vectors, sums = costs.sent_vectors(model)
    # And the sum and the gradient of the look-up, and the input of the head, whose gradient is a sum.
    vectors, sums = model.num_layers * vectors + 4, model.num_layers * sums + 1
    width = costs.dtype_bytes(model)
    activations = ((vectors - sums) * width + sums * backward) * tokens * model.d_model * (t - 1) / t
    gradients = sum(gradient_bytes(config, sizes).values())
    result = dict(parameters=params, gradients=gradients, activations=activations)
    rows, tokens_per_shard = tokens * c / config.data.seq_len, config.data.seq_len / c
    for _, count, layer in costs.layer_costs(model):
        sent = rows * count * layer.context_bytes(c, tokens_per_shard) / t
        result[layer.handed_over] = result.get(layer.handed_over, 0.0) + sent
    if config.optimizer.name == 'muon':
        result['muon'] = costs.dtype_bytes(model) * sum(stack.choice.sent for stack in _muon_stacks(config, sizes))
    return result


def _muon_stacks(config: Config, sizes: dict[str, int]) -> list[muon.Stack]:
    return _stacks(tuple(sizes.items()), *_settings(config.model))


@functools.cache
def _stacks(sizes, *settings):
    return muon.stacks(Model(*settings), dict(sizes))


def _settings(model: Model):
    """The model's settings, but one remat for all: it changes no parameter, and a search varies it."""
    return ('none' if f.name == 'remat' else getattr(model, f.name) for f in dataclasses.fields(Model))


def state_copies_bytes(config: Config, sizes: dict[str, int]) -> int:
    """Bytes of a device's state: parameters, two moments of each, of Muon's matrices one, and their average."""
    copies = 3 + (config.optimizer.ema_decay > 0)
    total = copies * params_per_device(config, sizes)
    if config.optimizer.name == 'muon':
        total -= sum(stack.elements // stack.devices for stack in _muon_stacks(config, sizes))
    return FLOAT32 * total


def gradient_bytes(config: Config, sizes: dict[str, int], dtypes: dict[str, str] | None = None) -> dict[str, float]:
    """Least bytes of parameters' gradients that a device sends in a step, by the mesh axes that they are summed over.

    'fsdp': the reduce-scatter of what fsdp shards, once a step. 'data x context': the all-reduce of its shards, once for
    both axes where they have one dtype. 'all': that of the other parameters, float32, over every axis that shards tokens.

    Args:
      dtypes: as from `reduction_dtypes`; None: those of the config.
    """
    dtypes = dtypes or reduction_dtypes(config, sizes)
    f, t, d, c = sizes['fsdp'], sizes['tensor'], sizes['data'], sizes['context']
    groups = [(d, dtypes['data']), (c, dtypes['context'])]
    if dtypes['data'] == dtypes['context']:
        groups = [(d * c, dtypes['data'])]
    result = dict.fromkeys(('fsdp', 'data x context', 'all'), 0.0)
    for size, axes in _parameters(*dataclasses.astuple(config.model)):
        if 'tensor' in axes:
            size /= t
        if 'fsdp' in axes:
            result['fsdp'] += _width(dtypes['fsdp']) * size * (f - 1) / f
            for members, dtype in groups:
                result['data x context'] += 2 * _width(dtype) * size / f * (members - 1) / members
        else:
            result['all'] += 2 * FLOAT32 * size * (d * c * f - 1) / (d * c * f)
    return {name: size for name, size in result.items() if size}


def _width(dtype: str) -> int:
    return BFLOAT16 if dtype == 'bfloat16' else FLOAT32


def min_dcn_bytes(config: Config, sizes: dict[str, int]) -> float:
    """Least bytes that a device sends to other slices in a step: the all-reduce of its fsdp shard of the gradients."""
    slices = config.mesh.slices
    width = _width(reduction_dtypes(config, sizes)['data' if sizes['data'] % slices == 0 else 'fsdp'])
    return 2 * width * params_per_device(config, sizes) * (slices - 1) / slices


# ---- operations ------------------------------------------------------------


def executed_flops_per_token(config: Config, sizes: dict[str, int]) -> float:
    """Forward, backward, what remat computes again and what the context axis adds."""
    return math.fsum(executed_flops_by_unit(config, sizes).values())


def executed_flops_by_unit(config: Config, sizes: dict[str, int]) -> dict[str, float]:
    """The same by what does it: 'matmul', and each kind of layer for its kernel."""
    model, attended = config.model, row_attended(config.data.seq_len)
    result = {'matmul': costs.train_flops_per_token(model, attended)}
    for kind, count, layer in costs.layer_costs(model):
        forward = layer.kernel_flops(attended)
        matmul_again, kernel_again = costs.recomputed_flops(model, kind, attended)
        added = layer.context_flops if sizes['context'] > 1 else 0
        result['matmul'] += count * (matmul_again - 3 * forward)
        result[kind] = count * (3 * forward + kernel_again + added)
    if config.optimizer.name == 'muon':  # on whole matrices, once a step
        work = sum(muon.flops(stack) for stack in _muon_stacks(config, sizes))
        result['matmul'] += (
            work * (sizes['data'] * sizes['fsdp'] * sizes['context'] * sizes['tensor']) / config.tokens_per_step
        )
    return result


# ---- memory ----------------------------------------------------------------


def min_memory_bytes(config: Config, sizes: dict[str, int]) -> dict[str, float]:
    """Bytes that a device holds when the backward pass begins, by what they are; a compiled step needs more.

    state: see `state_copies_bytes`. gradients: float32. saved: what model.remat keeps of every layer. head:
    the gathered embedding, its gradient that is summed over microbatches, and the logits of one chunk of the loss.
    """
    model, train, t = config.model, config.train, sizes['tensor']
    params = params_per_device(config, sizes)
    tokens = tokens_per_device(config, sizes) // train.num_microbatches
    per_token = sum(count * costs.saved_bytes(model, kind, t) for kind, count, _ in costs.layer_costs(model))
    V, D = model.vocab_size // t, model.d_model
    head = V * D * (BFLOAT16 + FLOAT32) + min(train.loss_chunk_tokens, tokens) * V * FLOAT32
    saved = per_token * tokens
    saved += costs.share_with_kept_weights(model) * costs.dtype_bytes(model) * params * sizes['fsdp']
    return dict(state=state_copies_bytes(config, sizes), gradients=FLOAT32 * params, saved=saved, head=head)


def min_hbm_bytes(config: Config, sizes: dict[str, int]) -> float:
    """Least bytes that a device's HBM reads and writes in a step.

    The state once each way; gathered weights and their gradients; and of every matrix product the inputs and outputs
    once forward and twice backward, because the backward pass of a product is two products.
    """
    model, microbatches, t = config.model, config.train.num_microbatches, sizes['tensor']
    params = params_per_device(config, sizes)
    gathered = params * sizes['fsdp']
    # The state read and written; gradients written and read.
    update = 2 * state_copies_bytes(config, sizes) + 2 * FLOAT32 * params
    weights = microbatches * (2 * 2 * BFLOAT16 + 2 * BFLOAT16) * gathered  # written and read twice; their gradients
    size, D, F = costs.dtype_bytes(model), model.d_model, model.d_mlp / t
    activations = 0.0
    for _, count, layer in costs.layer_costs(model):
        mixer = 2 * size * D + (layer.mixer_in_bytes + layer.mixer_out_bytes) / t
        mlp = size * ((D + 2 * F) + (F + D))  # gate and up; down
        activations += count * (mixer + mlp)
    return update + weights + 3 * tokens_per_device(config, sizes) * activations


# ---- time ------------------------------------------------------------------


def network_seconds(chip: Chip, mesh_devices: np.ndarray, collectives) -> dict[str, float]:
    """Least seconds that each kind of link is busy in a step: 'ICI x', ..., 'DCN' or 'NVLink'; they may work at once.

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
    """Bytes/s that a device sends over all its links at once, within a slice or host; no mesh has more."""
    return 2 * chip.torus * chip.link / chip.chip_devices if isinstance(chip, Tpu) else chip.nvlink


def collective_seconds(chip: Chip, mesh_devices: np.ndarray, collective) -> float:
    """Least seconds of all runs of one collective."""
    return collective.runs * max(seconds for _, seconds in _seconds_of(chip, list(mesh_devices.flat), collective))


def _seconds_of(chip, devices, collective):
    """[(link, seconds of one run), ...] of one collective."""
    permute = collective.kind == 'collective-permute'
    # All groups are alike; each pair of a permute is a group, and the slowest counts.
    groups = collective.groups if permute else collective.groups[:1]
    slices = np.array([[getattr(devices[i], 'slice_index', 0) for i in group] for group in groups])
    across = max(len(set(group)) for group in slices.tolist())
    n, sent, links = groups.shape[1], collective.comm_bytes, []
    if across > 1:
        # Within each slice first, so that only a device's shard of its slice's sum crosses.
        links.append(('DCN', (sent if permute else sent * (across - 1) / (n - 1)) / chip.dcn))
        sent = 0.0 if permute or n == across else sent * (1 - across / n) * n / (n - 1)
    if not sent:
        return links
    if not isinstance(chip, Tpu):
        return links + [('NVLink', sent / chip.nvlink)]
    coords = np.array([[devices[i].coords for i in group] for group in groups])  # [group, member, dimension]
    extent = np.array([device.coords for device in devices]).max(0) + 1
    spanned = [d for d in range(len(extent)) if np.any(coords[:, :, d] != coords[:, :1, d])]
    rings = [
        d for d in spanned if not permute and extent[d] % chip.ring == 0 and len(set(coords[0, :, d])) == extent[d]
    ]
    ways = len(spanned) + len(rings)  # both ways around a ring; one way at the end of a line
    return links + [('ICI ' + 'xyz'[d], sent * chip.chip_devices / (ways * chip.link)) for d in spanned]
