"""A workdir on an S3-compatible store: a run that loses its machine goes on from there as one that was never interrupted."""

import json
import pathlib
import shutil
import socket
import time

import jax
import numpy as np
import pytest
from store_fixtures import start_store
from train_fixtures import (
    before_saving,
    checkpoint_steps,
    compiled_once,
    losses,
    prepare_bytes,
    records,
    train,
    write_config,
)

from transxssm_jax import convert, generate
from transxssm_jax.data import object_store
from transxssm_jax.training import checkpoint, remote_workdir
from transxssm_jax.training.checkpoint_files import CheckpointError

SETTINGS = dict(train__steps=6, train__checkpoint_every_steps=2, train__eval_every_steps=3, train__eval_batches=1)


@pytest.fixture(scope='module')
def store():
    with start_store('runs') as files:
        yield files


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp('remote')
    with compiled_once(directory):
        yield write_config(directory, prepare_bytes(directory))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A function that takes all local copies away, as another machine has none."""
    monkeypatch.setenv('TRANSXSSM_JAX_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(remote_workdir, 'SCAN_SECONDS', 0.05)
    return lambda: shutil.rmtree(tmp_path / 'cache')


def steps_there(url):
    return remote_workdir.complete_steps(object_store.Files(url).names())


def test_a_run_goes_on_from_the_store_on_another_machine(store, config, tmp_path, cache):
    url = 's3://runs/a/b'
    assert train(config, tmp_path / 'whole', **SETTINGS).code == 0
    result = train(config, url, **SETTINGS | dict(train__steps=4))
    assert result.code == 0, result
    names = object_store.Files(url).names()
    assert remote_workdir.LEASE not in names
    assert {'config.json', 'metrics.jsonl'} <= set(names) and steps_there(url)[-1] == 4
    cache()
    result = train(config, url, **SETTINGS)
    assert result.code == 0, result
    assert steps_there(url) == checkpoint_steps(tmp_path / 'whole')
    cache()
    ours, theirs = checkpoint.load_trained(f'{url}@latest')[0], checkpoint.load_trained(tmp_path / 'whole')[0]
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    object_store.Files(url).fetch('metrics.jsonl', tmp_path / 'there' / 'metrics.jsonl')
    assert losses(tmp_path / 'there') == losses(tmp_path / 'whole')
    # What trained is read from there by a word.
    assert generate.main([f'--workdir={url}@best', '--prompt=a', '--max_tokens=2']) == 0
    assert convert.main(['export', f'--workdir={url}', '--step=6', f'--output={tmp_path / "out"}']) == 0
    with pytest.raises(CheckpointError, match='has no checkpoint of step 5; it has'):
        checkpoint.load_config(f'{url}@5')
    best = min((r for r in records(tmp_path / 'whole') if 'eval_loss' in r), key=lambda r: r['eval_loss'])['step']
    assert checkpoint.load_trained_step(f'{url}@best')[2] == best


def test_what_is_saved_is_there_before_the_run_ends(store, config, cache):
    """A checkpoint is complete there while the run trains on; a killed run has lost nothing of it."""
    url, seen = 's3://runs/early', []

    def look(run):
        (run.workdir / 'compiled').mkdir(exist_ok=True)
        (run.workdir / 'compiled' / 'program').write_text('of this machine')
        deadline = time.monotonic() + 60
        while 2 not in steps_there(url) and time.monotonic() < deadline:
            time.sleep(0.05)
        seen.append(steps_there(url))

    with before_saving(3, look):
        assert train(config, url, **SETTINGS).code == 0
    assert 2 in seen[0]
    assert not [name for name in object_store.Files(url).names() if name.startswith('compiled')]


def test_a_second_run_is_kept_out_and_a_lease_that_nobody_renews_is_not_heeded(store, config, cache):
    url, second = 's3://runs/held', []
    with before_saving(2, lambda run: second.append(train(config, url, **SETTINGS))):
        assert train(config, url, **SETTINGS).code == 0
    assert second[0].code == 2 and 'is held by a run on' in second[0].err and second[0].err.count('\n') == 1
    old = {'owner': 'gone', 'host': 'gone', 'time': time.time() - remote_workdir.LEASE_SECONDS - 1}
    object_store.Files(url).write(remote_workdir.LEASE, json.dumps(old).encode())
    assert train(config, url, **SETTINGS).code == 0


def test_a_lease_is_renewed_while_a_large_file_is_copied(store, cache, monkeypatch):
    monkeypatch.setattr(remote_workdir, 'RENEW_SECONDS', 0.05)
    monkeypatch.setattr(remote_workdir, 'LEASE_SECONDS', 5.0)
    url, put, holders = 's3://runs/large', object_store.Files.put, []

    def put_slowly(self, file, name):
        time.sleep(7)
        holders.append(remote_workdir.RemoteWorkdir(url)._holder())
        put(self, file, name)

    monkeypatch.setattr(object_store.Files, 'put', put_slowly)
    workdir = remote_workdir.RemoteWorkdir(url)
    workdir.open()
    (workdir.directory / 'checkpoints' / '1').mkdir(parents=True)
    (workdir.directory / 'checkpoints' / '1' / 'digests.json').write_text('{}')
    assert workdir.close() == '' and holders == [socket.gethostname()]
    assert remote_workdir.LEASE not in object_store.Files(url).names()


def test_a_start_that_fails_gives_the_lease_back(store, cache, monkeypatch):
    files = object_store.Files('s3://runs/failing')
    files.write('config.json', b'{}')

    def refuse(self, name, copy):
        raise object_store.StoreError('no space')

    with monkeypatch.context() as patch:
        patch.setattr(object_store.Files, 'fetch', refuse)
        with pytest.raises(object_store.StoreError, match='no space'):
            remote_workdir.RemoteWorkdir(files.url).open()
    assert files.names() == ['config.json']
    workdir = remote_workdir.RemoteWorkdir(files.url)
    workdir.open()
    assert workdir.close() == ''


def test_a_checkpoint_that_could_not_be_copied_outlives_the_next_start(store, cache, caplog):
    workdir = remote_workdir.RemoteWorkdir('s3://runs/behind')
    (workdir.directory / 'checkpoints' / '7').mkdir(parents=True)
    (workdir.directory / 'checkpoints' / '7' / 'digests.json').write_text('{}')
    workdir.open()
    assert workdir.close() == ''
    (kept,) = workdir.directory.parent.glob('not-copied-*/checkpoints/7/digests.json')
    (warning,) = [record.message for record in caplog.records if record.levelname == 'WARNING']
    assert str(kept.parents[2]) in warning
    assert not (workdir.directory / 'checkpoints').exists()
    assert workdir.directory.name == 'behind', 'the name that trackers give the run'


def test_a_store_that_refuses_in_the_midst_does_not_stop_the_run_and_is_told_at_its_end(
    store, config, cache, monkeypatch
):
    def refuse(self, file, name):
        raise object_store.StoreError(f'{self.url} cannot be written: Forbidden')

    with before_saving(1, lambda run: monkeypatch.setattr(object_store.Files, 'put', refuse)):
        result = train(config, 's3://runs/refused', **SETTINGS)
    assert result.code == 2 and 'finished at step 6' in result.out, result
    last = result.err.strip().splitlines()[-1]
    assert 'cannot be written: Forbidden' in last and 'what was not copied is in' in last
    local = pathlib.Path(last.rpartition(' ')[2])
    assert checkpoint.load_trained_step(local)[2] == 6


def test_what_is_not_complete_there_is_no_checkpoint(store, config, cache):
    url = 's3://runs/cut'
    assert train(config, url, **SETTINGS | dict(train__steps=4)).code == 0
    newest = steps_there(url)[-1]
    object_store.Files(url).remove([f'checkpoints/{newest}/digests.json'])
    cache()
    result = train(config, url, **SETTINGS)
    assert result.code == 0 and f'step {newest - 1}' not in result.err
    assert steps_there(url)[-1] == 6


def test_a_place_without_a_run_is_refused_in_one_line(store, cache, capsys):
    assert generate.main(['--workdir=s3://runs/nothing', '--prompt=a']) == 2
    error = capsys.readouterr().err
    assert 's3://runs/nothing holds no checkpoint' in error and error.count('\n') == 1
