"""A prompt and its completion on the host: tokens, their text, and what ends it.

Shape legend: L length, T steps of a block.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

NO_TOKEN = -1  # in the output of a block of steps, after a row's last token
CONTEXT_TOKENS = 8  # before the decoded ones, decoded with them: some tokenizers drop the first space of a text
INCOMPLETE = '\ufffd'  # what decoders write for bytes that are no character, perhaps not yet
CHARACTER_BYTES = 4  # most bytes of a UTF-8 character, so most tokens that a character's bytes are spread over


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a prompt was continued with.

    Attributes:
      tokens: int32 [L], without the prompt and without the stop token. Where a stop string ended
        the text, the tokens whose text is needed for what stands before it.
      text: decoded tokens, without the prompt, cut before the stop string; '' without a tokenizer.
      finish_reason: 'stop_token', 'stop_string', or 'length' (max_tokens or max_length was reached).
    """

    tokens: np.ndarray
    text: str
    finish_reason: str


class Request:
    """A prompt and its completion so far.

    Each block of tokens is decoded together with a bounded number of tokens before it, so that a completion of any
    length takes time in proportion to its length.

    Args:
      tokenizer: has `decode`; None: `text` stays empty.
      prompt: int32 [L].
      max_tokens: most tokens of the completion.
      stop_tokens: ids that end the completion.
      stop_strings: texts that end the completion where they first appear in it.
      seed: of the random choices, uint32.

    Attributes:
      tokens: list of the completion's ids, as in `Completion`.
      finish_reason: as in `Completion`; '' while the completion grows.
    """

    def __init__(
        self,
        tokenizer,
        prompt: np.ndarray,
        max_tokens: int,
        stop_tokens: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        seed: int = 0,
    ):
        self.tokenizer, self.prompt, self.max_tokens = tokenizer, prompt, max_tokens
        self.stop_tokens, self.stop_strings, self.seed = stop_tokens, stop_strings, seed
        self.tokens, self.finish_reason = [], ''
        # The text is that of the first _num_settled tokens, which later tokens cannot change, and _tail.
        self._settled, self._settled_length, self._num_settled, self._tail = [], 0, 0, ''
        # A stop string that the next tokens complete begins within these last characters.
        self._reach = max(map(len, stop_strings), default=1) - 1
        self._context = prompt[-CONTEXT_TOKENS:].tolist()
        # A character that the prompt begins and the completion ends belongs to the completion.
        self._context_text = '' if tokenizer is None else tokenizer.decode(self._context).rstrip(INCOMPLETE)

    @property
    def text(self) -> str:
        """Decoded tokens, cut before the stop string."""
        return ''.join(self._settled) + self._tail

    def extend(self, tokens_T: np.ndarray) -> None:
        """Takes the tokens of a block, int [T], up to the one that ends the completion."""
        if self.finish_reason:
            return
        if self.tokenizer is not None:
            self._settle()
        for token in tokens_T.tolist():
            if token == NO_TOKEN:
                break
            if token in self.stop_tokens:
                self.finish_reason = 'stop_token'
                break
            self.tokens.append(token)
        if not self.finish_reason and len(self.tokens) == self.max_tokens:
            self.finish_reason = 'length'
        if self.tokenizer is not None:
            self._tail = self._decode(self.tokens[self._num_settled :])
            self._cut_at_stop_string()

    def stable_text(self, start: int = 0) -> str:
        """The text from character `start` on that no later token changes or cuts off."""
        if start < self._settled_length:
            return (''.join(self._settled) + self._stable_tail())[start:]
        return self._stable_tail()[start - self._settled_length :]

    def completion(self) -> Completion:
        return Completion(np.array(self.tokens, np.int32), self.text, self.finish_reason)

    def _stable_tail(self) -> str:
        if self.finish_reason:
            return self._tail
        text = self._tail
        incomplete = min(len(text) - len(text.rstrip(INCOMPLETE)), CHARACTER_BYTES - 1)
        text = text[: len(text) - incomplete]
        held = [size for stop in self.stop_strings for size in range(1, len(stop)) if text.endswith(stop[:size])]
        return text[: len(text) - max(held, default=0)]

    def _decode(self, tokens: list[int]) -> str:
        """The text of tokens after the settled ones."""
        whole = self.tokenizer.decode(self._context + tokens)
        if whole.startswith(self._context_text):
            return whole[len(self._context_text) :]
        return self.tokenizer.decode(tokens)

    def _settle(self) -> None:
        """Moves text from the tail to the settled text, except the end, which later tokens may change or cut off.

        A cut is made only where the text on both sides, decoded separately, is the text decoded as a whole.
        """
        tokens = self.tokens[self._num_settled :]
        # The tokens after it can still join to a character and to a stop string.
        latest = len(tokens) - CHARACTER_BYTES * (1 + self._reach)
        for count in range(latest, max(latest - CONTEXT_TOKENS, 0), -1):
            head = self._decode(tokens[:count])
            if not self._tail.startswith(head) or len(head) > len(self._tail) - CHARACTER_BYTES - self._reach:
                continue
            before = self._context, self._context_text
            self._context = (self._context + tokens[:count])[-CONTEXT_TOKENS:]
            self._context_text = self.tokenizer.decode(self._context)
            if head + self._decode(tokens[count:]) == self._tail:
                self._settled.append(head)
                self._settled_length += len(head)
                self._num_settled += count
                self._tail = self._tail[len(head) :]
                return
            self._context, self._context_text = before

    def _cut_at_stop_string(self) -> None:
        positions = [position for position in map(self._tail.find, self.stop_strings) if position >= 0]
        if positions:
            self._tail, self.finish_reason = self._tail[: min(positions)], 'stop_string'
            tokens = self.tokens[self._num_settled :]
            while tokens and self._decode(tokens[:-1]).startswith(self._tail):
                tokens.pop()
            self.tokens[self._num_settled :] = tokens
