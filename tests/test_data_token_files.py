"""Token ids of others: the same documents of every kind of file, and what is damaged is refused in one line."""

import json
import struct

import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest
from data_fixtures import ids, run_prepare, texts, write_jsonl

from transxssm_jax.data import token_files
from transxssm_jax.data.loader import read_documents
from transxssm_jax.data.manifest import DataError, read_manifest

TEXTS = texts(30, longest=80)
IDS = [ids(text).tolist() for text in TEXTS]  # each with eos at its end
CODES = {np.uint8: 1, np.int32: 4, np.int64: 5, np.uint16: 8}


def write_megatron(stem, documents, dtype=np.uint16, per_document=1, **changes):
    """A .bin and .idx of Megatron-LM's layout, each document in so many sequences."""
    parts, first = [], [0]
    for document in documents:
        parts += [part.tolist() for part in np.array_split(np.array(document), per_document)]
        first.append(len(parts))
    sizes = np.array([len(part) for part in parts], '<i4')
    pointers = ((np.cumsum(sizes) - sizes) * np.dtype(dtype).itemsize).astype('<i8')
    header = (
        dict(magic=b'MMIDIDX\0\0', version=1, code=CODES[dtype], sequences=len(parts), entries=len(first)) | changes
    )
    content = struct.pack('<9sQBQQ', *header.values())
    content += sizes.tobytes() + pointers.tobytes() + np.array(first, '<i8').tobytes()
    stem.with_suffix('.idx').write_bytes(content)
    stem.with_suffix('.bin').write_bytes(np.concatenate([np.array(part, dtype) for part in parts]).tobytes())
    return stem.with_suffix('.bin')


def write_arrow(path, documents, open_writer):
    table = pyarrow.table({'input_ids': documents})
    with open_writer(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return path


def as_megatron(root):
    return write_megatron(root / 'a', IDS)


def as_megatron_in_sequences(root):
    return write_megatron(root / 'a', IDS, np.int32, per_document=3).with_suffix('.idx')


def as_stream(root):
    np.save(root / 'a.npy', np.concatenate(IDS).astype(np.uint16))
    return root / 'a.npy'


def as_arrow_file(root):
    return write_arrow(root / 'a.arrow', IDS, pyarrow.ipc.new_file)


def as_arrow_stream(root):
    return write_arrow(root / 'a.arrow', IDS, pyarrow.ipc.new_stream)


def as_parquet(root):
    pyarrow.parquet.write_table(pyarrow.table({'input_ids': IDS}), root / 'a.parquet', row_group_size=4)
    return root / 'a.parquet'


def as_jsonl(root):
    (root / 'a.jsonl').write_text(''.join(json.dumps({'input_ids': document[:-1]}) + '\n' for document in IDS))
    return root / 'a.jsonl'  # without eos


def as_lines_in_zst(root):
    path = as_jsonl(root)
    with pyarrow.output_stream(str(root / 'b.jsonl.zst'), compression='zstd') as file:
        file.write(path.read_bytes())
    return root / 'b.jsonl.zst'


def as_directory(root):
    as_megatron(root)
    return root


def as_megatron_in_upper_case(root):
    for path in (as_megatron(root), root / 'a.idx'):
        path.rename(path.with_suffix(path.suffix.upper()))
    return root  # a directory of A.BIN and A.IDX


def as_feather_in_upper_case(root):
    pyarrow.feather.write_feather(pyarrow.table({'input_ids': IDS}), root / 'a.FEATHER', compression='zstd')
    return root / 'a.FEATHER'


WRITERS = [
    as_megatron,
    as_megatron_in_upper_case,
    as_feather_in_upper_case,
    as_megatron_in_sequences,
    as_stream,
    as_arrow_file,
    as_arrow_stream,
    as_parquet,
    as_jsonl,
    as_lines_in_zst,
    as_directory,
]


@pytest.mark.parametrize('write', WRITERS, ids=lambda write: write.__name__)
def test_ids_are_prepared_as_their_text_is(tmp_path, write):
    assert run_prepare(tmp_path / 'text', write_jsonl(tmp_path / 'text.jsonl', TEXTS)) == 0
    (tmp_path / 'source').mkdir()
    assert run_prepare(tmp_path / 'ids', write(tmp_path / 'source'), format='ids') == 0
    text, found = read_manifest(tmp_path / 'text', 'train'), read_manifest(tmp_path / 'ids', 'train')
    assert [document.tolist() for document in read_documents(tmp_path / 'ids', 'train')] == IDS
    assert found.fingerprint() == text.fingerprint()  # the bytes of the text too


def test_rows_of_an_array_are_documents(tmp_path):
    rows = np.arange(1, 61).reshape(6, 10)
    np.save(tmp_path / 'a.npy', rows)
    assert run_prepare(tmp_path / 'ids', tmp_path / 'a.npy', format='ids') == 0
    found = [document.tolist() for document in read_documents(tmp_path / 'ids', 'train')]
    assert found == [[*row, 256] for row in rows.tolist()]


@pytest.mark.parametrize('count', [1, 2, 3, 7, 50, 1000])
def test_pieces_of_a_stream_hold_every_document_once(tmp_path, count):
    path = as_stream(tmp_path)
    _, stop, _ = token_files.measure('npy', str(path))
    bounds = [stop * i // count for i in range(count + 1)]
    found = [
        document.tolist()
        for start, end in zip(bounds, bounds[1:])
        for _, document in token_files.read('npy', str(path), start, end, '', 256)
    ]
    assert found == IDS


def test_a_begin_token_is_left_out_and_a_last_document_without_eos_gets_one(tmp_path):
    np.save(tmp_path / 'a.npy', np.array([256, 5, 6, 256, 7, 8]))
    assert run_prepare(tmp_path / 'ids', tmp_path / 'a.npy', format='ids') == 0
    # The first eos of a stream ends a document without text.
    assert [document.tolist() for document in read_documents(tmp_path / 'ids', 'train')] == [[5, 6, 256], [7, 8, 256]]


# ---- refusals ------------------------------------------------------------------


def refused(capsys, tmp_path, source, **flags):
    assert run_prepare(tmp_path / 'ids', source, format='ids', **flags) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error')]
    return line


@pytest.mark.parametrize('ending', ['.bin', '.idx'])
def test_one_without_the_other_is_refused(tmp_path, capsys, ending):
    path = as_megatron(tmp_path)
    other = '.idx' if ending == '.bin' else '.bin'
    path.with_suffix(other).unlink()
    assert f'a{ending} has no a{other} beside it' in refused(capsys, tmp_path, path.with_suffix(ending))


@pytest.mark.parametrize(
    'changes, expected',
    [
        (dict(magic=b'something'), 'the index has another beginning'),
        (dict(version=2), 'the index has another beginning'),
        (dict(code=6), 'of type 6'),
        (dict(sequences=1 << 60), 'the index is too short'),
        (dict(entries=0), 'the index is too short'),
        (dict(entries=3), 'its documents are not in order'),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, capsys, changes, expected):
    assert expected in refused(capsys, tmp_path, write_megatron(tmp_path / 'a', IDS, **changes))


@pytest.mark.parametrize('name', ['a.bin', 'a.idx'])
@pytest.mark.parametrize('share', [0, 0.01, 0.3, 0.9])
def test_a_cut_file_is_refused(tmp_path, capsys, name, share):
    as_megatron(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * share)])
    assert 'no data set of Megatron-LM or are damaged' in refused(capsys, tmp_path, tmp_path / 'a.bin')


@pytest.mark.parametrize('seed', range(30))
def test_an_index_with_flipped_bytes_is_read_or_refused(tmp_path, seed):
    path, rng = as_megatron(tmp_path).with_suffix('.idx'), np.random.default_rng(seed)
    content = bytearray(path.read_bytes())
    for position in rng.integers(0, len(content), 3):
        content[position] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    try:
        name, stop, _ = token_files.measure('megatron', str(path))
        for _, document in token_files.read('megatron', name, 0, stop, '', 256):
            token_files.check_ids(document, 1 << 16)
    except DataError as error:
        assert '\n' not in str(error)


@pytest.mark.parametrize(
    'array, expected',
    [
        (np.zeros(4), 'ids are whole numbers'),
        (np.zeros((1, 2, 3), np.int32), 'ids are whole numbers'),
        (np.array([1, 257]), 'id 257 is none of the tokenizer, which has 257'),
        (np.array([-1, 2]), 'id -1 is none of the tokenizer'),
    ],
)
def test_arrays_that_are_no_ids_are_refused(tmp_path, capsys, array, expected):
    np.save(tmp_path / 'a.npy', array)
    assert expected in refused(capsys, tmp_path, tmp_path / 'a.npy')


@pytest.mark.parametrize('name', ['a.npy', 'a.arrow', 'a.parquet'])
def test_what_is_no_such_file_is_refused(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(b'nothing of the kind')
    assert str(tmp_path / name) in refused(capsys, tmp_path, tmp_path / name)


@pytest.mark.parametrize(
    'value', ['"text"', '[1.5]', '[true]', '["a"]', '[[1], [2, 3]]', '[[1], [2]]', '{"a": 1}', '[null]']
)
def test_fields_that_are_no_ids_are_refused_with_their_place(tmp_path, capsys, value):
    (tmp_path / 'a.jsonl').write_text(f'{{"input_ids": [1]}}\n{{"input_ids": {value}}}\n')
    line = refused(capsys, tmp_path, tmp_path / 'a.jsonl')
    assert 'a.jsonl, line at byte 19: it must be a list of whole numbers' in line
    assert run_prepare(tmp_path / 'ids', tmp_path / 'a.jsonl', format='ids', skip_bad=0.5) == 0
    assert read_manifest(tmp_path / 'ids', 'train').sources[0].skipped == {'no ids': 1}


def test_a_missing_column_is_refused(tmp_path, capsys):
    path = write_arrow(tmp_path / 'a.arrow', IDS, pyarrow.ipc.new_file)
    assert "has no column 'ids' (it has input_ids)" in refused(capsys, tmp_path, path, text_field='ids')


def test_files_of_text_hold_no_ids(tmp_path, capsys):
    (tmp_path / 'a.txt').write_text('1 2 3')
    assert 'a.txt is text; token ids are read of jsonl, parquet' in refused(capsys, tmp_path, tmp_path / 'a.txt')
