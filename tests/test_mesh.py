"""The mesh: sizes of axes, slices, and which part of a batch a process puts on its devices."""

import types

import jax
import numpy as np
import pytest
from small import packed_batch, small_config

from transxssm_jax.config import ConfigError
from transxssm_jax.parallel import mesh


@pytest.mark.parametrize('axis', mesh.AXES)
def test_any_axis_takes_what_is_left(axis):
    given = {name: 2 for name in mesh.AXES if name != axis} | {axis: -1}
    device_mesh = mesh.build(small_config(**{f'mesh_{name}': size for name, size in given.items()}))
    assert device_mesh.axis_names == mesh.AXES
    assert device_mesh.devices.shape == tuple(1 if name == axis else 2 for name in mesh.AXES)


@pytest.mark.parametrize(
    'overrides, message',
    [
        (
            dict(mesh_data=1, mesh_context=8, data_seq_len=40),
            'data.seq_len=40 must be divisible by 2 x mesh.context=8; try 32 or 48',
        ),
        (
            dict(mesh_data=1, mesh_context=8, data_seq_len=8),
            'data.seq_len=8 must be divisible by 2 x mesh.context=8; try 16',
        ),
        (
            dict(mesh_data=3, mesh_context=2),
            'mesh.data=3 x mesh.fsdp=1 x mesh.context=2 x mesh.tensor=1 must multiply to the 8',
        ),
        (dict(mesh_slices=2), 'mesh.slices=2, but the 8 devices are of 1; set mesh.slices=1'),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(overrides, message):
    with pytest.raises(ConfigError) as error:
        mesh.build(small_config(**overrides))
    assert message in str(error.value)


# ---- slices ----------------------------------------------------------------


def devices_of(slices, each):
    """Stand-ins for devices, in an order that mixes the slices."""
    return [
        types.SimpleNamespace(id=i, slice_index=i % slices, platform='cpu', device_kind='cpu', process_index=i % slices)
        for i in range(slices * each)
    ]


def slice_of(arranged):
    return np.vectorize(lambda device: device.slice_index)(arranged)


def axes(**sizes):
    return dict.fromkeys(mesh.AXES, 1) | sizes


def test_slices_are_laid_along_data():
    of = slice_of(mesh.arrange(devices_of(2, 8), axes(data=4, context=2, tensor=2), 2))
    assert of.shape == (4, 1, 2, 2)
    assert (of[:2] == 0).all() and (of[2:] == 1).all()


def test_slices_beyond_data_are_laid_along_fsdp():
    of = slice_of(mesh.arrange(devices_of(4, 4), axes(data=2, fsdp=4, tensor=2), 4))
    assert of[:, :, 0, 0].tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]
    assert (of == of[:, :, :, :1]).all()


def test_every_device_has_one_place():
    devices = devices_of(3, 4)
    arranged = mesh.arrange(devices, axes(data=3, fsdp=2, context=2), 3)
    assert sorted(device.id for device in arranged.flat) == list(range(12))


def test_context_does_not_cross_slices():
    with pytest.raises(ConfigError) as error:
        mesh.arrange(devices_of(2, 4), axes(context=8), 2)
    assert str(error.value) == (
        'mesh.data=1 x mesh.fsdp=1 must be divisible by mesh.slices=2, for only these two reach '
        'across slices; try mesh.data=2'
    )


def test_a_wrong_number_of_slices_is_refused():
    with pytest.raises(ConfigError, match='mesh.slices=1, but the 8 devices are of 2; set mesh.slices=2'):
        mesh.arrange(devices_of(2, 4), axes(data=8), 1)


# ---- batches ---------------------------------------------------------------


@pytest.mark.parametrize(
    'sizes',
    [dict(mesh_data=8), dict(mesh_data=2, mesh_context=4), dict(mesh_data=2, mesh_fsdp=2, mesh_context=2)],
    ids=lambda sizes: '-'.join(f'{name}{size}' for name, size in sizes.items()),
)
def test_a_global_batch_is_the_rows_in_order(sizes):
    config = small_config(**sizes)
    device_mesh, batch = mesh.build(config), packed_batch(config)
    assert mesh.rows_of_this_process(device_mesh, 8).tolist() == list(range(8))
    arrays = mesh.global_batch(device_mesh, batch, 8)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, batch[name])
        assert array.dtype == np.int32
    shards = device_mesh.shape['data'] * device_mesh.shape['fsdp'], device_mesh.shape['context']
    assert arrays['tokens'].addressable_shards[0].data.shape == (8 // shards[0], 48 // shards[1])


def test_a_process_places_its_part_of_rows_it_shares(monkeypatch):
    """Devices 0 and 1 hold halves of rows 0 and 1, as when each belongs to a process of its own, which reads both rows."""
    config = small_config(mesh_data=2, mesh_context=2, data_global_batch=4)
    device_mesh, batch = mesh.build(config, jax.devices()[:4]), packed_batch(config)
    blocks = {}

    def of_one_process(shape, sharding, block):
        index = sharding.devices_indices_map(shape)[device_mesh.devices[1, 0, 1, 0]]
        blocks['sharding'], blocks['block'] = sharding, block(index)

    monkeypatch.setattr(jax, 'make_array_from_callback', of_one_process)
    monkeypatch.setattr(mesh, 'rows_of_this_process', lambda device_mesh, size: np.array([2, 3]))
    mesh.global_batch(device_mesh, {'tokens': batch['tokens'][2:]}, 4)
    np.testing.assert_array_equal(blocks['block'], batch['tokens'][2:, 24:])
