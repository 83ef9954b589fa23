"""Sampling: tokens are drawn with the probabilities of the definition, and seeds of texts do not collide."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transxssm_jax.inference.sampling import GREEDY, InputError, Sampling, fold_seed, sample_tokens

V, PADDED, DRAWS = 40, 48, 6000
LOGITS = 2 * np.random.default_rng(3).standard_normal(PADDED).astype(np.float32)
LOGITS[V:] = 50.0  # rows that pad the vocabulary must never be chosen, however likely
SEEN = np.random.default_rng(4).random(PADDED) < 0.4


def oracle(sampling):
    """Probabilities of the tokens, by sorting."""
    logits = LOGITS[:V].astype(np.float64)
    if sampling.repetition_penalty != 1:
        penalty = np.where(logits > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
        logits = np.where(SEEN[:V], logits * penalty, logits)
    if sampling.temperature == 0:
        return np.eye(V)[logits.argmax()]
    logits = logits / sampling.temperature
    order = np.argsort(-logits)
    if sampling.top_k:
        order = order[: sampling.top_k]
    p = np.exp(logits[order])
    p /= p.sum()
    if sampling.top_p < 1:
        count = np.searchsorted(np.cumsum(p), sampling.top_p) + 1
        order, p = order[:count], p[:count]
    kept = p >= sampling.min_p * p[0]
    probabilities = np.zeros(V)
    probabilities[order[kept]] = p[kept] / p[kept].sum()
    return probabilities


@functools.partial(jax.jit, static_argnums=0)
def draw(flags, values):
    logits_BV, seen_BV = (jnp.broadcast_to(row, (DRAWS, PADDED)) for row in (LOGITS, SEEN))
    return sample_tokens(flags, values, logits_BV, jax.random.split(jax.random.key(0), DRAWS), seen_BV)


@pytest.mark.parametrize(
    'sampling',
    [
        GREEDY,
        Sampling(1.0),
        Sampling(0.5),
        Sampling(1.0, top_k=1),
        Sampling(1.5, top_k=7),
        Sampling(1.0, top_p=0.6),
        Sampling(0.7, top_p=1e-6),
        Sampling(1.0, min_p=0.1),
        Sampling(1.0, repetition_penalty=1.7),
        Sampling(0.0, repetition_penalty=2.5),
        Sampling(1.2, top_k=12, top_p=0.8, min_p=0.05, repetition_penalty=1.3),
        Sampling(1.0, top_k=V),
    ],
    ids=str,
)
def test_tokens_are_chosen_with_the_probabilities_of_the_definition(sampling):
    counts = np.bincount(np.asarray(draw(sampling.flags(V), sampling.values())), minlength=PADDED)
    expected = oracle(sampling)
    assert not counts[V:].any() and not counts[:V][expected == 0].any()
    deviations = (counts[:V] - DRAWS * expected) / np.sqrt(DRAWS * expected * (1 - expected) + 1)
    assert np.abs(deviations).max() < 4.5, deviations


def test_a_threshold_takes_equals_too():
    sampling = Sampling(1.0, top_k=2)
    run = jax.jit(lambda logits, keys: sample_tokens(sampling.flags(4), sampling.values(), logits, keys, None))
    chosen = run(np.tile(np.float32([1, 3, 1, -2]), (500, 1)), jax.random.split(jax.random.key(0), 500))
    assert set(np.asarray(chosen).tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    'settings',
    [
        dict(temperature=-1.0),
        dict(top_k=-1),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(min_p=1.0),
        dict(repetition_penalty=0.0),
        dict(temperature=float('nan')),
    ],
)
def test_settings_out_of_range_are_named(settings):
    [(name, value)] = settings.items()
    with pytest.raises(InputError, match=f'{name}={value} must be'):
        Sampling(**settings)


def test_every_prompt_and_sample_has_a_seed_of_its_own():
    seeds = {fold_seed(seed, index, sample) for seed in (0, 1) for sample in range(4) for index in range(500)}
    assert len(seeds) == 2 * 4 * 500 and all(0 <= seed < 1 << 32 for seed in seeds)
    assert fold_seed(3, 5) == fold_seed(3, 5, 0)
    with pytest.raises(InputError, match='seed=-1 must be from 0'):
        fold_seed(-1, 0)
