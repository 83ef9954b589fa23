import contextlib
import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import ROOT, digests, ids, run_prepare, texts, train_tokenizer, write_jsonl

from transxssm_jax.data import commit, prepare, shard_writer
from transxssm_jax.data.manifest import read_manifest

# Prepares with tiny shards in a process of its own. With GATE=FIFO,NUMBER the tasks of shards from NUMBER on wait
# until somebody writes to the FIFO, so that a test can stop the run at a known place.
SCRIPT = """
import os, sys
from transxssm_jax.data import commit, prepare, shard_writer

prepare.MIN_SHARD_BYTES = 3000
real = prepare.write_shard
gate, _, first = os.environ.get('GATE', '').partition(',')

def write_shard(task, state, *arguments):
    if gate and task.number >= int(first):
        (state / f'waits.{task.number}').write_text('')
        open(gate).read()
    real(task, state, *arguments)

prepare.write_shard = write_shard

if __name__ == '__main__':  # worker processes import this file again
    sys.exit(prepare.main(sys.argv[1:]))
"""


def start(tmp_path, output, *flags, gate=''):
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), f'--output={output}', '--split=train', *map(str, flags)],
        cwd=tmp_path,
        env=os.environ | {'PYTHONPATH': str(ROOT), 'GATE': gate},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def make_gate(tmp_path, number) -> str:
    os.mkfifo(tmp_path / 'gate')
    return f'{tmp_path / "gate"},{number}'


def wait_for(found, process):
    """Waits until found() is true; the process cannot end before, as it waits at its gate."""
    while not found():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def refused(capsys, *arguments, **flags) -> str:
    """The error of a prepare that must exit 2 with one line."""
    capsys.readouterr()
    assert run_prepare(*arguments, **flags) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp('corpus')
    documents = texts(400)
    documents[5] = documents[77] = ''
    write_jsonl(directory / 'd.jsonl', documents)
    return directory / 'd.jsonl', documents


@pytest.fixture(scope='module')
def prepared(corpus, tmp_path_factory):
    """Prepared by one worker in many shards, never interrupted."""
    output = tmp_path_factory.mktemp('prepared') / 'out'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, 'MIN_SHARD_BYTES', 3000)
        assert run_prepare(output, corpus[0]) == 0
    return output


def test_tfds_reads_it(corpus, prepared):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(prepared)
    assert set(builder.info.splits) == {'train'}
    data = builder.as_data_source('train')
    kept = [text for text in corpus[1] if text]
    assert len(data) == len(kept) == 398
    for example, text in zip(data, kept, strict=True):
        assert example['tokens'].dtype == np.uint16 and example['offset'] == 0
        assert example['tokens'].tolist() == ids(text).tolist()
    assert 'tensorflow' not in sys.modules


def test_index(corpus, prepared):
    index = read_manifest(prepared, 'train')
    kept = [text for text in corpus[1] if text]
    assert len(index.shards) > 20
    assert index.num_documents == sum(shard.documents for shard in index.shards) == 398
    assert index.sources[0].skipped == {'empty': 2}
    assert index.num_bytes == sum(len(text.encode()) for text in kept)
    assert index.num_tokens == index.num_bytes + 398
    assert index.lengths().tolist() == [len(ids(text)) for text in kept]
    assert sorted(path.name for path in prepared.iterdir() if 'array_record' not in path.name) == [
        'dataset_info.json',
        'features.json',
        'train.lengths.npy',
        'train.manifest.json',
    ]


def test_killed_run_continues_to_the_same_bytes(corpus, prepared, tmp_path):
    output = tmp_path / 'out'
    flags = f'--source={corpus[0]}', '--tokenizer=byte', '--num_workers=2'
    process = start(tmp_path, output, *flags, gate=make_gate(tmp_path, 3))

    def results():
        return sorted(output.glob('.incomplete.train/*/0*.json'))

    wait_for(lambda: len(results()) == 3 and len(list(output.glob('.incomplete.train/*/waits.*'))) == 2, process)
    workers = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    assert not (output / 'dataset_info.json').exists()
    while any(_runs(pid) for pid in workers):  # orphans end by themselves
        time.sleep(0.01)

    finished = {path: path.stat().st_mtime_ns for path in results()}
    assert len(finished) == 3
    (tmp_path / 'gate').unlink()
    for path in output.glob('.incomplete.train/*/waits.*'):
        path.unlink()
    process = start(tmp_path, output, *flags, gate=make_gate(tmp_path, 3))
    wait_for(lambda: len(list(output.glob('.incomplete.train/*/waits.*'))) >= 2, process)
    assert {path: path.stat().st_mtime_ns for path in results()} == finished
    with open(tmp_path / 'gate', 'w'):
        pass
    while process.poll() is None:  # opens the gate for every task that comes to it
        with contextlib.suppress(OSError):
            os.close(os.open(tmp_path / 'gate', os.O_WRONLY | os.O_NONBLOCK))
        time.sleep(0.01)
    _, err = process.communicate()
    assert process.returncode == 0 and f'3 of {len(read_manifest(prepared, "train").shards)} shards are finished' in err
    assert not (output / '.incomplete.train').exists()
    assert digests(output) == digests(prepared)


def _runs(pid: str) -> bool:
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rsplit(')', 1)[1].split()[0] != 'Z'
    except OSError:
        return False


def test_killed_commit_continues(corpus, prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, 'MIN_SHARD_BYTES', 3000)
    output = tmp_path / 'out'
    with monkeypatch.context() as patch:

        def interrupt(*_):
            raise KeyboardInterrupt

        patch.setattr(commit, 'write_tfds_metadata', interrupt)
        assert run_prepare(output, corpus[0]) == 130
    assert 'run the same command to continue' in capsys.readouterr().err
    assert not (output / 'dataset_info.json').exists()
    assert run_prepare(output, corpus[0]) == 0
    assert digests(output) == digests(prepared)


@pytest.mark.parametrize('damage', ['{"documents"', '[]', ''])
@pytest.mark.parametrize('ending', ['.json', '.lengths.npy'])
def test_a_shard_with_damaged_counts_is_made_anew(corpus, prepared, tmp_path, monkeypatch, damage, ending):
    def die(*_):
        raise RuntimeError

    monkeypatch.setattr(prepare, 'MIN_SHARD_BYTES', 3000)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, 'commit', die)
        with pytest.raises(RuntimeError):
            run_prepare(tmp_path / 'out', corpus[0])
    (state,) = [path for path in (tmp_path / 'out/.incomplete.train').iterdir() if path.is_dir()]
    (state / f'00001{ending}').write_text(damage)
    assert run_prepare(tmp_path / 'out', corpus[0]) == 0
    assert digests(tmp_path / 'out') == digests(prepared)


def test_second_run(corpus, prepared, capsys, tmp_path):
    before = digests(prepared)
    assert run_prepare(prepared, corpus[0], num_workers=2) == 0
    assert 'nothing to do' in capsys.readouterr().out
    other = write_jsonl(tmp_path / 'other.jsonl', texts(3))
    error = refused(capsys, prepared, other)
    assert 'already holds split' in error and 'delete' not in error
    assert 'another text_field' in refused(capsys, prepared, corpus[0], text_field='body')
    tokenizer = train_tokenizer(tmp_path / 't.json', ['</s>'])
    error = refused(capsys, prepared, corpus[0], tokenizer=tokenizer)
    assert 'another tokenizer' in error and '{' not in error
    assert 'another tokenizer' in refused(capsys, prepared, other, tokenizer=tokenizer, split='validation')
    assert digests(prepared) == before


def test_another_command_after_an_interrupted_one(corpus, prepared, tmp_path, monkeypatch, capsys):
    """A mistyped flag does not stand in the way of the corrected command, nor costs what was finished."""
    monkeypatch.setattr(prepare, 'MIN_SHARD_BYTES', 3000)
    output = tmp_path / 'out'
    assert "no field 'body' (it has text)" in refused(capsys, output, corpus[0], text_field='body')
    with monkeypatch.context() as patch:

        def interrupt(*_):
            raise KeyboardInterrupt

        patch.setattr(prepare, 'commit', interrupt)
        assert run_prepare(output, corpus[0]) == 130
    finished = {path: path.stat().st_mtime_ns for path in output.glob('.incomplete.train/*/*.array_record')}
    assert len(finished) > 20
    assert 'no field' in refused(capsys, output, corpus[0], text_field='body')
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert run_prepare(output, corpus[0]) == 0
    assert digests(output) == digests(prepared) and not list(output.glob('.incomplete*'))
    # A source file that was changed meanwhile is read again, although it has the same size.
    source = tmp_path / 'same_size.jsonl'
    shutil.copy(corpus[0], source)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, 'commit', interrupt)
        assert run_prepare(tmp_path / 'changed', source) == 130
    source.write_bytes(source.read_bytes().replace(b'a', b'b'))
    os.utime(source, ns=(1, 1))
    assert run_prepare(tmp_path / 'changed', source) == 0
    record = next(iter(source.read_bytes().splitlines()))
    assert read_manifest(tmp_path / 'changed', 'train').lengths()[0] == len(json.loads(record)['text'].encode()) + 1
    assert digests(tmp_path / 'changed') != digests(prepared)


def test_two_commands_that_died_in_their_commits(corpus, tmp_path, monkeypatch, capsys):
    """Shards of the one in the place of the other's are noticed; the same command again puts it right."""
    other = write_jsonl(tmp_path / 'other.jsonl', texts(50, seed=3))
    output = tmp_path / 'out'
    with monkeypatch.context() as patch:

        def interrupt(*_):
            raise KeyboardInterrupt

        patch.setattr(commit, 'write_tfds_metadata', interrupt)
        for source in (corpus[0], other):
            assert run_prepare(output, source) == 130
    assert 'was replaced by another run of prepare; run the same command again' in refused(capsys, output, corpus[0])
    assert run_prepare(output, corpus[0]) == 0
    assert run_prepare(tmp_path / 'alone', corpus[0]) == 0
    assert digests(output) == digests(tmp_path / 'alone')


def test_splits_tokenizer_and_sources_of_one_directory(tmp_path):
    import tensorflow_datasets as tfds

    tokenizer = train_tokenizer(tmp_path / 't.json', ['</s>'])
    a, b = write_jsonl(tmp_path / 'a.jsonl', texts(20, 1)), write_jsonl(tmp_path / 'b.jsonl', texts(30, 2))
    output = tmp_path / 'out'
    assert run_prepare(output, f'{a}@0.25', f'{b}@.75', tokenizer=tokenizer, vocab_size=400) == 0
    assert run_prepare(output, b, tokenizer=tokenizer, split='validation') == 0
    builder = tfds.builder_from_directory(output)
    assert {name: len(builder.as_data_source(name)) for name in builder.info.splits} == {'train': 50, 'validation': 30}
    assert (output / 'tokenizer.json').read_bytes() == tokenizer.read_bytes()
    train = read_manifest(output, 'train')
    assert [(source.weight, source.first_document, source.documents) for source in train.sources] == [
        ('0.25', 0, 20),
        ('.75', 20, 30),
    ]
    assert train.mixture_weights() == [1, 3]
    assert read_manifest(output, 'validation').mixture_weights() == []


def test_long_documents_span_records(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(shard_writer, 'RECORD_TOKENS', 64)
    monkeypatch.setattr(shard_writer, 'PART_CHARS', 50)
    documents = texts(20)
    assert run_prepare(tmp_path / 'out', write_jsonl(tmp_path / 'd.jsonl', documents)) == 0
    found = []
    for example in tfds.builder_from_directory(tmp_path / 'out').as_data_source('train'):
        assert len(example['tokens']) <= 64
        if example['offset'] == 0:
            found.append([])
        assert example['offset'] == len(found[-1])
        found[-1] += example['tokens'].tolist()
    assert found == [ids(text).tolist() for text in documents]


def test_bad_input(tmp_path, capsys):
    good = write_jsonl(tmp_path / 'good.jsonl', texts(3))
    empty = write_jsonl(tmp_path / 'empty.jsonl', ['', ''])
    output = tmp_path / 'out'
    assert 'no such file' in refused(capsys, output, tmp_path / 'none')
    assert 'has no text (2 empty)' in refused(capsys, output, empty)
    assert 'has no text (2 empty)' in refused(capsys, tmp_path / 'out2', good, empty)
    assert 'unknown flag --colour' in refused(capsys, output, good, colour='red')
    assert 'must be at least 1' in refused(capsys, output, good, num_workers=0)
    assert 'some sources have a weight' in refused(capsys, output, f'{good}@1', good)
    assert 'raise it to at least 257' in refused(capsys, output, good, vocab_size=256)
    assert 'must be a word' in refused(capsys, output, good, split='a/b')
    assert 'good.jsonl' in refused(capsys, tmp_path / 'good.jsonl/out', good)  # no directory can be there
    assert 'good.jsonl is a file; name a directory' in refused(capsys, good, good)
    assert '--skip_bad=1.0 must be a share' in refused(capsys, output, good, skip_bad=1)
    assert 'leave --bos out' in refused(capsys, output, good, bos='</s>')
    assert not (output / 'dataset_info.json').exists()


def test_command_line(tmp_path):
    result = subprocess.run(
        [sys.executable, '-m', 'transxssm_jax.data.prepare', '--output=out', '--colour=red'],
        cwd=tmp_path,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and result.stderr.startswith('error: ')


def test_error_in_a_worker_is_one_line(tmp_path):
    path = write_jsonl(tmp_path / 'd.jsonl', texts(200))
    with open(path, 'a') as file:
        file.write('{"text"\n')
    process = start(tmp_path, tmp_path / 'out', f'--source={path}', '--tokenizer=byte', '--num_workers=2')
    _, err = process.communicate()
    assert process.returncode == 2
    assert 'not JSON' in err.splitlines()[-1] and 'Traceback' not in err


@pytest.fixture
def bad_documents(tmp_path):
    """A directory of 100 good documents and 9 bad ones, of every kind."""
    directory = tmp_path / 'source'
    directory.mkdir()
    good = texts(100)
    lines = write_jsonl(directory / 'a.jsonl', good[:60]).read_bytes()
    bad = [b'{"text"', b'[' * 10_000, b'3', b'{"body": "x"}', b'{"text": 3}', b'{"text": ["x"]}', b'\xff', b'{}']
    (directory / 'a.jsonl').write_bytes(lines + b'\n'.join(bad) + b'\n' + b'{"text": ""}\n')
    with gzip.open(directory / 'b.jsonl.gz', 'wb') as file:
        file.write(b''.join(json.dumps({'text': text}).encode() + b'\n' for text in good[60:]))
    content = (directory / 'b.jsonl.gz').read_bytes()
    (directory / 'b.jsonl.gz').write_bytes(content[:-8])  # cut short, behind the last document
    return directory, good


@pytest.mark.parametrize('num_workers', [1, 2])
def test_skip_bad(bad_documents, tmp_path, capsys, monkeypatch, num_workers):
    directory, good = bad_documents
    flags = {'num_workers': num_workers}
    monkeypatch.setattr(prepare, 'MIN_SHARD_BYTES', 3000)
    assert 'or leave such documents out with --skip_bad=SHARE' in refused(capsys, tmp_path / 'out', directory, **flags)
    error = refused(capsys, tmp_path / 'out', directory, skip_bad=0.05, **flags)
    assert '9 of 109 documents are bad' in error and 'more than --skip_bad=0.05 allows' in error
    assert 'a.jsonl, line at byte' in error and 'run the same command with --skip_bad=0.09' in error
    assert run_prepare(tmp_path / 'out', directory, skip_bad=0.09, **flags) == 0
    assert '10 skipped' in capsys.readouterr().out
    manifest = read_manifest(tmp_path / 'out', 'train')
    assert manifest.sources[0].skipped == {'empty': 1, 'no field': 3, 'not JSON': 3, 'not text': 2, 'unreadable': 1}
    assert manifest.lengths().tolist() == [len(ids(text)) for text in good]


def write_parquet(path, documents):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({'text': documents}), path, row_group_size=10)
    return path


@pytest.mark.parametrize('damage', ['footer', 'empty', 'row group'])
@pytest.mark.parametrize('num_workers', [1, 2])
def test_skip_bad_of_parquet(tmp_path, capsys, damage, num_workers):
    directory, good = tmp_path / 'source', texts(60)
    directory.mkdir()
    write_parquet(directory / 'a.parquet', good[:30])
    write_parquet(directory / 'c.parquet', good[30:])
    bad = write_parquet(directory / 'b.parquet', texts(30, seed=1, longest=4000))
    content = bad.read_bytes()
    bad.write_bytes(
        {'footer': content[:-20], 'empty': b'', 'row group': bytes(len(content) // 9) + content[len(content) // 9 :]}[
            damage
        ]
    )
    flags = {'num_workers': num_workers}
    error = refused(capsys, tmp_path / 'out', directory, **flags)
    assert 'b.parquet' in error and ('fetch it again' in error)
    assert run_prepare(tmp_path / 'out', directory, skip_bad=0.1, **flags) == 0
    manifest = read_manifest(tmp_path / 'out', 'train')
    assert manifest.sources[0].skipped == {'unreadable': 1}
    lengths = [len(ids(text)) for text in good]
    found = manifest.lengths().tolist()
    assert found[:30] == lengths[:30] and found[-30:] == lengths[30:]


def test_file_systems_without_locks(corpus, prepared, tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOSYS, 'Function not implemented')

    monkeypatch.setattr(prepare, 'MIN_SHARD_BYTES', 3000)
    monkeypatch.setattr('fcntl.flock', flock)
    assert run_prepare(tmp_path / 'out', corpus[0]) == 0
    assert 'the file system has no locks (Function not implemented)' in capsys.readouterr().err
    assert digests(tmp_path / 'out') == digests(prepared)


def test_what_is_passed_over_is_reported(tmp_path, capsys):
    source = tmp_path / 'source'
    source.mkdir()
    write_jsonl(source / 'a.jsonl', ['x'])
    (source / 'README.md').write_text('no data')
    assert run_prepare(tmp_path / 'out', f'{source}@2', f'{source / "README.md"}@6') == 0
    err = capsys.readouterr().err
    assert f'note: --source={source}: 1 files are passed over: {source / "README.md"}' in err
    assert f'note: --source={source} has weight 2: 0.25 of the rows' in err


def test_full_disk(tmp_path):
    # Files that may not grow past a limit stand in for a disk that is full.
    path = write_jsonl(tmp_path / 'd.jsonl', texts(3000))
    script = 'import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n' + SCRIPT.replace(
        '3000', '1 << 22'
    )
    output = tmp_path / 'out'
    flags = [f'--output={output}', '--split=train', f'--source={path}', '--tokenizer=byte', '--num_workers=1']
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    result = subprocess.run(
        [sys.executable, '-c', script, *flags], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2, result.stderr
    assert 'free space' in result.stderr.splitlines()[-1] and 'Traceback' not in result.stderr
    assert not (output / 'dataset_info.json').exists()
    assert run_prepare(output, path) == 0
    assert json.loads((output / 'train.manifest.json').read_text())['sources'][0]['documents'] == 3000


def test_two_runs_at_once_are_refused(corpus, tmp_path, capsys):
    import fcntl

    state = tmp_path / 'out/.incomplete.train'
    state.mkdir(parents=True)
    with open(state / 'lock', 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert 'another prepare is at work' in refused(capsys, tmp_path / 'out', corpus[0])


def test_sigint(corpus, tmp_path):
    process = start(
        tmp_path,
        tmp_path / 'out',
        f'--source={corpus[0]}',
        '--tokenizer=byte',
        '--num_workers=1',
        gate=make_gate(tmp_path, 1),
    )
    wait_for(lambda: list(tmp_path.glob('out/.incomplete.train/*/waits.1')), process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and err.splitlines()[-1] == 'interrupted; run the same command to continue'
