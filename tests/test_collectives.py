"""What the step sends between devices: every collective that is written out, its bytes, and how often it runs.

Read from the traced step, all of which is written for one device's block: the compiler adds none.
"""

import math

import jax
import numpy as np
import pytest
from small import small_config

from transxssm_jax import config as config_lib
from transxssm_jax.model import parameters
from transxssm_jax.parallel import mesh
from transxssm_jax.planning import roofline
from transxssm_jax.training import step

NAMES = {
    'psum': 'sum',
    'psum_invariant': 'sum',
    'all_gather': 'gather',
    'all_gather_invariant': 'gather',
    'reduce_scatter': 'scatter',
    'ppermute': 'permute',
    'pmax': 'max',
    'all_to_all': 'all to all',
}


def collectives(jaxpr):
    """Yields (kind, mesh axes, bytes of the operand on a device, times it runs a step)."""
    for kind, axes, dtype, elements, times in collectives_of(jaxpr):
        yield kind, axes, elements * np.dtype(dtype).itemsize, times


def collectives_of(jaxpr, times=1):
    """Yields (kind, mesh axes, dtype, elements of the operand on a device, times it runs a step)."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in NAMES:
            axes = equation.params.get('axes', equation.params.get('axis_name'))
            axes = axes if isinstance(axes, tuple) else (axes,)
            for v in equation.invars:
                yield NAMES[equation.primitive.name], axes, v.aval.dtype.name, math.prod(v.aval.shape), times
        inner = times * equation.params.get('length', 1)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, 'jaxpr') or hasattr(v, 'eqns')):
            value = getattr(value, 'jaxpr', value)
            if hasattr(value, 'eqns'):
                yield from collectives_of(value, inner)


def of_step(config):
    device_mesh = mesh.build(config)
    with jax.set_mesh(device_mesh):
        batch = {
            name: jax.ShapeDtypeStruct((config.data.global_batch, config.data.seq_len), np.int32)
            for name in ('tokens', 'targets', 'segment_ids', 'positions')
        }
        traced = jax.make_jaxpr(step.train_step(config))(step.abstract_state(config, device_mesh), batch)
    return list(collectives(traced.jaxpr))


def total(found, kind, axes):
    return sum(size * times for name, over, size, times in found if (name, over) == (kind, axes))


def count(found, kind, axes):
    return sum(times for name, over, _, times in found if (name, over) == (kind, axes))


def kernels(config):
    """Parameters that fsdp splits, in all and of the embedding."""
    params = jax.eval_shape(lambda: parameters.init_params(config.model, 0))
    sizes = jax.tree.leaves(
        jax.tree.map(
            lambda leaf, axes: leaf.size if 'embed' in axes else 0, params, parameters.param_axes(config.model)
        )
    )
    return sum(sizes), params['embedding'].size


# ---- data ------------------------------------------------------------------


@pytest.mark.parametrize('accumulation_steps, width', [(1, 2), (4, 4)])
def test_gradients_are_summed_once_a_step(accumulation_steps, width):
    config = small_config(
        mesh_data=8, data_global_batch=32, train_accumulation_steps=accumulation_steps, model_dtype='bfloat16'
    )
    found = of_step(config)
    assert {(kind, axes) for kind, axes, _, _ in found} == {('sum', ('data',))}
    assert all(times == 1 for *_, times in found)
    matrices = kernels(config)[0]
    rest = parameters.count_params(config.model) - matrices  # norms and the like, and two sums of the loss
    assert total(found, 'sum', ('data',)) == width * matrices + 4 * rest + 8


# ---- fsdp ------------------------------------------------------------------


@pytest.mark.parametrize('remat', ['none', 'hybrid'])
def test_fsdp_moves_three_times_the_parameters(remat):
    config = small_config(mesh_data=1, mesh_fsdp=8, model_remat=remat, model_dtype='bfloat16')
    found = of_step(config)
    matrices, embedding = kernels(config)
    # Gathered for forward and for backward, the embedding for the look-up and for the head, from an eighth each.
    gathers = matrices + embedding if remat == 'none' else 2 * matrices
    assert total(found, 'gather', ('fsdp',)) * 8 == 2 * gathers
    assert total(found, 'scatter', ('fsdp',)) == 2 * (matrices + embedding)
    assert total(found, 'sum', ('fsdp',)) == 4 * (parameters.count_params(config.model) - matrices) + 8


def test_the_1p3b_step_is_near_the_least():
    config = config_lib.load('configs/1p3b.py', {'mesh.data': 1, 'mesh.fsdp': 8, 'data.global_batch': 8})
    found = of_step(config)
    moved = (
        total(found, 'gather', ('fsdp',)) * 8 + total(found, 'scatter', ('fsdp',)) + 2 * total(found, 'sum', ('fsdp',))
    )
    assert 1 <= moved / (3 * 2 * parameters.count_params(config.model)) < 1.05
    assert {axes for _, axes, _, _ in found} == {('fsdp',)}


# ---- tensor ----------------------------------------------------------------


@pytest.mark.parametrize('remat, gathers, scatters', [('none', 4, 4), ('matmuls', 6, 4), ('hybrid', 6, 5)])
def test_tensor_gathers_and_scatters_the_stream(remat, gathers, scatters):
    """Of mixer and MLP, forward and backward; what is not kept is gathered again, and a mixer's output summed again."""
    config = small_config(
        mesh_data=4, mesh_tensor=2, model_remat=remat, model_dtype='bfloat16', model_tie_embeddings=False
    )
    model, tokens = config.model, 8 // 4 * config.data.seq_len
    found = of_step(config)
    stream = tokens * model.d_model * 2
    # And of the look-up and for the head, forward and backward.
    assert total(found, 'gather', ('tensor',)) == (gathers * model.num_layers + 2) * stream / 2
    assert total(found, 'scatter', ('tensor',)) == (scatters * model.num_layers + 2) * stream
    # Two numbers a token of the loss; the gradients of norms and residuals, which act on the stream.
    assert total(found, 'sum', ('tensor',)) == 2 * tokens * 4 + (4 * model.num_layers + 1) * model.d_model * 4
    sent = total(found, 'gather', ('tensor',)) + total(found, 'scatter', ('tensor',)) / 2
    least = roofline.min_comm_bytes(config, dict(data=4, fsdp=1, context=1, tensor=2))
    assert sent == least['activations']


def test_a_stream_that_tensor_does_not_divide_is_summed_whole():
    config = small_config(mesh_data=4, mesh_tensor=2, data_global_batch=4, data_seq_len=47, model_dtype='bfloat16')
    model, tokens = config.model, 47
    found = of_step(config)
    assert not [kind for kind, axes, *_ in found if 'tensor' in axes and kind in ('gather', 'scatter')]
    # The loss works on two chunks of 32 tokens.
    assert total(found, 'sum', ('tensor',)) == (4 * model.num_layers + 2) * tokens * model.d_model * 2 + 2 * 64 * 4


def test_one_half_of_the_rows_is_sent_while_the_other_is_computed():
    """Of unrolled layers: as many bytes in twice as many collectives, each of one half of the rows."""
    settings = dict(mesh_data=2, mesh_tensor=4, model_num_kv_heads=4, model_num_ssd_groups=4, model_dtype='bfloat16')
    scanned, unrolled = (of_step(small_config(**settings, model_layer_loop=loop)) for loop in ('scan', 'unrolled'))
    for kind in ('gather', 'scatter'):
        assert count(unrolled, kind, ('tensor',)) == 2 * count(scanned, kind, ('tensor',))
        assert total(unrolled, kind, ('tensor',)) == total(scanned, kind, ('tensor',))
    odd = of_step(small_config(**settings, model_layer_loop='unrolled', data_global_batch=2))
    assert count(odd, 'gather', ('tensor',)) == count(scanned, 'gather', ('tensor',))


# ---- context ---------------------------------------------------------------


@pytest.mark.parametrize('pieces, shifts', [(2, 1), (4, 3), (8, 4)])
def test_a_scan_passes_on_its_state(pieces, shifts):
    config = small_config(
        mesh_data=1,
        mesh_fsdp=8 // pieces,
        mesh_context=pieces,
        model_attention_period=0,
        model_remat='hybrid',
        data_global_batch=8,
    )
    model, rows = config.model, 8 // (8 // pieces)
    found = of_step(config)
    state = rows * model.num_heads * model.head_dim * model.d_state * 4
    assert count(found, 'permute', ('context',)) == 2 * shifts * model.num_layers
    assert total(found, 'permute', ('context',)) == 2 * shifts * model.num_layers * state
    # Decays and ids at borders; of activations nothing is gathered.
    assert total(found, 'gather', ('context',)) <= model.num_layers * rows * (4 * model.num_heads + 2 * 4)


def test_no_activation_is_gathered():
    config = small_config(mesh_data=2, mesh_fsdp=2, mesh_context=2, data_seq_len=4096, data_global_batch=8)
    found = of_step(config)
    one_a_token = 2 * 4096 // 2 * 4  # rows and length of a device, float32
    assert max(size for kind, _, size, _ in found if kind == 'gather') < one_a_token
    assert {kind for kind, axes, *_ in found if 'data' in axes} == {'sum'}
