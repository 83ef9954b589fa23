"""Text <-> token ids. Every tokenizer has `encode_batch`, `decode`, `vocab_size`, `eos_id`, `special_ids`, `dtype`.

`encode_batch` never adds special tokens: prepare.py ends each document with
`eos_id` itself. A special token spelled out in the text (`<|endoftext|>`) does
become its id, as everywhere in the `tokenizers` library.
"""

import hashlib
from pathlib import Path

import numpy as np

from transxssm_jax.data.manifest import DataError, finished_splits, read_index

EOS_TOKENS = ('<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>', '<|eos|>', '[EOS]')


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255; `eos_id` 256, so a vocabulary of 257."""

    vocab_size = 257
    eos_id = 256
    special_ids = {}  # text -> id of the tokens that `decode` leaves out; eos has no text here
    dtype = np.dtype(np.uint16)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """One uint16 array of ids for each text, without eos."""
        return [np.frombuffer(text.encode('utf-8', 'replace'), np.uint8).astype(np.uint16) for text in texts]

    def decode(self, ids) -> str:
        """Text of `ids`, without eos; bytes that are not UTF-8 come out as U+FFFD."""
        return bytes(int(i) for i in ids if i < 256).decode('utf-8', 'replace')

    def describe(self) -> dict:
        return {'kind': 'byte', 'sha256': '', 'vocab_size': self.vocab_size, 'eos_id': self.eos_id, 'eos_token': ''}


class JsonTokenizer:
    """A Hugging Face `tokenizers` json file.

    Args:
      content: the bytes of the json file.
      name: what error messages call it.
      eos: token or id (digits are an id) that ends a document; '' finds the one of EOS_TOKENS that the vocabulary has.
    """

    def __init__(self, content: bytes, *, name: str, eos: str = ''):
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises plain Exception and ValueError
            raise DataError(
                f'{name} is no tokenizers json file ({_first_line(error)}); give byte or the tokenizer.json of a model'
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.content = content
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        # Not get_vocab_size(): ids may have holes, and a model needs a row for the largest.
        self.vocab_size = max(vocabulary.values()) + 1
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self.eos_token, self.eos_id = _find_eos(vocabulary, name, eos)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = {token.content: token_id for token_id, token in added.items() if token.special}

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """One array of ids (uint16, or uint32 where the vocabulary is larger) for each text, without eos."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def decode(self, ids) -> str:
        """Text of `ids`, without special tokens."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def describe(self) -> dict:
        return {
            'kind': 'json',
            'sha256': hashlib.sha256(self.content).hexdigest(),
            'vocab_size': self.vocab_size,
            'eos_id': self.eos_id,
            'eos_token': self.eos_token,
        }


def load_tokenizer(path, eos: str = '') -> ByteTokenizer | JsonTokenizer:
    """The tokenizer of `path`: `byte`, a tokenizers json file, or a prepared directory.

    Raises DataError where it cannot be read or its end-of-document token cannot be told.
    """
    if str(path) == 'byte':
        if eos and eos != str(ByteTokenizer.eos_id):
            raise DataError(
                f'--eos={eos}: the byte tokenizer ends documents with id {ByteTokenizer.eos_id}; leave --eos out'
            )
        return ByteTokenizer()
    path = Path(path)
    if path.is_dir():
        splits = finished_splits(path)
        description = read_index(path, splits[0]).tokenizer
        if description['kind'] == 'byte':
            return ByteTokenizer()
        return load_tokenizer(path / 'tokenizer.json', eos=str(description['eos_id']))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f'tokenizer {path}: {error.strerror}; give byte, a tokenizers json file or a prepared directory'
        ) from None
    return JsonTokenizer(content, name=str(path), eos=eos)


def _find_eos(vocabulary: dict[str, int], name: str, eos: str) -> tuple[str, int]:
    if eos.isdigit():  # an id, although '0' is a token of most vocabularies too
        for token, token_id in vocabulary.items():
            if token_id == int(eos):
                return token, token_id
    elif eos and eos in vocabulary:
        return eos, vocabulary[eos]
    if eos:
        raise DataError(f'--eos={eos} is neither a token nor an id of {name}')
    found = [token for token in EOS_TOKENS if token in vocabulary]
    if len(found) != 1:
        what = f'has {", ".join(found)}' if found else f'has none of {", ".join(EOS_TOKENS)}'
        raise DataError(
            f'{name} {what}, so the token that ends a document is unclear; name it with --eos=TOKEN or --eos=ID'
        )
    return found[0], vocabulary[found[0]]


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
