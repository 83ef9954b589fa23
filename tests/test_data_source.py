import gzip
import json

import numpy as np
import pytest
from data_fixtures import texts, write_jsonl

from transxssm_jax.data.manifest import DataError
from transxssm_jax.data.source import cut, list_files, parse_source, read_documents


def read(spec, split='train', piece_size=1 << 30, text_field='text'):
    return [
        text
        for file in list_files(str(spec), split)
        for piece in cut(file, piece_size)
        for text in read_documents(piece, text_field)
    ]


def write_parquet(path, documents, rows_per_group=10):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(
        pyarrow.table({'id': list(range(len(documents))), 'text': documents}), path, row_group_size=rows_per_group
    )


def test_weights():
    assert parse_source('a.txt') == ('a.txt', '')
    assert parse_source('a.txt@0.25') == ('a.txt', '0.25')
    assert parse_source('user@host/a') == ('user@host/a', '')
    with pytest.raises(DataError, match='above 0'):
        parse_source('a.txt@0')


def test_text_files_directories_and_patterns(tmp_path):
    (tmp_path / 'src/deep').mkdir(parents=True)
    (tmp_path / 'src/.git').mkdir()
    (tmp_path / 'src/__pycache__').mkdir()
    (tmp_path / 'src/b.py').write_bytes(b'b = 1\r\n')
    (tmp_path / 'src/deep/test.py').write_bytes('é\xff'.encode('latin-1') + b'z')
    (tmp_path / 'src/a.txt').write_text('a')
    (tmp_path / 'src/deep/package.json').write_text('{\n}\n')
    (tmp_path / 'src/empty.txt').write_text('')
    (tmp_path / 'src/image.bin').write_bytes(b'\0\1\2')
    (tmp_path / 'src/.git/config').write_text('hidden')
    (tmp_path / 'src/__pycache__/b.pyc').write_text('cache')
    with gzip.open(tmp_path / 'src/z.txt.gz', 'wt') as file:
        file.write('zipped')
    assert read(tmp_path / 'src') == ['a', 'b = 1\r\n', '{\n}\n', '��z', '', '', 'zipped']
    assert read(tmp_path / 'src/**/*.py') == ['b = 1\r\n', '��z']
    assert read(tmp_path / 'src/b.py') == ['b = 1\r\n']
    with pytest.raises(DataError, match='binary'):
        read(tmp_path / 'src/image.bin')
    with pytest.raises(DataError, match='no such file'):
        read(tmp_path / 'none')
    with pytest.raises(DataError, match='no files'):
        read(tmp_path / '*.rst')


@pytest.mark.parametrize('piece_size', [1, 50, 1000, 1 << 30])
def test_jsonl_in_pieces(tmp_path, piece_size):
    documents = texts(30)
    path = write_jsonl(tmp_path / 'd.jsonl', documents)
    assert read(path, piece_size=piece_size) == documents
    with gzip.open(tmp_path / 'd.jsonl.gz', 'wb') as file:
        file.write(path.read_bytes())
    assert read(tmp_path / 'd.jsonl.gz', piece_size=piece_size) == documents


def test_jsonl_oddities(tmp_path):
    path = tmp_path / 'd.jsonl'
    path.write_text('{"text": "a"}\n\n{"text": null}\n{"text": "half \\ud800"}\n{"text": "no newline at the end"}')
    assert read(path) == ['a', '', 'half ?', 'no newline at the end']
    path.write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(DataError, match='d.jsonl, line at byte 14: not JSON'):
        read(path)
    path.write_text('{"content": "a"}\n')
    with pytest.raises(DataError, match="no field 'text' .it has content.; name the text with --text_field"):
        read(path)
    assert read(path, text_field='content') == ['a']
    path.write_text(json.dumps({'text': 3}) + '\n')
    with pytest.raises(DataError, match='is int, not text'):
        read(path)


@pytest.mark.parametrize('piece_size', [1, 1000, 1 << 30])
def test_parquet_in_pieces(tmp_path, piece_size):
    documents = texts(35) + [None]
    write_parquet(tmp_path / 'd.parquet', documents)
    assert read(tmp_path / 'd.parquet', piece_size=piece_size) == documents[:-1] + ['']
    with pytest.raises(DataError, match='no column .body. .it has id, text.'):
        read(tmp_path / 'd.parquet', text_field='body')
    with pytest.raises(DataError, match='is int64, not text'):
        read(tmp_path / 'd.parquet', text_field='id')
    (tmp_path / 'broken.parquet').write_bytes(b'PAR1 nonsense')
    with pytest.raises(DataError, match='broken.parquet is no parquet file'):
        read(tmp_path / 'broken.parquet')


def test_hugging_face_layouts(tmp_path):
    documents = texts(9)
    hub = tmp_path / 'hub'
    for i in range(2):
        write_parquet(hub / f'data/train-{i:05d}-of-00002.parquet', documents[3 * i : 3 * i + 3])
    write_parquet(hub / 'data/test-00000-of-00001.parquet', documents[6:])
    (hub / 'README.md').write_text('not data')
    assert read(hub) == documents[:6]
    assert read(hub, split='test') == documents[6:]
    with pytest.raises(DataError, match='files of test, train but none of --split=validation; name the files'):
        read(hub, split='validation')
    assert read(hub / 'data/test-*', split='validation') == documents[6:]

    converted = tmp_path / 'converted'
    write_parquet(converted / 'default/train/0000.parquet', documents[:4])
    write_parquet(converted / 'default/dev/0000.parquet', documents[4:])
    assert read(converted) == documents[:4]
    assert read(converted, split='validation') == documents[4:]

    plain = tmp_path / 'plain'
    plain.mkdir()
    write_jsonl(plain / 'part1.jsonl', documents[:5])
    write_jsonl(plain / 'part2.jsonl', documents[5:])
    assert read(plain, split='validation') == documents


def test_tfds(tmp_path):
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    documents = texts(20)
    features = tfds.features.FeaturesDict({'text': tfds.features.Text(), 'label': tfds.features.Scalar(np.int64)})
    writer = ArrayRecordWriter(str(tmp_path / 'small-train.array_record-00000-of-00001'), 'group_size:1')
    for text in documents:
        writer.write(features.serialize_example({'text': text, 'label': 1}))
    writer.close()
    tfds.folder_dataset.write_metadata(
        data_dir=tmp_path,
        features=features,
        check_data=False,
        split_infos=[
            tfds.core.SplitInfo(
                name='train',
                shard_lengths=[20],
                num_bytes=1000,
                filename_template=tfds.core.ShardedFileTemplate(
                    data_dir=tmp_path, dataset_name='small', split='train', filetype_suffix='array_record'
                ),
            )
        ],
    )
    assert read(f'tfds:{tmp_path}/train') == documents
    assert read(f'tfds:{tmp_path}/train', piece_size=100) == documents
    assert read(f'tfds:{tmp_path}/train[5:10]') == documents[5:10]
    with pytest.raises(DataError, match="no split 'test', only train"):
        read(f'tfds:{tmp_path}/test')
    with pytest.raises(DataError, match='no feature .body. .it has .*label'):
        read(f'tfds:{tmp_path}/train', text_field='body')
    with pytest.raises(DataError, match='cannot be opened'):
        read('tfds:no_such_data_set/train')
