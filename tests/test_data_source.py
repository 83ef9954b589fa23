import gzip
import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data_fixtures import run_prepare, texts, write_jsonl

from transxssm_jax.data.manifest import DataError, read_manifest
from transxssm_jax.data.source import Skipped, cut, list_files, parse_source, read_documents, read_items


def read(spec, split='train', piece_size=1 << 30, text_field='text'):
    return [
        text
        for file in list_files(str(spec), split)
        for piece in cut(file, piece_size)
        for text in read_documents(piece, text_field)
    ]


def write_parquet(path, documents, rows_per_group=10):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(
        pyarrow.table({'id': list(range(len(documents))), 'text': documents}), path, row_group_size=rows_per_group
    )


def test_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('a.txt', 'wiki', 'only@2023', 'both', 'both@7'):
        (tmp_path / name).write_text('text')
    assert parse_source('a.txt') == ('a.txt', '')
    assert parse_source('a.txt@0.25') == ('a.txt', '0.25')
    assert parse_source('*.txt@.5') == ('*.txt', '.5')
    assert parse_source('tfds:c4/train@0.7') == ('tfds:c4/train', '0.7')
    assert parse_source('user@host/a') == ('user@host/a', '')
    assert parse_source('wiki@2023') == ('wiki', '2023')
    # What exists under its whole name is no weight.
    assert parse_source('only@2023') == ('only@2023', '')
    assert parse_source('only@2023@1') == ('only@2023', '1')
    with pytest.raises(DataError, match='there are both both and both@7; a name that ends .* --source=both@7@1'):
        parse_source('both@7')
    with pytest.raises(DataError, match='no such file or directory: news, with weight 2023; .* --source=news@2023@1'):
        parse_source('news@2023')
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
    assert read(tmp_path / 'src') == ['a', 'b = 1\r\n', '{\n}\n', '��z', '', 'zipped']
    assert read(tmp_path / 'src/**/*.py') == ['b = 1\r\n', '��z']
    assert read(tmp_path / 'src/b.py') == ['b = 1\r\n']
    with pytest.raises(DataError, match='binary'):
        read(tmp_path / 'src/image.bin')
    with pytest.raises(DataError, match='no such file'):
        read(tmp_path / 'none')
    with pytest.raises(DataError, match='no files'):
        read(tmp_path / '*.rst')


def compress(path, suffix):
    """path + suffix ('.gz', '.zst') with the content of path."""
    target = path.with_name(path.name + suffix)
    if suffix == '.gz':
        target.write_bytes(gzip.compress(path.read_bytes()))
    else:
        # Two frames, as zstd's tools write when they append.
        content = path.read_bytes()
        half = len(content) // 2
        target.write_bytes(
            b''.join(pyarrow.compress(part, 'zstd', asbytes=True) for part in (content[:half], content[half:]))
        )
    return target


@pytest.mark.parametrize('piece_size', [1, 50, 1000, 1 << 30])
def test_jsonl_in_pieces(tmp_path, piece_size):
    documents = texts(30) + ['line\u2028separator', 'para\u2029graph', 'a\rb\x0bc\x0cd\x85e']
    path = tmp_path / 'd.jsonl'
    path.write_text(''.join(json.dumps({'text': text}, ensure_ascii=False) + '\n' for text in documents), newline='')
    assert read(path, piece_size=piece_size) == documents
    for suffix in ('.gz', '.zst'):
        assert read(compress(path, suffix), piece_size=piece_size) == documents


@pytest.mark.parametrize('suffix', ['.gz', '.zst'])
@pytest.mark.parametrize('name', ['d.jsonl', 'd.txt'])
def test_compressed_files_that_are_damaged(tmp_path, suffix, name):
    path = tmp_path / name
    path.write_text(json.dumps({'text': ''.join(texts(100))}) + '\n')
    good = compress(path, suffix)
    content = good.read_bytes()
    assert len(read(good)) == 1
    damaged = {'short': content[: len(content) // 2], 'cut': content[:-1], 'trailer': b'junk' + content}
    if suffix == '.gz':
        damaged['crc'] = content[:-8] + bytes(4) + content[-4:]
    for what, bad in damaged.items():
        good.write_bytes(bad)
        with pytest.raises(DataError, match=f'{good} cannot be read .*; fetch it again') as info:
            read(good)
        assert '\n' not in str(info.value), what
        *_, last = read_items(list_files(str(good), 'train')[0], 'text')
        assert isinstance(last, Skipped) and last.reason == 'unreadable'


def test_one_rule_for_byte_order_marks(tmp_path):
    mark = '\ufeff'
    (tmp_path / 'a.txt').write_text(f'{mark}text')
    (tmp_path / 'b.txt').write_text(f'te{mark}xt')
    (tmp_path / 'c.jsonl').write_text(f'{mark}\n' + json.dumps({'text': f'{mark}text'}) + '\n')
    (tmp_path / 'd.jsonl').write_text(mark + json.dumps({'text': 'text'}, ensure_ascii=False) + '\n')
    write_parquet(tmp_path / 'e.parquet', [f'{mark}text', f'te{mark}xt'])
    for name in 'a.txt', 'c.jsonl', 'd.jsonl', compress(tmp_path / 'a.txt', '.gz').name:
        assert read(tmp_path / name) == ['text'], name
    assert read(tmp_path / 'b.txt') == [f'te{mark}xt']
    assert read(tmp_path / 'e.parquet') == ['text', f'te{mark}xt']


def test_jsonl_oddities(tmp_path):
    path = tmp_path / 'd.jsonl'
    path.write_text('{"text": "a"}\n\n{"text": null}\n{"text": "half \\ud800"}\n{"text": "no newline at the end"}')
    assert read(path) == ['a', '', 'half \ufffd', 'no newline at the end']
    path.write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(DataError, match='d.jsonl, line at byte 14: not JSON'):
        read(path)
    path.write_text('[' * 10_000 + ']' * 10_000)
    with pytest.raises(DataError, match='line at byte 0: not JSON .it is nested too deeply.'):
        read(path)
    path.write_text('{"content": "a"}\n')
    with pytest.raises(DataError, match="no field 'text' .it has content.; name the text with --text_field"):
        read(path)
    assert read(path, text_field='content') == ['a']
    path.write_text('[{"text": "a"}, {"text": "b"}]')
    with pytest.raises(DataError, match=r"line at byte 0 is list, not an object; .*jq -c '\.\[\]'"):
        read(path)
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
    content = bytearray((tmp_path / 'd.parquet').read_bytes())
    content[8:400] = bytes(392)  # the first pages; the footer is whole
    (tmp_path / 'pages.parquet').write_bytes(content)
    with pytest.raises(DataError, match='pages.parquet cannot be read'):
        read(tmp_path / 'pages.parquet')


def test_parquet_text_of_every_type(tmp_path):
    documents = ['a', None, 'b', 'a', 'é']
    text = pyarrow.array(documents)
    for name, column in (
        ('large', text.cast(pyarrow.large_string())),
        ('view', text.cast(pyarrow.string_view())),
        ('dictionary', text.dictionary_encode()),
        ('large_dictionary', text.cast(pyarrow.large_string()).dictionary_encode()),
    ):
        pyarrow.parquet.write_table(pyarrow.table({'text': column}), tmp_path / f'{name}.parquet')
        assert read(tmp_path / f'{name}.parquet') == ['a', '', 'b', 'a', 'é'], name
    numbers = pyarrow.array([1, 2]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({'text': numbers}), tmp_path / 'numbers.parquet')
    with pytest.raises(DataError, match='is int64, not text'):
        read(tmp_path / 'numbers.parquet')


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


def listed(directory, split='train'):
    """(names of the files that are taken, notes)."""
    notes = []
    files = list_files(str(directory), split, notes.append)
    return [file.path.removeprefix(f'{directory}/') for file in files], notes


def test_a_split_in_one_name_hides_no_other_file(tmp_path):
    for name in ('a', 'b', 'train'):
        write_jsonl(tmp_path / f'{name}.jsonl', ['x'])
    assert listed(tmp_path) == (['a.jsonl', 'b.jsonl', 'train.jsonl'], [])
    for name in ('val-d-isere', 'my_dev_notes'):
        write_jsonl(tmp_path / f'{name}.jsonl', ['x'])
        # Neither hidden, nor trained on although it may be held out.
        with pytest.raises(DataError, match=f'{name}.jsonl seems to be of split .validation. but .*a.jsonl names no'):
            listed(tmp_path)
        (tmp_path / f'{name}.jsonl').unlink()
    with pytest.raises(DataError, match='train.jsonl seems to be of split .train. but'):
        listed(tmp_path, 'validation')


def test_files_that_are_passed_over_are_reported(tmp_path):
    for name in ('train-0', 'train-1', 'test-0'):
        compress(write_jsonl(tmp_path / f'{name}.jsonl', [name]), '.zst')
        (tmp_path / f'{name}.jsonl').unlink()
    (tmp_path / 'README.md').write_text('no data')
    (tmp_path / 'archive.tar').write_text('not read')
    (tmp_path / 'broken-link').symlink_to('nowhere')
    names, notes = listed(tmp_path)
    assert names == ['train-0.jsonl.zst', 'train-1.jsonl.zst'] and read(tmp_path) == ['train-0', 'train-1']
    assert len(notes) == 2
    assert notes[0].endswith(f'1 files of other splits are passed over: {tmp_path}/test-0.jsonl.zst')
    assert '3 files are passed over: ' in notes[1]
    assert all(name in notes[1] for name in ('README.md', 'archive.tar', 'broken-link'))

    text = tmp_path / 'text'
    text.mkdir()
    (text / 'a.txt').write_text('a')
    (text / 'b.txt.xz').write_text('not read')
    for spec in (text, f'{text}/*'):
        assert read(spec) == ['a']
        assert f'1 files are passed over: {text}/b.txt.xz' in listed(spec)[1][0]
    with pytest.raises(DataError, match='b.txt.xz: this format is not read'):
        read(text / 'b.txt.xz')


def test_prepared_data_below_a_source_is_no_text(tmp_path):
    (tmp_path / 'a.txt').write_text('text')
    output = tmp_path / 'out'
    for split in ('train', 'validation'):
        assert run_prepare(output, tmp_path, split=split) == 0
        assert read_manifest(output, split).num_documents == 1, split
    notes = []
    assert [piece.path for piece in list_files(str(tmp_path), 'test', notes.append)] == [str(tmp_path / 'a.txt')]
    assert notes == [f'--source={tmp_path}: 1 files are passed over: {output}']
    assert len(list_files(f'{tmp_path}/**', 'test', notes.append)) == 1
    with pytest.raises(DataError, match=f'--source={output} holds prepared data, not text'):
        list_files(str(output), 'test')


def test_a_pattern_that_comes_to_a_file_twice_takes_it_once(tmp_path):
    (tmp_path / 'a.txt').write_text('text')
    (tmp_path / 'loop').symlink_to(tmp_path)
    notes = []
    assert len(list_files(f'{tmp_path}/**/*.txt', 'train', notes.append)) == 1
    assert 'are passed over' in notes[0] and 'loop/a.txt' in notes[0]


def test_endings_in_upper_case(tmp_path):
    (tmp_path / 'A.JSONL').write_text('{"text": "one"}\n')
    (tmp_path / 'B.Jsonl.GZ').write_bytes(gzip.compress(b'{"text": "two"}\n'))
    pyarrow.parquet.write_table(pyarrow.table({'text': ['three']}), tmp_path / 'C.PARQUET')
    found = [
        text
        for name in ('A.JSONL', 'B.Jsonl.GZ', 'C.PARQUET')
        for file in list_files(str(tmp_path / name), 'train')
        for piece in cut(file, 1000)
        for text in read_documents(piece, 'text')
    ]
    assert found == ['one', 'two', 'three']
    assert [piece.kind for piece in list_files(str(tmp_path), 'train')] == ['parquet']


def test_what_is_no_source_is_named(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(DataError, match='is neither a file nor a directory'):
        list_files(str(tmp_path / 'pipe'), 'train')
    (tmp_path / 'a.txt').write_bytes('text'.encode('utf-16'))
    for weight in ('1e3', '-1', 'x', '1,5'):
        with pytest.raises(DataError, match='the weight behind @ must be a decimal number'):
            parse_source(f'{tmp_path / "a.txt"}@{weight}')
    (file,) = list_files(str(tmp_path / 'a.txt'), 'train')
    with pytest.raises(DataError, match='is UTF-16; convert it'):
        list(read_documents(file, 'text'))


def test_a_directory_that_cannot_be_listed(tmp_path, monkeypatch):
    (tmp_path / 'a.txt').write_text('a')

    def scandir(path):
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr('os.scandir', scandir)
    with pytest.raises(DataError, match='cannot be listed .Permission denied.'):
        listed(tmp_path)


def test_a_failing_disk_is_no_bad_document(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / 'd.jsonl', ['a'])
    (piece,) = list_files(str(path), 'train')

    def fail(*_):
        raise OSError(5, 'Input/output error')

    monkeypatch.setattr('transxssm_jax.data.source._open', fail)
    with pytest.raises(DataError, match='d.jsonl cannot be read .Input/output error.; run the same command again'):
        list(read_items(piece, 'text'))


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
