"""Several processes as one run, on this machine: how they join, agree and end, and that training does not notice them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from process_fixtures import TESTS, Process, Processes, free_port, start, start_all
from train_fixtures import arguments, call, checkpoint_steps, prepare_bytes, records, train, write_config

from transxssm_jax.parallel import cluster, preemption, processes
from transxssm_jax.training import checkpoint, lease


def doing(what):
    return [str(TESTS / 'process_fixtures.py'), what]


# ---- agreeing --------------------------------------------------------------


def test_processes_agree_and_stop_at_the_same_turn():
    ended = start_all(doing('agree'), 3).finish()
    for process in ended:
        assert process.code == 75, process
        assert process.out.splitlines() == [
            "broadcast {'n': 1}",
            "gathered ['p0', 'p1', 'p2']",
            'stopped at turn 5 with 75',
        ], process
        assert 'Traceback' not in process.err and 'Fatal' not in process.err


def test_one_process_needs_nobody():
    assert not processes.is_multiprocess() and processes.is_coordinator() and processes.process_label() == ''
    assert processes.broadcast_from_0([1, 'a']) == [1, 'a'] and processes.all_gather_json({'b': 2}) == [{'b': 2}]
    stop = preemption.PreemptionSync()
    assert [stop.should_stop(0), stop.should_stop(75), stop.should_stop(0)] == [0, 75, 0], 'at once'
    processes.abort_all(2, 'returns')
    processes.shutdown(0)
    processes.wait_for_peer_failure()


# ---- ending ----------------------------------------------------------------


@pytest.mark.parametrize('failing', [1, 0])
def test_a_failure_ends_all_and_says_whose_it_is(failing):
    ended = start_all(doing(f'fail{failing}'), 3).finish()
    for process, end in enumerate(ended):
        assert end.code == 2, end
        if process != failing:
            assert end.error() == (
                f'error (process {process} of 3): process {failing} ended: data.path=/nowhere: no such directory'
            )


@pytest.mark.parametrize('lost', [2, 0], ids=['a process', 'the coordinator'])
def test_a_killed_process_is_missed(lost):
    with start_all(doing('wait'), 3, heartbeat_timeout_seconds=10) as running:
        running.until_printed('watched')
        running[lost].kill()
        ended = running.finish()
    for process, end in enumerate(ended):
        if process == lost:
            assert end.code == -signal.SIGKILL
            continue
        assert end.code == processes.PEER_LOST, end
        assert (
            f'process {lost} of 3' in end.error() and 'is gone' in end.error() and 'same command again' in end.error()
        )


def test_a_stopped_coordinator_is_missed():
    """SIGSTOP: its connections stay open, and the kernel accepts new ones."""
    with start_all(doing('wait'), 2, heartbeat_timeout_seconds=10) as running:
        running.until_printed('watched')
        running[0].send_signal(signal.SIGSTOP)
        code = running[1].wait(600)
        err = running[1].output()[1]
    assert code == processes.PEER_LOST, err
    (error,) = [line for line in err.splitlines() if line.startswith('error')]
    assert error.startswith('error (process 1 of 2): process 0 of 2 (the coordinator, ') and 'stopped' in error


def test_a_process_that_was_killed_and_started_again_is_another():
    """Its place is taken, so there is a heartbeat; the others must notice all the same, and all end."""
    port, flags = free_port(), dict(heartbeat_timeout_seconds=10, connect_timeout_seconds=30)
    with Processes() as running:
        for process in range(3):
            running.append(Process(doing('wait'), process, 3, port, **flags))
        running.until_printed('watched')
        running[2].kill()
        running.append(Process(doing('wait'), 2, 3, port, **flags))
        assert [end.code for end in running.finish()] == [
            processes.PEER_LOST,
            processes.PEER_LOST,
            -signal.SIGKILL,
            processes.PEER_LOST,
        ]


def test_output_that_nobody_reads_does_not_keep_a_process():
    program = (
        'import select, sys, threading, time; from transxssm_jax.parallel import processes\n'
        'threading.Thread(target=lambda: [print("x" * 999) for _ in range(9999)], daemon=True).start()\n'
        'while select.select([], [1], [], 0)[1]: time.sleep(0.01)\n'  # until the pipe is full
        'processes._end(processes.PEER_LOST, "process 1 is gone")'
    )
    with subprocess.Popen(
        [sys.executable, '-c', program],
        cwd=TESTS.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONUNBUFFERED': ''},
    ) as process:
        try:
            assert process.wait(60) == processes.PEER_LOST
            assert process.stderr.read() == b'error: process 1 is gone\n'
        finally:
            process.kill()


# ---- joining ---------------------------------------------------------------


def test_who_does_not_come_is_not_waited_for_for_ever():
    port, unused = free_port(), free_port()
    alone = Process(doing('wait'), 0, 2, port, connect_timeout_seconds=3)
    lonely = Process(doing('wait'), 1, 2, unused, connect_timeout_seconds=3)
    first, second = Processes([alone, lonely]).finish()
    assert first.code == second.code == processes.PEER_LOST
    assert 'not all processes of the run came within 3 s' in first.error() and f'localhost:{port}' in first.error()
    assert 'process 0 does not answer' in second.error() and f'--coordinator=localhost:{unused}' in second.error()


@pytest.mark.parametrize(
    'given, environment, message',
    [
        (dict(coordinator='somewhere', num_processes=2, process_id=0), {}, '--coordinator=somewhere must be HOST:PORT'),
        (dict(coordinator='a:1'), {}, 'needs --num_processes=N'),
        (dict(coordinator='a:1', num_processes=2), {}, '--process_id=-1 (or JAX_PROCESS_ID) must be of 0 .. 1'),
        (dict(num_processes=2, process_id=5, coordinator='a:1'), {}, '--process_id=5'),
        (dict(num_processes=2), {}, 'need --coordinator=HOST:PORT'),
        (
            {},
            {'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': 'two'},
            'JAX_NUM_PROCESSES=two must be a whole number',
        ),
        ({}, {'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '2'}, '--process_id=2'),
    ],
    ids=str,
)
def test_what_is_refused(monkeypatch, given, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(processes.ProcessesError) as error:
        processes.join(**given)
    assert message in str(error.value)


def test_a_refused_flag_is_said_in_one_line(tmp_path):
    result = call(['train', '--config=configs/tiny.py', f'--workdir={tmp_path}', '--coordinator=a:1'])
    assert result.code == 2 and result.err.count('\n') == 1, result
    assert result.err.startswith('error: --coordinator=a:1 needs --num_processes')
    result = call(['train', '--config=configs/tiny.py', '--workdir=hdfs://bucket/run'])
    assert result.code == 2 and 'mount the bucket' in result.err


@pytest.mark.parametrize(
    'environment, expected',
    [
        ({}, None),
        ({'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '1', 'JAX_PROCESS_ID': '0'}, None),
        (
            {'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '4', 'JAX_PROCESS_ID': '0'},
            dict(coordinator_address='a:1', num_processes=4, process_id=0, cluster_detection_method='deactivate'),
        ),
        # A notebook in a pod, a step of one task in a larger allocation, a TPU host by itself: nobody to wait for.
        ({'KUBERNETES_SERVICE_HOST': '10.0.0.1'}, None),
        (
            {'SLURM_JOB_ID': '1', 'SLURM_NTASKS': '8', 'SLURM_STEP_NODELIST': 'n[1-8]', 'SLURM_STEP_NUM_TASKS': '1'},
            None,
        ),
        (
            {
                'SLURM_STEP_NODELIST': 'n[1-2]',
                'SLURM_STEP_NUM_TASKS': '2',
                'SLURM_STEP_TASKS_PER_NODE': '1(x2)',
                'SLURM_GPUS_ON_NODE': '8',
            },
            dict(cluster_detection_method='slurm', local_device_ids=list(range(8))),
        ),
        (
            {
                'SLURM_STEP_NODELIST': 'n[1-2]',
                'SLURM_STEP_NUM_TASKS': '16',
                'SLURM_STEP_TASKS_PER_NODE': '8(x2)',
                'SLURM_GPUS_ON_NODE': '8',
            },
            dict(cluster_detection_method='slurm'),
        ),
        ({'OMPI_COMM_WORLD_SIZE': '2'}, dict(cluster_detection_method='ompi')),
        ({'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '0'}, dict(cluster_detection_method='k8s')),
        (
            {'TPU': 'yes', 'JAX_PLATFORMS': 'tpu,cpu', 'TPU_WORKER_HOSTNAMES': 'a,b'},
            dict(cluster_detection_method='gketpu'),
        ),
        ({'TPU': 'yes', 'JAX_PLATFORMS': ''}, dict(cluster_detection_method='gcetpu')),
        ({'TPU': 'yes', 'JAX_PLATFORMS': 'cpu'}, None),
    ],
    ids=lambda value: ','.join(value) if isinstance(value, dict) else '',
)
def test_where_processes_are_found(monkeypatch, environment, expected):
    """What is passed to jax.distributed.initialize in an environment; None: it is not called."""
    for name in list(os.environ):
        if name.startswith(('SLURM_', 'OMPI_', 'KUBERNETES_', 'TPU_', 'JAX_')) or name == 'JOB_COMPLETION_INDEX':
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked = []

    def initialize(initialization_timeout, heartbeat_timeout_seconds, **how):
        asked.append(how)
        raise ValueError('as far as this test goes')

    monkeypatch.setattr(cluster, 'has_tpu', lambda: 'TPU' in environment)
    monkeypatch.setattr(processes, '_membership', processes._Membership())
    monkeypatch.setattr(processes, '_catch_abort', lambda: None)
    monkeypatch.setattr(jax.distributed, 'initialize', initialize)
    monkeypatch.setattr(jax.config, 'update', lambda name, value: None)
    if expected is None:
        processes.join()
        assert not asked
    else:
        with pytest.raises(processes.ProcessesError, match='could not be joined'):
            processes.join()
        assert asked == [expected]


@pytest.mark.parametrize('error', [RuntimeError('UNAVAILABLE: no route'), OSError('no answer of the metadata server')])
def test_what_may_pass_ends_as_lost(monkeypatch, capfd, error):
    """A launcher starts again after LOST, not after wrong input."""

    def fail(*_, **how):
        raise error

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(processes, '_membership', processes._Membership())
    monkeypatch.setattr(processes, '_catch_abort', lambda: None)
    monkeypatch.setattr(jax.distributed, 'initialize', fail)
    monkeypatch.setattr(jax.config, 'update', lambda name, value: None)
    monkeypatch.setattr(os, '_exit', leave)
    with pytest.raises(SystemExit) as ended:
        processes.join('a:1', num_processes=2, process_id=0)
    assert ended.value.code == processes.PEER_LOST
    said = capfd.readouterr().err
    assert said.startswith('error: the processes of this run could not be joined') and str(error) in said, said


# ---- training: 4 processes x 2 devices, one killed; the same again, told to stop; 2 processes x 4 devices to the end ----

SETTINGS = dict(train__checkpoint_every_steps=4, train__eval_every_steps=3, train__eval_batches=1)
ENDLESS = 10**9  # steps of a run that is stopped from outside, however fast it is
EXTRA_STEPS = 4  # after the stop


def trainer(config, workdir, **settings):
    return ['-m', 'transxssm_jax.train', *arguments(config, workdir, **SETTINGS, **settings)[1:]]


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp('run')
    return write_config(directory, prepare_bytes(directory))


@pytest.fixture(scope='module')
def killed(config, tmp_path_factory):
    """(workdir, ends, highest step recorded) of four processes that lose one."""
    workdir = tmp_path_factory.mktemp('many') / 'workdir'
    with start_all(
        trainer(config, workdir, mesh__data=1, mesh__fsdp=8, train__steps=ENDLESS),
        4,
        devices=2,
        heartbeat_timeout_seconds=10,
    ) as running:
        running.until(lambda: (workdir / 'checkpoints' / '4').exists())
        running[3].kill()
        return workdir, running.finish(), max(record['step'] for record in records(workdir))


@pytest.fixture(scope='module')
def stopped(config, killed):
    """(workdir, ends) of the same command again; one process is told to stop."""
    workdir = killed[0]
    with start_all(trainer(config, workdir, mesh__data=1, mesh__fsdp=8, train__steps=ENDLESS), 4, devices=2) as running:
        running.until_printed('first step after', 0)
        running[2].send_signal(signal.SIGTERM)
        ends = running.finish()
    return shutil.copytree(workdir, workdir.parent / 'stopped'), ends


@pytest.fixture(scope='module')
def finished(config, stopped):
    """(workdir, ends, steps) of two processes that go on to the end, each row's tokens over both of them."""
    workdir = shutil.copytree(stopped[0], stopped[0].parent / 'finished')
    steps = checkpoint_steps(workdir)[-1] + EXTRA_STEPS
    running = start_all(
        trainer(config, workdir, mesh__data=1, mesh__context=8, train__steps=steps, train__sample_tokens=5),
        2,
        devices=4,
    )
    return workdir, running.finish(), steps


@pytest.fixture(scope='module')
def alone(config, finished, tmp_path_factory):
    """Workdir of one process with eight devices that trains to the same step, uninterrupted."""
    workdir = tmp_path_factory.mktemp('alone') / 'workdir'
    result = train(config, workdir, **SETTINGS, train__steps=finished[2])
    assert result.code == 0, result
    return workdir


def test_a_killed_process_ends_the_training_of_all(killed):
    workdir, ends, _ = killed
    assert ends[3].code == -signal.SIGKILL
    for process, end in enumerate(ends[:3]):
        assert end.code == processes.PEER_LOST, end
        assert end.error().startswith(f'error (process {process} of 4): process 3 of 4 is gone'), end
        assert 'Traceback' not in end.err


def test_a_signal_to_one_process_stops_all_after_the_same_step(killed, stopped):
    workdir, ends = stopped
    assert [end.code for end in ends] == [75] * 4, ends
    step = checkpoint_steps(workdir)[-1]
    assert f'stopped at step {step} and saved' in ends[0].out
    resumed = int(ends[0].out.partition('resuming from step ')[2].split()[0])
    assert 4 <= resumed < step
    for end in ends[1:]:
        assert 'Traceback' not in end.err
        # Threads of Gloo may print this into each other's lines.
        gloo = '[Gloo] Rank 1 is connected to 3 peer ranks. Expected number of connected peer ranks is : 3'
        words, known = (set(re.findall(r'[A-Za-z]+|[^\sA-Za-z0-9]', text)) for text in (end.out, gloo))
        assert words <= known, ('process 0 speaks for all', end.out)
    assert [record['step'] for record in records(workdir) if 'loss' in record] == list(range(1, step + 1))


def test_the_losses_are_those_of_one_process(finished, alone):
    workdir, ends, steps = finished
    assert [end.code for end in ends] == [0, 0], ends
    assert f'resuming from step {steps - EXTRA_STEPS}' in ends[0].out and ends[0].out.splitlines()[-1].startswith(
        f'finished at step {steps}: evaluation loss'
    )
    assert 'no sample' in ends[0].out
    many, one = records(workdir), records(alone)
    assert [record['step'] for record in many] == [record['step'] for record in one]
    for ours, theirs in zip(many, one):
        for name in {'loss', 'eval_loss', 'grad_norm', 'param_norm'} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5), (ours['step'], name)


def test_one_process_goes_on_where_four_stopped(config, stopped, finished, tmp_path):
    workdir, steps = shutil.copytree(stopped[0], tmp_path / 'one'), finished[2]
    result = train(config, workdir, **SETTINGS, train__steps=steps)
    assert result.code == 0 and f'resuming from step {steps - EXTRA_STEPS}' in result.out, result
    (ours, _), (theirs, _) = checkpoint.load_trained(workdir), checkpoint.load_trained(finished[0])
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=2e-5)


def test_different_commands_and_workdirs_are_refused(config, tmp_path):
    """Four processes of a pod where one is not like the others: each kind of mistake is said by all."""
    ends = start([trainer(config, tmp_path / 'shared', data__seed=process) for process in range(2)]).finish()
    assert [end.code for end in ends] == [2, 2], ends
    assert any('settings: those of process 1 are not those of process 0' in end.error() for end in ends)

    ends = start([trainer(config, tmp_path / f'own{process}') for process in range(2)]).finish()
    assert [end.code for end in ends] == [2, 2], ends
    assert any('is not the directory of process 0' in end.error() for end in ends)


def test_a_workdir_that_is_in_use_refuses_all_processes_of_a_second_run(config, tmp_path):
    with lease.hold(tmp_path / 'workdir'):
        ends = start([trainer(config, tmp_path / 'workdir', train__steps=3)] * 2).finish()
        assert (tmp_path / 'workdir' / lease.NAME).exists(), 'the holder keeps it'
    assert [end.code for end in ends] == [2, 2], ends
    for process, end in enumerate(ends):
        assert end.error().startswith(f'error (process {process} of 2): '), end
        assert f'is in use by another run (process {os.getpid()} on host' in end.error(), end
        assert 'Traceback' not in end.err
    assert not (tmp_path / 'workdir' / 'checkpoints').exists()


def test_data_that_cannot_be_read_ends_all_and_names_the_newest_checkpoint(config, tmp_path):
    data, workdir = shutil.copytree(config.parent / 'prepared', tmp_path / 'data'), tmp_path / 'workdir'
    settings = dict(data__path=data, mesh__data=2, train__steps=ENDLESS, train__eval_every_steps=0)
    command = ['-m', 'transxssm_jax.train', *arguments(config, workdir, **settings)[1:]]
    with start_all(command, 2) as running:
        running.until(lambda: (workdir / 'checkpoints' / '4').exists())
        (shard,) = data.glob('documents-train.array_record-*')
        content = shard.read_bytes()
        shard.write_bytes(content[:128] + bytes(len(content) - 256) + content[-128:])
        ends = running.finish()
    assert [end.code for end in ends] == [2, 2], ends
    newest = checkpoint_steps(workdir)[-1]
    for end in ends:
        assert f'{shard} is missing or corrupt' in end.error() and 'Traceback' not in end.err, end
        assert f'the newest checkpoint is of step {newest}' in end.error(), end


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_read_is_used_by_none(config, stopped, tmp_path):
    """Orbax keeps what each process wrote in a directory of its own; one of them is damaged."""
    workdir = shutil.copytree(stopped[0], tmp_path / 'damaged')
    newest = checkpoint_steps(workdir)[-1]
    part = workdir / 'checkpoints' / str(newest) / 'params' / 'ocdbt.process_3'
    assert part.is_dir(), list(part.parent.iterdir())
    for path in (workdir / 'checkpoints' / str(newest) / 'params').rglob('d/*'):
        if path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:10])
            break
    before = checkpoint_steps(workdir)[-2]
    running = start_all(
        trainer(config, workdir, mesh__data=1, mesh__fsdp=2, train__steps=before, train__sample_tokens=0), 2
    )
    ends = running.finish()
    assert [end.code for end in ends] == [0, 0], ends
    assert f'resuming from step {before}' in ends[0].out
    assert 'skipping unreadable checkpoint' in ends[0].err
    assert checkpoint_steps(workdir)[-1] == before and (workdir / 'checkpoints' / f'{newest}.unreadable').is_dir()
    assert json.loads((workdir / 'config.json').read_text())['mesh']['fsdp'] == 2
