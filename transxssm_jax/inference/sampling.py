"""How a token is chosen from logits.

Shape legend: B rows, V vocabulary.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from transxssm_jax import cli
from transxssm_jax.config import Model


class InputError(cli.UserError, ValueError):
    """What was asked for cannot be generated; the message is one line."""


def check_tokenizer(tokenizer, model: Model) -> None:
    """Raises InputError where the model has no row for some token."""
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(
            f'the tokenizer has {tokenizer.vocab_size} tokens, more than model.vocab_size={model.vocab_size}; '
            'give the tokenizer of the training data'
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which parts of the choice are compiled in; what is off costs nothing."""

    vocab_size: int  # tokens that may be chosen; rows of the head beyond only pad it
    greedy: bool
    top_k: bool
    top_p: bool
    min_p: bool
    repetition_penalty: bool


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of the choice, applied in this order, as the transformers library does.

    Attributes:
      repetition_penalty: > 0; logits of tokens that the row already holds, prompt
        included, are divided by it where positive and multiplied where negative; 1: off.
      temperature: >= 0; divides the logits; 0 takes the likeliest token (greedy), whatever follows.
      top_k: >= 0; only the k likeliest tokens; 0: off.
      top_p: in (0, 1]; only the likeliest tokens whose probabilities add up to at least top_p; 1: off.
      min_p: in [0, 1); only tokens at least min_p times as likely as the likeliest; 0: off.

    Tokens exactly as likely as the last that top_k or top_p takes are taken too.

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

    def plan(self, vocab_size: int) -> Plan:
        greedy = self.temperature == 0
        return Plan(
            vocab_size=vocab_size,
            greedy=greedy,
            top_k=not greedy and 0 < self.top_k < vocab_size,
            top_p=not greedy and self.top_p < 1,
            min_p=not greedy and self.min_p > 0,
            repetition_penalty=self.repetition_penalty != 1,
        )

    def numbers(self) -> dict:
        """The values, float32, for `choose`; other values under the same plan compile nothing anew."""
        return {name: np.float32(value) for name, value in dataclasses.asdict(self).items()}


GREEDY = Sampling(temperature=0.0)


def choose(plan: Plan, numbers: dict, logits_BV: jax.Array, key_B: jax.Array, seen_BV: jax.Array | None) -> jax.Array:
    """One token a row: int32 [B].

    Nothing is sorted: top_k and top_p are thresholds, found bit by bit. A row's token depends on its own logits, key
    and seen tokens only.

    Args:
      plan, numbers: of a Sampling.
      logits_BV: float32.
      key_B: a random key a row.
      seen_BV: bool, tokens that the row holds; read only for the repetition penalty.
    """
    if plan.repetition_penalty:
        penalty = numbers['repetition_penalty']
        penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(seen_BV, penalised_BV, logits_BV)
    logits_BV = jnp.where(jnp.arange(logits_BV.shape[1]) < plan.vocab_size, logits_BV, -jnp.inf)
    if plan.greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / numbers['temperature']
    if plan.top_k:
        ones_BV = jnp.ones_like(logits_BV)
        enough_B = jnp.broadcast_to(numbers['top_k'], logits_BV.shape[:1])
        logits_BV = _largest(logits_BV, ones_BV, enough_B)
    if plan.top_p or plan.min_p:
        # Relative to the likeliest token's, which is all that either needs.
        probability_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
        if plan.top_p:
            cut_BV = _largest(logits_BV, probability_BV, numbers['top_p'] * jnp.sum(probability_BV, axis=-1))
        else:
            cut_BV = logits_BV
        if plan.min_p:
            cut_BV = jnp.where(probability_BV >= numbers['min_p'], cut_BV, -jnp.inf)
        logits_BV = cut_BV
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:], jnp.float32))(key_B)
    return jnp.argmax(logits_BV + noise_BV, axis=-1).astype(jnp.int32)


def _largest(logits_BV, weight_BV, enough_B):
    """logits, with -inf for all but the fewest largest of each row whose weights add up to at least enough.

    A sort of the vocabulary would take longer than a layer of the model. Floats order as their bits do once the sign
    is turned over, so the largest threshold that leaves enough weight is found from its highest bit down, two bits a
    pass over the logits.
    """
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order_BV = jnp.where(bits_BV & sign, ~bits_BV, bits_BV | sign)

    threshold_B = jnp.zeros(logits_BV.shape[0], jnp.uint32)
    for shift in range(30, -1, -2):
        tried_B3 = threshold_B[:, None] | (jnp.arange(1, 4, dtype=jnp.uint32) << shift)
        left_B3 = jnp.sum(jnp.where(order_BV[:, None] >= tried_B3[..., None], weight_BV[:, None], 0), axis=-1)
        # What is left only shrinks as the threshold grows: as many of the three leave enough as the digit says.
        digit_B = jnp.sum(left_B3 >= enough_B[:, None], axis=-1, dtype=jnp.uint32)
        threshold_B = threshold_B | (digit_B << shift)
    return jnp.where(order_BV >= threshold_B[:, None], logits_BV, -jnp.inf)
