"""A row's completion on the host: tokens, their text, and what ends it.

Shape legend: L length, T steps of a block.
"""

import dataclasses

import numpy as np

NO_TOKEN = -1  # in the output of a block of steps, after a row's last token
CONTEXT_TOKENS = 8  # of the prompt that a completion is decoded with: some tokenizers drop a text's first space
INCOMPLETE = '\ufffd'  # what decoders write for bytes that are no character, perhaps not yet


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a prompt was continued with.

    Attributes:
      tokens: int32 [L], without the prompt and without the stop token. Where a stop string ended
        the text, the tokens whose text is needed for what stands before it.
      text: decoded tokens, without the prompt, cut before the stop string; '' without a tokenizer.
      finish: 'stop_token', 'stop_string', or 'length' (max_tokens or max_length was reached).
    """

    tokens: np.ndarray
    text: str
    finish: str


class Row:
    """A prompt and its completion so far, on the host."""

    def __init__(self, tokenizer, prompt, max_tokens, stop_tokens, stop_strings, seed):
        self.tokenizer, self.prompt, self.max_tokens = tokenizer, prompt, max_tokens
        self.stop_tokens, self.stop_strings, self.seed = stop_tokens, stop_strings, seed
        self.tokens, self.text, self.finish = [], '', ''
        self._context = prompt[-CONTEXT_TOKENS:].tolist()
        self._context_text = '' if tokenizer is None else tokenizer.decode(self._context).rstrip(INCOMPLETE)

    def extend(self, tokens_T) -> None:
        """Takes the tokens of a block, up to the one that ends the row."""
        if self.finish:
            return
        for token in tokens_T.tolist():
            if token == NO_TOKEN:
                break
            if token in self.stop_tokens:
                self.finish = 'stop_token'
                break
            self.tokens.append(token)
        if len(self.tokens) == self.max_tokens:
            self.finish = 'length'
        if self.tokenizer is not None:
            self.text = self._decode(self.tokens)
            self._cut_at_stop_string()

    def _decode(self, tokens) -> str:
        whole = self.tokenizer.decode(self._context + tokens)
        return (
            whole[len(self._context_text) :] if whole.startswith(self._context_text) else self.tokenizer.decode(tokens)
        )

    def _cut_at_stop_string(self) -> None:
        places = [place for place in map(self.text.find, self.stop_strings) if place >= 0]
        if places:
            self.text, self.finish = self.text[: min(places)], 'stop_string'
            while self.tokens and self._decode(self.tokens[:-1]).startswith(self.text):
                self.tokens.pop()

    def settled_text(self) -> str:
        """What no later token changes, as far as it is known now."""
        if self.finish:
            return self.text
        text = self.text.rstrip(INCOMPLETE)
        held = [size for stop in self.stop_strings for size in range(1, len(stop)) if text.endswith(stop[:size])]
        return text[: len(text) - max(held, default=0)]

    def completion(self) -> Completion:
        return Completion(np.array(self.tokens, np.int32), self.text, self.finish)
