"""The lease of a workdir: one run at a time, and a stale one is taken over."""

import errno
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading

import pytest
from train_fixtures import ROOT, before_saving, prepare_bytes, train, write_config

from transxssm_jax.training import lease as lease_lib
from transxssm_jax.training.checkpoint import CheckpointError
from transxssm_jax.training.lease import Lease, LeaseError

OPTIONS = dict(renew_seconds=1000.0, patience_seconds=4000.0)  # the thread never renews; tests call renew


def fail(message):
    pytest.fail(message)


@pytest.fixture
def held(tmp_path):
    """Makes leases of one workdir; the thread of each sleeps, and looks come when a test lets them."""
    leases = []

    def held(sleep=lambda seconds: None, on_lost=fail):
        leases.append(Lease(tmp_path, sleep=sleep, on_lost=on_lost, **OPTIONS))
        return leases[-1]

    yield held
    for lease in leases:
        lease.release()


def content(tmp_path):
    return json.loads((tmp_path / 'lease.json').read_text())


def write(tmp_path, **changes):
    """The lease as another run would have left it."""
    with tempfile.TemporaryDirectory() as directory, lease_lib.hold(pathlib.Path(directory), **OPTIONS):
        left = content(pathlib.Path(directory))
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / 'lease.json').write_text(json.dumps({**left, 'token': 'of another', **changes}) + '\n')


def of_another_host(tmp_path, **changes):
    write(tmp_path, host='elsewhere', host_identity='elsewhere', process=7, **changes)


def ended_process() -> int:
    process = subprocess.Popen(['true'])
    process.wait()
    return process.pid


def leftovers(tmp_path):
    return [name for name in os.listdir(tmp_path) if name != 'lease.json']


def test_a_lease_names_its_holder_and_is_released(held, tmp_path):
    lease = held()
    assert content(tmp_path)['process'] == os.getpid() and leftovers(tmp_path) == []
    lease.release()
    assert os.listdir(tmp_path) == []
    held().release()
    assert os.listdir(tmp_path) == []


def test_a_second_run_is_refused_by_host_process_and_age(held, tmp_path):
    held()
    before = content(tmp_path)
    with pytest.raises(LeaseError) as error:
        held()
    assert str(error.value) == (
        f'--workdir={tmp_path} is in use by another run (process {os.getpid()} on host {before["host"]}, for 0 min); '
        'end that one first, or use another --workdir'
    )
    assert content(tmp_path) == before and leftovers(tmp_path) == []


def test_a_second_process_is_refused(held, tmp_path):
    held()
    program = (
        'import pathlib, sys\nfrom transxssm_jax.training import lease\n'
        'try:\n    lease.Lease(pathlib.Path(sys.argv[1]))\nexcept lease.LeaseError as error:\n    print(error)'
    )
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    ended = subprocess.run(
        [sys.executable, '-c', program, str(tmp_path)], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert f'is in use by another run (process {os.getpid()} on host' in ended.stdout, ended


@pytest.mark.parametrize('which', ['ended', 'another process now', 'not a process'])
def test_a_lease_of_a_process_that_is_gone_is_taken_over_at_once(held, tmp_path, caplog, which):
    process = {'ended': ended_process(), 'another process now': os.getpid(), 'not a process': 'x'}[which]
    write(tmp_path, process=process, process_start='1')
    held(sleep=lambda seconds: fail('it waited'))
    assert content(tmp_path)['process'] == os.getpid() and content(tmp_path)['token'] != 'of another'
    assert leftovers(tmp_path) == []
    assert 'is taken over' in caplog.text and f'process {process}' in caplog.text


def test_a_zombie_is_gone(held, tmp_path):
    process = subprocess.Popen(['true'])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
    write(tmp_path, process=process.pid, process_start=lease_lib._start_of(process.pid))
    held(sleep=lambda seconds: fail('it waited'))
    process.wait()


def test_a_lease_of_another_host_that_is_renewed_is_refused(held, tmp_path):
    of_another_host(tmp_path)
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            of_another_host(tmp_path, renewals='000000000001')

    with pytest.raises(LeaseError, match=r'in use by another run \(process 7 on host elsewhere, for 0 min\)'):
        held(sleep)
    assert looks == [1000.0] * 2


def test_a_lease_of_another_host_that_does_not_change_is_taken_over(held, tmp_path, caplog):
    of_another_host(tmp_path, since=0)  # clocks differ; only the counter counts
    looks = []
    held(looks.append)
    assert looks == [1000.0] * 4 and content(tmp_path)['process'] == os.getpid()
    assert 'waiting to see whether the run (process 7 on host elsewhere, for ' in caplog.text


def test_a_run_that_ends_while_it_is_watched_leaves_its_place(held, tmp_path):
    of_another_host(tmp_path)
    held(lambda seconds: (tmp_path / 'lease.json').unlink())
    assert content(tmp_path)['process'] == os.getpid()


@pytest.mark.parametrize(
    'damaged', [b'', b'\xff\x00', b'5', b'{"host": "a"}', b'{"since": "x", "host": 1, "process": 2}']
)
def test_a_damaged_lease_is_watched_and_taken_over(held, tmp_path, damaged):
    (tmp_path / 'lease.json').write_bytes(damaged)
    looks = []
    held(looks.append)
    assert len(looks) == 4 and content(tmp_path)['process'] == os.getpid()


def test_of_two_takers_one_succeeds(held, tmp_path):
    """The second finds the lease stale, too, and acts after the first has taken it."""
    write(tmp_path, process=ended_process())
    stale = (tmp_path / 'lease.json').read_bytes()
    first = held()
    second = object.__new__(Lease)
    second.__dict__ |= {**first.__dict__, '_token': 'second', '_who': {**first._who, 'token': 'second'}}
    assert not second._take_over(stale)
    assert content(tmp_path)['token'] == first._token and leftovers(tmp_path) == []


def test_a_claim_keeps_others_from_taking_over(held, tmp_path):
    """Another taker is between its claim and its lease; it then goes on."""
    write(tmp_path, process=ended_process())
    claim = tmp_path / f'lease.json.claim-{lease_lib.xxhash.xxh3_128_hexdigest((tmp_path / "lease.json").read_bytes())}'
    claim.touch()

    def sleep(seconds):
        if claim.exists():
            write(tmp_path)  # by the taker, which is this process and alive
            claim.unlink()

    with pytest.raises(LeaseError, match='in use by another run'):
        held(sleep)


def test_a_claim_of_a_taker_that_died_is_removed(held, tmp_path):
    write(tmp_path, process=ended_process())
    claim = tmp_path / f'lease.json.claim-{lease_lib.xxhash.xxh3_128_hexdigest((tmp_path / "lease.json").read_bytes())}'
    claim.touch()
    looks = []
    held(looks.append)
    assert len(looks) == 4 and leftovers(tmp_path) == []


def test_a_file_system_without_hard_links_serves(held, tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(errno.EOPNOTSUPP, 'Operation not supported')

    monkeypatch.setattr(os, 'link', link)
    held()
    with pytest.raises(LeaseError):
        held()
    assert leftovers(tmp_path) == []


def test_a_renewal_changes_the_counter_and_no_length(held, tmp_path):
    lease = held()
    before = (tmp_path / 'lease.json').read_bytes()
    assert lease.renew()
    after = (tmp_path / 'lease.json').read_bytes()
    assert before != after and len(before) == len(after)
    (tmp_path / 'lease.json').unlink()
    assert lease.renew() and content(tmp_path)['renewals'] == '000000000002', 'one that was deleted is made anew'


def test_a_lost_lease_is_noticed_and_left_to_its_holder(held, tmp_path):
    lease = held()
    of_another_host(tmp_path / 'aside')
    os.replace(tmp_path / 'aside' / 'lease.json', tmp_path / 'lease.json')
    taken = content(tmp_path)
    assert not lease.renew()
    lease.release()
    assert content(tmp_path) == taken


def test_the_thread_renews_and_reports_a_loss(tmp_path):
    lost, lines = threading.Event(), []
    lease = Lease(
        tmp_path, renew_seconds=0.001, patience_seconds=1, on_lost=lambda line: (lines.append(line), lost.set())
    )
    of_another_host(tmp_path / 'aside')
    os.replace(tmp_path / 'aside' / 'lease.json', tmp_path / 'lease.json')
    assert lost.wait(60)
    lease.release()
    assert lines[0].startswith(f'--workdir={tmp_path} was taken over by another run (process 7 on host elsewhere')


def test_a_loss_ends_the_process_with_one_line(tmp_path):
    program = f"""
import os, pathlib, time
from transxssm_jax.training import lease
path = pathlib.Path({str(tmp_path)!r})
held = lease.Lease(path, renew_seconds=0.01)
(path / 'aside').write_text('{{}}')
os.replace(path / 'aside', path / 'lease.json')
time.sleep(100)
"""
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    ended = subprocess.run(
        [sys.executable, '-c', program], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=90
    )
    assert ended.returncode == lease_lib.LOST, ended
    assert ended.stderr.startswith('error: --workdir=') and ended.stderr.count('\n') == 1, ended


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(CheckpointError, match=f'--workdir={tmp_path}/file cannot be written'):
        Lease(tmp_path / 'file')


def test_a_second_trainer_is_refused_and_the_first_goes_on(tmp_path):
    config, results = write_config(tmp_path, prepare_bytes(tmp_path)), []
    settings = dict(train__steps=3, train__eval_every_steps=0)
    with before_saving(
        2, lambda run: results.append(None) or results.append(train(config, tmp_path / 'w', **settings))
    ):
        # The second run, in the middle of the first, is another call in this process, whose hook is used up.
        first = train(config, tmp_path / 'w', **settings)
    second = results[1]
    assert second.code == 2 and second.err.count('\n') == 1, second
    assert f'is in use by another run (process {os.getpid()} on host' in second.err
    assert first.code == 0, first
    assert not (tmp_path / 'w' / 'lease.json').exists()
    assert train(config, tmp_path / 'w', **settings).code == 0, 'it was released'


@pytest.mark.parametrize('comes_back', [False, True])
def test_a_workdir_that_is_removed_ends_the_run(tmp_path, monkeypatch, comes_back):
    lost, renew, goes_on = [], Lease.renew, threading.Event()
    monkeypatch.setattr(Lease, 'renew', lambda lease: goes_on.wait(60) and renew(lease))
    held = Lease(tmp_path / 'run', on_lost=lost.append, renew_seconds=0.01)
    (tmp_path / 'run' / lease_lib.NAME).unlink()
    (tmp_path / 'run').rmdir()
    if comes_back:  # by a checkpoint that was being written; on many file systems with the same inode number
        (tmp_path / 'run' / 'checkpoints' / '8').mkdir(parents=True)
    goes_on.set()
    held._thread.join(60)
    [message] = lost
    assert 'was removed under the run' in message and not held.path.exists()
