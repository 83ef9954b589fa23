"""Linear maps with 8-bit operands: the rounding is as large as the types say, gradients follow, and a model still learns."""

import builtins
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import small_config

from transxssm_jax import cli
from transxssm_jax.config import Config, ConfigError, Data, Model, Optimizer, Train
from transxssm_jax.model import quantized
from transxssm_jax.parallel import mesh as mesh_lib
from transxssm_jax.training import compilation
from transxssm_jax.training import step as step_lib

# A number of float8_e4m3fn is off by at most 1/16, one of float8_e5m2 by at most 1/8, uniformly below that; of int8 the
# largest of a token is 127. Products of independent roundings add up in the square.
EXPECTED = {'fp8': (0.04, 0.08, 0.08), 'int8': (0.013, 0.013, 1e-6)}


def relative(value, exact):
    return float(np.linalg.norm(np.asarray(value, np.float64) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize('quantization', ['fp8', 'int8'])
def test_products_and_gradients_are_off_by_the_rounding_alone(quantization):
    rng = np.random.default_rng(0)
    # Tokens and outputs of several sizes, and outliers, which a scale per matrix must carry.
    x = rng.normal(size=(2, 24, 64)) * np.exp(rng.normal(size=(2, 24, 1)))
    kernel = rng.normal(size=(64, 48)) * 0.02 * np.exp(rng.normal(size=(48,)))
    dy = rng.normal(size=(2, 24, 48)) * 1e-4
    y, pullback = jax.vjp(
        functools.partial(quantized.matmul, quantization=quantization),
        jnp.asarray(x, jnp.float32),
        jnp.asarray(kernel, jnp.float32),
    )
    dx, d_kernel = pullback(jnp.asarray(dy, jnp.float32))
    exact = x @ kernel, dy @ kernel.T, np.einsum('bli,blo->io', x, dy)
    errors = [relative(value, right) for value, right in zip((y, dx, d_kernel), exact)]
    assert all(error < limit for error, limit in zip(errors, EXPECTED[quantization])), errors
    if quantization == 'fp8':
        assert min(errors) > 0.01  # it did round


def test_zeros_and_the_range_of_the_types_give_finite_products():
    for quantization in quantized.TYPES:
        for scale in (0.0, 1e-12, 1e15):
            x = jnp.full((4, 32), scale, jnp.bfloat16)
            y, pullback = jax.vjp(
                functools.partial(quantized.matmul, quantization=quantization), x, jnp.eye(32, dtype=x.dtype)
            )
            np.testing.assert_allclose(np.asarray(y, np.float64), np.asarray(x, np.float64), rtol=0.01)
            assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in pullback(x))


@pytest.mark.parametrize('quantization', ['fp8', 'int8'])
@pytest.mark.parametrize('policy', ['everything_saveable', 'dots_saveable', 'nothing_saveable'])
def test_checkpoints_keep_every_number_of_the_types(quantization, policy):
    """float8_e4m3fn has numbers where types with infinity have it, which jax.checkpoint does not know."""
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 32, 64), (64, 64)))

    def twice(x, kernel):
        return quantized.matmul(jnp.tanh(quantized.matmul(x, kernel, quantization)), kernel, quantization)

    kept = jax.checkpoint(twice, policy=getattr(jax.checkpoint_policies, policy))
    plain, found = (
        jax.jit(jax.value_and_grad(lambda x, kernel: (f(x, kernel) ** 2).sum(), argnums=(0, 1)))(x, kernel)  # noqa: B023
        for f in (twice, kept)
    )
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(found)):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(other, one, rtol=0.02, atol=0.01 * float(np.abs(one).max()))


def losses(quantization, **mesh):
    config = Config(
        model=Model(
            vocab_size=256,
            d_model=64,
            num_layers=2,
            attention_period=2,
            attention_offset=1,
            num_heads=4,
            num_kv_heads=2,
            num_ssd_groups=2,
            d_state=16,
            d_mlp=128,
            quantization=quantization,
        ),
        data=Data(seq_len=64, global_batch=8),
        optimizer=Optimizer(learning_rate=1e-2, warmup_steps=2),
        train=Train(steps=30, accumulation_steps=1),
    )
    for axis, size in mesh.items():
        setattr(config.mesh, axis, size)
    device_mesh = mesh_lib.build(config, jax.devices()[: max(1, int(np.prod(list(mesh.values()))))])
    # Every token says which one follows.
    start = np.random.default_rng(0).integers(0, 256, (8, 1))
    tokens = ((start + 7 * np.arange(65)) % 256).astype(np.int32)
    place = np.tile(np.arange(64, dtype=np.int32), (8, 1))
    batch = dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], segment_ids=np.ones_like(place), positions=place)
    with jax.set_mesh(device_mesh):
        state = step_lib.create_state(config, device_mesh)
        batch = jax.device_put(batch, step_lib.batch_sharding(device_mesh))
        step = jax.jit(step_lib.train_step(config), donate_argnums=0)
        found = []
        for _ in range(30):
            state, metrics = step(state, batch)
            found.append(float(metrics['loss']))
    return found


@pytest.fixture(scope='module')
def bfloat16_losses():
    return losses('none')


@pytest.mark.parametrize('quantization', ['fp8', 'int8'])
def test_a_model_learns_as_it_does_in_bfloat16(quantization, bfloat16_losses):
    found = losses(quantization)
    assert found[0] != bfloat16_losses[0]  # it is another computation
    np.testing.assert_allclose(found[0], bfloat16_losses[0], rtol=2e-3)
    assert found[-1] < 0.5 * found[0]
    np.testing.assert_allclose(found[10], bfloat16_losses[10], rtol=0.05)


@pytest.mark.parametrize('pattern', ['ssd', 'attention', 'mamba2'])
def test_the_products_of_the_mlp_are_quantized_and_no_others(pattern):
    config = small_config(model_pattern=pattern, model_quantization='fp8', model_remat='none', model_num_layers=1)
    device_mesh = mesh_lib.build(config, jax.devices()[:1])
    with jax.set_mesh(device_mesh):
        traced = jax.jit(step_lib.train_step(config)).trace(*compilation.abstract_inputs(config, device_mesh))
    products = re.findall(r'stablehlo\.dot_general.*?: \((.*?), (.*?)\) -> ', traced.lower().as_text())
    of_8_bits = [pair for pair in products if all('f8E' in operand for operand in pair)]
    assert len(of_8_bits) == 9 < len(products)  # gate, up and out: forward, and the gradients of input and weights
    assert all(re.search(rf'[<x]{config.model.d_mlp}x', ' '.join(pair)) for pair in of_8_bits)


def test_a_model_without_mlps_has_nothing_to_quantize():
    with pytest.raises(ConfigError, match=r"model.quantization='fp8' acts on the MLPs, and with model.d_mlp=0"):
        small_config(model_pattern='mamba2', model_quantization='fp8', model_d_mlp=0)


def test_shards_round_by_scales_of_their_own(bfloat16_losses):
    found = losses('fp8', data=1, fsdp=2, tensor=2)
    np.testing.assert_allclose(found[0], bfloat16_losses[0], rtol=2e-3)
    np.testing.assert_allclose(found[10], bfloat16_losses[10], rtol=0.05)


def test_a_missing_library_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == 'qwix':
            raise ImportError('No module named qwix')
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(cli.MissingPackageError, match=r'model.quantization needs qwix .*pip install') as raised:
        losses('int8')
    assert raised.value.exit_code == cli.ExitCode.WRONG_INPUT and '\n' not in str(raised.value)
