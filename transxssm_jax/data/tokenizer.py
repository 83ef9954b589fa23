"""Text <-> token ids. Every tokenizer has `encode_batch`, `decode`, `vocab_size`, `eos_id`, `begin_id`, `special_ids`, `dtype`.

`encode_batch` adds no special tokens: prepare.py stores each document with
`eos_id` at its end, and the loader feeds `begin_id` (the tokenizer's bos where
it has one, else eos) as the input whose target is the document's first token.

An eos or begin token that is spelled out in a text (`<|endoftext|>`) stays
plain text: it is encoded as the characters that it consists of. Otherwise a
web page that quotes it would hold an end of document after which the document
goes on. Other special tokens become their ids, as everywhere in the
`tokenizers` library, so that text may be written with control tokens.
`encode_batch(..., special_tokens=True)` makes no exception, for prompts.
"""

import hashlib
import itertools
import re
from pathlib import Path

import numpy as np

from transxssm_jax.data import object_store
from transxssm_jax.data.manifest import DataError, finished_splits, first_line, local_directory, read_manifest

EOS_TOKENS = (
    '<|endoftext|>',
    '<|end_of_text|>',
    '</s>',
    '<eos>',
    '<|eos|>',
    '[EOS]',
    '<EOS>',
    '<EOS_TOKEN>',
    '<｜end▁of▁sentence｜>',
)
BOS_TOKENS = (
    '<|begin_of_text|>',
    '<s>',
    '<bos>',
    '<|bos|>',
    '[BOS]',
    '<BOS>',
    '<BOS_TOKEN>',
    '<|startoftext|>',
    '<|start_of_text|>',
    '<｜begin▁of▁sentence｜>',
)


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255; `eos_id` 256, so a vocabulary of 257. It has no bos: documents begin with eos too."""

    vocab_size = 257
    eos_id = begin_id = 256
    special_ids = {}  # text -> id of the tokens that `decode` leaves out; eos has no text here
    dtype = np.dtype(np.uint16)

    def encode_batch(self, texts: list[str], *, special_tokens: bool = False) -> list[np.ndarray]:
        """One uint16 array of ids for each text, without eos; there are no special tokens to spell."""
        del special_tokens
        return [np.frombuffer(replace_surrogates(text).encode(), np.uint8).astype(np.uint16) for text in texts]

    def encode_with_offsets(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, int64 [ids, 2] of the first character and past the last of each) for each text."""
        encoded = []
        for text in map(replace_surrogates, texts):
            of_byte = np.repeat(np.arange(len(text)), [len(character.encode()) for character in text])
            encoded.append((self.encode_batch([text])[0], np.stack([of_byte, of_byte + 1], axis=1)))
        return encoded

    def decode(self, ids) -> str:
        """Text of `ids`, without eos; bytes that are not UTF-8 come out as U+FFFD."""
        return bytes(int(i) for i in ids if i < 256).decode('utf-8', 'replace')

    def describe(self) -> dict:
        return {
            'kind': 'byte',
            'sha256': '',
            'vocab_size': self.vocab_size,
            'eos_id': self.eos_id,
            'eos_token': '',
            'begin_id': self.begin_id,
            'begin_token': '',
        }


class JsonTokenizer:
    """A Hugging Face `tokenizers` json file.

    Args:
      content: the bytes of the json file.
      name: what error messages call it.
      eos: token or id (digits are an id) that ends a document; '' finds the one of EOS_TOKENS that the vocabulary has.
      bos: token or id that begins a document; '' finds the one of BOS_TOKENS that is a special token of the
        tokenizer, and takes eos where there is none.

    Raises DataError where the file is no tokenizer, or eos or bos cannot be told.
    """

    def __init__(self, content: bytes, *, name: str, eos: str = '', bos: str = ''):
        self.content, self._name = content, name
        self._tokenizer = self._parse()
        added = self._tokenizer.get_added_tokens_decoder()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        # Not get_vocab_size(): ids may have holes, and a model needs a row for the largest.
        self.vocab_size = max(vocabulary.values()) + 1
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        special = {token.content: token_id for token_id, token in added.items()}
        self.special_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        self.eos_token, self.eos_id = self._find_eos(vocabulary, special, eos)
        self.begin_token, self.begin_id = self._find_begin(vocabulary, special, bos)

    def _parse(self):
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_buffer(self.content)
        except Exception as error:  # the library raises plain Exception and ValueError
            raise DataError(
                f'{self._name} is no tokenizers json file ({first_line(error)}); '
                'give byte or the tokenizer.json of a model'
            ) from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def encode_batch(self, texts: list[str], *, special_tokens: bool = False) -> list[np.ndarray]:
        """One array of ids (uint16, or uint32 where the vocabulary is larger) for each text, without eos.

        Args:
          texts: lone surrogates in them become U+FFFD.
          special_tokens: whether eos and the begin token become their ids where a text spells them.

        Raises DataError where the tokenizer makes `eos_id` or `begin_id` of other text.
        """
        texts = [replace_surrogates(text) for text in texts]
        encoded = self._encode(texts)
        for i, ids in enumerate(encoded):
            if not special_tokens and self._has_reserved(ids):
                encoded[i] = self._encode_cut(texts[i])
        return encoded

    def encode_with_offsets(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, int64 [ids, 2] of the first character and past the last of each) for each text.

        Every special token that a text spells becomes its id, eos and the begin token too: for templates.
        """
        encodings = self._tokenizer.encode_batch([replace_surrogates(t) for t in texts], add_special_tokens=False)
        return [
            (np.array(encoding.ids, self.dtype), np.array(encoding.offsets, np.int64).reshape(-1, 2))
            for encoding in encodings
        ]

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def _has_reserved(self, ids: np.ndarray) -> bool:
        return bool(((ids == self.eos_id) | (ids == self.begin_id)).any())

    def _encode_cut(self, text: str) -> np.ndarray:
        """Ids of a text that spells eos or the begin token: it is cut in two, after the token's first character."""
        words = '|'.join(re.escape(token) for token in (self.eos_token, self.begin_token))
        cuts = [0, *(match.start() + 1 for match in re.finditer(words, text)), len(text)]
        parts = [text[start:stop] for start, stop in itertools.pairwise(cuts)]
        ids = np.concatenate(self._encode(parts))
        if self._has_reserved(ids):
            raise DataError(
                f'{self._name} makes {self.eos_token} or {self.begin_token} of the plain text {text[:40]!r}; '
                'name other tokens with --eos and --bos'
            )
        return ids

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
            'begin_id': self.begin_id,
            'begin_token': self.begin_token,
        }

    def _find_eos(self, vocabulary: dict[str, int], special: dict[str, int], eos: str) -> tuple[str, int]:
        if eos:
            return _find_named('eos', eos, vocabulary, self._name)
        found = [token for token in EOS_TOKENS if token in special] or [
            token for token in EOS_TOKENS if token in vocabulary
        ]
        if len(found) != 1:
            what = f'has {", ".join(found)}' if found else f'has none of {", ".join(EOS_TOKENS)}'
            raise DataError(
                f'{self._name} {what}, so the token that ends a document is unclear; '
                'name it with --eos=TOKEN or --eos=ID'
            )
        return found[0], vocabulary[found[0]]

    def _find_begin(self, vocabulary: dict[str, int], special: dict[str, int], bos: str) -> tuple[str, int]:
        if bos:
            return _find_named('bos', bos, vocabulary, self._name)
        # Special tokens alone: <s> is also a word of HTML, which a large vocabulary may well have.
        found = [token for token in BOS_TOKENS if token in special]
        if len(found) > 1:
            raise DataError(
                f'{self._name} has {", ".join(found)}, so the token that begins a document is unclear; '
                'name it with --bos=TOKEN or --bos=ID'
            )
        return (found[0], special[found[0]]) if found else (self.eos_token, self.eos_id)


def load_tokenizer(path, eos: str = '', bos: str = '') -> ByteTokenizer | JsonTokenizer:
    """The tokenizer of `path`: `byte`, a tokenizers json file, or a prepared directory.

    Raises DataError where it cannot be read, is not the one that the directory was prepared with, or where the
    tokens that end and begin a document cannot be told.
    """
    if str(path) == 'byte':
        for flag, value in (('eos', eos), ('bos', bos)):
            if value and value != str(ByteTokenizer.eos_id):
                raise DataError(
                    f'--{flag}={value}: the byte tokenizer begins and ends documents with id {ByteTokenizer.eos_id}; '
                    f'leave --{flag} out'
                )
        return ByteTokenizer()
    is_url = object_store.is_url(path)
    if is_url or Path(path).is_dir():
        splits = finished_splits(path)
        description = read_manifest(path, splits[0]).tokenizer
        if description['kind'] == 'byte':
            return ByteTokenizer()
        file = local_directory(path, ('tokenizer.json',)) / 'tokenizer.json'
        tokenizer = load_tokenizer(file, str(description['eos_id']), str(description['begin_id']))
        if tokenizer.describe() != description:
            raise DataError(
                f'{file} is not the tokenizer that {path} was prepared with (sha256 {description["sha256"][:12]}...); '
                'restore it from a copy'
            )
        return tokenizer
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(
            f'tokenizer {path}: {getattr(error, "strerror", None) or error}; '
            'give byte, a tokenizers json file or a prepared directory'
        ) from None
    return JsonTokenizer(content, name=str(path), eos=eos, bos=bos)


def replace_surrogates(text: str) -> str:
    """`text` with U+FFFD for every half of a surrogate pair, which JSON can spell and UTF-8 cannot hold."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    return text


def _find_named(flag: str, value: str, vocabulary: dict[str, int], name: str) -> tuple[str, int]:
    if value.isdecimal():  # an id, although '0' is a token of most vocabularies too
        for token, token_id in vocabulary.items():
            if token_id == int(value):
                return token, token_id
    elif value in vocabulary:
        return value, vocabulary[value]
    raise DataError(f'--{flag}={value} is neither a token nor an id of {name}; give one of its tokens')
