"""Log-likelihoods of continuations: those of the forward pass, whatever the batch."""

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eval_fixtures import SMALLER, random_params
from flax import nnx
from small import small_config

from transxssm_jax.data import packing
from transxssm_jax.evals import scoring
from transxssm_jax.model import parameters
from transxssm_jax.model.language_model import is_unrolled
from transxssm_jax.parallel import mesh

NINETY = types.SimpleNamespace(vocab_size=90, begin_id=7)


@pytest.fixture(scope='module')
def model():
    """(params, config, log-probabilities [rows, 96, V] of rows of at most 96 tokens by the plain forward pass)."""
    config = small_config(**SMALLER)
    params = random_params(config)
    graph, _ = parameters.split_model(config.model)

    @jax.jit
    def forward(tokens_BL):
        return jax.nn.log_softmax(nnx.merge(graph, params).logits(tokens_BL))

    def of_rows(rows):
        tokens_BL = np.zeros((48, 96), np.int32)
        for i, row in enumerate(rows):
            tokens_BL[i, : len(row)] = row
        return np.asarray(forward(tokens_BL))

    return params, config, of_rows


@pytest.fixture(scope='module')
def scorer(model):
    params, config, _ = model
    return scoring.Scorer(params, config, NINETY, max_length=40, batch_tokens=256)


def random_pairs(count, longest_context, longest_continuation, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (
            rng.integers(0, 90, rng.integers(1, longest_context)).tolist(),
            rng.integers(0, 90, rng.integers(0, longest_continuation)).tolist(),
        )
        for _ in range(count)
    ]


def by_forward(model, pairs, max_length=96):
    """Log-likelihood and greediness of each pair, the context cut to leave what max_length holds."""
    shown = [(context + continuation)[:-1][-max_length:] for context, continuation in pairs]
    log_p = model[2](shown)
    expected = []
    for i, (_, continuation) in enumerate(pairs):
        rows = log_p[i, len(shown[i]) - len(continuation) : len(shown[i])]
        expected.append(
            (
                sum(rows[np.arange(len(continuation)), continuation]),
                bool((rows[:, :90].argmax(-1) == continuation).all()),
            )
        )
    return expected


def test_log_likelihoods_are_those_of_the_forward_pass_whatever_the_batch(model, scorer):
    pairs = random_pairs(24, 60, 30)
    counts = []
    found = scorer.score(pairs, counts.append)
    for (total, greedy), (expected, expected_greedy) in zip(found, by_forward(model, pairs, 40)):
        assert total == pytest.approx(expected, abs=1e-3)
        assert greedy == expected_greedy
    assert sum(counts) == len(pairs) and len(counts) > 2
    alone = [scorer.score([pair])[0] for pair in pairs[:3]]
    np.testing.assert_allclose([total for total, _ in alone], [total for total, _ in found[:3]], rtol=1e-5)


def test_greedy_is_what_the_forward_pass_would_choose(model, scorer):
    context = list(range(20))
    whole = list(context)
    for _ in range(6):
        whole.append(int(model[2]([whole])[0, len(whole) - 1, :90].argmax()))
    found = scorer.score([(context, whole[20:]), (context, whole[20:-1] + [(whole[-1] + 1) % 90]), (context, [])])
    assert [greedy for _, greedy in found] == [True, False, True]
    assert found[2][0] == 0.0


def test_answers_to_one_question_share_a_row(scorer, monkeypatch):
    shapes, hidden = [], scorer._hidden

    def counting(params, tokens_BL, positions_BL):
        shapes.append(tokens_BL.shape)
        return hidden(params, tokens_BL, positions_BL)

    monkeypatch.setattr(scorer, '_hidden', counting)
    found = scorer.score([([1, 2, 3], [token]) for token in range(90)])
    assert shapes == [(1, 32)]
    # Of a distribution over 96 rows of the embedding, 90 of which are tokens.
    assert 0.9 < sum(math.exp(total) for total, _ in found) < 1
    assert sum(greedy for _, greedy in found) == 1


def test_long_texts_are_scored_by_windows_as_the_harness_cuts_them(model, scorer):
    utils = pytest.importorskip('lm_eval.utils', reason='needs pip install -e .[eval]')
    tokens = np.random.default_rng(1).integers(0, 90, 90).tolist()
    for length in (1, 40, 41, 90):
        ours = [
            (shown[: len(shown) - len(targets) + 1], targets)
            for shown, targets in scoring.windows([7], tokens[:length], 40)
        ]
        theirs = [
            utils.make_disjoint_window(pair)
            for pair in utils.get_rolling_token_windows(tokens[:length], prefix_token=7, max_seq_len=40, context_len=1)
        ]
        assert ours == theirs
    ((total, _),) = scorer.score([([7], tokens)])
    assert total == pytest.approx(sum(total for total, _ in by_forward(model, theirs)), abs=1e-3)


@pytest.mark.parametrize('length', [5, 40, 41, 90])
def test_windows_are_the_rows_of_training(length):
    """A window that does not begin the text has the token before it as first input, and no begin token, as a row."""
    tokens = np.random.default_rng(1).integers(0, 90, length)
    rows = [
        (row['tokens'][row['targets'] >= 0].tolist(), row['targets'][row['targets'] >= 0].tolist())
        for start in range(0, length, 40)
        for row in [
            packing.pack_row(
                np.concatenate([[NINETY.begin_id], tokens])[start : start + 41], [len(tokens[start : start + 40])], 40
            )
        ]
    ]
    found = [
        (shown[-len(targets) :], targets) for shown, targets in scoring.windows([NINETY.begin_id], tokens.tolist(), 40)
    ]
    assert found == rows


def test_an_empty_context_stands_for_the_begin_token(scorer):
    found, expected = scorer.score([([], [5, 6]), ([NINETY.begin_id], [5, 6])])
    assert found == expected and found[0] < 0


def test_the_batch_is_split_over_a_mesh(model, scorer):
    params, config, _ = model
    pairs = random_pairs(5, 30, 10)
    with jax.set_mesh(mesh.build(config)):
        split = scoring.Scorer(params, config, NINETY, max_length=40, batch_tokens=256).score(pairs)
    np.testing.assert_allclose([total for total, _ in split], [total for total, _ in scorer.score(pairs)], rtol=1e-4)


def test_padding_leaves_dynamic_rope_alone(model):
    config = small_config(**SMALLER, model_rope_scaling='dynamic', model_rope_original_length=16)
    scorer = scoring.Scorer(model[0], config, NINETY, max_length=96, batch_tokens=96)
    graph, _ = parameters.split_model(config.model)
    tokens = np.random.default_rng(2).integers(0, 90, 23)
    log_p = jax.nn.log_softmax(nnx.merge(graph, model[0]).logits(jnp.asarray(tokens[None, :-1])))[0]
    ((total, _),) = scorer.score([(tokens[:20], tokens[20:])])
    assert total == pytest.approx(sum(float(log_p[i, tokens[i + 1]]) for i in (19, 20, 21)), abs=1e-4)


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(max_length=0), 'max_length=0 must be at least 1'),
        (
            dict(tokenizer=types.SimpleNamespace(vocab_size=97, begin_id=7)),
            'the tokenizer has 97 ids, more than model.vocab_size=96',
        ),
    ],
)
def test_a_scorer_refuses(model, settings, message):
    params, config, _ = model
    with pytest.raises(ValueError, match=message):
        scoring.Scorer(params, config, **{**dict(tokenizer=NINETY, max_length=40, batch_tokens=256), **settings})


@pytest.mark.parametrize('loop, unrolled', [('auto', False), ('scan', False), ('unrolled', True)])
def test_evaluations_scan_where_training_unrolls(loop, unrolled):
    """They compile for many shapes, each of which is used for seconds."""
    model = dataclasses.replace(small_config().model, layer_loop=loop, remat='full')
    evaluated = nnx.merge(*parameters.split_for_evaluation(model)).model
    assert is_unrolled(model, 'gpu') == (loop != 'scan') and is_unrolled(evaluated, 'gpu') == unrolled
    assert dataclasses.replace(evaluated, layer_loop=loop, remat='full') == model
