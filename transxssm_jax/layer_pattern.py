"""Settings that say something of each layer: a list of words, separated by commas, each perhaps with a count before it.

model.pattern names the kind of each layer of a period, '7xmamba2,attention', and model.remat may name the policy of each
layer of the model, '6xmatmuls,18xnone'. This module imports no jax.
"""

import functools
import itertools
import re
from collections.abc import Iterable

from transxssm_jax import cli
from transxssm_jax.settings import ConfigError

KINDS = ('ssd', 'attention', 'mamba2')  # the words of model/mixers.py
POLICIES = ('none', 'matmuls', 'dots', 'hybrid', 'full')  # the words of REMAT of model/costs.py
MOST_LAYERS = 1 << 12


def parse_pattern(text: str) -> tuple[str, ...]:
    """The kinds of the layers that a pattern lists.

    Raises:
      ConfigError: it is not of this form, names a kind that does not exist, or has more than MOST_LAYERS layers.
    """
    return _parse('model.pattern', text, 'a kind of layer', 'mixer', KINDS, '7xmamba2,attention')


def parse_remat(text: str) -> tuple[str, ...]:
    """The remat policies of the layers that a list names, or the one word for all of them. Raises as `parse_pattern`."""
    return _parse('model.remat', text, 'a remat policy', 'policy', ('auto', *POLICIES), '6xmatmuls,18xnone')


@functools.cache
def _parse(name: str, text: str, what: str, noun: str, known: tuple[str, ...], example: str) -> tuple[str, ...]:
    words: list[str] = []
    for part in text.split(','):
        match = re.fullmatch(r'(?:([1-9]\d{0,3})x)?([a-z]\w*)', part.strip())
        if not match:
            raise ConfigError(
                f'{name}={cli.shorten(text)!r} has {cli.shorten(part.strip())!r} where {what} must be, '
                f'perhaps with a count from 1 to {MOST_LAYERS} before it, e.g. {example!r}'
            )
        count, word = int(match[1] or 1), match[2]
        if word not in known:
            raise ConfigError(
                f'{name}={cli.shorten(text)!r}: unknown {noun} {cli.shorten(word)!r}{cli.nearest(word, known)}'
            )
        words += [word] * count
        if len(words) > MOST_LAYERS:
            raise ConfigError(f'{name}={cli.shorten(text)!r} has more than {MOST_LAYERS} layers')
    return tuple(words)


def write_pattern(words: Iterable[str]) -> str:
    """The shortest list of these words."""
    runs = ((word, len(list(run))) for word, run in itertools.groupby(words))
    return ','.join(word if count == 1 else f'{count}x{word}' for word, count in runs)
