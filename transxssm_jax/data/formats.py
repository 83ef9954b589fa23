"""What a document of a source is besides text: a conversation, or token ids. `prepare --format`.

A format says which kinds of files hold its documents (`kinds`), makes a document of
a value that a reader found (`convert`, or Skipped for a bad one), and the tokens of
documents (`encode`: tokens with eos at their end, the mask of those that are learned
or None, and the bytes of text that is learned; no tokens of a document without text).
"""

from collections.abc import Iterable

import numpy as np

from transxssm_jax.data import chat as chat_lib
from transxssm_jax.data import token_files
from transxssm_jax.data.source import Skipped

FORMATS = ('text', 'chat', 'ids')
FIELDS = {'text': 'text', 'chat': 'messages', 'ids': 'input_ids'}  # default of --text_field


class ChatFormat:
    """Conversations, written by a chat template."""

    name, kinds, field = 'conversations', ('jsonl', 'parquet'), FIELDS['chat']

    def __init__(self, tokenizer, chat: chat_lib.Chat):
        self._tokenizer, self.chat = tokenizer, chat

    def convert(self, messages) -> chat_lib.Conversation | Skipped:
        try:
            return self.chat.conversation(messages)
        except chat_lib.BadConversation as error:
            return Skipped(error.reason, str(error))

    def encode(self, conversations: list[chat_lib.Conversation]) -> Iterable[tuple[np.ndarray, np.ndarray, int]]:
        return chat_lib.encode(self._tokenizer, conversations)


class IdsFormat:
    """Token ids of the tokenizer."""

    name, kinds, field = 'token ids', ('jsonl', 'parquet', *dict.fromkeys(token_files.ENDINGS.values())), FIELDS['ids']
    chat = None

    def __init__(self, tokenizer):
        self._tokenizer, self.eos_id = tokenizer, tokenizer.eos_id

    def convert(self, ids) -> np.ndarray | Skipped:
        try:
            return token_files.check_ids(ids, self._tokenizer.vocab_size)
        except token_files.BadIds as error:
            return Skipped(error.reason, str(error))

    def encode(self, documents: list[np.ndarray]) -> Iterable[tuple[np.ndarray, None, int]]:
        return token_files.encode(self._tokenizer, documents)
