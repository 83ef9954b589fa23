"""Properties of the train step: the same numbers on every mesh, under accumulation and under every remat policy."""

import functools

import jax
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from small import packed_batch, small_config

from transxssm_jax.config import ConfigError
from transxssm_jax.model import parameters
from transxssm_jax.parallel import mesh
from transxssm_jax.training import step


def losses_and_state(config, num_devices=1, steps=3):
    device_mesh = mesh.build(config, jax.devices()[:num_devices])
    state = step.create_state(config, device_mesh)
    shardings = step.state_shardings(config, device_mesh)
    run = jax.jit(
        step.train_step(config),
        donate_argnums=0,
        in_shardings=(shardings, step.batch_sharding(device_mesh)),
        out_shardings=(shardings, None),
    )
    losses = []
    with jax.set_mesh(device_mesh):
        for seed in range(steps):
            state, metrics = run(state, jax.device_put(packed_batch(config, seed), step.batch_sharding(device_mesh)))
            losses.append([float(metrics[name]) for name in ('loss', 'grad_norm', 'update_norm')])
    return np.array(losses), state


@functools.cache
def one_device():
    return losses_and_state(small_config())


def test_loss_falls_on_a_repeated_batch():
    config = small_config()
    run = jax.jit(step.train_step(config))
    state, batch = step.create_state(config, mesh.build(config, jax.devices()[:1])), packed_batch(config)
    first, last = None, None
    for _ in range(15):
        state, metrics = run(state, batch)
        first, last = first or float(metrics['loss']), float(metrics['loss'])
    assert abs(first - np.log(config.model.vocab_size)) < 0.3
    assert last < first - 0.5


@pytest.mark.parametrize(
    'axes',
    [
        dict(mesh_data=8),
        dict(mesh_data=1, mesh_fsdp=8),
        dict(mesh_data=4, mesh_tensor=2),
        dict(mesh_data=2, mesh_fsdp=2, mesh_tensor=2),
    ],
    ids=lambda axes: '-'.join(f'{k}{v}' for k, v in axes.items()),
)
def test_mesh_equals_one_device(axes):
    expected, expected_state = one_device()
    losses, state = losses_and_state(small_config(**axes), num_devices=8)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state['params']):
        reference = functools.reduce(lambda tree, key: tree[key.key], path, expected_state['params'])
        np.testing.assert_allclose(leaf, reference, atol=3e-4, err_msg=str(path))


def test_state_is_created_in_shards():
    config = small_config(mesh_data=1, mesh_fsdp=4, mesh_tensor=2)
    state = step.create_state(config, mesh.build(config))
    for tree in (state['params'], *state['opt_state'].values()):
        assert tree['embedding'].addressable_shards[0].data.size == tree['embedding'].size // 8
        x_proj = tree['layers']['ssd']['mixer']['in_proj']['x']['kernel']
        assert x_proj.addressable_shards[0].data.size == x_proj.size // 8
    np.testing.assert_allclose(
        state['params']['embedding'], parameters.init_params(config.model, 0)['embedding'], atol=1e-6
    )


def test_accumulation_equals_one_batch():
    losses, _ = losses_and_state(small_config(train_accumulation_steps=4))
    np.testing.assert_allclose(losses, one_device()[0], rtol=2e-5)
    losses, _ = losses_and_state(small_config(train_accumulation_steps=2, mesh_data=2, mesh_fsdp=2), num_devices=4)
    np.testing.assert_allclose(losses, one_device()[0], rtol=2e-5)


def test_evaluation_is_in_microbatches_too():
    sums, memory = {}, {}
    for accumulation_steps in (1, 16):
        config = small_config(train_accumulation_steps=accumulation_steps, data_global_batch=64)
        params, batch = parameters.init_params(config.model, 0), packed_batch(config)
        compiled = jax.jit(step.eval_step(config)).lower(params, batch).compile()
        sums[accumulation_steps] = compiled(params, batch)
        memory[accumulation_steps] = compiled.memory_analysis().temp_size_in_bytes
    assert float(sums[16]['tokens']) == float(sums[1]['tokens'])
    np.testing.assert_allclose(sums[16]['nll'], sums[1]['nll'], rtol=1e-6)
    assert memory[16] < memory[1] / 2


@pytest.mark.parametrize('policy', ['full', 'dots', 'hybrid', '5xhybrid,2xmatmuls,none'])
def test_remat_equals_plain(policy):
    losses, _ = losses_and_state(small_config(model_remat=policy))
    np.testing.assert_allclose(losses, one_device()[0], rtol=1e-5)


def test_remat_policies_save_what_they_say():
    saved = {}
    for policy in ('none', 'full', 'dots', 'hybrid'):
        config = small_config(model_remat=policy, data_global_batch=8, data_seq_len=512, model_ssd_chunk_size=64)
        compiled = (
            jax.jit(step.train_step(config))
            .lower(
                jax.eval_shape(lambda c=config: step.init_state(c, 0)),
                jax.eval_shape(lambda c=config: packed_batch_shapes(c)),
            )
            .compile()
        )
        saved[policy] = compiled.memory_analysis().temp_size_in_bytes
    assert saved['full'] < saved['hybrid'] < saved['none']
    assert saved['full'] < saved['dots']


def packed_batch_shapes(config):
    return jax.tree.map(jax.numpy.asarray, packed_batch(config))


@pytest.mark.parametrize(
    'overrides, message',
    [
        (dict(data_global_batch=30), 'data.global_batch=30 must be divisible by 8 data shards; try 24 or 32'),
        (dict(mesh_data=3), 'must multiply to the 8 devices'),
        (dict(mesh_tensor=8), 'model.num_heads=4 must be divisible by mesh.tensor=8; try mesh.tensor=4'),
        (dict(mesh_tensor=4), 'model.num_kv_heads=2 must be divisible by mesh.tensor=4; try mesh.tensor=2'),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message.replace('.', r'\.')):
        mesh.build(small_config(**overrides))


DEVICES = {
    'tpu': jax.sharding.AbstractDevice('TPU v5 lite', 1, 'tpu'),
    'cuda': jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu'),
}
KERNELS = {
    'tpu': ['rotary_ssd_forward', 'rotary_ssd_backward', 'splash_mha_fwd', 'splash_mha_dq', 'splash_mha_dkv'],
    'cuda': ['rotary_ssd_forward', 'rotary_ssd_backward', 'fmhaSoftmax', 'fmhaSoftmaxBackward'],
}  # fmt: skip


@pytest.mark.parametrize('loop', ['scan', 'unrolled', 'auto'])
@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_a_step_lowers_with_the_kernels_of_a_platform(platform, loop, monkeypatch):
    """For devices that are not here. A kernel is traced once, with its layer, and differentiated elsewhere: in a scan, or
    after a jit of the layer."""
    # JAX asks for the cuDNN library while tracing, even when only lowering.
    monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 92100)
    sizes = dict(model_d_model=256, model_d_state=128, model_dtype='bfloat16', model_num_layers=4, data_seq_len=256)
    settings = dict(model_layer_loop=loop, model_remat='hybrid', model_ssd_chunk_size=0, mesh_data=2, mesh_fsdp=2)
    config = small_config(**sizes, **settings)
    axes = dict(axis_types=mesh.build(small_config()).axis_types, abstract_device=DEVICES[platform])
    device_mesh = jax.sharding.AbstractMesh((2, 2, 1, 1), mesh.AXES, **axes)
    state = jax.eval_shape(lambda: step.init_state(config, 0))
    with jax.sharding.use_abstract_mesh(device_mesh):
        text = (
            jax.jit(step.train_step(config))
            .trace(state, packed_batch(config))
            .lower(lowering_platforms=(platform,))
            .as_text()
        )
    assert [name for name in KERNELS[platform] if name not in text] == []
    assert ('func.func private @of_one' in text) == (loop != 'scan'), 'unrolled layers are calls of one function'
