"""Writes one shard of prepared data: its documents as records, their lengths, and its counts.

prepare.py cuts the work into such tasks and runs them in processes. A task is
finished when its counts are written, which happens last.
"""

import collections
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from transxssm_jax.data import manifest as manifest_lib
from transxssm_jax.data.manifest import DataError
from transxssm_jax.data.source import Piece, Skipped, read_items

RECORD_TOKENS = 1 << 15
BATCH_CHARS = 1 << 20
# Longer texts are tokenised in parts that end with a line: a tokenizer needs about 100 bytes per character.
PART_CHARS = 1 << 22


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """The work of one shard."""

    number: int
    source: int
    pieces: tuple[Piece, ...]


def write_shard(
    task: ShardTask,
    state: Path,
    tokenizer,
    text_field: str,
    skip_bad: bool,
    advance: Callable[[int, int], None],
    form=None,
) -> None:
    """Writes one shard: its records, its documents' lengths, then its counts, which mark it finished.

    Args:
      task: what to read.
      state: directory of the files.
      tokenizer: see tokenizer.py.
      text_field: field, column or feature that holds the text.
      skip_bad: whether a bad document is counted and left out; otherwise it raises DataError.
      advance: called with the numbers of new documents and tokens.
      form: what a document is, see formats.py; None: text.
    """
    path = shard_path(state, task)
    temporary = path.with_name(f'{path.name}.tmp')
    skipped, first_bad = collections.Counter(), ''

    def texts() -> Iterator:
        nonlocal first_bad
        for piece in task.pieces:
            for item in read_items(piece, text_field, form):
                if not isinstance(item, Skipped):
                    yield item
                    continue
                if item.error and not skip_bad:
                    raise DataError(f'{item.error}; or leave such documents out with --skip_bad=SHARE')
                skipped[item.reason] += 1
                first_bad = first_bad or item.error

    writer = _Writer(temporary)
    lengths, text_bytes, targets = [], 0, 0
    for batch in _batches(texts()):
        batch_tokens = 0
        for ids, mask, learned_bytes in form.encode(batch) if form else _documents(tokenizer, batch):
            if not len(ids):
                skipped['empty'] += 1
                continue
            for offset in range(0, len(ids), RECORD_TOKENS):
                part = slice(offset, offset + RECORD_TOKENS)
                writer.write(_example(ids[part], offset, None if mask is None else mask[part]))
            lengths.append(len(ids))
            text_bytes += learned_bytes
            targets += 0 if mask is None else int(mask.sum())
            batch_tokens += len(ids)
        advance(len(batch), batch_tokens)
    writer.close()
    with open(temporary, 'rb+') as file:
        manifest_lib.sync(file)
    os.replace(temporary, path)
    with open(lengths_path(state, task), 'wb') as file:
        np.save(file, np.array(lengths, np.uint32))
        manifest_lib.sync(file)
    counts = {
        'documents': len(lengths),
        'records': writer.records,
        'tokens': sum(lengths),
        'bytes': text_bytes,
        'targets': targets,
        'skipped': dict(sorted(skipped.items())),
        'first_bad': first_bad,
        'file_bytes': path.stat().st_size,
        'sha256': manifest_lib.file_digest(path),
    }
    manifest_lib.write_file(result_path(state, task), json.dumps(counts).encode())
    manifest_lib.sync_directory(state)


def read_result(state: Path, task: ShardTask) -> dict | None:
    """The counts of a finished shard; None where it is not finished, or what tells so is damaged."""
    try:
        counts = json.loads(result_path(state, task).read_bytes())
        lengths = np.load(lengths_path(state, task))
        if (len(lengths), int(lengths.sum(dtype=np.int64))) != (counts['documents'], counts['tokens']):
            return None
    except (FileNotFoundError, ValueError, KeyError, TypeError, EOFError, RecursionError):
        return None
    return counts


class _Writer:
    """An ArrayRecord file. What fails in here is the output's fault, never that of the text."""

    def __init__(self, path: Path):
        from array_record.python.array_record_module import ArrayRecordWriter

        self.records = 0
        self._path = path
        path.write_bytes(b'')  # a Python error with the reason where the writer has only a status
        self._writer = self._run(lambda: ArrayRecordWriter(str(path), 'group_size:1'))

    def _run(self, action):
        try:
            return action()
        except (RuntimeError, ValueError) as error:
            raise DataError(
                f'{self._path} cannot be written ({manifest_lib.first_line(error)}); '
                'free space there, then run the same command to continue'
            ) from None

    def write(self, record: bytes) -> None:
        self._run(lambda: self._writer.write(record))
        self.records += 1

    def close(self) -> None:
        """Finishes the file, and reads its number of records again: a full disk may only be seen there."""
        self._run(self._close)

    def _close(self) -> None:
        from array_record.python.array_record_module import ArrayRecordReader

        self._writer.close()
        reader = ArrayRecordReader(str(self._path), options='readahead_buffer_size:0,max_parallelism:0')
        if reader.num_records() != self.records:
            raise RuntimeError(f'{reader.num_records()} records instead of {self.records}')
        reader.close()


def _documents(tokenizer, texts: list[str]) -> Iterator[tuple[np.ndarray, None, int]]:
    """(ids with eos at their end, no mask, bytes of the text) of each text; no ids for one without text."""
    for text, ids in zip(texts, _encode(tokenizer, texts), strict=True):
        yield np.append(ids, np.array(tokenizer.eos_id, ids.dtype)) if len(ids) else ids, None, len(text.encode())


def _encode(tokenizer, texts: list[str]) -> list[np.ndarray]:
    """encode_batch, with very long texts in parts."""
    parts = [list(_parts(text)) for text in texts]
    encoded = iter(tokenizer.encode_batch([part for text_parts in parts for part in text_parts]))
    return [
        ids[0] if len(ids) == 1 else np.concatenate(ids)
        for ids in ([next(encoded) for _ in text_parts] for text_parts in parts)
    ]


def _parts(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PART_CHARS:
        stop = text.rfind('\n', start, start + PART_CHARS) + 1
        if stop <= start:
            stop = start + PART_CHARS
        yield text[start:stop]
        start = stop
    yield text[start:]


def _batches(texts: Iterator) -> Iterator[list]:
    batch, chars = [], 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS or len(batch) >= 1024:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _example(ids: np.ndarray, offset: int, mask: np.ndarray | None) -> bytes:
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    example.features.feature['tokens'].bytes_list.value.append(
        ids.astype(ids.dtype.newbyteorder('<'), copy=False).tobytes()
    )
    example.features.feature['offset'].int64_list.value.append(offset)
    if mask is not None:
        example.features.feature['mask'].bytes_list.value.append(mask.tobytes())
    return example.SerializeToString(deterministic=True)


def shard_path(state: Path, task: ShardTask) -> Path:
    return state / f'{task.number:05d}.array_record'


def lengths_path(state: Path, task: ShardTask) -> Path:
    return state / f'{task.number:05d}.lengths.npy'


def result_path(state: Path, task: ShardTask) -> Path:
    return state / f'{task.number:05d}.json'
