"""A workdir on an S3-compatible store: a run that loses its machine goes on from there as one that was never interrupted."""

import json
import os
import pathlib
import shutil
import subprocess
import time
import types

import jax
import numpy as np
import pytest
from process_fixtures import start_all
from store_fixtures import start_store
from train_fixtures import (
    arguments,
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
from transxssm_jax.parallel import processes
from transxssm_jax.training import checkpoint, digest, lease, ledger, remote_workdir, store_lease
from transxssm_jax.training.checkpoint_exchange import PLACE, CheckpointExchange
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
    assert store_lease.NAME not in names
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


def test_a_second_run_is_kept_out(store, config, cache):
    url, second = 's3://runs/held', []
    with before_saving(2, lambda run: second.append(train(config, url, **SETTINGS))):
        assert train(config, url, **SETTINGS).code == 0
    assert second[0].code == 2 and 'is held by a run on' in second[0].err and second[0].err.count('\n') == 1


class Looks:
    """In place of time.sleep between two looks at a lease: counts them, and acts at one."""

    def __init__(self, at=0, action=None):
        self.count, self._at, self._action = 0, at, action

    def __call__(self, seconds):
        self.count += 1
        if self.count == self._at:
            self._action()


def write_lease(url, **changes):
    elsewhere = {'host': 'elsewhere', 'host_identity': 'elsewhere', 'process': 7, 'token': 'of another', 'renewals': 1}
    object_store.Files(url).write(store_lease.NAME, json.dumps(elsewhere | changes).encode())


@pytest.mark.parametrize(
    'how', ['killed here', 'killed elsewhere', 'ended meanwhile', 'alive elsewhere', 'no lease at all']
)
def test_a_lease_is_watched_before_it_is_taken_over(store, cache, monkeypatch, how):
    """A run that was killed is started again at once, by a launcher say, and must not be refused for its own lease."""
    url = f's3://runs/watched-{how.replace(" ", "-")}'
    looks = Looks()
    if how == 'killed here':
        gone = subprocess.Popen(['true'])
        gone.wait()
        write_lease(url, **lease.own_identity() | {'process': gone.pid, 'process_start': '1'})
    elif how == 'no lease at all':
        object_store.Files(url).write(store_lease.NAME, b'[')
    else:
        write_lease(url)
    if how == 'ended meanwhile':
        looks = Looks(2, lambda: object_store.Files(url).remove([store_lease.NAME]))
    elif how == 'alive elsewhere':
        looks = Looks(2, lambda: write_lease(url, renewals=2))
    workdir = remote_workdir.RemoteWorkdir(url)
    monkeypatch.setattr(store_lease, 'time', types.SimpleNamespace(sleep=looks))  # other threads sleep as they did
    if how == 'alive elsewhere':
        with pytest.raises(CheckpointError, match=f'{url} is held by a run on elsewhere; end that one first'):
            workdir.open()
        return
    workdir.open()
    assert looks.count == {'killed elsewhere': store_lease.LOOKS, 'ended meanwhile': 2}.get(how, 0)
    assert json.loads(object_store.Files(url).read(store_lease.NAME))['process'] == os.getpid()
    assert workdir.close() == '' and object_store.Files(url).names() == []


def test_a_lease_is_renewed_while_a_large_file_is_copied(store, cache, monkeypatch):
    """Also at the end, when the run is over."""
    monkeypatch.setattr(store_lease, 'RENEW_SECONDS', 0.05)
    files, put = object_store.Files('s3://runs/large'), object_store.Files.put
    renewed = []

    def put_slowly(self, file, name):
        before, deadline = files.read(store_lease.NAME), time.monotonic() + 60
        while files.read(store_lease.NAME) == before and time.monotonic() < deadline:
            time.sleep(0.05)
        renewed.append(files.read(store_lease.NAME) != before)
        put(self, file, name)

    monkeypatch.setattr(object_store.Files, 'put', put_slowly)
    workdir = remote_workdir.RemoteWorkdir(files.url)
    workdir.open()
    (workdir.directory / 'checkpoints' / '1').mkdir(parents=True)
    (workdir.directory / 'checkpoints' / '1' / 'digests.json').write_text('{}')
    assert workdir.close() == '' and renewed == [True]
    assert store_lease.NAME not in files.names()


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


def test_a_run_that_lost_its_lease_copies_nothing_more(store, cache, monkeypatch):
    url = 's3://runs/lost'
    monkeypatch.setattr(store_lease, 'RENEW_SECONDS', 0.05)
    workdir = remote_workdir.RemoteWorkdir(url)
    workdir.open()
    while workdir._lease._thread.is_alive():  # a renewal that was under way may overwrite the other run's lease
        write_lease(url)
        workdir._lease._thread.join(0.2)
    (workdir.directory / 'metrics.jsonl').write_text('{}')
    assert 'was taken over by a run on elsewhere' in workdir.close()
    assert object_store.Files(url).names() == [store_lease.NAME], 'the lease of the other stays'


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


# ---- several processes -------------------------------------------------------


def of_two(config, workdir, **settings):
    """Two processes as one run, its state in shards on both."""
    command = arguments(config, workdir, mesh__data=1, mesh__fsdp=2, **SETTINGS | settings)[1:]
    return start_all(['-m', 'transxssm_jax.train', *command], 2)


def test_processes_without_a_common_directory_go_on_from_the_store(store, config, tmp_path, cache, monkeypatch):
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'compiled'))
    monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    url = 's3://runs/two'
    assert [end.code for end in of_two(config, tmp_path / 'whole').finish()] == [0, 0]
    ends = of_two(config, url, train__steps=4).finish()
    assert [end.code for end in ends] == [0, 0], ends
    names = object_store.Files(url).names()
    assert {'ledger/process-0.jsonl', 'ledger/process-1.jsonl'} <= set(names) and store_lease.NAME not in names
    assert not [name for name in names if name.startswith(PLACE)] and steps_there(url)[-1] == 4
    local = object_store.cache_of(url)
    assert not any((local / 'process-1' / 'two' / 'checkpoints').iterdir()), 'nothing is left that process 0 has'
    cache()
    object_store.Files(url).write(f'{PLACE}/5-of-a-killed-run/params/d', b'left')
    ends = of_two(config, url).finish()
    assert [end.code for end in ends] == [0, 0] and 'resuming from step 4' in ends[0].out, ends
    assert steps_there(url) == checkpoint_steps(tmp_path / 'whole')
    assert not [name for name in object_store.Files(url).names() if name.startswith(PLACE)]
    ours, theirs = checkpoint.load_trained(f'{url}@latest')[0], checkpoint.load_trained(tmp_path / 'whole')[0]
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    for process in range(2):  # each step's line, with the digest of the rows that the process read
        name = f'ledger/process-{process}.jsonl'
        object_store.Files(url).fetch(name, tmp_path / 'there' / name)
    found, wanted = (ledger.read_lines(tmp_path / place, 1, 6) for place in ('there', 'whole'))
    for step in wanted:
        for ours, theirs in zip(found[step], wanted[step], strict=True):
            assert {name: ours[name] for name in ('batch', 'loss', 'rows')} == {
                name: theirs[name] for name in ('batch', 'loss', 'rows')
            }


def test_what_is_damaged_on_its_way_is_no_part_of_a_checkpoint(store, tmp_path):
    exchange = CheckpointExchange(object_store.Files('s3://runs/way'), lambda: '')
    sent, received = tmp_path / 'a' / '4-0.partial', tmp_path / 'b' / '4-0.partial'
    (sent / 'params').mkdir(parents=True)
    (sent / 'params' / 'd').write_bytes(b'arrays')
    digests = digest.of_files(sent, ['params/d'])
    exchange.send(sent, ['params/d'])
    exchange.receive(received, digests)
    assert (received / 'params' / 'd').read_bytes() == b'arrays'
    object_store.Files('s3://runs/way').write(f'{PLACE}/4-1.partial/params/d', b'of another')
    exchange.clear(received)
    assert object_store.Files('s3://runs/way').names() == [f'{PLACE}/4-1.partial/params/d']
    (sent / 'params' / 'd').write_bytes(b'arrayz')
    exchange.send(sent, ['params/d'])
    with pytest.raises(digest.DamagedError, match='params/d'):
        exchange.receive(received, digests)
    exchange.clear()
    assert object_store.Files('s3://runs/way').names() == []
    with pytest.raises(FileNotFoundError):
        exchange.receive(received, digests)


def test_a_checkpoint_is_at_every_process_while_it_is_read(store, tmp_path, monkeypatch):
    """Process 0 copies it to the store first, because the thread may not have come to it."""
    files, path = object_store.Files('s3://runs/brought'), tmp_path / 'checkpoints' / '4'
    monkeypatch.setattr(processes, 'is_coordinator', lambda: True)
    published = []
    with CheckpointExchange(files, lambda: published.append(1) or '').brought(path):
        assert published == [1] and not path.exists()
    refused = CheckpointExchange(files, lambda: 'Forbidden').brought(path)
    with pytest.raises(CheckpointError, match='Forbidden; run the same command again'), refused:
        pytest.fail('it is not read')
    files.write('checkpoints/4/params/d', b'arrays')
    files.write('checkpoints/40/params/d', b'others')
    monkeypatch.setattr(processes, 'is_coordinator', lambda: False)
    with CheckpointExchange(files, lambda: pytest.fail('process 0 does it')).brought(path):
        assert (path / 'params' / 'd').read_bytes() == b'arrays'
    assert not path.exists() and not (tmp_path / 'checkpoints' / '40').exists()
