"""What a prepared directory holds besides its ArrayRecord shards, and how it is written and checked.

    DIR/dataset_info.json, features.json     for TFDS; a split is finished when dataset_info.json lists it
    DIR/tokenizer.json                       copy of the tokenizer (none for bytes)
    DIR/documents-SPLIT.array_record-00000-of-00009
                                             tf.train.Example records: tokens (bytes of uint16 or uint32),
                                             offset (int64; 0 begins a document); of conversations also
                                             mask (bytes; 1: the token is learned as a target)
    DIR/SPLIT.manifest.json                  arguments, tokenizer, sources, shards, digests
    DIR/SPLIT.lengths.npy                    uint32 [documents]: tokens of each document, eos included

A document longer than `record_tokens` spans several records, all but the last
of that length, so that reading a row out of a long document stays cheap and
the record of any token follows from the lengths alone.

Everything that decides a batch has a sha256: the manifest holds its own, that
of the lengths, of the tokenizer and of every shard. The first three are checked
whenever a split is opened. Of the shards the size is checked at opening, the
number of records when one is first read, and every record by ArrayRecord's own
checksums when it is read; `check_shards(verify='full')` reads them whole.
"""

import dataclasses
import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from transxssm_jax import cli
from transxssm_jax.data import object_store
from transxssm_jax.data.mixture import whole_number_weights

DATASET_NAME = 'documents'
MANIFEST_VERSION = 2
CHAT_VERSION = 3  # of conversations, whose mask earlier programs would not see
VERIFY = ('sizes', 'full')  # how the contents of shards are checked at opening
# Nothing here advises to delete: a wrong --path may well hold what prepare did not write.
RESTORE = 'restore it from a copy, or prepare the data again in another directory'


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
    bytes: int  # UTF-8 bytes of the text; of conversations, of what is learned of it
    skipped: dict[str, int]  # documents that are not stored, by reason: 'empty', 'binary file', 'not JSON', ...
    targets: int = 0  # of conversations, the tokens that are learned; 0: all


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file; shards follow one another in document order."""

    file: str
    file_bytes: int
    records: int
    documents: int
    sha256: str  # of the file


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What SPLIT.manifest.json holds."""

    directory: Path
    split: str
    arguments: dict  # of prepare, to tell whether a second run asks for the same
    tokenizer: dict  # ByteTokenizer.describe()
    token_dtype: str
    record_tokens: int
    lengths_sha256: str  # of SPLIT.lengths.npy
    sources: tuple[Source, ...]
    shards: tuple[Shard, ...]
    chat: dict = dataclasses.field(default_factory=dict)  # Chat.describe() of conversations, which have a mask
    origin: str = ''  # URL of the directory on an object store, of which `directory` is the cache; '': it is local

    @property
    def num_documents(self) -> int:
        return sum(source.documents for source in self.sources)

    @property
    def num_tokens(self) -> int:
        return sum(source.tokens for source in self.sources)

    @property
    def num_targets(self) -> int:
        """Stored tokens that are learned."""
        return sum(source.targets for source in self.sources) if self.chat else self.num_tokens

    @property
    def num_bytes(self) -> int:
        return sum(source.bytes for source in self.sources)

    def mixture_weights(self) -> list[int]:
        """Whole-number weights in the exact proportion of the sources' weights; empty where sources have none."""
        if not self.sources[0].weight:
            return []
        return whole_number_weights([source.weight for source in self.sources])

    def fingerprint(self) -> str:
        """sha256 of all that decides a batch: tokenizer, lengths, shards, and the sources' documents and weights.

        It is the same wherever the text came from and wherever the directory lies.
        """
        content = self._content()
        del content['arguments']
        for source in content['sources']:
            del source['spec'], source['skipped']
        return _digest(content)

    def lengths(self) -> np.ndarray:
        """uint32 [num_documents], memory-mapped. Raises DataError where the file is not the one that was written."""
        path = self._copy(f'{self.split}.lengths.npy', self.lengths_sha256)
        try:
            if file_digest(path) != self.lengths_sha256:
                raise ValueError('its sha256 is not that of the manifest')
            lengths = np.load(path, mmap_mode='r')
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from None
        return lengths

    def shard_path(self, shard: Shard) -> Path:
        """The shard's file here; from an object store it is fetched where the cache lacks it. Raises DataError."""
        return self._copy(shard.file, shard.sha256, shard.file_bytes)

    def _copy(self, name: str, sha256: str, size: int = -1) -> Path:
        if not self.origin:
            return self.directory / name
        # By its digest: what was prepared anew at the same place is another file.
        copy = self.directory / f'{sha256[:16]}-{name}'
        if not copy.exists() or (size >= 0 and copy.stat().st_size != size):
            try:
                object_store.fetch(self.origin, name, copy)
            except FileNotFoundError:
                raise broken_shard(f'{self.origin}/{name}', 'it is not there') from None
        return copy

    def _shard_size(self, shard: Shard) -> int:
        if self.origin:
            return object_store.Files(self.origin).size(shard.file)
        return os.path.getsize(self.directory / shard.file)

    def check_shards(self, verify: str = 'sizes') -> None:
        """Raises DataError naming a shard that is missing, not of its size or, under 'full', not of its sha256.

        'full' reads every shard, on all cores: 0.5 to 2 GB/s per core by whether the processor has SHA instructions.
        """
        if verify not in VERIFY:
            raise DataError(f'verify={verify!r} must be one of {", ".join(map(repr, VERIFY))}')
        for shard in self.shards:
            path = f'{self.origin}/{shard.file}' if self.origin else self.directory / shard.file
            try:
                size = self._shard_size(shard)
            except OSError as error:
                raise broken_shard(path, error.strerror or 'it is not there') from None
            if size != shard.file_bytes:
                raise broken_shard(path, f'{size} bytes instead of {shard.file_bytes}')
        if verify == 'full':
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                paths = [self.shard_path(shard) for shard in self.shards]
                digests = [pool.submit(file_digest, path) for path in paths]
                for path, digest, shard in zip(paths, digests, self.shards, strict=True):
                    try:
                        damaged = digest.result() != shard.sha256
                    except OSError as error:
                        raise broken_shard(path, error.strerror) from None
                    if damaged:
                        raise broken_shard(path, 'its sha256 is not that of the manifest')

    def _content(self) -> dict:
        content = {'version': CHAT_VERSION if self.chat else MANIFEST_VERSION} | dataclasses.asdict(self)
        del content['directory'], content['split'], content['origin']
        if not self.chat:  # text has the form that it had before there were conversations
            del content['chat']
            for source in content['sources']:
                del source['targets']
        return content

    def write(self) -> None:
        """Writes SPLIT.manifest.json, all of it or nothing."""
        content = self._content()
        content = {'sha256': _digest(content)} | content
        write_file(self.directory / f'{self.split}.manifest.json', (json.dumps(content, indent=1) + '\n').encode())


def finished_splits(directory) -> list[str]:
    """Splits of a prepared directory. Raises DataError with the prepare command where there is none."""
    origin, directory = directory, local_directory(directory, ('dataset_info.json',))
    if os.path.isfile(directory):
        raise DataError(f'{directory} is a file; give the directory that transxssm_jax.data.prepare wrote')
    path = directory / 'dataset_info.json'
    try:
        splits = [split['name'] for split in json.loads(path.read_bytes())['splits']]
        if not splits:
            raise ValueError('it lists no split')
        if bad := [name for name in splits if not isinstance(name, str) or not re.fullmatch(r'[A-Za-z]\w*', name)]:
            raise ValueError(f'{cli.shorten(repr(bad[0]), 40)} is no name of a split')
    except FileNotFoundError:
        if object_store.is_url(origin):
            raise DataError(f'{origin} holds no prepared data; prepare it in a local directory and copy that') from None
        unfinished = sorted(directory.glob('.incomplete.*'))
        what = 'is not finished' if unfinished else 'holds no prepared data'
        raise DataError(
            f'{directory} {what}; run: python -m transxssm_jax.data.prepare --output={directory} '
            '--tokenizer=byte|FILE.json --split=train --source=...'
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from None
    return splits


def local_directory(directory, names: tuple[str, ...]) -> Path:
    """The directory; of one on an object store its cache, into which files of these names are fetched, as they are now.

    A file that is not there is not in the cache either. Raises StoreError where the store refuses.
    """
    if not object_store.is_url(directory):
        return Path(directory)
    cache = object_store.cache_of(str(directory))
    for name in names:
        try:
            object_store.fetch(str(directory), name, cache / name)
        except FileNotFoundError:
            (cache / name).unlink(missing_ok=True)
    return cache


def read_manifest(directory, split: str) -> Manifest:
    """Manifest of one finished split. Raises DataError where the directory or the split is missing or damaged."""
    origin = str(directory).rstrip('/') if object_store.is_url(directory) else ''
    splits = finished_splits(directory)
    if split not in splits:
        raise DataError(
            f'{directory} has no split {split!r}, only {", ".join(splits)}; name one of these, or run: '
            f'python -m transxssm_jax.data.prepare --output={directory} --split={split} ...'
        )
    directory = local_directory(directory, (f'{split}.manifest.json',))
    path = directory / f'{split}.manifest.json'
    if not os.path.exists(path) and os.path.exists(directory / f'{split}.index.json'):
        raise DataError(
            f'{directory} was prepared by a version without digests, whose data is no longer read; '
            'prepare it again in another directory'
        )
    try:
        content = json.loads(path.read_bytes())
        digest, version = content.pop('sha256'), content['version']
        if digest != _digest(content):
            raise ValueError('its content is not that of its sha256')
        if version not in (MANIFEST_VERSION, CHAT_VERSION):
            raise ValueError(f'it is of version {version}, not {MANIFEST_VERSION} or {CHAT_VERSION}')
        del content['version']
        content['sources'] = tuple(Source(**source) for source in content['sources'])
        content['shards'] = tuple(Shard(**shard) for shard in content['shards'])
        return Manifest(directory=directory, split=split, origin=origin, **content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, error) from None


def write_lengths(directory: Path, split: str, lengths: np.ndarray) -> str:
    """Writes SPLIT.lengths.npy, all of it or nothing; returns its sha256."""
    path = directory / f'{split}.lengths.npy'
    temporary = path.with_name(f'.{path.name}.tmp')
    with open(temporary, 'wb') as file:
        np.save(file, lengths)
        sync(file)
    digest = file_digest(temporary)
    os.replace(temporary, path)
    return digest


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


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


def first_line(error) -> str:
    """The first line of what an error reports, or its type where it reports nothing."""
    return next((line.strip()[:200] for line in str(error).splitlines() if line.strip()), type(error).__name__)


def broken_shard(path: Path, reason) -> DataError:
    return DataError(f'shard {path} is missing or corrupt ({first_line(reason)}); {RESTORE}')


def _damaged(path: Path, error: Exception) -> DataError:
    reason = first_line(getattr(error, 'strerror', None) or error)
    return DataError(f'{path} cannot be read or is damaged ({reason}); {RESTORE}')


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
