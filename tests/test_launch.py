"""The launch scripts by what they would do: the commands that --dry-run prints, and shellcheck."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).parents[1] / 'launch'
SCRIPTS = sorted(LAUNCH.glob('*.sh'))
PROGRAMS = ['tpu_vm', 'gke', 'slurm', 'sweep']
TRAINING = ['--config=configs/1p3b.py', '--workdir=/mnt/runs/a run', "--config.data.path=/mnt/data's"]
REQUIRED = {
    'tpu_vm': ['--name=books', '--zone=us-west4-a', '--accelerator=v5litepod-256'],
    'gke': ['--cluster=pod', '--name=books', '--tpu_type=v5p-256'],
    'slurm': [],
    'sweep': ['--out=/runs/sweep', 'optimizer.learning_rate=1e-4,3e-4'],
}


def call(name, *arguments, training=TRAINING, **environment):
    command = [LAUNCH / f'{name}.sh', *arguments, *(['--', *training] if training is not None else [])]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def commands(name, *arguments, training=TRAINING):
    """What --dry-run prints, as words; a line that is no command line of its own stays one word."""
    result = call(name, *REQUIRED[name], *arguments, '--dry-run', training=training)
    assert result.returncode == 0, result
    return [shlex.split(line) for line in result.stdout.splitlines()]


def refused(result, *parts):
    assert result.returncode == 2, result
    assert result.stderr.startswith('error: ') and result.stderr.count('\n') == 1, result.stderr
    assert not result.stdout
    for part in parts:
        assert part in result.stderr


def test_shellcheck():
    path = shutil.which('shellcheck', path=f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}')
    if path is None:
        pytest.skip('shellcheck is not installed (pip install -e .[dev])')
    result = subprocess.run([path, '--external-sources', *SCRIPTS], capture_output=True, text=True, cwd=LAUNCH.parent)
    assert result.returncode == 0, result.stdout
    assert len(SCRIPTS) >= 7


@pytest.mark.parametrize('name', PROGRAMS)
def test_help(name):
    result = call(name, '--help', training=None)
    assert result.returncode == 0 and not result.stderr
    assert f'launch/{name}.sh --' in result.stdout and '--dry-run' in result.stdout
    assert 'set -' not in result.stdout and '#' not in result.stdout


@pytest.mark.parametrize('name', PROGRAMS)
def test_what_is_refused(name):
    refused(call(name, *REQUIRED[name], '--nodse=3', '--dry-run'), 'unknown option --nodse=3', f'{name}.sh --help')
    refused(call(name, *REQUIRED[name], '--dry-run', training=['--workdir=/runs']), '--config=PATH is missing')
    if name != 'sweep':
        refused(call(name, *REQUIRED[name], '--dry-run', training=['--config=a.py']), '--workdir=DIR is missing')
    for missing in REQUIRED[name]:
        if missing.startswith('--'):
            refused(call(name, *(given for given in REQUIRED[name] if given != missing), '--dry-run'), missing.split('=')[0])


def test_counts_are_checked():
    refused(call('tpu_vm', *REQUIRED['tpu_vm'], '--slices=0'), '--slices=0 must be a whole number')
    refused(call('gke', *REQUIRED['gke'], '--max_restarts=many'), '--max_restarts=many')
    refused(call('slurm', '--nodes=2x'), '--nodes=2x')
    refused(call('tpu_vm', *REQUIRED['tpu_vm'], '--spot', '--reservation=r'), 'exclude each other')
    refused(call('tpu_vm', '--name=a', '--zone=z', '--accelerator=v9-8'), '--runtime=VERSION')
    refused(call('sweep', '--out=/o', 'learning_rate=1'), 'SETTING=VALUE')
    refused(call('sweep', '--out=/o'), 'no setting varies')


# ---- Cloud TPU VMs ---------------------------------------------------------


def test_tpu_vm_creates_installs_trains_and_deletes():
    create, archive, copy, install, train, delete = commands('tpu_vm', '--project=p', '--mount=bucket')
    tpus = ['gcloud', 'compute', 'tpus', 'queued-resources']
    where = ['--zone=us-west4-a', '--project=p']
    assert create == [*tpus, 'create', 'books', *where, '--accelerator-type=v5litepod-256',
                      '--runtime-version=v2-alpha-tpuv5-lite', '--node-id=books']
    assert archive[0] == 'git' and 'archive' in archive and archive[-1] == 'HEAD'
    assert copy == [*tpus, 'scp', '/tmp/transxssm.tar.gz', 'books:transxssm.tar.gz', *where, '--worker=all', '--node=all']
    for ssh in (install, train):
        assert ssh[:-1] == [*tpus, 'ssh', 'books', *where, '--worker=all', '--node=all']
    assert 'pip install' in install[-1] and '.[tpu]' in install[-1] and 'gcsfuse' in install[-1] and '/mnt/bucket' in install[-1]
    # As the worker's shell reads it, the command line is the one that was given.
    line = next(part for part in train[-1].removeprefix('--command=').split('; ') if 'transxssm_jax.train' in part)
    assert shlex.split(line) == ['flock', '~/transxssm.lock', '~/venv/bin/python', '-m', 'transxssm_jax.train', *TRAINING]
    assert delete == [*tpus, 'delete', 'books', *where, '--force', '--quiet']


def test_tpu_vm_with_slices_spot_and_keep():
    create, *_, train = commands('tpu_vm', '--slices=2', '--spot', '--keep', '--runtime=tpu-new')
    assert {'--node-prefix=books', '--node-count=2', '--spot', '--runtime-version=tpu-new'} <= set(create)
    assert '--config.mesh.slices=2' in train[-1]


def pretend(directory, name, text):
    path = directory / name
    path.write_text('#!/usr/bin/env bash\n' + text)
    path.chmod(0o755)


def test_tpu_vm_starts_again_after_a_preemption(tmp_path):
    """With a gcloud that loses the TPUs once: created again, installed again, the same training command again."""
    pretend(tmp_path, 'sleep', '')
    pretend(tmp_path, 'gcloud', r'''
echo "$*" >> "$LOG"
lost=$LOG.lost
case "$*" in
    *" describe "*)
        if [ -e "$LOG.there" ]; then echo ACTIVE; elif [ -e "$LOG.suspended" ]; then echo SUSPENDED; else exit 1; fi ;;
    *" create "*) touch "$LOG.there" ;;
    *" delete "*) rm -f "$LOG.there" "$LOG.suspended" ;;
    *"cat ~/exit_code"*) exit 1 ;;
    *transxssm_jax.train*)
        if [ ! -e "$lost" ]; then touch "$lost" "$LOG.suspended"; rm "$LOG.there"; exit 255; fi ;;
esac
''')
    log = tmp_path / 'log'
    result = call('tpu_vm', *REQUIRED['tpu_vm'], PATH=f'{tmp_path}:{os.environ["PATH"]}', LOG=str(log))
    assert result.returncode == 0, result
    done = [line.split()[3] for line in log.read_text().splitlines() if ' describe ' not in line]
    assert done == ['create', 'scp', 'ssh', 'ssh', 'ssh', 'delete', 'create', 'scp', 'ssh', 'ssh', 'delete']
    trained = [line for line in log.read_text().splitlines() if 'transxssm_jax.train' in line]
    assert len(trained) == 2 and trained[0] == trained[1]
    assert 'interrupted (exit code 69); starting again' in result.stdout


@pytest.mark.parametrize('code, starts', [(2, 1), (75, 3)])
def test_tpu_vm_asks_worker_0_how_training_ended(tmp_path, code, starts):
    pretend(tmp_path, 'sleep', '')
    pretend(tmp_path, 'gcloud', f'''
echo "$*" >> "$LOG"
case "$*" in
    *" describe "*) echo ACTIVE ;;
    *"cat ~/exit_code"*) echo {code} ;;
    *transxssm_jax.train*) exit 1 ;;
esac
''')
    log = tmp_path / 'log'
    result = call('tpu_vm', *REQUIRED['tpu_vm'], '--max_restarts=2', PATH=f'{tmp_path}:{os.environ["PATH"]}', LOG=str(log))
    assert result.returncode == code, result
    assert log.read_text().count('transxssm_jax.train') == starts
    assert log.read_text().splitlines()[-1].split()[3] == 'delete'


# ---- GKE -------------------------------------------------------------------


def test_gke_creates_a_workload():
    [create] = commands('gke', '--slices=2', '--image=gcr.io/p/transxssm', '--storage=books', '--zone=z', '--project=p')
    assert create[:3] == ['xpk', 'workload', 'create']
    flags = dict(word.removeprefix('--').split('=', 1) for word in create[3:])
    command = shlex.split(flags.pop('command'))
    assert command == ['exec', 'python', '-m', 'transxssm_jax.train', '--config.mesh.slices=2', *TRAINING]
    assert flags == {
        'cluster': 'pod', 'workload': 'books', 'tpu-type': 'v5p-256', 'num-slices': '2', 'project': 'p', 'zone': 'z',
        'docker-image': 'gcr.io/p/transxssm', 'storage': 'books', 'priority': 'medium', 'max-restarts': '100',
        'restart-on-exit-codes': '69,75', 'termination-grace-period-seconds': '120'}


def test_gke_without_an_image_takes_this_directory():
    [create] = commands('gke')
    assert f'--script-dir={LAUNCH.parent}' in create and '--base-docker-image=python:3.12' in create
    assert create[-1].startswith('--command=pip install') and 'exec python -m transxssm_jax.train --config=' in create[-1]


# ---- SLURM -----------------------------------------------------------------


def job_of(output):
    head, _, rest = output.partition("<<'JOB'\n")
    assert rest.endswith('JOB\n')
    return shlex.split(head), rest.removesuffix('JOB\n')


def test_slurm_submits_one_process_a_node():
    submit, job = job_of(call('slurm', '--nodes=4', '--time=4:00:00', '--partition=h200', '--dry-run').stdout)
    assert submit[0] == 'sbatch'
    assert {'--nodes=4', '--ntasks-per-node=1', '--gpus-per-node=8', '--requeue', '--signal=TERM@120', '--open-mode=append',
            '--time=4:00:00', '--partition=h200', f'--chdir={LAUNCH.parent}'} <= set(submit)
    line = next(line for line in job.splitlines() if line.startswith('srun'))
    assert shlex.split(line) == ['srun', '--kill-on-bad-exit=0', '.venv/bin/python', '-m', 'transxssm_jax.train',
                                 '--config.mesh.slices=4', *TRAINING]


@pytest.mark.parametrize('code, restarts, requeued', [(0, 0, False), (2, 0, False), (3, 0, False), (75, 0, True), (69, 4, True),
                                                      (137, 0, True), (75, 5, False)])
def test_slurm_puts_an_interrupted_job_back_into_the_queue(tmp_path, code, restarts, requeued):
    _, job = job_of(call('slurm', '--nodes=2', '--max_restarts=5', '--dry-run').stdout)
    pretend(tmp_path, 'srun', f'exit {code}\n')
    pretend(tmp_path, 'scontrol', f'echo "$*" > {tmp_path}/requeued\n')
    result = subprocess.run(['bash', '-c', job], env=os.environ | {
        'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '17', 'SLURM_RESTART_COUNT': str(restarts)})
    assert result.returncode == code
    assert (tmp_path / 'requeued').exists() == requeued
    assert not requeued or (tmp_path / 'requeued').read_text() == 'requeue 17\n'


def test_slurm_hands_the_job_to_sbatch(tmp_path):
    pretend(tmp_path, 'sbatch', f'cat > {tmp_path}/job; echo "$*" > {tmp_path}/arguments\n')
    result = call('slurm', '--gpus=4', PATH=f'{tmp_path}:{os.environ["PATH"]}')
    assert result.returncode == 0, result
    assert '--gpus-per-node=4' in (tmp_path / 'arguments').read_text()
    assert (tmp_path / 'job').read_text() == job_of(call('slurm', '--gpus=4', '--dry-run').stdout)[1]


# ---- sweeps ----------------------------------------------------------------


def test_sweep_trains_every_combination_in_a_workdir_of_its_own():
    training = ['--config=configs/tiny.py']
    got = commands('sweep', 'data.seed=0,1,2', training=training)
    assert len(got) == 6
    assert got[1] == ['.venv/bin/python', '-m', 'transxssm_jax.train', '--config=configs/tiny.py',
                      '--workdir=/runs/sweep/optimizer.learning_rate=1e-4,data.seed=1',
                      '--config.optimizer.learning_rate=1e-4', '--config.data.seed=1']
    assert len({word for words in got for word in words if word.startswith('--workdir=')}) == 6
    by_slurm = commands('sweep', '--slurm=--nodes=2 --time=1:00:00', training=training)
    assert by_slurm[0] == ['launch/slurm.sh', '--python=.venv/bin/python', '--nodes=2', '--time=1:00:00', '--',
                           '--config=configs/tiny.py', '--workdir=/runs/sweep/optimizer.learning_rate=1e-4',
                           '--config.optimizer.learning_rate=1e-4']


def test_sweep_goes_on_after_a_failure_and_stops_when_told(tmp_path):
    pretend(tmp_path, 'python', f'echo "$*" >> {tmp_path}/log; case $* in *seed=1*) exit "$CODE" ;; esac\n')

    def sweep(code):
        (tmp_path / 'log').write_text('')
        result = call('sweep', '--out=/runs', f'--python={tmp_path}/python', 'data.seed=0,1,2', training=['--config=a.py'],
                      CODE=str(code))
        return result.returncode, len((tmp_path / 'log').read_text().splitlines())

    assert sweep(3) == (1, 3)
    assert sweep(130) == (130, 2)
