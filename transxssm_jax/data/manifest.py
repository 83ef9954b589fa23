"""What a prepared directory holds besides its ArrayRecord shards, and how it is written.

    DIR/dataset_info.json, features.json     for TFDS; a split is finished when dataset_info.json lists it
    DIR/tokenizer.json                       copy of the tokenizer (none for bytes)
    DIR/documents-SPLIT.array_record-00000-of-00009
                                             tf.train.Example records: tokens (bytes of uint16 or uint32),
                                             offset (int64; 0 begins a document)
    DIR/SPLIT.index.json                     arguments, tokenizer, sources and shards with their counts
    DIR/SPLIT.lengths.npy                    uint32 [documents]: tokens of each document, eos included

A document longer than `record_tokens` spans several records, all but the last
of that length, so that reading a row out of a long document stays cheap and
the record of any token follows from the lengths alone.
"""

import dataclasses
import hashlib
import json
import math
import os
from fractions import Fraction
from pathlib import Path

import numpy as np

from transxssm_jax import cli

DATASET_NAME = 'documents'
INDEX_VERSION = 1


class DataError(cli.UserError, ValueError):
    """Data that is missing, broken or does not fit; the message is one line and names the remedy."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One `--source` of a split. Its documents are `first_document` .. `first_document + documents`."""

    spec: str
    weight: str  # decimal as given on the command line; '' in a split without weights
    first_document: int
    documents: int
    tokens: int  # eos included
    bytes: int  # UTF-8 bytes of the text
    skipped: int  # documents without text (or binary files), not stored


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file; shards follow one another in document order."""

    file: str
    file_bytes: int
    records: int
    documents: int


@dataclasses.dataclass(frozen=True)
class SplitIndex:
    directory: Path
    split: str
    arguments: dict  # of prepare, to tell whether a second run asks for the same
    tokenizer: dict  # ByteTokenizer.describe()
    token_dtype: str
    record_tokens: int
    sources: tuple[Source, ...]
    shards: tuple[Shard, ...]

    @property
    def num_documents(self) -> int:
        return sum(source.documents for source in self.sources)

    @property
    def num_tokens(self) -> int:
        return sum(source.tokens for source in self.sources)

    @property
    def num_bytes(self) -> int:
        return sum(source.bytes for source in self.sources)

    def mixture_weights(self) -> list[int]:
        """Whole-number weights in the exact proportion of the sources' weights; empty where sources have none."""
        if not self.sources[0].weight:
            return []
        fractions = [Fraction(source.weight) for source in self.sources]
        denominator = math.lcm(*(fraction.denominator for fraction in fractions))
        return [int(fraction * denominator) for fraction in fractions]

    def fingerprint(self) -> str:
        """sha256 of the index file: arguments, tokenizer, and the size and count of every shard."""
        return hashlib.sha256((self.directory / f'{self.split}.index.json').read_bytes()).hexdigest()

    def lengths(self) -> np.ndarray:
        """uint32 [num_documents], memory-mapped."""
        path = self.directory / f'{self.split}.lengths.npy'
        try:
            lengths = np.load(path, mmap_mode='r')
        except (OSError, ValueError) as error:
            raise DataError(
                f'{path} cannot be read ({error}); delete {self.directory} and run transxssm_jax.data.prepare again'
            ) from None
        if lengths.shape != (self.num_documents,):
            raise DataError(
                f'{path} has {lengths.size} documents, its index {self.num_documents}; '
                f'delete {self.directory} and run transxssm_jax.data.prepare again'
            )
        return lengths


def finished_splits(directory) -> list[str]:
    """Splits of a prepared directory. Raises DataError with the prepare command where there is none."""
    path = Path(directory) / 'dataset_info.json'
    try:
        splits = [split['name'] for split in json.loads(path.read_text())['splits']]
    except FileNotFoundError:
        unfinished = sorted(Path(directory).glob('.incomplete.*'))
        what = 'is not finished' if unfinished else 'holds no prepared data'
        raise DataError(
            f'{directory} {what}; run: python -m transxssm_jax.data.prepare --output={directory} '
            '--tokenizer=byte|FILE.json --split=train --source=...'
        ) from None
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f'{path} cannot be read ({error}); delete {directory} and run transxssm_jax.data.prepare again'
        ) from None
    return splits


def read_index(directory, split: str) -> SplitIndex:
    """Index of one finished split. Raises DataError where the directory or the split is not there."""
    directory = Path(directory)
    splits = finished_splits(directory)
    if split not in splits:
        raise DataError(
            f'{directory} has no split {split!r}, only {", ".join(splits)}; name one of these, or run: '
            f'python -m transxssm_jax.data.prepare --output={directory} --split={split} ...'
        )
    path = directory / f'{split}.index.json'
    try:
        content = json.loads(path.read_text())
        if content.pop('version') != INDEX_VERSION:
            raise ValueError(f'written for another version than {INDEX_VERSION}')
        content['sources'] = tuple(Source(**source) for source in content['sources'])
        content['shards'] = tuple(Shard(**shard) for shard in content['shards'])
        return SplitIndex(directory=directory, split=split, **content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'{path} cannot be read ({error}); delete {directory} and run transxssm_jax.data.prepare again'
        ) from None


def write_index(index: SplitIndex, lengths: np.ndarray) -> None:
    """Writes SPLIT.lengths.npy and SPLIT.index.json, each at once."""
    path = index.directory / f'{index.split}.lengths.npy'
    temporary = path.with_name(f'.{path.name}.tmp')
    with open(temporary, 'wb') as file:
        np.save(file, lengths)
        sync(file)
    os.replace(temporary, path)
    content = {'version': INDEX_VERSION} | dataclasses.asdict(index)
    del content['directory'], content['split']
    write_file(index.directory / f'{index.split}.index.json', (json.dumps(content, indent=1) + '\n').encode())


def write_file(path: Path, content: bytes) -> None:
    """Writes a whole file or nothing: temporary name, fsync, rename."""
    temporary = path.with_name(f'.{path.name}.tmp')
    with open(temporary, 'wb') as file:
        file.write(content)
        sync(file)
    os.replace(temporary, path)


def sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Makes the renames in a directory last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
