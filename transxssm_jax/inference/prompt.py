"""Text to the tokens that a model continues.

Every row of training begins with the tokenizer's begin token, so that the model knows what a row's first token is
conditioned on; a prompt begins with it too.
"""

from collections.abc import Sequence

import numpy as np


def with_begin(tokenizer, tokens: Sequence[int]) -> np.ndarray:
    """Tokens, int32 [L], with the begin token before them unless they begin with it already."""
    tokens = np.asarray(tokens, np.int32)
    if len(tokens) and tokens[0] == tokenizer.begin_id:
        return tokens
    return np.concatenate([np.array([tokenizer.begin_id], np.int32), tokens])


def encode_prompts(tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Tokens of each prompt, int32 [L]: the begin token and the text, which may be empty.

    A special token that a text spells becomes its id.
    """
    return [with_begin(tokenizer, tokens) for tokens in tokenizer.encode_batch(texts, special_tokens=True)]
