import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import ROOT, digests, ids, run_prepare, texts, train_tokenizer, write_jsonl

from transxssm_jax.data import prepare, shard_writer
from transxssm_jax.data.manifest import read_index

# Prepares with tiny shards in a process of its own: python -c SCRIPT flags.
SCRIPT = """
import sys
from transxssm_jax.data import prepare
prepare.MIN_SHARD_BYTES = 3000
sys.exit(prepare.main(sys.argv[1:]))
"""


def start(output, *flags):
    return subprocess.Popen(
        [sys.executable, '-c', SCRIPT, f'--output={output}', '--split=train', *map(str, flags)],
        cwd=ROOT,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


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
    index = read_index(prepared, 'train')
    kept = [text for text in corpus[1] if text]
    assert len(index.shards) > 20
    assert index.num_documents == sum(shard.documents for shard in index.shards) == 398
    assert index.sources[0].skipped == 2
    assert index.num_bytes == sum(len(text.encode()) for text in kept)
    assert index.num_tokens == index.num_bytes + 398
    assert index.lengths().tolist() == [len(ids(text)) for text in kept]
    assert sorted(path.name for path in prepared.iterdir() if 'array_record' not in path.name) == [
        'dataset_info.json',
        'features.json',
        'train.index.json',
        'train.lengths.npy',
    ]


def test_killed_run_continues_to_the_same_bytes(corpus, prepared, tmp_path):
    output = tmp_path / 'out'
    state = output / '.incomplete.train'
    flags = f'--source={corpus[0]}', '--tokenizer=byte', '--num_workers=2'
    process = start(output, *flags)
    deadline = time.monotonic() + 60
    while len(list(state.glob('0*.json'))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    workers = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    assert not (output / 'dataset_info.json').exists(), 'killed too late to test anything'
    finished = {path.name: path.stat().st_mtime_ns for path in state.glob('0*.json')}
    while any(_runs(pid) for pid in workers):  # orphans end by themselves
        assert time.monotonic() < deadline
        time.sleep(0.01)

    process = start(output, *flags)
    while process.poll() is None:
        for name, mtime in finished.items():
            try:
                assert (state / name).stat().st_mtime_ns == mtime
            except FileNotFoundError:
                finished = {}
                break
    out, err = process.communicate()
    assert process.returncode == 0 and 'shards are finished; continuing' in err
    assert not state.exists()
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

        patch.setattr(prepare, '_write_tfds_metadata', interrupt)
        assert run_prepare(output, corpus[0]) == 130
    assert 'run the same command to continue' in capsys.readouterr().err
    assert not (output / 'dataset_info.json').exists()
    assert run_prepare(output, corpus[0]) == 0
    assert digests(output) == digests(prepared)


def test_second_run(corpus, prepared, capsys, tmp_path):
    before = digests(prepared)
    assert run_prepare(prepared, corpus[0], num_workers=2) == 0
    assert 'nothing to do' in capsys.readouterr().out
    other = write_jsonl(tmp_path / 'other.jsonl', texts(3))
    assert 'already holds split' in refused(capsys, prepared, other)
    assert 'another text_field' in refused(capsys, prepared, corpus[0], text_field='body')
    tokenizer = train_tokenizer(tmp_path / 't.json', ['</s>'])
    assert 'another tokenizer' in refused(capsys, prepared, corpus[0], tokenizer=tokenizer)
    assert 'another tokenizer' in refused(capsys, prepared, other, tokenizer=tokenizer, split='validation')
    assert digests(prepared) == before


def test_interrupted_run_with_other_arguments_is_refused(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, 'MIN_SHARD_BYTES', 3000)
    output = tmp_path / 'out'
    with monkeypatch.context() as patch:

        def interrupt(*_):
            raise KeyboardInterrupt

        patch.setattr(prepare, 'commit', interrupt)
        assert run_prepare(output, corpus[0]) == 130
    other = write_jsonl(tmp_path / 'other.jsonl', texts(3))
    assert 'other arguments or other source files; repeat that command, or delete it' in refused(capsys, output, other)


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
    train = read_index(output, 'train')
    assert [(source.weight, source.first_document, source.documents) for source in train.sources] == [
        ('0.25', 0, 20),
        ('.75', 20, 30),
    ]
    assert train.mixture_weights() == [1, 3]
    assert read_index(output, 'validation').mixture_weights() == []


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
    assert 'no text in' in refused(capsys, output, empty)
    assert 'has no text (2 empty documents)' in refused(capsys, tmp_path / 'out2', good, empty)
    assert 'unknown flag --colour' in refused(capsys, output, good, colour='red')
    assert 'must be at least 1' in refused(capsys, output, good, num_workers=0)
    assert 'some sources have a weight' in refused(capsys, output, f'{good}@1', good)
    assert 'raise it to at least 257' in refused(capsys, output, good, vocab_size=256)
    assert 'must be a word' in refused(capsys, output, good, split='a/b')
    assert 'good.jsonl' in refused(capsys, tmp_path / 'good.jsonl/out', good)  # no directory can be there
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
    process = start(tmp_path / 'out', f'--source={path}', '--tokenizer=byte', '--num_workers=2')
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert 'not JSON' in err.splitlines()[-1] and 'Traceback' not in err


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
        [sys.executable, '-c', script, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2, result.stderr
    assert 'free space' in result.stderr.splitlines()[-1] and 'Traceback' not in result.stderr
    assert not (output / 'dataset_info.json').exists()
    assert run_prepare(output, path) == 0
    assert json.loads((output / 'train.index.json').read_text())['sources'][0]['documents'] == 3000


def test_two_runs_at_once_are_refused(corpus, tmp_path, capsys):
    import fcntl

    state = tmp_path / 'out/.incomplete.train'
    state.mkdir(parents=True)
    with open(state / 'lock', 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert 'another prepare is at work' in refused(capsys, tmp_path / 'out', corpus[0])


def test_sigint(corpus, tmp_path):
    process = start(tmp_path / 'out', f'--source={corpus[0]}', '--tokenizer=byte', '--num_workers=1')
    while not list((tmp_path / 'out').glob('.incomplete.train/0*.json')):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err.splitlines()[-1] == 'interrupted; run the same command to continue'
