import collections
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import unicodedata

import numpy as np
import pyarrow.parquet
import pytest
from data_fixtures import ROOT, SHARED, ids, run_prepare, texts, train_tokenizer, write_jsonl

from transxssm_jax.data import loader as loader_module
from transxssm_jax.data import prepare, shard_writer
from transxssm_jax.data.loader import DataError, check_vocab, make_loader
from transxssm_jax.data.tokenizer import load_tokenizer

SEQ_LEN, BATCH = 48, 6
NAMES = {'tokens', 'targets', 'segment_ids', 'positions'}


def mixture_texts(source):
    generator = random.Random(source)
    return [
        ''.join(generator.choices(('abcd', 'efgh', 'ijkl')[source], k=generator.randint(1, 300)))
        for _ in range(20 + 10 * source)
    ]


@pytest.fixture(scope='module')
def documents():
    return texts(120) + texts(3, seed=9, longest=3000)  # some longer than a record


@pytest.fixture(scope='module')
def data(documents, tmp_path_factory):
    """Splits train (many shards, records of 128 tokens) and mixture (sources 5 : 3 : 2, of different letters)."""
    directory = tmp_path_factory.mktemp('data')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, 'MIN_SHARD_BYTES', 4000)
        patch.setattr(shard_writer, 'RECORD_TOKENS', 128)
        assert run_prepare(directory / 'out', write_jsonl(directory / 'd.jsonl', documents)) == 0
        sources = [
            f'{write_jsonl(directory / f"{i}.jsonl", mixture_texts(i))}@{weight}'
            for i, weight in enumerate(('0.5', '0.3', '0.2'))
        ]
        assert run_prepare(directory / 'out', *sources, split='mixture') == 0
    return directory / 'out'


def load(path, steps, split='train', **arguments):
    arguments = {'seq_len': SEQ_LEN, 'global_batch': BATCH, 'seed': 1, 'num_threads': 0} | arguments
    with make_loader(path, split, **arguments) as loader:
        return list(itertools.islice(loader, steps))


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys() == NAMES
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def segments(batches):
    """(tokens, targets) of each row's segments, in order."""
    for batch in batches:
        for row in range(len(batch['tokens'])):
            own = batch['segment_ids'][row]
            for segment in range(1, own.max() + 1):
                yield batch['tokens'][row][own == segment], batch['targets'][row][own == segment]


def pairs(batches):
    """How often each (input, target) comes."""
    return collections.Counter(
        pair for tokens, targets in segments(batches) for pair in zip(tokens.tolist(), targets.tolist(), strict=True)
    )


def pairs_of_documents(documents):
    found = collections.Counter()
    for text in documents:
        tokens = ids(text).tolist()
        found.update(zip([256] + tokens[:-1], tokens, strict=True))  # the byte tokenizer begins documents with eos
    return found


def test_batches_have_the_stated_form(data):
    for batch in load(data, 50):
        assert batch.keys() == NAMES
        assert all(values.shape == (BATCH, SEQ_LEN) and values.dtype == np.int32 for values in batch.values())
        steps = np.diff(batch['segment_ids'])
        assert np.isin(steps[batch['segment_ids'][:, 1:] > 0], (0, 1)).all() and (batch['segment_ids'][:, 0] == 1).all()
        begins = np.pad(steps != 0, ((0, 0), (1, 0)), constant_values=True)
        real = batch['segment_ids'] > 0
        assert (batch['positions'][begins] == 0).all() and (
            np.diff(batch['positions'])[(steps == 0) & real[:, 1:]] == 1
        ).all()
        inside = (steps == 0) & real[:, 1:]
        np.testing.assert_array_equal(batch['targets'][:, :-1][inside], batch['tokens'][:, 1:][inside])
        # A document that begins in the row begins with the begin token (here 256) and ends with the target eos.
        later = begins & real & (batch['segment_ids'] > 1)
        assert (batch['tokens'][later] == 256).all()
        assert (batch['targets'][:, :-1][later[:, 1:]] == 256).all()
        # eos is no input but where it is the begin token: at the first slot of a segment.
        assert begins[batch['tokens'] == 256].all()
        assert (batch['targets'][real] >= 0).all()
        assert (batch['tokens'][~real] == 0).all() and (batch['targets'][~real] == -1).all()


@pytest.mark.parametrize('hosts', [[[0, 1, 2], [3, 4, 5]], [[5], [0, 3], [4, 2, 1]], [[i] for i in range(6)]])
def test_any_split_over_hosts(data, hosts):
    whole = load(data, 12)
    for rows in hosts:
        assert_same(
            load(data, 12, rows=rows), [{name: values[rows] for name, values in batch.items()} for batch in whole]
        )


@pytest.mark.parametrize('threads, prefetch', [(1, 1), (3, 8)])
def test_any_threads(data, threads, prefetch):
    assert_same(load(data, 40, num_threads=threads, prefetch=prefetch), load(data, 40))


@pytest.mark.parametrize('split', ['train', 'mixture'])
def test_resume_at_any_step(data, split):
    whole = load(data, 90, split)
    for step in (1, 17, 60):
        assert_same(load(data, 30, split, start_step=step), whole[step : step + 30])
    (far,) = load(data, 1, split, start_step=10**9)
    assert far['segment_ids'].any()


def test_seed_and_shuffle(data):
    assert not np.array_equal(load(data, 1)[0]['tokens'], load(data, 1, seed=2)[0]['tokens'])
    ordered = load(data, 3, shuffle=False)
    assert_same(ordered, load(data, 3, shuffle=False, seed=2))


def test_every_token_once_an_epoch(data, documents):
    with make_loader(data, 'train', seq_len=SEQ_LEN, global_batch=1, seed=1) as loader:
        epochs = [list(itertools.islice(loader, loader.rows_per_epoch)) for _ in range(2)]
        targets = sum(int((batch['targets'] >= 0).sum()) for batch in epochs[0])
        assert loader.packing_efficiency == targets / (loader.rows_per_epoch * SEQ_LEN)
        assert targets == loader.num_tokens
    for batches in epochs:
        assert pairs(batches) == pairs_of_documents(documents)
    assert not np.array_equal(epochs[0][0]['tokens'], epochs[1][0]['tokens'])


def test_rows_that_end_inside_a_document(data):
    first, second = load(data, 2, global_batch=1, shuffle=False)
    assert first['targets'][0, -1] != 256
    assert first['targets'][0, -1] == second['tokens'][0, 0] and second['positions'][0, 0] == 0


@pytest.mark.parametrize('bos, begin', [('', 0), ('<pad>', 1), ('</s>', 2)])
def test_documents_begin_with_bos(tmp_path, bos, begin):
    """The tokenizer's bos is the input before a document's first token, wherever rows and records are cut."""
    tokenizer = train_tokenizer(tmp_path / 't.json', ['<s>', '<pad>', '</s>'])
    source = write_jsonl(tmp_path / 'd.jsonl', texts(40) + ['<s> and </s> are plain text here'])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, 'RECORD_TOKENS', 16)
        assert run_prepare(tmp_path / 'out', source, tokenizer=tokenizer, bos=bos) == 0
    stored = [
        np.append(tokens, 2).tolist() for tokens in load_tokenizer(tokenizer).encode_batch(texts(40) + ['a'])[:40]
    ]
    for seq_len in (15, 16, 17):
        batches = load(tmp_path / 'out', None, seq_len=seq_len, global_batch=3, shuffle=False, repeat=False)
        inputs = np.concatenate([tokens for tokens, _ in segments(batches)])
        targets = np.concatenate([targets for _, targets in segments(batches)])
        ends = np.flatnonzero(targets == 2) + 1
        assert len(ends) == 41
        for tokens, inside, document in zip(np.split(inputs, ends), np.split(targets, ends), stored):
            assert inside.tolist() == document and tokens.tolist() == [begin] + document[:-1]
        with make_loader(tmp_path / 'out', 'train', seq_len=seq_len, global_batch=3, seed=0) as loader:
            assert (loader.begin_id, loader.eos_id) == (begin, 2)
    assert load_tokenizer(tmp_path / 'out').begin_id == begin


def test_evaluation_pass(data, documents):
    batches = load(data, None, shuffle=False, repeat=False)
    stream = np.concatenate([targets for _, targets in segments(batches)])
    np.testing.assert_array_equal(stream, np.concatenate([ids(text) for text in documents]))
    with make_loader(data, 'train', seq_len=SEQ_LEN, global_batch=BATCH, seed=1, repeat=False) as loader:
        assert loader.num_steps == len(batches) == -(-loader.rows_per_epoch // BATCH)
        assert len(loader.fingerprint) == 64
        padded = loader.num_steps * BATCH - loader.rows_per_epoch
        assert (loader.num_documents, loader.vocab_size, loader.eos_id) == (len(documents), 257, 256)
        assert loader.num_bytes == sum(len(text.encode()) for text in documents)
    assert padded and not batches[-1]['segment_ids'][-padded:].any() and (batches[-1]['targets'][-padded:] == -1).all()
    assert_same(load(data, None, shuffle=False, repeat=False, start_step=5), batches[5:])
    assert load(data, None, shuffle=False, repeat=False, start_step=10**6) == []
    # A batch larger than the data is padded too.
    (batch,) = load(data, None, shuffle=False, repeat=False, global_batch=5000)
    assert (batch['segment_ids'] > 0).sum() == len(stream)


def test_mixture_is_exact(data):
    def sources(row):
        return set(((row[row < 256] - ord('a')) // 4).tolist())

    batches = load(data, 100, 'mixture', global_batch=10)
    found = [[], [], []]
    for batch in batches:
        for row in range(10):
            one = {name: values[row : row + 1] for name, values in batch.items()}
            (source,) = sources(one['targets'][one['segment_ids'] > 0])  # a row is of one source
            found[source].append(one)
        assert [len(rows) % n for rows, n in zip(found, (5, 3, 2), strict=True)] == [0, 0, 0]
    assert [len(rows) for rows in found] == [500, 300, 200]
    for source, rows in enumerate(found):  # each in epochs of its own: nothing again before everything once
        expected = pairs_of_documents(mixture_texts(source))
        rows_per_epoch = -(-expected.total() // SEQ_LEN)
        assert len(rows) > rows_per_epoch
        assert pairs(rows[:rows_per_epoch]) == expected
    # One pass ignores the weights: every document once.
    stream = np.concatenate([targets for _, targets in segments(load(data, None, 'mixture', repeat=False))])
    assert (stream == 256).sum() == 20 + 30 + 40


def test_tokens_of_a_large_vocabulary(tmp_path):
    path = train_tokenizer(tmp_path / 't.json', ['</s>'])
    parsed = json.loads(path.read_text())
    parsed['added_tokens'].append(parsed['added_tokens'][0] | {'id': 70_000, 'content': '<far>'})
    parsed['model']['vocab']['<far>'] = 70_000
    path.write_text(json.dumps(parsed))
    assert run_prepare(tmp_path / 'out', write_jsonl(tmp_path / 'd.jsonl', ['a<far>b' * 40]), tokenizer=path) == 0
    (batch,) = load(tmp_path / 'out', 1, seq_len=16, global_batch=2)
    assert (batch['tokens'] == 70_000).any()
    with pytest.raises(
        DataError, match='has 70001 ids, more than .*vocab_size=50304; raise .* to at least 70001 .70016 is'
    ):
        check_vocab(tmp_path / 'out', 50304)
    check_vocab(tmp_path / 'out', 70_016)


def test_refusals(data, tmp_path):
    arguments = {'seq_len': SEQ_LEN, 'global_batch': BATCH, 'seed': 0}
    with pytest.raises(DataError, match='holds no prepared data; run: python -m transxssm_jax.data.prepare --output='):
        make_loader(tmp_path / 'none', 'train', **arguments)
    (tmp_path / 'half/.incomplete.train').mkdir(parents=True)
    with pytest.raises(DataError, match='is not finished; run: python -m'):
        make_loader(tmp_path / 'half', 'train', **arguments)
    (tmp_path / 'README.md').write_text('no data')
    with pytest.raises(
        DataError, match='README.md is a file; give the directory that transxssm_jax.data.prepare wrote'
    ):
        make_loader(tmp_path / 'README.md', 'train', **arguments)
    for path in (tmp_path / 'README.md/x', 'x' * 5000, 'a\0b'):
        with pytest.raises(DataError) as info:
            make_loader(path, 'train', **arguments)
        assert 'delete' not in str(info.value)
    with pytest.raises(DataError, match="no split 'test', only train, mixture; name one of these"):
        make_loader(data, 'test', **arguments)
    with pytest.raises(DataError, match='less than one batch of 100000; lower the global batch to'):
        make_loader(data, 'train', **arguments | {'global_batch': 100_000})
    with pytest.raises(DataError, match='global batch'):
        make_loader(data, 'train', **arguments, rows=[6])
    with pytest.raises(DataError, match='seq_len=0 must be at least 1'):
        make_loader(data, 'train', **arguments | {'seq_len': 0})


def damaged(data, path, change, split='train', **arguments):
    """The error of opening and reading a copy of `data` that `change` was applied to."""
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(data, path)
    change(path)
    with pytest.raises(DataError) as info:
        load(path, None, split, repeat=False, num_threads=2, **arguments)
    assert '\n' not in str(info.value) and 'delete' not in str(info.value)
    return str(info.value)


def flip(path, position, bit=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_corrupt_shards_are_named(data, tmp_path):
    name = sorted(path.name for path in data.glob('documents-train*'))[2]

    def broken(change, match, **arguments):
        error = damaged(data, tmp_path / 'out', lambda path: change(path / name), **arguments)
        assert re.search(f'shard .*{name} is missing or corrupt .{match}.*restore it from a copy, or prepare', error)

    def scramble(shard):
        for i in range(200, shard.stat().st_size, 97):  # headers, records and footer
            flip(shard, i)

    broken(lambda shard: shard.unlink(), 'No such file')
    broken(lambda shard: shard.write_bytes(shard.read_bytes()[:-1000]), r'\d+ bytes instead of')
    broken(lambda shard: shard.write_bytes(b''), '0 bytes instead of')
    broken(lambda shard: shard.write_bytes(bytes(shard.stat().st_size)), '')
    broken(scramble, '')
    # Another good file under its name.
    other = sorted(data.glob('documents-train*'))[3]
    broken(lambda shard: shard.write_bytes(other.read_bytes()), '')
    # A bit of the padding decides no batch; verify='full' sees it all the same.
    position = (data / name).read_bytes().index(bytes(200)) + 100
    broken(lambda shard: flip(shard, position), 'its sha256 is not', verify='full')
    shutil.copytree(data, tmp_path / 'good')
    assert_same(load(tmp_path / 'good', 5, verify='full'), load(data, 5))
    with pytest.raises(DataError, match="verify='all' must be one of 'sizes', 'full'"):
        load(data, 1, verify='all')


def test_one_flipped_bit_never_changes_a_batch(tmp_path):
    """Whatever bit of whatever file: an error of one line, or the same batches."""
    assert run_prepare(tmp_path / 'data', write_jsonl(tmp_path / 'd.jsonl', texts(40))) == 0
    expected = load(tmp_path / 'data', None, repeat=False)
    generator, outcomes = random.Random(0), collections.Counter()
    files = sorted(path for path in (tmp_path / 'data').iterdir())
    for file in files:
        content = file.read_bytes()
        used = [i for i, byte in enumerate(content) if byte] if 'array_record' in file.name else range(len(content))
        for position in generator.sample(used, 60):
            flip(file, position, generator.randrange(8))
            try:
                assert_same(load(tmp_path / 'data', None, repeat=False), expected)
                outcomes[file.name, 'same'] += 1
            except DataError as error:
                assert '\n' not in str(error)
                outcomes[file.name, 'refused'] += 1
            file.write_bytes(content)
    assert outcomes['train.lengths.npy', 'refused'] == 60
    assert outcomes['train.manifest.json', 'refused'] > 50  # white space is no content


@pytest.mark.parametrize('name', ['dataset_info.json', 'train.manifest.json', 'train.lengths.npy'])
def test_damaged_files_are_named(data, tmp_path, name):
    def change(content):
        return damaged(data, tmp_path / 'out', lambda path: (path / name).write_bytes(content))

    content = (data / name).read_bytes()
    for bad in (b'', content[: len(content) // 2], b'5', b'null', b'{}', b'[' * 100_000, b'\xff\xfe', bytes(200)):
        error = change(bad)
        assert name in error and 'restore it from a copy, or prepare the data again in another directory' in error
    if name.startswith('train'):
        assert name in damaged(data, tmp_path / 'out', lambda path: (path / name).unlink())
        other = (data / name.replace('train', 'mixture')).read_bytes()
        change(other)


def test_data_of_an_older_version(data, tmp_path):
    def change(path):
        (path / 'train.manifest.json').rename(path / 'train.index.json')

    assert 'prepare it again in another directory' in damaged(data, tmp_path / 'out', change)


def test_the_fingerprint_is_of_the_content(data, documents, tmp_path):
    def fingerprint(path, **arguments):
        with make_loader(path, 'train', seq_len=SEQ_LEN, global_batch=1, seed=0, **arguments) as loader:
            return loader.fingerprint

    a, b = write_jsonl(tmp_path / 'a.jsonl', documents), tmp_path / 'elsewhere/b.jsonl'
    b.parent.mkdir()
    shutil.copy(a, b)
    for name, source, flags in (
        ('a', a, {}),
        ('b', b, {}),
        ('other', write_jsonl(tmp_path / 'o.jsonl', documents[1:]), {}),
        ('weighted', f'{a}@1', {}),
        ('field', tmp_path / 'field.jsonl', {'text_field': 'body'}),
    ):
        (tmp_path / 'field.jsonl').write_text(a.read_text().replace('"text"', '"body"'))
        assert run_prepare(tmp_path / name, source, **flags) == 0
    shutil.move(tmp_path / 'b', tmp_path / 'moved')
    assert fingerprint(tmp_path / 'a') == fingerprint(tmp_path / 'moved') == fingerprint(tmp_path / 'field')
    assert len({fingerprint(tmp_path / name) for name in ('a', 'other', 'weighted')}) == 3
    # bos decides the inputs.
    tokenizer = train_tokenizer(tmp_path / 't.json', ['<s>', '</s>'])
    assert run_prepare(tmp_path / 'bos', a, tokenizer=tokenizer) == 0
    assert run_prepare(tmp_path / 'eos', a, tokenizer=tokenizer, bos='</s>') == 0
    assert fingerprint(tmp_path / 'bos') != fingerprint(tmp_path / 'eos')


def test_an_absurd_batch_is_refused_at_once(data):
    with pytest.raises(DataError, match='less than one batch of 1000000000000'):
        make_loader(data, 'train', seq_len=SEQ_LEN, global_batch=10**12, seed=0)


WORKERS_SCRIPT = """
import hashlib, itertools, multiprocessing, sys
from transxssm_jax.data.loader import DataError, make_loader

def main():
    for path, split, num_workers in ((sys.argv[1], 'mixture', 2), (sys.argv[2], 'train', 1)):
        loader = make_loader(path, split, seq_len=48, global_batch=6, seed=1, start_step=3,
                             num_workers=num_workers, num_threads=2)
        try:
            for batch in itertools.islice(loader, 25):
                print(hashlib.sha256(b''.join(batch[name].tobytes() for name in sorted(batch))).hexdigest())
        except DataError as error:
            print('error:', error)
        if num_workers == 2:
            loader.close()
            loader.close()
            print('children', len(multiprocessing.active_children()))
    # The last one is not closed: exit must be clean all the same.

if __name__ == '__main__':
    main()
"""


def test_worker_processes(data, tmp_path):
    """The same batches from worker processes; close() ends them; an error in one arrives as DataError."""
    script = tmp_path / 'script.py'
    script.write_text(WORKERS_SCRIPT)
    broken = tmp_path / 'broken'
    shutil.copytree(data, broken)
    for shard in sorted(broken.glob('documents-train*')):
        shard.write_bytes(bytes(shard.stat().st_size))
    result = subprocess.run(
        [sys.executable, str(script), str(data), str(broken)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
    )
    assert result.returncode == 0 and 'Traceback' not in result.stderr, result.stderr
    lines = result.stdout.splitlines()
    expected = [
        hashlib.sha256(b''.join(batch[name].tobytes() for name in sorted(batch))).hexdigest()
        for batch in load(data, 25, 'mixture', start_step=3)
    ]
    assert lines[:25] == expected and len(set(expected)) == 25
    assert lines[25] == 'children 0'
    assert lines[26].startswith('error: shard ') and len(lines) == 27


def test_benchmark(data, capsys):
    assert loader_module.main([f'--path={data}', '--seq_len=64', '--global_batch=4', '--seconds=0.1']) == 0
    assert 'tokens/s' in capsys.readouterr().out
    assert loader_module.main([f'--path={data}/none']) == 2
    assert capsys.readouterr().err.startswith('error: ')


def test_close_ends_threads(data):
    loader = make_loader(data, 'train', seq_len=SEQ_LEN, global_batch=BATCH, seed=1, num_threads=3)
    next(loader)
    loader.close()
    loader.close()
    with pytest.raises(ValueError, match='closed'):
        next(loader)
    for thread in threading.enumerate():
        if thread.name.startswith('grain-prefetch'):
            thread.join()


def test_shared_books(tmp_path):
    source = SHARED / 'data/books/validation.parquet'
    tokenizer = SHARED / 'tokenizers/neox20b.json'
    if not source.exists() or not tokenizer.exists():
        pytest.skip(f'{SHARED} is not here')
    assert (
        run_prepare(tmp_path / 'out', source, tokenizer=tokenizer, split='validation', vocab_size=50304, num_workers=2)
        == 0
    )
    batches = load(tmp_path / 'out', None, 'validation', seq_len=1024, global_batch=8, shuffle=False, repeat=False)
    stream = np.concatenate([targets for _, targets in segments(batches)])
    books = pyarrow.parquet.read_table(source, columns=['text'])['text'].to_pylist()
    end = np.flatnonzero(stream == 0)[1]
    begin = np.flatnonzero(stream == 0)[0] + 1
    assert (stream == 0).sum() == len(books)
    assert load_tokenizer(tmp_path / 'out').decode(stream[begin:end]) == unicodedata.normalize('NFC', books[1])
