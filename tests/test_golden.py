"""The mathematics is the published one: logits and loss of a checkpoint computed by the published code."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import DIRECTORY, load_golden

from transxssm_jax.loss import IGNORED, next_token_loss
from transxssm_jax.step import init_params, split_model

pytestmark = pytest.mark.skipif(not DIRECTORY.exists(), reason=f'{DIRECTORY} is absent')


@pytest.fixture(scope='module')
def golden():
    config, params, expected = load_golden()
    model = nnx.merge(split_model(config.model)[0], params)
    return config, params, expected, model


def test_names_and_shapes_are_those_of_a_fresh_model(golden):
    config, params, _, _ = golden
    fresh = init_params(config.model, 0)
    assert nnx.traversals.flatten_mapping(fresh).keys() == nnx.traversals.flatten_mapping(params).keys()
    for name, leaf in nnx.traversals.flatten_mapping(fresh).items():
        assert leaf.shape == nnx.traversals.flatten_mapping(params)[name].shape, name


def test_logits(golden):
    _, _, expected, model = golden
    logits = model.logits(jnp.asarray(expected['input_ids']))
    np.testing.assert_allclose(logits, expected['logits'], atol=1e-4)


def test_logits_of_a_shorter_prefix_are_the_published_decode_logits(golden):
    _, _, expected, model = golden
    start = int(expected['prefill']) - 1
    logits = model.logits(jnp.asarray(expected['input_ids']))
    np.testing.assert_allclose(logits[:, start:start + 32], expected['decode_logits'], atol=1e-4)


def test_loss(golden):
    _, _, expected, model = golden
    ids = jnp.asarray(expected['input_ids'])
    targets = jnp.concatenate([ids[:, 1:], jnp.full_like(ids[:, :1], IGNORED)], axis=1)
    objective, sums = next_token_loss(model(ids), model.head_VD, targets, z_loss=0.0, chunk_tokens=32)
    assert abs(objective / sums['tokens'] - expected['loss']) < 1e-6
