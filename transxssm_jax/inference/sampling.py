"""How the next token is drawn from logits.

Shape legend: B rows, V vocabulary.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from transxssm_jax import cli


class InputError(cli.UserError, ValueError):
    """The request cannot be served; the message is one line."""


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
    """Which parts of sampling are compiled; a part that is off costs nothing."""

    vocab_size: int  # tokens that may be sampled; later rows of the head only pad it
    greedy: bool
    top_k: bool
    top_p: bool
    min_p: bool
    repetition_penalty: bool


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to sample; the settings apply in this order, as in the transformers library.

    Attributes:
      repetition_penalty: > 0; logits of tokens that the row already has, prompt
        included, are divided by it where positive and multiplied where negative; 1: off.
      temperature: >= 0; divides the logits; 0 takes the likeliest token (greedy), whatever follows.
      top_k: >= 0; only the k likeliest tokens; 0: off.
      top_p: in (0, 1]; only the likeliest tokens whose probabilities add up to at least top_p; 1: off.
      min_p: in [0, 1); only tokens at least min_p times as likely as the likeliest; 0: off.

    Tokens exactly as likely as the last that top_k or top_p keeps are kept too.

    Raises:
      InputError: a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for name, fits, rule in (
            ('temperature', 0 <= self.temperature < math.inf, 'at least 0; 0 takes the likeliest token'),
            ('top_k', self.top_k >= 0 and int(self.top_k) == self.top_k, 'a whole number, at least 0; 0 turns it off'),
            ('top_p', 0 < self.top_p <= 1, 'above 0 and at most 1; 1 turns it off'),
            ('min_p', 0 <= self.min_p < 1, 'at least 0 and below 1; 0 turns it off'),
            ('repetition_penalty', 0 < self.repetition_penalty < math.inf, 'above 0; 1 turns it off'),
        ):
            if not fits:
                raise InputError(f'{name}={getattr(self, name)} must be {rule}')

    def flags(self, vocab_size: int) -> SamplingFlags:
        greedy = self.temperature == 0
        return SamplingFlags(
            vocab_size=vocab_size,
            greedy=greedy,
            top_k=not greedy and 0 < self.top_k < vocab_size,
            top_p=not greedy and self.top_p < 1,
            min_p=not greedy and self.min_p > 0,
            repetition_penalty=self.repetition_penalty != 1,
        )

    def values(self) -> dict:
        """The settings' values, float32, for `sample_tokens`; other values under the same flags compile nothing new."""
        return {name: np.float32(value) for name, value in dataclasses.asdict(self).items()}


GREEDY = Sampling(temperature=0.0)


def fold_seed(seed: int, index: int, sample: int = 0) -> int:
    """The seed, uint32, of one of the texts that a command's seed stands for.

    Args:
      seed: from 0 to 2^32 - 1.
      index: of the prompt among the prompts; different indices of one sample never share a seed.
      sample: number of the text among several for the same prompt.

    Raises:
      InputError: the seed is out of its range.
    """
    if not 0 <= seed < 1 << 32:
        raise InputError(f'seed={seed} must be from 0 to {(1 << 32) - 1}')
    return (int(np.random.SeedSequence([seed, sample]).generate_state(1)[0]) + index) % (1 << 32)


def sample_tokens(
    flags: SamplingFlags, values: dict, logits_BV: jax.Array, key_B: jax.Array, seen_BV: jax.Array | None
) -> jax.Array:
    """Samples one token per row, int32 [B].

    Nothing is sorted: top_k and top_p are thresholds, found bit by bit. A row's token depends on its own logits, key
    and seen tokens only.

    Args:
      flags, values: of a Sampling.
      logits_BV: float32.
      key_B: one random key per row.
      seen_BV: bool, tokens that the row has; read only for the repetition penalty.
    """
    if flags.repetition_penalty:
        penalty = values['repetition_penalty']
        penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(seen_BV, penalised_BV, logits_BV)
    logits_BV = jnp.where(jnp.arange(logits_BV.shape[1]) < flags.vocab_size, logits_BV, -jnp.inf)
    if flags.greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / values['temperature']
    if flags.top_k:
        ones_BV = jnp.ones_like(logits_BV)
        enough_B = jnp.broadcast_to(values['top_k'], logits_BV.shape[:1])
        logits_BV = _largest(logits_BV, ones_BV, enough_B)
    if flags.top_p or flags.min_p:
        # Relative to the likeliest token, which is all that both need.
        probability_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
        if flags.top_p:
            cut_BV = _largest(logits_BV, probability_BV, values['top_p'] * jnp.sum(probability_BV, axis=-1))
        else:
            cut_BV = logits_BV
        if flags.min_p:
            cut_BV = jnp.where(probability_BV >= values['min_p'], cut_BV, -jnp.inf)
        logits_BV = cut_BV
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:], jnp.float32))(key_B)
    return jnp.argmax(logits_BV + noise_BV, axis=-1).astype(jnp.int32)


def _largest(logits_BV, weight_BV, enough_B):
    """Keeps the fewest largest logits of each row whose weights add up to at least `enough`; the others become -inf.

    Sorting the vocabulary would take longer than a layer of the model. Floats are ordered as their bits once the sign
    is flipped, so the largest threshold that leaves enough weight is found from its highest bit down, two bits per
    pass over the logits.
    """
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order_BV = jnp.where(bits_BV & sign, ~bits_BV, bits_BV | sign)

    threshold_B = jnp.zeros(logits_BV.shape[0], jnp.uint32)
    for shift in range(30, -1, -2):
        tried_B3 = threshold_B[:, None] | (jnp.arange(1, 4, dtype=jnp.uint32) << shift)
        left_B3 = jnp.sum(jnp.where(order_BV[:, None] >= tried_B3[..., None], weight_BV[:, None], 0), axis=-1)
        # The weight left shrinks as the threshold grows, so the digit is how many of the three leave enough.
        digit_B = jnp.sum(left_B3 >= enough_B[:, None], axis=-1, dtype=jnp.uint32)
        threshold_B = threshold_B | (digit_B << shift)
    return jnp.where(order_BV >= threshold_B[:, None], logits_BV, -jnp.inf)
