"""Perplexity by position: sums that are those of the logits, the same text at every length, refusals."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_fixtures
from data_fixtures import ids, run_prepare, train_tokenizer, write_jsonl
from flax import nnx
from small import small_config

from transxssm_jax import config as config_lib
from transxssm_jax.data.manifest import DataError
from transxssm_jax.evals import perplexity
from transxssm_jax.model.loss import IGNORED, next_token_loss
from transxssm_jax.model.parameters import init_params, split_model
from transxssm_jax.parallel import mesh
from transxssm_jax.training import checkpoint, run_directory

TRAINED = 32  # tokens of a row in training


@pytest.fixture(scope='module')
def config():
    return small_config(
        model_vocab_size=512,
        model_d_model=32,
        model_num_layers=2,
        model_num_heads=2,
        model_attention_period=2,
        model_attention_offset=1,
        model_d_mlp=32,
        data_seq_len=TRAINED,
    )


@pytest.fixture(scope='module')
def params(config):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(functools.partial(init_params, config.model), 0)
    return jax.tree.map_with_path(
        lambda path, leaf: (
            np.float32(path[-1].key in ('scale', 'weight')) + 0.1 * rng.standard_normal(leaf.shape, np.float32)
        ),
        shapes,
    )


@pytest.fixture(scope='module')
def spans():
    text = np.random.default_rng(0).integers(0, 257, (2, 1 + 4 * TRAINED)).astype(np.int32)
    return text[:, :-1], text[:, 1:]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """(prepared directory, its held-out documents): two long ones among short ones."""
    directory = tmp_path_factory.mktemp('data')
    texts = [
        f'{i}: ' + ''.join(chr(97 + (i * j) % 26) for j in range(length))
        for i, length in enumerate((5, 40, 200, 3, 310, 17, 90))
    ]
    for split in ('train', 'validation'):
        assert run_prepare(directory / 'prepared', write_jsonl(directory / f'{split}.jsonl', texts), split=split) == 0
    return directory / 'prepared', [ids(text) for text in texts]


def test_losses_of_tokens_are_those_of_the_logits():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden_BLD, head_VD = jax.random.normal(keys[0], (2, 7, 16)), jax.random.normal(keys[1], (40, 16))
    targets_BL = jax.random.randint(keys[2], (2, 7), 0, 40).at[1, 2:5].set(IGNORED)
    nll_BL = perplexity.token_losses(hidden_BLD, head_VD, targets_BL, vocab_size=40, chunk_tokens=4)
    logits = jax.nn.log_softmax(hidden_BLD @ head_VD.T)
    expected = -jnp.take_along_axis(logits, jnp.maximum(targets_BL, 0)[..., None], -1)[..., 0] * (targets_BL != IGNORED)
    np.testing.assert_allclose(nll_BL, expected, rtol=1e-5, atol=1e-6)
    _, sums = next_token_loss(hidden_BLD, head_VD, targets_BL, z_loss=0.0, chunk_tokens=8)
    np.testing.assert_allclose(nll_BL.sum(), sums['nll'], rtol=1e-5)


def test_logits_of_a_window_never_exist_whole():
    L, D, V = 4096, 16, 512
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((1, L, D), jnp.float32), ((V, D), jnp.float32), ((1, L), jnp.int32))
    ]
    losses = functools.partial(perplexity.token_losses, vocab_size=V, chunk_tokens=64)
    compiled = jax.jit(losses).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < L * V * 4 / 4


@pytest.mark.parametrize('length, batch', [(2 * TRAINED, 1), (TRAINED, 3)])
def test_losses_by_position_are_those_of_each_window_by_itself(config, params, spans, length, batch):
    done = []
    nats_L, counts_L = perplexity.losses_by_position(params, config, spans, length, batch=batch, advance=done.append)
    model = nnx.merge(split_model(config.model)[0], params)
    log_probabilities = jax.jit(lambda tokens_BL: jax.nn.log_softmax(model.logits(tokens_BL)))
    expected_L, expected_counts_L = np.zeros(length), np.zeros(length, int)
    for tokens, targets in zip(*spans):
        for start in range(0, len(tokens), length):
            logits = np.asarray(log_probabilities(tokens[None, start : start + length]))[0]
            expected_L -= logits[np.arange(length), targets[start : start + length]]
            expected_counts_L += 1
    np.testing.assert_array_equal(counts_L, expected_counts_L)
    np.testing.assert_allclose(nats_L, expected_L, rtol=1e-4)
    assert sum(done) == spans[0].size


@pytest.mark.parametrize('sizes', [dict(data=4, fsdp=1, tensor=2), dict(data=1, fsdp=2, tensor=2, context=2)])
def test_losses_are_the_same_on_a_mesh(config, params, spans, sizes):
    expected_L, counts_L = perplexity.losses_by_position(params, config, spans, TRAINED, batch=3)
    done = []
    with jax.set_mesh(mesh.build(config_lib.replace(config, {f'mesh.{name}': size for name, size in sizes.items()}))):
        found_L, found_counts_L = perplexity.losses_by_position(
            params, config, spans, TRAINED, batch=3, advance=done.append
        )
    np.testing.assert_array_equal(found_counts_L, counts_L)
    np.testing.assert_allclose(found_L, expected_L, rtol=1e-4)
    assert sum(done) == spans[0].size


def test_scalings_differ_only_beyond_the_training_length(config, params, spans):
    results = perplexity.evaluate(
        params,
        config,
        spans,
        lengths=[TRAINED, 4 * TRAINED],
        scalings=list(perplexity.SCALINGS),
        factor=4.0,
        batch=2,
    )
    by = {(result['rope_scaling'], result['length']): result for result in results}
    assert len(by) == 8
    within = {scaling: by[scaling, TRAINED]['nats_per_token'] for scaling in perplexity.SCALINGS}
    assert within['length'] == within['none']
    # The frequencies of 'dynamic' are computed on the device, in float32.
    assert within['dynamic'] == pytest.approx(within['none'], rel=1e-6)
    assert within['linear'] != pytest.approx(within['none'], rel=1e-5)
    beyond = {by[scaling, 4 * TRAINED]['buckets'][-1]['nats_per_token'] for scaling in perplexity.SCALINGS}
    assert len(beyond) == 4
    # The length scale acts on the tokens beyond the training length alone.
    of_none, of_length = (by[scaling, 4 * TRAINED]['buckets'] for scaling in ('none', 'length'))
    assert of_none[0]['nats_per_token'] == pytest.approx(of_length[0]['nats_per_token'], rel=1e-5)
    for result in results:
        # Every length scores every token of a span.
        assert result['tokens'] == spans[0].size == sum(bucket['tokens'] for bucket in result['buckets'])
        mean = sum(bucket['tokens'] * bucket['nats_per_token'] for bucket in result['buckets']) / result['tokens']
        assert mean == pytest.approx(result['nats_per_token'])
        assert result['perplexity'] == pytest.approx(np.exp(result['nats_per_token']))
    text = perplexity.table(results, TRAINED)
    assert '64-128+' in text and f'{by["none", TRAINED]["nats_per_token"]:.4f}' in text


def test_bucket_edges():
    assert perplexity.bucket_edges(32768, 4096) == [0, 1024, 2048, 4096, 8192, 16384, 32768]
    assert perplexity.bucket_edges(5000, 4096) == [0, 1024, 2048, 4096, 5000]
    assert perplexity.bucket_edges(100, 4096) == [0, 100]
    assert perplexity.bucket_edges(6, 2) == [0, 1, 2, 4, 6]


def test_spans(data):
    """Long documents from their start, or all documents joined; each document begins with the begin token."""
    path, documents = data
    begin = 300
    pairs = [np.stack([[begin, *document[:-1]], document]) for document in documents]

    def read(documents, count=0):
        return np.stack(
            perplexity.read_spans(path, 'validation', 100, begin=begin, documents=documents, count=count), axis=1
        )

    long = [pair[:, i : i + 100] for pair in pairs for i in range(0, pair.shape[1] - 99, 100)]
    assert len(long) == 5
    np.testing.assert_array_equal(read('long'), long)
    np.testing.assert_array_equal(read('long', 3), long[:3])
    joined = np.concatenate(pairs, axis=1)
    cut = [joined[:, i : i + 100] for i in range(0, joined.shape[1] - 99, 100)]
    np.testing.assert_array_equal(read('joined'), cut)
    np.testing.assert_array_equal(read('joined', 2), cut[:2])
    with pytest.raises(DataError, match='no document of 400 tokens in split .*, the longest has 314'):
        perplexity.read_spans(path, 'validation', 400, begin=begin, documents='long', count=0)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, config, params, data):
    directory = tmp_path_factory.mktemp('run')
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(data[0])))
    run_directory.open_workdir(directory, config)
    checkpoints = checkpoint.Checkpoints(directory, config)
    zeros = jax.tree.map(np.zeros_like, params)
    checkpoints.save(1, {'step': np.int32(1), 'params': params, 'opt_state': {'mu': zeros, 'nu': zeros}}, {})
    checkpoints.close()
    return directory


def test_command(workdir, data, capsys):
    argv = [f'--workdir={workdir}', '--lengths=1x,48', '--rope_scaling=none,length', '--windows=0']
    assert perplexity.main(argv) == 0
    out = capsys.readouterr().out
    (path,) = (workdir / 'evals').glob('perplexity-step-1-*.json')
    report = json.loads(path.read_text())
    first = out.splitlines()[0]
    assert f'{workdir} at step 1: 2 rope scalings x 2 lengths over' in first and first.endswith(str(path))
    assert (report['workdir'], report['step'], len(report['config_digest'])) == (str(workdir), 1, 64)
    assert (
        report['command'].startswith('python -m transxssm_jax.evals.perplexity --workdir=')
        and report['versions']['jax']
    )
    assert [(r['rope_scaling'], r['length']) for r in report['results']] == [
        ('none', 32),
        ('none', 48),
        ('length', 32),
        ('length', 48),
    ]
    spans = sum(len(document) // 48 for document in data[1])
    assert report['results'][1]['windows'] == spans and report['results'][1]['tokens'] == 48 * spans
    assert report['training_length'] == TRAINED and report['documents'] == 'long'
    assert f'{report["results"][1]["perplexity"]:.4g}' in out and out.endswith(f'results written to {path}\n')


def test_bad_input_is_reported_in_one_line(workdir, data, tmp_path, capsys):
    def refused(message, *argv):
        assert perplexity.main([f'--workdir={workdir}', *argv]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1, error

    refused('does not exist', f'--workdir={tmp_path / "none"}')
    refused('has no checkpoint of step 4', '--step=4')
    refused("'9y' must be a number of tokens", '--lengths=1x,9y')
    refused("'1' must be a number of tokens of at least 2", '--lengths=1')
    refused(
        '--rope_scaling=yarn is not one of the choices; known: dynamic, length, linear, none', '--rope_scaling=yarn'
    )
    refused('no document of 512 tokens', '--lengths=16x')
    refused('less than one window of 32768', '--lengths=1024x', '--documents=joined')
    refused('has no split', '--split=test')
    refused('holds no prepared data', f'--data={tmp_path}')
    (tmp_path / 'old.json').write_text('')
    refused('old.json exists; name a new file', f'--output={tmp_path / "old.json"}')
    refused('its directory does not exist', '--output=/nowhere/new.json')
    refused('--batch=0 must be at least 1', '--batch=0')
    refused('--rope_factor=0.5 must be at least 1', '--rope_factor=0.5')
    train_tokenizer(tmp_path / 'tokenizer.json', ['<|endoftext|>'])
    assert (
        run_prepare(
            tmp_path / 'words',
            write_jsonl(tmp_path / 'text.jsonl', ['some text'] * 5),
            split='validation',
            tokenizer=tmp_path / 'tokenizer.json',
        )
        == 0
    )
    capsys.readouterr()
    refused('has another tokenizer than the training data', f'--data={tmp_path / "words"}', '--lengths=2')
    assert train_fixtures.checkpoint_steps(workdir) == [1]
