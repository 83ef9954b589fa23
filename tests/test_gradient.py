"""In which dtype gradients are summed over each mesh axis: the setting, its default, and why that is what it is."""

import functools
import re

import jax
import numpy as np
import pytest
from flax import nnx
from ring_reduction import ring_error
from small import packed_batch, small_config
from test_collectives import collectives_of

from pallas_kernels.device import Device
from transxssm_jax.model import language_model, parameters
from transxssm_jax.model.mixers import mixer_of
from transxssm_jax.parallel import mesh
from transxssm_jax.planning import roofline
from transxssm_jax.training.gradient import MOST_ROUNDED_MEMBERS, reduction_dtypes, summed_gradient

KERNEL_TOLERANCE = 5e-3  # of a scan in bfloat16, tests/test_ssd_kernels.py


@pytest.mark.parametrize('signal', [0.0, 1.0])
def test_the_error_of_a_ring_grows_with_its_members_in_bfloat16_alone(signal):
    errors = {members: ring_error(members, 'bfloat16', signal) for members in (2, 16, 64, 256)}
    assert list(errors.values()) == sorted(errors.values())
    assert errors[2] < 2.5e-3 and errors[64] > 6e-3 and 1.2e-2 < errors[256] < 2.5e-2
    assert max(ring_error(members, 'float32', signal) for members in errors) < 1e-6


def test_a_long_ring_in_bfloat16_loses_what_members_agree_on():
    assert ring_error(1024, 'bfloat16', signal=4.0) > 0.3, 'a share is less than half of the last digit of the sum'


def test_the_default_rounds_no_more_than_a_kernel_may():
    assert ring_error(MOST_ROUNDED_MEMBERS, 'bfloat16') < 1.05 * KERNEL_TOLERANCE
    assert ring_error(2 * MOST_ROUNDED_MEMBERS, 'bfloat16') > KERNEL_TOLERANCE


@pytest.mark.parametrize(
    'settings, sizes, expected',
    [
        ({}, dict(data=16, fsdp=16), dict.fromkeys(mesh.AXES, 'bfloat16')),
        ({}, dict(data=17), dict(data='float32', context='float32', fsdp='bfloat16', tensor='bfloat16')),
        ({}, dict(fsdp=32), dict(data='bfloat16', context='bfloat16', fsdp='float32', tensor='bfloat16')),
        ({}, dict(data=4, context=8), dict(data='float32', context='float32', fsdp='bfloat16', tensor='bfloat16')),
        (
            dict(train_accumulation_steps=2),
            {},
            dict(data='float32', context='float32', fsdp='bfloat16', tensor='bfloat16'),
        ),
        (
            dict(train_gradient_dtype_data='bfloat16', train_gradient_dtype_tensor='float32'),
            dict(data=256),
            dict(data='bfloat16', context='float32', fsdp='bfloat16', tensor='float32'),
        ),
    ],
)
def test_auto_depends_on_the_members_of_each_sum(settings, sizes, expected):
    assert reduction_dtypes(small_config(model_dtype='bfloat16', **settings), sizes) == expected


def test_a_float32_model_is_not_rounded():
    assert set(reduction_dtypes(small_config(), {}).values()) == {'float32'}


@functools.cache
def reductions(**settings):
    """[(kind, mesh axes, dtype, elements, times)] of the sums in the traced gradient, by default of a bfloat16 model."""
    config = small_config(**dict(model_dtype='bfloat16', model_num_layers=4) | settings)
    device_mesh = mesh.build(config)
    params = jax.eval_shape(lambda: parameters.init_params(config.model, 0))
    with jax.set_mesh(device_mesh):
        batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in packed_batch(config).items()}
        traced = jax.make_jaxpr(summed_gradient(config))(params, batch)
    return [found for found in collectives_of(traced.jaxpr) if found[0] in ('sum', 'scatter')]


AXES = dict(mesh_data=2, mesh_fsdp=2, mesh_tensor=2)


@pytest.mark.parametrize('axis, kind', [('data', 'sum'), ('fsdp', 'scatter'), ('tensor', 'scatter')])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_each_axis_is_summed_in_its_dtype(axis, kind, dtype):
    found, before = reductions(**AXES, **{f'train_gradient_dtype_{axis}': dtype}), reductions(**AXES)
    changed = [(one, other) for one, other in zip(found, before, strict=True) if one != other]
    assert bool(changed) == (dtype == 'float32')
    for one, other in changed:
        assert (one[0], one[1], one[2]) == (kind, (axis,), 'float32')
        assert one[3:] == other[3:] and other[2] == 'bfloat16', 'as many elements, as often'


def test_parameters_of_a_part_of_tokens_or_heads_are_summed_in_float32():
    """Whatever the setting for tensor is: norms, residuals and biases of outputs, and norms of heads."""
    settings = dict(model_num_layers=2, model_attention_period=2, model_attention_offset=1)
    settings |= dict(model_qk_norm=True, model_bc_norm=True, model_use_bias=True, model_dtype='float32')
    found = reductions(**AXES, **settings, train_gradient_dtype_tensor='bfloat16')
    assert {dtype for kind, axes, dtype, *_ in found if axes == ('tensor',) and kind == 'sum'} == {'float32'}
    assert {dtype for kind, axes, dtype, *_ in found if axes == ('tensor',) and kind == 'scatter'} > {'bfloat16'}


def test_axes_of_two_dtypes_are_summed_one_after_another():
    found = reductions(mesh_data=2, mesh_fsdp=2, mesh_context=2, train_gradient_dtype_context='float32')
    axes = {(names, dtype) for kind, names, dtype, *_ in found if kind == 'sum' and 'fsdp' not in names}
    assert axes == {(('context',), 'float32'), (('data',), 'bfloat16')}


def gradient_of(config, num_devices):
    device_mesh = mesh.build(config, jax.devices()[:num_devices])
    params, batch = parameters.init_params(config.model, 0), packed_batch(config)
    with jax.set_mesh(device_mesh):
        _, grads = jax.jit(summed_gradient(config))(params, batch)
    return jax.device_get(grads)


def test_the_setting_decides_what_is_rounded():
    """A float32 model, so that nothing but the sums is rounded."""
    exact = gradient_of(small_config(model_num_layers=4), 1)
    errors = {}
    for dtype in ('float32', 'bfloat16'):
        settings = {f'train_gradient_dtype_{axis}': dtype for axis in mesh.AXES}
        found = gradient_of(small_config(model_num_layers=4, **AXES, **settings), 8)
        for path, leaf in jax.tree_util.tree_leaves_with_path(found):
            wanted = exact
            for key in path:
                wanted = wanted[key.key]
            error = np.linalg.norm(leaf - wanted) / np.linalg.norm(wanted)
            errors[dtype] = max(errors.get(dtype, 0.0), error)
    assert errors['float32'] < 2e-5
    assert 1e-3 < errors['bfloat16'] < 2e-2


def both_loops(**settings):
    """Gradients of scanned and of unrolled layers, leaf by leaf: (path, scanned, unrolled)."""
    devices = 2 if 'mesh' in str(settings) else 1
    scanned, unrolled = (
        gradient_of(small_config(model_num_layers=4, model_layer_loop=loop, **settings), devices)
        for loop in ('scan', 'unrolled')
    )
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(scanned), jax.tree.leaves(unrolled)):
        assert other.dtype == leaf.dtype, path
        yield path, np.asarray(leaf, np.float64), np.asarray(other, np.float64)


@pytest.mark.parametrize(
    'settings', [{}, dict(train_accumulation_steps=2), dict(mesh_fsdp=2), dict(mesh_tensor=2)], ids=str
)
@pytest.mark.parametrize('dtype, tolerance', [('float32', 1e-6), ('bfloat16', 1e-2)])
def test_unrolled_layers_have_the_gradient_of_a_scan(dtype, tolerance, settings):
    """The form of GPUs, whose weights are cast as a stack; in bfloat16 a compiler may round sums elsewhere."""
    if dtype == 'bfloat16' and 'mesh_tensor' in settings:
        pytest.skip('each half of the rows has its own products, whose sums are rounded apart; see the next test')
    for path, wanted, found in both_loops(model_dtype=dtype, **settings):
        assert np.linalg.norm(found - wanted) <= tolerance * np.linalg.norm(wanted), path


GPU = Device('gpu', 'NVIDIA H100 80GB HBM3', '9.0')


def test_gradients_that_gpus_join_as_words_are_the_same(monkeypatch):
    settings = dict(model_num_layers=2, model_attention_period=2, model_attention_offset=1, model_layer_loop='unrolled')
    settings |= dict(model_dtype='bfloat16', mesh_fsdp=2, train_accumulation_steps=2)
    wanted = gradient_of(small_config(**settings), 2)
    monkeypatch.setattr(language_model, 'current_device', lambda: GPU)
    found = gradient_of(small_config(**settings), 2)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize('backend', ['gpu', 'cpu'])
@pytest.mark.parametrize('shape', [(21, 8, 6), (12, 4), (3, 5), (2, 1), (4,)])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
def test_the_gradient_of_a_split_stack_is_the_stack_of_gradients(backend, shape, dtype, monkeypatch):
    """Bit for bit, also what is not finite and where a part is not whole words; and 64 bits stay inside."""
    monkeypatch.setattr(language_model, 'current_device', lambda: Device(backend))
    stack = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    cotangents = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    cotangents.flat[:3] = np.inf, np.nan, -0.0
    parts, pull = jax.vjp(language_model._split, stack)
    (found,) = jax.jit(pull)([jax.numpy.asarray(part) for part in cotangents])
    assert [part.tobytes() for part in map(np.asarray, parts)] == [part.tobytes() for part in stack]
    assert (found.shape, found.dtype) == (shape, dtype) and np.asarray(found).tobytes() == cotangents.tobytes()
    assert jax.numpy.arange(2).dtype == 'int32'


def test_words_of_64_bits_reach_the_gpu(monkeypatch):
    """XLA's kernel of more than ten arrays moves one number a thread: of two bytes it took three times as long as it needs."""
    monkeypatch.setattr(language_model, 'current_device', lambda: GPU)
    stack = jax.ShapeDtypeStruct((21, 8, 6), 'bfloat16')
    lowered = jax.jit(lambda x: jax.vjp(language_model._split, x)[1](language_model._split(x))).lower(stack)
    joined = [line for line in lowered.as_text().splitlines() if 'stablehlo.concatenate' in line]
    assert sum(line.count('tensor<1x12xui64>') for line in joined) == 21
    assert not any('bf16' in line for line in joined)


def test_cublas_can_add_up_the_gradients_of_an_input():
    """XLA has it add to a product whatever is on the product's right, and looks no further where the left is a sum already."""
    model = small_config(model_dtype='bfloat16').model
    mixer = mixer_of('ssd')(model, rngs=nnx.Rngs(0))
    u = jax.numpy.ones((2, 8, model.d_model), 'bfloat16')
    outputs, pull = jax.vjp(mixer.in_proj, u)
    cotangents = jax.tree.map(lambda y: (y / 3).astype(y.dtype), outputs)
    jaxpr = jax.make_jaxpr(pull)(cotangents).jaxpr
    made_by = {variable: equation for equation in jaxpr.eqns for variable in equation.outvars}

    def origin(variable):
        equation = made_by[variable]
        return origin(equation.invars[0]) if equation.primitive.name == 'reshape' else equation.primitive.name

    sums = [
        e.invars for e in jaxpr.eqns if e.primitive.name in ('add', 'add_any') and e.outvars[0].aval.shape == u.shape
    ]
    assert len(outputs) == 4 and [[origin(v) for v in pair] for pair in sums] == [
        ['dot_general', 'dot_general'], ['dot_general', 'add'], ['dot_general', 'add']
    ]  # fmt: skip
    wanted = sum(
        np.asarray(jax.vjp(lambda u, i=i: mixer.in_proj(u)[i], u)[1](cotangents[i])[0], np.float64) for i in range(4)
    )
    found = np.asarray(pull(cotangents)[0], np.float64)
    assert np.linalg.norm(found - wanted) < 1e-2 * np.linalg.norm(wanted)


def test_two_halves_of_the_rows_are_as_exact_as_all():
    """In bfloat16 over tensor, where unrolled layers work on halves: as near to the gradient in float32 as a scan is."""
    exact = gradient_of(small_config(model_num_layers=4), 1)
    errors = []
    for (path, *found), wanted in zip(both_loops(model_dtype='bfloat16', mesh_tensor=2), jax.tree.leaves(exact)):
        wanted = np.asarray(wanted, np.float64)
        errors.append([np.linalg.norm(leaf - wanted) / np.linalg.norm(wanted) for leaf in found])
        assert errors[-1][1] < 1.5 * errors[-1][0] + 1e-3, path
    of_scan, of_halves = np.mean(errors, axis=0)
    assert of_halves < 1.1 * of_scan < 0.02


def test_tensor_beside_every_other_axis_changes_no_gradient():
    """A cut stream in two halves of one row each, of microbatches, with a head, biases and norms of heads of their own."""
    settings = dict(model_num_layers=2, model_attention_period=2, model_attention_offset=1, model_tie_embeddings=False)
    settings |= dict(model_qk_norm=True, model_bc_norm=True, model_use_bias=True)
    axes = dict(mesh_data=1, mesh_fsdp=2, mesh_context=2, mesh_tensor=2, train_accumulation_steps=2)
    found = gradient_of(small_config(model_layer_loop='unrolled', **settings, **axes), 8)
    for (path, wanted), leaf in zip(
        jax.tree_util.tree_leaves_with_path(gradient_of(small_config(**settings), 1)),
        jax.tree.leaves(found),
        strict=True,
    ):
        assert np.linalg.norm(leaf - wanted) <= 2e-5 * np.linalg.norm(wanted), path


def test_a_weight_is_cast_once_for_all_layers():
    """Unrolled, and to the dtype of the products: no layer reads float32, forward or backward."""
    config = small_config(
        model_num_layers=8, model_dtype='bfloat16', model_layer_loop='unrolled', model_remat='matmuls'
    )
    params = jax.eval_shape(lambda: parameters.init_params(config.model, 0))
    with jax.set_mesh(mesh.build(config, jax.devices()[:1])):
        batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in packed_batch(config).items()}
        text = jax.jit(summed_gradient(config)).lower(params, batch).as_text()
    gates = re.findall(r'stablehlo.convert .*\(tensor<((?:[0-9]+x)*64x96)xf32>\) -> tensor<[0-9x]*xbf16>', text)
    # Of ssd and attention; four as they are, and four gradients.
    assert set(gates) == {'2x3x64x96', '2x1x64x96'} and len(gates) == 8


def test_the_price_is_known():
    sizes = dict(data=4, fsdp=2, context=1, tensor=1)
    config = small_config(model_dtype='bfloat16')
    bytes_in = {
        dtype: roofline.gradient_bytes(config, sizes, dict.fromkeys(mesh.AXES, dtype))
        for dtype in ('bfloat16', 'float32')
    }
    for name, factor in (('fsdp', 2), ('data x context', 2), ('all', 1)):
        assert bytes_in['float32'][name] == factor * bytes_in['bfloat16'][name]
    dear = small_config(model_dtype='bfloat16', train_gradient_dtype_fsdp='float32')
    more = roofline.min_comm_bytes(dear, sizes)['gradients'] - roofline.min_comm_bytes(config, sizes)['gradients']
    assert more == bytes_in['bfloat16']['fsdp']
