"""Documents that are token ids already: `prepare --format=ids`.

    corpus.bin with corpus.idx    Megatron-LM's indexed data set; a document is what its index calls one
    ids.npy                       whole numbers; [tokens]: eos ends a document; [documents, tokens]: a row is one
    shard.arrow, shard.feather    Arrow (file or stream), a list of ids under --text_field
    shard.parquet, corpus.jsonl   likewise, read by source.py

A begin token at the start of a document is left out, for the loader puts it before
every document, and eos is added where it does not end one.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from transxssm_jax import cli
from transxssm_jax.data.manifest import DataError, first_line

ENDINGS = {'.bin': 'megatron', '.idx': 'megatron', '.npy': 'npy', '.arrow': 'arrow', '.feather': 'arrow'}
BYTES_PER_TOKEN = 4  # of text, roughly; only sizes the pieces
_MAGIC = b'MMIDIDX\x00\x00'
_HEADER = struct.Struct('<9sQBQQ')  # magic, version, dtype, sequences, entries of the documents' index
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # by Megatron's code
_BLOCK = 1 << 20  # tokens that are searched for eos at a time


class BadIds(cli.UserError, ValueError):
    """A document that cannot be stored: `reason`, a few words by which it is counted, and what is wrong with it."""

    def __init__(self, reason: str, explanation: str):
        super().__init__(explanation)
        self.reason = reason


def kind_of(path: str) -> str:
    """The kind of a file of ids by the ending of its name; '' for what source.py reads."""
    return ENDINGS.get(os.path.splitext(path)[1].lower(), '')


def without_indexes(paths: list[str]) -> list[str]:
    """Without the .idx that stands beside its .bin."""
    here = set(paths)
    return [path for path in paths if not (path.lower().endswith('.idx') and str(_pair(path)[0]) in here)]


def _pair(path: str) -> tuple[Path, Path]:
    """The .bin and the .idx of a data set of Megatron-LM, of which one is given; in upper case where that is."""
    endings = ('.BIN', '.IDX') if Path(path).suffix.isupper() else ('.bin', '.idx')
    return Path(path).with_suffix(endings[0]), Path(path).with_suffix(endings[1])


def measure(kind: str, path: str) -> tuple[str, int, int]:
    """(path, documents or tokens that can be read from any on, bytes of text, roughly) of a file.

    Raises DataError where the file is not what its name promises.
    """
    if kind == 'megatron':
        index = _open_megatron(path)
        return str(_pair(path)[0]), len(index.first_sequence) - 1, index.num_tokens * BYTES_PER_TOKEN
    if kind == 'npy':
        array = _open_npy(path)
        return path, len(array), array.size * BYTES_PER_TOKEN
    return path, 1, os.path.getsize(path)


def read(kind: str, path: str, start: int, stop: int, field: str, eos_id: int) -> Iterator[tuple[str, np.ndarray]]:
    """(place, ids) of every document that begins in [start, stop) of `measure`'s count."""
    if kind == 'megatron':
        index = _open_megatron(path)
        for document in range(start, stop):
            yield f'{path}, document {document}', index.read(document)
    elif kind == 'arrow':
        row = 0
        for batch in _arrow_batches(path, field):
            for ids in batch.column(field).to_pylist():
                yield f'{path}, row {row}', ids
                row += 1
    elif (array := _open_npy(path)).ndim == 2:
        for row in range(start, stop):
            yield f'{path}, row {row}', array[row]
    else:
        yield from _read_stream(path, array, start, stop, eos_id)


def check_ids(value, vocab_size: int) -> np.ndarray:
    """The ids of a document as int64 [tokens]. Raises BadIds for what is no list of ids of the tokenizer."""
    try:
        ids = np.asarray([] if value is None else value)
    except ValueError:  # lists of several lengths
        ids = np.zeros((1, 1))
    if not ids.size:
        return np.zeros(0, np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in 'iu':
        raise BadIds('no ids', 'it must be a list of whole numbers')
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = int(ids.max() if ids.min() >= 0 else ids.min())
        raise BadIds('unknown id', f'id {wrong} is none of the tokenizer, which has {vocab_size}')
    return ids.astype(np.int64)


def encode(tokenizer, documents: list[np.ndarray]) -> Iterator[tuple[np.ndarray, None, int]]:
    """(tokens with eos at their end, no mask, bytes of their text) of each document; no tokens of one without text."""
    for ids in documents:
        if len(ids) and ids[0] == tokenizer.begin_id:
            ids = ids[1:]
        body = ids[:-1] if len(ids) and ids[-1] == tokenizer.eos_id else ids
        if not len(body):
            yield body, None, 0
            continue
        yield np.append(body, tokenizer.eos_id).astype(tokenizer.dtype), None, len(tokenizer.decode(body).encode())


# ---- npy ---------------------------------------------------------------------


def _open_npy(path: str) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode='r', allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        if getattr(error, 'errno', None):
            raise
        raise DataError(f'{path} is no npy file or is damaged ({first_line(error)}); write it again') from None
    if array.ndim not in (1, 2) or array.dtype.kind not in 'iu':
        raise DataError(
            f'{path} has shape {list(array.shape)} and dtype {array.dtype}; ids are whole numbers, [tokens] or '
            '[documents, tokens]'
        )
    return array


def _read_stream(path: str, array: np.ndarray, start: int, stop: int, eos_id: int) -> Iterator[tuple[str, np.ndarray]]:
    begin = 0 if start == 0 else _after_eos(array, start - 1, eos_id)
    while begin < min(stop, len(array)):
        end = _after_eos(array, begin, eos_id)
        yield f'{path}, document at token {begin}', array[begin:end]
        begin = end


def _after_eos(array: np.ndarray, position: int, eos_id: int) -> int:
    """Where the document goes on no more: behind the first eos from `position` on, or the end."""
    while position < len(array):
        found = np.flatnonzero(array[position : position + _BLOCK] == eos_id)
        if found.size:
            return position + int(found[0]) + 1
        position += _BLOCK
    return len(array)


# ---- Megatron ------------------------------------------------------------------


class _Megatron:
    """A .bin of token ids and its .idx: where sequences lie, and which of them are one document."""

    def __init__(self, tokens: np.ndarray, sizes: np.ndarray, starts: np.ndarray, first_sequence: np.ndarray):
        self._tokens, self._sizes, self._starts = tokens, sizes, starts
        self.first_sequence = first_sequence  # of each document, and the number of sequences at the end
        self.num_tokens = int(sizes.sum(dtype=np.int64))

    def read(self, document: int) -> np.ndarray:
        first, last = int(self.first_sequence[document]), int(self.first_sequence[document + 1])
        parts = [self._tokens[self._starts[i] : self._starts[i] + self._sizes[i]] for i in range(first, last)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _open_megatron(path: str) -> _Megatron:
    binary, index = _pair(path)
    for here, other in ((binary, index), (index, binary)):
        if not here.exists():
            raise DataError(
                f'{other} has no {here.name} beside it, without which its documents are unknown; fetch both'
            )

    def damaged(reason):
        return DataError(f'{index} and {binary.name} are no data set of Megatron-LM or are damaged ({reason})')

    raw = np.memmap(index, np.uint8, 'r') if index.stat().st_size else np.zeros(0, np.uint8)
    if len(raw) < _HEADER.size:
        raise damaged('the index is too short')
    magic, version, code, sequences, entries = _HEADER.unpack(raw[: _HEADER.size].tobytes())
    if magic != _MAGIC or version != 1:
        raise damaged('the index has another beginning')
    if code not in _DTYPES:
        raise damaged(f'its tokens are of type {code}, which is none of whole numbers')
    if len(raw) - _HEADER.size < 12 * sequences + 8 * entries or entries < 1:
        raise damaged('the index is too short')
    parts, offset = [], _HEADER.size
    for dtype, count in (('<i4', sequences), ('<i8', sequences), ('<i8', entries)):
        size = np.dtype(dtype).itemsize * count
        parts.append(raw[offset : offset + size].view(dtype))
        offset += size
    sizes, pointers, first_sequence = parts
    dtype = np.dtype(_DTYPES[code]).newbyteorder('<')
    count = binary.stat().st_size // dtype.itemsize
    tokens = np.memmap(binary, dtype, 'r', shape=(count,)) if count else np.zeros(0, dtype)
    if (sizes < 0).any() or (pointers < 0).any() or (pointers % dtype.itemsize).any():
        raise damaged('a sequence has no place')
    starts = pointers // dtype.itemsize
    if (starts > len(tokens)).any() or (starts + sizes > len(tokens)).any():
        raise damaged('the tokens end before the last sequence')
    if first_sequence[0] != 0 or first_sequence[-1] != sequences or (np.diff(first_sequence) < 0).any():
        raise damaged('its documents are not in order')
    return _Megatron(tokens, sizes, starts, first_sequence)


# ---- Arrow ---------------------------------------------------------------------


def _arrow_batches(path: str, field: str) -> Iterator:
    import pyarrow
    import pyarrow.ipc

    try:
        source = pyarrow.memory_map(path)
        try:
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pyarrow.ArrowInvalid:
            source.seek(0)
            batches = reader = pyarrow.ipc.open_stream(source)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f'{path} is no Arrow file or is damaged ({first_line(error)}); fetch it again') from None
    if field not in reader.schema.names:
        raise DataError(
            f'{path} has no column {field!r} (it has {", ".join(reader.schema.names)}); name the ids with --text_field'
        )
    yield from batches
