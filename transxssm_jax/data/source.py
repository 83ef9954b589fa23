"""Where text comes from: the readers behind `--source=SPEC[@WEIGHT]` of prepare.py.

    notes.txt, notes.txt.gz           the whole file is one document
    corpus.jsonl, corpus.json.gz      one document a line, its text under --text_field
    shard.parquet                     one document a row, its text in column --text_field
    DIR                               the parquet files below DIR, or else the jsonl files, or else every text file;
                                      where the names of parquet or jsonl files tell splits apart
                                      (data/train-00000-of-00010.parquet, valid.jsonl, train/0000.parquet),
                                      those of --split
    'DIR/**/*.py'                     the files that match, each read by its ending
    tfds:NAME_OR_DIR/SPLIT            a TFDS data set in ArrayRecord files, its text in feature --text_field

Files are taken in sorted order and cut into pieces (byte ranges of jsonl, row
groups of parquet, ranges of TFDS examples), so that the documents and their
order depend on the source alone and any piece can be read by itself.
"""

import dataclasses
import glob
import gzip
import itertools
import json
import os
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from transxssm_jax.data.manifest import DataError

SPLIT_WORDS = {  # as the Hugging Face hub reads file names
    'train': 'train',
    'training': 'train',
    'validation': 'validation',
    'valid': 'validation',
    'val': 'validation',
    'dev': 'validation',
    'test': 'test',
    'testing': 'test',
    'eval': 'test',
    'evaluation': 'test',
}
COMPRESSION = 3  # text bytes for a byte of gzip, roughly; only sizes the pieces


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of documents that is read on its own.

    start and stop count bytes in jsonl, row groups in parquet and examples in
    TFDS; a text or gzip file is one piece. size: bytes of text, roughly.
    """

    kind: str  # text, jsonl, parquet, tfds
    path: str
    start: int
    stop: int
    size: int
    explicit: bool = True  # False: found in a directory or by a pattern, so binary files are passed over


def parse_source(argument: str) -> tuple[str, str]:
    """'SPEC' or 'SPEC@WEIGHT' -> (spec, weight as written, '' for none)."""
    spec, at, weight = argument.rpartition('@')
    if at and re.fullmatch(r'\d+(\.\d*)?|\.\d+', weight):
        if not Fraction(weight):
            raise DataError(f'--source={argument}: the weight must be above 0; leave the source out instead')
        return spec, weight
    return argument, ''


def list_files(spec: str, split: str) -> list[Piece]:
    """The files (or the TFDS split) of one source, each as one whole piece, in sorted order.

    Raises DataError where there are none.
    """
    if spec.startswith('tfds:'):
        data, size = _open_tfds(spec)
        return [Piece('tfds', spec, 0, len(data), size)]
    if os.path.isfile(spec):
        return [_whole_file(spec, explicit=True)]
    if os.path.isdir(spec):
        paths = _below(spec)
        for ending in (r'\.parquet', r'\.(jsonl|ndjson|json)\.gz|\.(jsonl|ndjson)'):
            tables = [path for path in paths if re.search(f'({ending})$', path)]
            if tables:
                paths = _of_split(tables, spec, split)
                break
        else:  # also of package.json and the like
            return [_whole_file(path, explicit=False, kind='text') for path in paths] or _no_files(spec)
    elif glob.has_magic(spec):
        paths = [path for path in glob.glob(spec, recursive=True) if os.path.isfile(path)]
    else:
        raise DataError(f'--source={spec}: no such file or directory')
    return [_whole_file(path, explicit=False) for path in sorted(paths)] or _no_files(spec)


def cut(file: Piece, piece_size: int) -> list[Piece]:
    """Pieces of about `piece_size` bytes of text that hold the documents of `file` in order."""
    if file.kind == 'parquet':
        metadata = _open_parquet(file.path).metadata
        pieces, start, size = [], 0, 0
        for group in range(metadata.num_row_groups):
            size += metadata.row_group(group).total_byte_size
            if size >= piece_size or group == metadata.num_row_groups - 1:
                pieces.append(dataclasses.replace(file, start=start, stop=group + 1, size=size))
                start, size = group + 1, 0
        return pieces
    if file.kind == 'text' or file.path.endswith('.gz') or file.size <= piece_size:
        return [file]
    count = -(-file.size // piece_size)
    bounds = [file.stop * i // count for i in range(count + 1)]
    return [
        dataclasses.replace(file, start=start, stop=stop, size=file.size // count)
        for start, stop in itertools.pairwise(bounds)
        if start < stop
    ]


def read_documents(piece: Piece, text_field: str) -> Iterator[str]:
    """Texts of the documents of `piece`; '' for one without text. Raises DataError naming the place."""
    readers = {'text': _read_text, 'jsonl': _read_jsonl, 'parquet': _read_parquet, 'tfds': _read_tfds}
    return readers[piece.kind](piece, text_field)


def _no_files(spec: str):
    raise DataError(f'--source={spec}: no files there; name a file, a directory or a quoted pattern that has some')


def _below(directory: str) -> list[str]:
    """Files below a directory; hidden ones and Python's caches are left out."""
    paths = []
    for root, directories, files in os.walk(directory):
        directories[:] = [name for name in directories if not name.startswith('.') and name != '__pycache__']
        paths += [os.path.join(root, name) for name in files if not name.startswith('.')]
    return sorted(path for path in paths if os.path.isfile(path))


def _of_split(paths: list[str], directory: str, split: str) -> list[str]:
    """The paths of one split where file names tell splits apart, otherwise all."""
    splits = {}
    for path in paths:
        words = re.split(r'[^a-z]+', os.path.relpath(path, directory).lower())
        # The last word that names a split counts: test/train-0.parquet is of train.
        found = [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS]
        splits.setdefault(found[-1] if found else '', []).append(path)
    if set(splits) == {''}:
        return paths
    wanted = SPLIT_WORDS.get(split, split)
    if wanted not in splits:
        raise DataError(
            f'--source={directory} has files of {", ".join(sorted(filter(None, splits)))} but none of '
            f'--split={split}; name the files, for example --source={directory}/{sorted(filter(None, splits))[0]}*'
        )
    return splits[wanted]


def _whole_file(path: str, *, explicit: bool, kind: str = '') -> Piece:
    size = os.path.getsize(path)
    stem = path.removesuffix('.gz')
    text_size = size * COMPRESSION if stem != path else size
    if stem.endswith('.parquet') and not kind:
        return Piece('parquet', path, 0, 0, size * COMPRESSION, explicit)
    if path.endswith(('.zst', '.xz', '.bz2', '.zip', '.tar', '.7z')) and explicit:
        raise DataError(f'--source={path}: this compression is not read; decompress it or use gzip')
    table = stem.endswith(('.jsonl', '.ndjson', '.json'))
    return Piece(kind or ('jsonl' if table else 'text'), path, 0, size, text_size, explicit)


def _read_text(piece: Piece, text_field: str) -> Iterator[str]:
    del text_field
    with _open(piece.path) as file:
        content = file.read()
    if b'\0' in content[:8192]:
        if piece.explicit:
            raise DataError(
                f'--source={piece.path} is a binary file (it has zero bytes); '
                'text, jsonl and parquet are read, by the ending of the name'
            )
        content = b''
    yield content.decode('utf-8', 'replace')


def _read_jsonl(piece: Piece, text_field: str) -> Iterator[str]:
    with _open(piece.path) as file:
        whole = piece.path.endswith('.gz')
        if piece.start:
            # A line belongs to the piece that its first byte is in.
            file.seek(piece.start - 1)
            file.readline()
        while whole or file.tell() < piece.stop:
            position = file.tell()
            line = file.readline()
            if not line:
                break
            if line.strip():
                yield _json_text(line, text_field, f'{piece.path}, line at byte {position}')


def _json_text(line: bytes, text_field: str, place: str) -> str:
    try:
        document = json.loads(line)
    except ValueError as error:
        raise DataError(f'{place}: not JSON ({error}); every line must be one JSON object') from None
    if not isinstance(document, dict) or text_field not in document:
        names = ', '.join(document) if isinstance(document, dict) else type(document).__name__
        raise DataError(f'{place} has no field {text_field!r} (it has {names}); name the text with --text_field')
    text = document[text_field]
    if not isinstance(text, str | None):
        raise DataError(
            f'{place}: field {text_field!r} is {type(text).__name__}, not text; name the text with --text_field'
        )
    # JSON can spell half a surrogate pair, which is no text.
    return (text or '').encode('utf-8', 'replace').decode()


def _read_parquet(piece: Piece, text_field: str) -> Iterator[str]:
    import pyarrow

    file = _open_parquet(piece.path)
    if text_field not in file.schema_arrow.names:
        raise DataError(
            f'{piece.path} has no column {text_field!r} (it has {", ".join(file.schema_arrow.names)}); '
            'name the text with --text_field'
        )
    column_type = file.schema_arrow.field(text_field).type
    if not (
        pyarrow.types.is_string(column_type)
        or pyarrow.types.is_large_string(column_type)
        or pyarrow.types.is_string_view(column_type)
    ):
        raise DataError(
            f'{piece.path}: column {text_field!r} is {column_type}, not text; name the text with --text_field'
        )
    try:
        for batch in file.iter_batches(
            batch_size=256, row_groups=range(piece.start, piece.stop), columns=[text_field], use_threads=False
        ):
            for text in batch.column(0).to_pylist():
                yield text or ''
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f'{piece.path} cannot be read ({str(error).splitlines()[0]}); fetch it again') from None


def _read_tfds(piece: Piece, text_field: str) -> Iterator[str]:
    data, _ = _open_tfds(piece.path)
    for i in range(piece.start, piece.stop):
        example = data[i]
        if text_field not in example:
            raise DataError(
                f'{piece.path} has no feature {text_field!r} (it has {", ".join(example)}); '
                'name the text with --text_field'
            )
        text = example[text_field]
        if isinstance(text, bytes):  # TFDS without TensorFlow gives text as bytes
            text = text.decode('utf-8', 'replace')
        if not isinstance(text, str):
            raise DataError(
                f'{piece.path}: feature {text_field!r} is {type(text).__name__}, not text; '
                'name the text with --text_field'
            )
        yield text


def _open(path: str):
    return gzip.open(path) if path.endswith('.gz') else open(path, 'rb')


def _open_parquet(path: str):
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise DataError(f'{path} is no parquet file ({str(error).splitlines()[0]}); fetch it again') from None


def _open_tfds(spec: str):
    """(random-access examples, their bytes) of tfds:NAME_OR_DIR/SPLIT."""
    import tensorflow_datasets as tfds

    name, _, split = spec.removeprefix('tfds:').rpartition('/')
    if not name:
        raise DataError(f'--source={spec}: must be tfds:NAME_OR_DIR/SPLIT')
    try:
        builder = tfds.builder_from_directory(name) if Path(name).is_dir() else tfds.builder(name)
        splits = builder.info.splits
        if re.split(r'[\[+]', split)[0] not in splits:
            raise DataError(
                f'--source={spec}: {name} has no split {split!r}, only {", ".join(splits) or "none (not downloaded)"}'
            )
        return builder.as_data_source(split), splits[split].num_bytes or 0
    except DataError:
        raise
    except Exception as error:  # TFDS raises many kinds, ImportError (no TensorFlow) among them
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(
            f'--source={spec} cannot be opened ({reason[:200]}); TFDS must find it prepared in ArrayRecord files '
            '(tfds build --file_format=array_record)'
        ) from None
