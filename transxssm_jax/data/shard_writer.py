"""One shard of prepared data: the documents of its pieces as records, their lengths, and its counts.

prepare.py cuts the work into such units and runs them in processes; a unit is
finished when its counts are written, which happens last.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from transxssm_jax.data import manifest as index_lib
from transxssm_jax.data.manifest import DataError
from transxssm_jax.data.source import Piece, read_documents

RECORD_TOKENS = 1 << 15
BATCH_CHARS = 1 << 20
# Longer texts are tokenised in parts that end with a line: a tokenizer needs about 100 bytes a character.
PART_CHARS = 1 << 22


@dataclasses.dataclass(frozen=True)
class Unit:
    """The work of one shard."""

    number: int
    source: int
    pieces: tuple[Piece, ...]


def tokenize_unit(unit: Unit, state: Path, tokenizer, text_field: str, advance: Callable[[int, int], None]) -> None:
    """Writes one shard: its records, its documents' lengths, then its counts, which mark it finished."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    path = shard_path(state, unit)
    temporary = path.with_name(f'{path.name}.tmp')
    temporary.write_bytes(b'')  # a Python error with the reason where the writer has only a status
    lengths, records, text_bytes, skipped = [], 0, 0, 0
    try:
        writer = ArrayRecordWriter(str(temporary), 'group_size:1')
        for texts in _batches(text for piece in unit.pieces for text in read_documents(piece, text_field)):
            batch_tokens = 0
            for text, ids in zip(texts, _encode(tokenizer, texts), strict=True):
                if not len(ids):
                    skipped += 1
                    continue
                ids = np.append(ids, np.array(tokenizer.eos_id, ids.dtype))
                for offset in range(0, len(ids), RECORD_TOKENS):
                    writer.write(_example(ids[offset : offset + RECORD_TOKENS], offset))
                    records += 1
                lengths.append(len(ids))
                text_bytes += len(text.encode())
                batch_tokens += len(ids)
            advance(len(texts), batch_tokens)
        writer.close()
        reader = ArrayRecordReader(str(temporary), options='readahead_buffer_size:0,max_parallelism:0')
        if reader.num_records() != records:
            raise RuntimeError(f'{reader.num_records()} records instead of {records}')
        reader.close()
    except (RuntimeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f'{temporary} cannot be written ({str(error).splitlines()[0]}); '
            'free space there, then run the same command to continue'
        ) from None
    with open(temporary, 'rb+') as file:
        index_lib.sync(file)
    os.replace(temporary, path)
    with open(lengths_path(state, unit), 'wb') as file:
        np.save(file, np.array(lengths, np.uint32))
        index_lib.sync(file)
    counts = {
        'documents': len(lengths),
        'records': records,
        'tokens': sum(lengths),
        'bytes': text_bytes,
        'skipped': skipped,
        'file_bytes': path.stat().st_size,
    }
    index_lib.write_file(result_path(state, unit), json.dumps(counts).encode())
    index_lib.sync_directory(state)


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


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch, chars = [], 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS or len(batch) >= 1024:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _example(ids: np.ndarray, offset: int) -> bytes:
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    example.features.feature['tokens'].bytes_list.value.append(
        ids.astype(ids.dtype.newbyteorder('<'), copy=False).tobytes()
    )
    example.features.feature['offset'].int64_list.value.append(offset)
    return example.SerializeToString(deterministic=True)


def shard_path(state: Path, unit: Unit) -> Path:
    return state / f'{unit.number:05d}.array_record'


def lengths_path(state: Path, unit: Unit) -> Path:
    return state / f'{unit.number:05d}.lengths.npy'


def result_path(state: Path, unit: Unit) -> Path:
    return state / f'{unit.number:05d}.json'
