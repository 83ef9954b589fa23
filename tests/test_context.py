"""Rows split over devices (mesh.context): the same values, losses and gradients as on one device, and what is communicated."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from small import small_config

from pallas_kernels.ssd.api import rotary_ssd
from pallas_kernels.ssd.context import rotary_ssd_in_context
from transxssm_jax.model import parameters, rope
from transxssm_jax.model.loss import IGNORED
from transxssm_jax.parallel import collectives, mesh
from transxssm_jax.training import gradient, step

B, L, H, P, G, N = 2, 64, 4, 16, 2, 16

# Lengths of the documents of two rows of 64 tokens; pieces are of 32, 16 or 8.
DOCUMENTS = {
    'one document': ([64], [64]),
    'across borders': ([5, 40, 19], [20, 9, 35]),
    'ending at borders': ([16, 16, 32], [8, 24, 32]),
    'of one token': ([7, 1, 8, 1, 15, 32], [1] * 64),
    'none over the border': ([32, 1, 31], [31, 1, 32]),
}


def ids(name):
    # An id comes back, as after packing of several sources: only neighbours count.
    return np.stack([np.repeat(np.arange(len(row)) % 2, row) for row in DOCUMENTS[name]]).astype(np.int32)


def inputs():
    keys = iter(jax.random.split(jax.random.key(0), 8))
    angles = jnp.arange(L)[None, :, None] * 0.3 ** jnp.arange(N // 2)
    arrays = dict(
        x=jax.random.normal(next(keys), (B, L, H, P)),
        dt=jax.nn.softplus(jax.random.normal(next(keys), (B, L, H)) - 3),
        a=-jnp.exp(jax.random.normal(next(keys), (H,))),
        b=jax.random.normal(next(keys), (B, L, G, N)),
        c=jax.random.normal(next(keys), (B, L, G, N)),
    )
    rope = tuple(jnp.broadcast_to(table, (B, L, N // 2)) for table in (jnp.cos(angles), jnp.sin(angles)))
    return arrays, rope, jax.random.normal(next(keys), (B, L, H, P))


@functools.cache
def scans(pieces):
    """Jitted y and gradients; pieces 0: on one device."""
    kwargs = dict(implementation='xla', chunk_size=16)

    def scan(x, dt, a, b, c, rope, segment_ids):
        return rotary_ssd(x, dt, a, b, c, rope, segment_ids=segment_ids, **kwargs)[0]

    if pieces:
        device_mesh = jax.make_mesh(
            (pieces,), ('context',), axis_types=(AxisType.Auto,), devices=jax.devices()[:pieces]
        )
        row = PartitionSpec(None, 'context')
        scan = jax.shard_map(
            lambda x, dt, a, b, c, rope, segment_ids: rotary_ssd_in_context(
                x, dt, a, b, c, rope, axis_name='context', axis_size=pieces, segment_ids=segment_ids, **kwargs
            ),
            mesh=device_mesh,
            in_specs=(row, row, PartitionSpec(), row, row, row, row),
            out_specs=row,
            check_vma=False,
        )

    def loss(arrays, rope, segment_ids, weight):
        y = scan(*(arrays[name] for name in ('x', 'dt', 'a', 'b', 'c')), rope, segment_ids)
        return jnp.sum(y * weight), y

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize('pieces', [2, 4, 8])
@pytest.mark.parametrize('documents', DOCUMENTS)
def test_a_scan_in_pieces_is_the_scan(pieces, documents):
    arrays, rope, weight = inputs()
    (_, y), gradients = scans(pieces)(arrays, rope, ids(documents), weight)
    (_, expected), expected_gradients = scans(0)(arrays, rope, ids(documents), weight)
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
    for name, expected in expected_gradients.items():
        error = np.linalg.norm(gradients[name] - expected) / np.linalg.norm(expected)
        assert error < 1e-5, (name, error)


# ---- the whole step --------------------------------------------------------


def tiny(**overrides):
    """(ssd, ssd, attention), float32, rows of 64 tokens."""
    sizes = dict(
        model_num_layers=3,
        model_attention_period=3,
        model_attention_offset=2,
        model_d_model=32,
        model_num_heads=2,
        model_d_mlp=32,
        model_vocab_size=64,
        data_seq_len=L,
        data_global_batch=4,
        train_loss_chunk_tokens=16,
    )
    return small_config(**sizes | overrides)


def batch_of(config, documents):
    """Rows of the named documents, in turn, with random tokens."""
    rows = [DOCUMENTS[documents][i % 2] for i in range(config.data.global_batch)]
    segment_ids = np.stack([np.repeat(np.arange(len(row)), row) for row in rows])
    positions = np.stack([np.concatenate([np.arange(n) for n in row]) for row in rows])
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, segment_ids.shape)
    ends = np.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    targets = np.where(ends, IGNORED, np.roll(tokens, -1, axis=1))
    batch = dict(tokens=tokens, targets=targets, segment_ids=segment_ids, positions=positions)
    return {name: value.astype(np.int32) for name, value in batch.items()}


@functools.cache
def gradient_step(settings):
    """(mesh, jitted (params, batch) -> (sums, summed gradients)) of a config's mesh."""
    config = tiny(**dict(settings))
    sizes = [getattr(config.mesh, name) for name in mesh.AXES]
    device_mesh = mesh.build(config, jax.devices()[: math.prod(sizes)])
    shardings = step.state_shardings(config, device_mesh)['params']
    run = jax.jit(
        gradient.summed_gradient(config),
        in_shardings=(shardings, step.batch_sharding(device_mesh)),
        out_shardings=(None, shardings),
    )
    return config, device_mesh, run


def sums_and_gradients(documents, **settings):
    config, device_mesh, run = gradient_step(tuple(settings.items()))
    params = parameters.init_params(config.model, 0)
    with jax.set_mesh(device_mesh):
        return jax.device_get(run(params, batch_of(config, documents)))


def assert_equal_to_one_device(documents, settings, **of_model):
    sums, gradients = sums_and_gradients(documents, **settings, **of_model)
    expected_sums, expected = sums_and_gradients(documents, mesh_data=1, **of_model)
    assert sums['tokens'] == expected_sums['tokens'] > 0
    np.testing.assert_allclose(sums['nll'], expected_sums['nll'], rtol=1e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        reference = functools.reduce(lambda tree, key: tree[key.key], path, expected)
        error = np.linalg.norm(leaf - reference) / np.linalg.norm(reference)
        assert error < 1e-5, (path, error)


MESHES = {
    'context 8': dict(mesh_data=1, mesh_context=8, model_remat='hybrid'),
    'fsdp 2 context 4': dict(mesh_data=1, mesh_fsdp=2, mesh_context=4),
    'fsdp 2 context 2 tensor 2': dict(mesh_data=1, mesh_fsdp=2, mesh_context=2, mesh_tensor=2, model_remat='full'),
}
MORE_MESHES = {
    'context 2': dict(mesh_data=1, mesh_context=2),
    'context 4': dict(mesh_data=1, mesh_context=4, train_accumulation_steps=4),
    'context 4 tensor 2': dict(mesh_data=1, mesh_context=4, mesh_tensor=2, model_remat='hybrid'),
    'data 2 fsdp 2 context 2': dict(mesh_data=2, mesh_fsdp=2, mesh_context=2, model_remat='dots'),
    'data 2 context 4 twice': dict(mesh_data=2, mesh_context=4, train_accumulation_steps=2),
}


@pytest.mark.parametrize('name', [*MESHES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_MESHES)])
def test_losses_and_gradients_are_those_of_one_device(name):
    for documents in DOCUMENTS:
        assert_equal_to_one_device(documents, (MESHES | MORE_MESHES)[name])


# 'across borders' has documents that begin within the reach of the convolution from a border, 'of one token' many.
@pytest.mark.parametrize('documents', ['across borders', 'of one token', 'none over the border'])
@pytest.mark.parametrize(
    'pattern, encoding', [('attention', 'rope'), ('mamba2', 'rope'), ('2xmamba2,attention', 'none')]
)
def test_the_other_models_are_split_alike(pattern, encoding, documents):
    settings = dict(model_pattern=pattern, model_attention_encoding=encoding)
    assert_equal_to_one_device(documents, MESHES['fsdp 2 context 2 tensor 2'], **settings)


@pytest.mark.slow
def test_other_parameters_are_split_alike():
    assert_equal_to_one_device(
        'across borders',
        MESHES['fsdp 2 context 2 tensor 2'],
        model_use_bias=True,
        model_tie_embeddings=False,
        model_use_dt_bias=False,
        model_rope_scaling='length',
        model_rope_original_length=8,
    )


@pytest.mark.slow
def test_an_evaluation_is_that_of_one_device():
    sums = {}
    for name, sizes in {'one': dict(mesh_data=1), 'eight': dict(mesh_data=2, mesh_fsdp=2, mesh_context=2)}.items():
        config = tiny(**sizes, train_accumulation_steps=2, data_global_batch=8)
        device_mesh = mesh.build(config, jax.devices()[: 8 if name == 'eight' else 1])
        state = step.create_state(config, device_mesh)
        with jax.set_mesh(device_mesh):
            batch = mesh.global_batch(device_mesh, batch_of(config, 'across borders'), config.data.global_batch)
            sums[name] = jax.device_get(jax.jit(step.eval_step(config))(state['params'], batch))
    assert sums['eight']['tokens'] == sums['one']['tokens'] > 0
    np.testing.assert_allclose(sums['eight']['nll'], sums['one']['nll'], rtol=1e-6)


def test_dynamic_rope_scaling_sees_the_whole_row():
    config = tiny(mesh_data=2, mesh_context=4, model_rope_scaling='dynamic', model_rope_original_length=16)
    positions = np.stack([np.arange(L), np.arange(L) % 20, np.arange(L) % 16, np.arange(L) % 33])
    table = ('batch', 'length', None)

    def tables(positions):
        return rope.tables(positions, 16, config.model)

    with jax.set_mesh(mesh.build(config)):
        split = jax.jit(collectives.shard_map(tables, (mesh.BATCH,), (table, table)))(positions)
    for ours, whole in zip(split, tables(jnp.asarray(positions))):
        np.testing.assert_allclose(ours, whole, atol=1e-6)
