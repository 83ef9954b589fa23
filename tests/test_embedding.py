"""The embedding look-up: rows of the table, and a gradient that is summed in float32."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import small_config

from transxssm_jax.model.language_model import look_up
from transxssm_jax.parallel import mesh
from transxssm_jax.training import compilation
from transxssm_jax.training import step as step_lib


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize('outside', [0.0, np.nan])
def test_rows_are_those_of_the_table(outside, rng):
    table_VD, ids = rng.normal(size=(50, 6)).astype(np.float32), rng.integers(0, 60, (3, 7))
    rows = look_up(jnp.asarray(table_VD), jnp.asarray(ids, jnp.int32), outside)
    expected = np.where((ids < 50)[..., None], table_VD[np.minimum(ids, 49)], outside)
    np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_gradient_is_the_sum_of_float64_rounded_once(dtype, rng):
    """Ids as frequent as words of text, some of them outside."""
    ids = np.minimum(rng.zipf(1.3, (4, 1_000)), 80)
    weights = jnp.asarray(rng.normal(size=(4, 1_000, 6)), dtype)
    got = jax.grad(lambda table: (look_up(table, jnp.asarray(ids), 0.0) * weights).astype('float32').sum())(
        jnp.ones((70, 6), dtype)
    )
    expected, magnitude = np.zeros((81, 6)), np.zeros((81, 6))
    np.add.at(expected, ids, np.asarray(weights, np.float64))
    np.add.at(magnitude, ids, np.abs(np.asarray(weights, np.float64)))
    rounding = np.abs(expected) * (2.0**-8 if dtype == 'bfloat16' else 2.0**-24)
    assert got.dtype == dtype
    assert (np.abs(np.asarray(got, np.float64) - expected[:70]) <= (rounding + 2.0**-20 * magnitude)[:70]).all()


def test_a_frequent_id_keeps_its_whole_sum():
    """4,096 times 1 is 4,096; added up in bfloat16 it stops at 256, from which one step is 2."""
    ids, table = jnp.zeros((8, 512), jnp.int32), jnp.zeros((4, 2), 'bfloat16')
    gradient = jax.grad(lambda table: look_up(table, ids).astype('float32').sum())(table)
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), [[4096, 4096], [0, 0], [0, 0], [0, 0]])


@pytest.mark.parametrize('pattern', ['ssd,attention', 'mamba2'])
def test_no_scatter_of_the_train_step_adds_up_in_bfloat16(pattern):
    config = small_config(model_pattern=pattern, model_dtype='bfloat16')
    device_mesh = mesh.build(config, jax.devices()[:1])
    with jax.set_mesh(device_mesh):
        traced = jax.jit(step_lib.train_step(config)).trace(*compilation.abstract_inputs(config, device_mesh))
        text = traced.lower(lowering_platforms=('cuda',)).as_text()
    added = re.findall(r'"stablehlo\.scatter".*?stablehlo\.add %\S+, %\S+ : tensor<(\w+)>', text, re.DOTALL)
    assert 'f32' in added and 'bf16' not in added
