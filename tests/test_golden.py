"""The mathematics is the published one: logits and loss of a checkpoint computed by the published code."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import DIRECTORY, load_golden
from safetensors.numpy import load_file

from transxssm_jax.inference.decode import Decoder
from transxssm_jax.model.loss import IGNORED, next_token_loss
from transxssm_jax.model.parameters import init_params, split_model
from transxssm_jax.pytorch import conversion
from transxssm_jax.training import checkpoint

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


def test_decoding_gives_the_published_decode_logits(golden):
    config, params, expected, _ = golden
    tokens, prefill = expected['input_ids'].astype(np.int32), int(expected['prefill'])
    rows, length = tokens.shape
    decoder, whole = Decoder(params, config), np.full(rows, length, np.int32)
    state = decoder.prefill(decoder.empty(rows, length), tokens[:, :prefill], np.full(rows, prefill, np.int32), whole)
    logits = [np.asarray(state['logits_BV'])]
    for t in range(prefill, prefill + expected['decode_logits'].shape[1] - 1):
        state = decoder.step(state, tokens[:, t], whole)
        logits.append(np.asarray(state['logits_BV']))
    np.testing.assert_allclose(np.stack(logits, axis=1), expected['decode_logits'], atol=1e-4)


def test_loss(golden):
    _, _, expected, model = golden
    ids = jnp.asarray(expected['input_ids'])
    targets = jnp.concatenate([ids[:, 1:], jnp.full_like(ids[:, :1], IGNORED)], axis=1)
    objective, sums = next_token_loss(model(ids), model.head_VD, targets, z_loss=0.0, chunk_tokens=32)
    assert abs(objective / sums['tokens'] - expected['loss']) < 1e-6


def test_an_imported_run_has_the_logits_and_exports_the_bytes(golden, tmp_path):
    _, _, expected, _ = golden
    conversion.import_pytorch(DIRECTORY, tmp_path / 'run')
    params, config = checkpoint.load_trained(tmp_path / 'run')
    model = nnx.merge(split_model(config.model)[0], params)
    np.testing.assert_allclose(model.logits(jnp.asarray(expected['input_ids'])), expected['logits'], atol=1e-4)
    conversion.export_pytorch(tmp_path / 'run', tmp_path / 'out')
    before, after = (load_file(directory / 'model.safetensors') for directory in (DIRECTORY, tmp_path / 'out'))
    assert before.keys() == after.keys()
    assert all(
        before[name].tobytes() == after[name].tobytes() and before[name].shape == after[name].shape for name in before
    )
