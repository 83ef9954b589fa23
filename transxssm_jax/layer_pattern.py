"""The pattern language: which kind of layer stands at which place of a period, e.g. '7xmamba2,attention'.

A pattern is a list of kinds, separated by commas, each perhaps with a count before it. This module imports no jax.
"""

import functools
import re

from transxssm_jax import cli
from transxssm_jax.settings import ConfigError

KINDS = ('ssd', 'attention', 'mamba2')  # the words of model/mixers.py
MOST_LAYERS = 1 << 12


@functools.cache
def parse_pattern(text: str) -> tuple[str, ...]:
    """The kinds of the layers that a pattern lists.

    Raises:
      ConfigError: it is not of this form, names a kind that does not exist, or has more than MOST_LAYERS layers.
    """
    kinds: list[str] = []
    for word in text.split(','):
        match = re.fullmatch(r'(?:([1-9]\d{0,3})x)?([a-z]\w*)', word.strip())
        if not match:
            raise ConfigError(
                f'model.pattern={cli.shorten(text)!r} has {cli.shorten(word.strip())!r} where a kind of layer must be, '
                f"perhaps with a count from 1 to {MOST_LAYERS} before it, e.g. '7xmamba2,attention'"
            )
        count, kind = int(match[1] or 1), match[2]
        if kind not in KINDS:
            raise ConfigError(
                f'model.pattern={cli.shorten(text)!r}: unknown mixer {cli.shorten(kind)!r}{cli.nearest(kind, KINDS)}'
            )
        kinds += [kind] * count
        if len(kinds) > MOST_LAYERS:
            raise ConfigError(f'model.pattern={cli.shorten(text)!r} has more than {MOST_LAYERS} layers')
    return tuple(kinds)


def write_pattern(kinds: tuple[str, ...]) -> str:
    """The shortest pattern of these kinds."""
    words: list[list] = []
    for kind in kinds:
        if words and words[-1][1] == kind:
            words[-1][0] += 1
        else:
            words.append([1, kind])
    return ','.join(kind if count == 1 else f'{count}x{kind}' for count, kind in words)
