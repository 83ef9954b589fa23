"""Text to the tokens that a model continues.

Every row of training begins with the tokenizer's begin token, so that the model knows what a row's first token is
conditioned on; a prompt begins with it too.
"""

import re
from collections.abc import Sequence

import numpy as np

_LONE_SURROGATE = re.compile('[\ud800-\udfff]')


def clean_text(text: str) -> str:
    """The text with U+FFFD for every lone surrogate, which JSON can spell and a command line can hold, but is no text."""
    return _LONE_SURROGATE.sub('\ufffd', text)


def begin_id(tokenizer) -> int:
    """The token that a row begins with."""
    return getattr(tokenizer, 'begin_id', tokenizer.eos_id)


def with_begin(tokenizer, tokens: Sequence[int]) -> np.ndarray:
    """Tokens, int32 [L], with the begin token before them unless they begin with it already."""
    tokens = np.asarray(tokens, np.int32)
    if len(tokens) and tokens[0] == begin_id(tokenizer):
        return tokens
    return np.concatenate([np.array([begin_id(tokenizer)], np.int32), tokens])


def encode_prompts(tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Tokens of each prompt, int32 [L]: the begin token and the text, which may be empty."""
    return [with_begin(tokenizer, tokens) for tokens in tokenizer.encode_batch([clean_text(text) for text in texts])]
