"""Where text comes from: the readers behind `--source=SPEC[@WEIGHT]` of prepare.py.

    notes.txt, notes.txt.gz           the whole file is one document
    corpus.jsonl, corpus.json.gz      one document per line, its text under --text_field
    shard.parquet                     one document per row, its text in column --text_field
    DIR                               the parquet files below DIR, or else the jsonl files, or else every text file
    'DIR/**/*.py'                     the files that match, each read by its ending
    tfds:NAME_OR_DIR/SPLIT            a TFDS data set in ArrayRecord files, its text in feature --text_field
    hf:NAME[/CONFIG]:SPLIT            the parquet files of a data set of a Hugging Face hub, see hub.py

Text and jsonl may be compressed by gzip (.gz) or Zstandard (.zst). Where every
parquet or jsonl file of DIR names its split (data/train-00000-of-00010.parquet,
valid.jsonl, train/0000.parquet), those of --split are taken. Directories that
prepare wrote are passed over, and so is a file that a pattern comes to a second
time; which files are passed over is reported. Endings are read in upper case
too. A weight is a decimal number; a SPEC that itself ends
in @NUMBER needs one behind it (wiki@2023@1), unless a file or directory has the
whole name.

Files are taken in sorted order and cut into pieces (byte ranges of jsonl, row
groups of parquet, ranges of TFDS examples), so that the documents and their
order depend on the source alone and any piece can be read by itself.

Every reader gives text under the same rules: UTF-8 with U+FFFD for what is
not, without a byte order mark at its begin.
"""

import codecs
import dataclasses
import glob
import gzip
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

from transxssm_jax.data import hub, source_files, token_files
from transxssm_jax.data.manifest import DataError, first_line
from transxssm_jax.data.tokenizer import replace_surrogates

COMPRESSED = ('.gz', '.zst')
TOKEN_FILES = '|'.join(map(re.escape, token_files.ENDINGS))
UNREAD = ('.xz', '.bz2', '.lz4', '.br', '.zip', '.7z', '.rar', '.tar', '.tgz', '.tar.gz', '.tar.zst')
COMPRESSION = 3  # text bytes per compressed byte, roughly; only sizes the pieces
BYTE_ORDER_MARK = '\ufeff'


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of documents that is read on its own.

    start and stop count bytes in jsonl, row groups in parquet and examples in
    TFDS; a text file or a compressed one is one piece. size: bytes of text, roughly.
    """

    kind: str  # text, jsonl, parquet, tfds, or one of token_files.py
    path: str
    start: int
    stop: int
    size: int
    explicit: bool = True  # False: found in a directory or by a pattern, so binary files are passed over


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A document that is not there to be stored."""

    reason: str  # a few words, by which it is counted
    error: str = ''  # where and what; '' for what is no error: a binary file among others


class DamagedFileError(DataError):
    """None of a file can be read, whatever is tried."""


def parse_source(argument: str) -> tuple[str, str]:
    """'SPEC' or 'SPEC@WEIGHT' -> (spec, weight as written, '' for none).

    Raises DataError for a weight of 0, or where it cannot be told whether the argument ends in a weight.
    """
    spec, at, weight = argument.rpartition('@')
    if not at or not re.fullmatch(r'[0-9]+(\.[0-9]*)?|\.[0-9]+', weight):
        if spec and os.path.exists(spec) and not os.path.exists(argument):
            raise DataError(f'--source={argument}: the weight behind @ must be a decimal number such as 0.3')
        return argument, ''
    explain = f'a name that ends in @NUMBER needs a weight behind it: --source={argument}@1'
    if os.path.exists(argument):
        if os.path.exists(spec):
            raise DataError(f'--source={argument}: there are both {spec} and {argument}; {explain}')
        return argument, ''
    if not Fraction(weight):
        raise DataError(f'--source={argument}: the weight must be above 0; leave the source out instead')
    if not spec.startswith(('tfds:', hub.PREFIX)) and not os.path.exists(spec) and not glob.has_magic(spec):
        raise DataError(f'--source={argument}: no such file or directory: {spec}, with weight {weight}; {explain}')
    return spec, weight


def list_files(
    spec: str, split: str, note: Callable[[str], None] = lambda text: None, *, ids: bool = False
) -> list[Piece]:
    """The files (or the TFDS split) of one source, each as one whole piece, in sorted order.

    Args:
      spec: see the top of this file.
      split: that a directory's files are taken of, where all of them name theirs.
      note: called with a sentence about files that are passed over.
      ids: whether documents are token ids, which token_files.py reads too.

    Raises DataError where there are none, or where it cannot be told which are meant.
    """
    if spec.startswith('tfds:'):
        data, size = _open_tfds(spec)
        return [Piece('tfds', spec, 0, len(data), size)]
    if spec.startswith(hub.PREFIX):
        return [_whole_file(path, explicit=False) for path in hub.fetch(spec)]
    if os.path.isfile(spec):
        return [_whole_file(spec, explicit=True, ids=ids)]
    kind = ''
    if os.path.isdir(spec):
        found, passed_over = source_files.below(spec)
        found = token_files.without_indexes(found) if ids else found
        for ending in (
            *([TOKEN_FILES] if ids else []),
            r'\.parquet',
            r'\.(jsonl|ndjson|json)\.(gz|zst)|\.(jsonl|ndjson)',
        ):
            paths = [path for path in found if re.search(f'({ending})$', path, re.IGNORECASE)]
            if paths:
                passed_over += sorted(set(found) - set(paths))
                paths = source_files.of_split(paths, spec, split, note)
                break
        else:
            paths, kind = found, 'text'  # package.json and the like are text here
    elif glob.has_magic(spec):
        found = sorted(glob.glob(spec, recursive=True))
        found = token_files.without_indexes(found) if ids else found
        passed_over = [path for path in found if not os.path.isfile(path) and not os.path.isdir(path)]
        files = [path for path in found if os.path.isfile(path) and not source_files.is_prepared(os.path.dirname(path))]
        # A pattern with ** follows links, and may come to one file by several ways.
        paths = sorted({os.path.realpath(path): path for path in reversed(files)}.values())
        passed_over += sorted({path for path in found if os.path.isfile(path)} - set(paths))
    elif os.path.lexists(spec):
        raise DataError(f'--source={spec} is neither a file nor a directory; write what it gives to a file')
    else:
        raise DataError(f'--source={spec}: no such file or directory')
    passed_over += [path for path in paths if path.lower().endswith(UNREAD)]
    paths = [path for path in paths if not path.lower().endswith(UNREAD)]
    if passed_over:
        note(f'--source={spec}: {len(passed_over):,} files are passed over: {source_files.some(passed_over)}')
    if not paths:
        raise DataError(f'--source={spec}: no files there; name a file, a directory or a quoted pattern that has some')
    return [_whole_file(path, explicit=False, kind=kind, ids=ids) for path in paths]


def cut(file: Piece, piece_size: int, *, skip_bad: bool = False) -> list[Piece]:
    """Pieces of about `piece_size` bytes of text that hold the documents of `file` in order.

    A parquet file without a readable footer raises DataError, or with skip_bad is one piece, which reads as Skipped.
    """
    if file.kind == 'parquet':
        try:
            metadata = _open_parquet(file.path).metadata
        except DamagedFileError:
            if not skip_bad:
                raise
            return [file]
        pieces, start, size = [], 0, 0
        for group in range(metadata.num_row_groups):
            size += metadata.row_group(group).total_byte_size
            if size >= piece_size or group == metadata.num_row_groups - 1:
                pieces.append(dataclasses.replace(file, start=start, stop=group + 1, size=size))
                start, size = group + 1, 0
        return pieces
    if file.kind == 'text' or file.path.lower().endswith(COMPRESSED) or file.size <= piece_size:
        return [file]
    count = -(-file.size // piece_size)
    bounds = [file.stop * i // count for i in range(count + 1)]
    return [
        dataclasses.replace(file, start=start, stop=stop, size=file.size // count)
        for start, stop in itertools.pairwise(bounds)
        if start < stop
    ]


def read_documents(piece: Piece, text_field: str) -> Iterator[str]:
    """Texts of the documents of `piece`; '' for one without text. Raises DataError naming a bad one."""
    for item in read_items(piece, text_field):
        if not isinstance(item, Skipped):
            yield item
        elif item.error:
            raise DataError(item.error)


def read_items(piece: Piece, text_field: str, form=None) -> Iterator:
    """Texts of the documents of `piece`, and Skipped for those that are bad.

    With a `form` (formats.py) the field holds something else than text: form.convert(value) is what is yielded, or a
    Skipped whose error lacks its place.

    What cannot be read any further is one Skipped ('unreadable'), whose rest is lost. Raises DataError where all
    documents of a file lack the field, and where the system fails to read (EIO, EACCES): that is no bad document.
    """
    readers = {'text': _read_text, 'jsonl': _read_jsonl, 'parquet': _read_parquet, 'tfds': _read_tfds}
    if form and piece.kind not in form.kinds:
        raise DataError(f'--source={piece.path} is {piece.kind}; {form.name} are read of {", ".join(form.kinds)}')
    items = readers.get(piece.kind, _read_ids)(piece, text_field, *([form] if form else []))
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except DamagedFileError as error:
            yield Skipped('unreadable', str(error))
            return
        except (DataError, MemoryError):
            raise
        except Exception as error:  # of gzip, zlib, zstd, Arrow and TFDS alike
            if getattr(error, 'errno', None):
                raise DataError(f'{piece.path} cannot be read ({error.strerror}); run the same command again') from None
            yield Skipped('unreadable', f'{piece.path} cannot be read ({first_line(error)}); fetch it again')
            return
        yield item if form or isinstance(item, Skipped) else replace_surrogates(item).removeprefix(BYTE_ORDER_MARK)


def _whole_file(path: str, *, explicit: bool, kind: str = '', ids: bool = False) -> Piece:
    if ids and (of_ids := token_files.kind_of(path)):
        path, stop, size = token_files.measure(of_ids, path)
        return Piece(of_ids, path, 0, stop, size, explicit)
    size, name = os.path.getsize(path), path.lower()
    if name.endswith(UNREAD):
        raise DataError(
            f'--source={path}: this format is not read; unpack it, or compress single files by gzip or zstd'
        )
    if name.endswith('.parquet') and not kind:
        return Piece('parquet', path, 0, 0, size * COMPRESSION, explicit)
    stem = name.removesuffix('.gz').removesuffix('.zst')
    text_size = size * COMPRESSION if stem != name else size
    table = stem.endswith(('.jsonl', '.ndjson', '.json'))
    return Piece(kind or ('jsonl' if table else 'text'), path, 0, size, text_size, explicit)


def _read_text(piece: Piece, text_field: str) -> Iterator[str | Skipped]:
    del text_field
    with _open(piece.path) as file:
        content = file.read()
    if b'\0' not in content[:8192]:
        yield content.decode('utf-8', 'replace')
    elif piece.explicit and content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f'--source={piece.path} is UTF-16; convert it, e.g. with iconv -f UTF-16 -t UTF-8')
    elif piece.explicit:
        raise DataError(
            f'--source={piece.path} is a binary file (it has zero bytes); '
            'text, jsonl and parquet are read, by the ending of the name'
        )
    else:
        yield Skipped('binary file')


def _read_jsonl(piece: Piece, text_field: str, form=None) -> Iterator:
    with _open(piece.path) as file:
        whole = piece.path.lower().endswith(COMPRESSED)
        position = piece.start
        if position:
            # A line belongs to the piece that its first byte is in.
            file.seek(position - 1)
            position += len(file.readline()) - 1
        while whole or position < piece.stop:
            line = file.readline()  # bytes end with a line feed alone, not with U+2028 and the like
            if not line:
                break
            content = line if position else line.removeprefix(BYTE_ORDER_MARK.encode())
            if content.strip():
                yield _json_text(content, text_field, f'{piece.path}, line at byte {position}', form)
            position += len(line)


def _json_text(line: bytes, text_field: str, place: str, form=None):
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = 'it is nested too deeply' if isinstance(error, RecursionError) else first_line(error)
        return Skipped('not JSON', f'{place}: not JSON ({reason}); every line must be one JSON object')
    if not isinstance(document, dict):
        wrong = f"is {type(document).__name__}, not an object; every line must be one, as jq -c '.[]' makes of a list"
        return Skipped('no field', f'{place} {wrong}')
    if text_field not in document:
        wrong = f'has no field {text_field!r} (it has {source_files.some(list(document), 20)}); name the text with --text_field'
        return Skipped('no field', f'{place} {wrong}')
    text = document[text_field]
    if form:
        return _converted(text, place, form)
    if not isinstance(text, str | None):
        return Skipped(
            'not text',
            f'{place}: field {text_field!r} is {type(text).__name__}, not text; name the text with --text_field',
        )
    return text or ''


def _read_ids(piece: Piece, text_field: str, form) -> Iterator:
    for place, ids in token_files.read(piece.kind, piece.path, piece.start, piece.stop, text_field, form.eos_id):
        yield _converted(ids, place, form)


def _converted(value, place: str, form):
    item = form.convert(value)
    return Skipped(item.reason, f'{place}: {item.error}') if isinstance(item, Skipped) and item.error else item


def _read_parquet(piece: Piece, text_field: str, form=None) -> Iterator:
    import pyarrow

    file = _open_parquet(piece.path)
    if text_field not in file.schema_arrow.names:
        raise DataError(
            f'{piece.path} has no column {text_field!r} (it has {", ".join(file.schema_arrow.names)}); '
            'name the text with --text_field'
        )
    column_type = file.schema_arrow.field(text_field).type
    value_type = column_type.value_type if pyarrow.types.is_dictionary(column_type) else column_type
    if not form and not (
        pyarrow.types.is_string(value_type)
        or pyarrow.types.is_large_string(value_type)
        or pyarrow.types.is_string_view(value_type)
    ):
        raise DataError(
            f'{piece.path}: column {text_field!r} is {column_type}, not text; name the text with --text_field'
        )
    row = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
    for batch in file.iter_batches(
        batch_size=256, row_groups=range(piece.start, piece.stop), columns=[text_field], use_threads=False
    ):
        for text in batch.column(0).to_pylist():
            yield _converted(text, f'{piece.path}, row {row}', form) if form else text or ''
            row += 1


def _read_tfds(piece: Piece, text_field: str) -> Iterator[str | Skipped]:
    data, _ = _open_tfds(piece.path)
    for i in range(piece.start, piece.stop):
        try:
            example = data[i]
        except Exception as error:  # TFDS raises many kinds
            yield Skipped('unreadable', f'{piece.path}: example {i} cannot be read ({first_line(error)})')
            continue
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
    if path.lower().endswith('.gz'):
        return gzip.open(path)
    if path.lower().endswith('.zst'):
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path, compression='zstd'), 1 << 20)
    return open(path, 'rb')


def _open_parquet(path: str):
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, 'errno', None):
            raise DataError(f'{path} cannot be read ({error.strerror}); run the same command again') from None
        raise DamagedFileError(
            f'{path} is no parquet file or is damaged ({first_line(error)}); fetch it again'
        ) from None


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
