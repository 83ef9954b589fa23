"""The launch scripts by what they would do: the commands that --dry-run prints, and shellcheck."""

import functools
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

import pytest

from transxssm_jax import config as config_lib
from transxssm_jax import train

LAUNCH = pathlib.Path(__file__).parents[1] / 'launch'
SCRIPTS = sorted(LAUNCH.glob('*.sh'))
PROGRAMS = ['tpu_vm', 'gke', 'slurm']
TRAINING = ['--config=configs/1p3b.py', '--workdir=/mnt/runs/a run', "--config.data.path=/mnt/data's"]
REQUIRED = {
    'tpu_vm': ['--name=books', '--zone=us-west4-a', '--accelerator=v5litepod-256'],
    'gke': ['--cluster=pod', '--name=books', '--tpu_type=v5p-256'],
    'slurm': [],
}


def call(name, *arguments, training=TRAINING, **environment):
    command = [LAUNCH / f'{name}.sh', *arguments, *(['--', *training] if training is not None else [])]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=60)


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
    result = subprocess.run(
        [path, '--external-sources', *SCRIPTS], capture_output=True, text=True, cwd=LAUNCH.parent, timeout=60
    )
    assert result.returncode == 0, result.stdout
    assert len(SCRIPTS) >= 6


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
    refused(call(name, *REQUIRED[name], '--dry-run', training=['--config=a.py']), '--workdir=DIR is missing')
    for missing in REQUIRED[name]:
        if missing.startswith('--'):
            refused(
                call(name, *(given for given in REQUIRED[name] if given != missing), '--dry-run'), missing.split('=')[0]
            )


def test_counts_are_checked():
    refused(call('tpu_vm', *REQUIRED['tpu_vm'], '--slices=0'), '--slices=0 must be a whole number')
    refused(call('gke', *REQUIRED['gke'], '--max_restarts=many'), '--max_restarts=many')
    refused(call('slurm', '--nodes=2x'), '--nodes=2x')
    refused(call('tpu_vm', *REQUIRED['tpu_vm'], '--spot', '--reservation=r'), 'exclude each other')
    refused(call('tpu_vm', '--name=a', '--zone=z', '--accelerator=v9-8'), '--runtime=VERSION')
    refused(call('tpu_vm', *REQUIRED['tpu_vm'], '--mount=gs://b'), '--mount=gs://b must be the name of a bucket')


@pytest.mark.parametrize('name, several', [('tpu_vm', '--slices=2'), ('gke', '--slices=2'), ('slurm', '--nodes=2')])
def test_training_understands_the_command_line(name, several):
    """Every launcher's command, as the shells at the far end split it, is one that training accepts."""
    training = [
        '--config.train.steps=700',
        '--config=configs/tiny.py',
        '--workdir=/mnt/a run',
        "--config.data.path=/d's",
    ]
    for given, slices in ((training, 2), ([*training, '--config.mesh.slices=4'], 4)):
        text = call(name, *REQUIRED[name], several, '--dry-run', training=given).stdout
        while 'transxssm_jax.train' not in (words := shlex.split(text, comments=True)):
            text = next(word for word in words if 'transxssm_jax.train' in word).removeprefix('--command=')
        start = words.index('transxssm_jax.train') + 1
        end = next((i for i in range(start, len(words)) if not words[i].startswith('--')), len(words))
        flags = train.COMMAND.parse([word.removesuffix(';') for word in words[start:end]])
        config = config_lib.from_flags(flags)
        assert (config.mesh.slices, config.train.steps, config.data.path) == (slices, 700, "/d's")
        assert flags.workdir == '/mnt/a run'


# ---- Cloud TPU VMs ---------------------------------------------------------


def test_tpu_vm_creates_installs_trains_and_deletes():
    archive, create, copy, install, train, delete = commands('tpu_vm', '--project=p', '--mount=bucket')
    tpus = ['gcloud', 'compute', 'tpus', 'queued-resources']
    where = ['--zone=us-west4-a', '--project=p']
    assert create == [
        *tpus,
        'create',
        'books',
        *where,
        '--accelerator-type=v5litepod-256',
        '--runtime-version=v2-alpha-tpuv5-lite',
        '--node-id=books',
    ]
    assert archive[0] == 'git' and 'archive' in archive and archive[-1] == 'HEAD'
    assert copy == [
        *tpus,
        'scp',
        archive[-2].removeprefix('--output='),
        'books:transxssm.tar.gz',
        *where,
        '--worker=all',
        '--node=all',
    ]
    for ssh in (install, train):
        assert ssh[:-1] == [*tpus, 'ssh', 'books', *where, '--worker=all', '--node=all']
    assert (
        'pip install' in install[-1]
        and '.[tpu,cloud]' in install[-1]
        and 'gcsfuse' in install[-1]
        and '/mnt/bucket' in install[-1]
    )
    assert delete == [*tpus, 'delete', 'books', *where, '--force', '--quiet']


def test_tpu_vm_with_slices_spot_and_keep():
    _, create, *_, train = commands('tpu_vm', '--slices=2', '--spot', '--keep', '--runtime=tpu-new')
    assert {'--node-prefix=books', '--node-count=2', '--spot', '--runtime-version=tpu-new'} <= set(create)
    assert '--config.mesh.slices=2' in train[-1]


def pretend(directory, name, text):
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('#!/usr/bin/env bash\n' + text)
    path.chmod(0o755)


class Cloud:
    """A gcloud with one TPU VM, whose home is a directory here and whose shell is bash.

    Each behaviour is bash that is run before gcloud's own part, with the name of
    the call in $1 (describe, create, scp, install, train, ask, delete) and the
    count of such calls so far in $count; it may `exit`. Whether the TPUs are
    there is whether the file $HOME/there is.
    """

    def __init__(self, directory, behaviour='', training='exit 0'):
        self.home, self.log = directory / 'home', directory / 'log'
        pretend(directory, 'bin/sleep', '')
        pretend(
            directory,
            'bin/gcloud',
            rf"""
export HOME={self.home}
kind=$4
case "$*" in
    *" install "*) kind=install ;;
    *transxssm_jax.train*) kind=train ;;
    *"cat ~/exit_code"*) kind=ask ;;
esac
[ $kind = describe ] || echo $kind >> {self.log}
echo >> {self.log}.$kind
count=$(wc -l < {self.log}.$kind)
there=$HOME/there
behaviour() {{
    :
    {behaviour}
}}
command=${{@: -1}}
behaviour $kind
case $kind in
    describe) if [ -e $there ]; then echo ACTIVE; else echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; fi ;;
    create) if [ -e $there ]; then echo "ERROR: ALREADY_EXISTS" >&2; exit 1; else touch $there; fi ;;
    delete) rm -f $there ;;
    scp) cp "$5" $HOME/transxssm.tar.gz ;;
    *) bash -c "${{command#--command=}}" ;;
esac
""",
        )
        pretend(self.home, '.local/bin/uv', '')
        # The python of the worker notes what it was called with and does what the test says.
        pretend(
            self.home,
            'venv/bin/python',
            f'printf "%s\\n" "$PWD" "$@" >> {self.home}/called\n'
            f'count=$(grep -c transxssm_jax.train {self.home}/called)\n{training}\n',
        )

    def launch(self, *arguments):
        return call('tpu_vm', *REQUIRED['tpu_vm'], *arguments, PATH=f'{self.log.parent}/bin:{os.environ["PATH"]}')

    def calls(self):
        return self.log.read_text().split()

    def trained(self):
        return (self.home / 'called').read_text().count('transxssm_jax.train')


START = ['scp', 'install', 'train', 'ask']


@pytest.fixture
def cloud(tmp_path):
    missing = [program for program in ('flock', 'setsid') if shutil.which(program) is None]
    if missing:
        pytest.skip(f'{missing[0]} is not installed; it comes with util-linux')
    return functools.partial(Cloud, tmp_path)


def test_tpu_vm_trains_once_and_shows_what_training_says(cloud):
    cloud = cloud(training='echo "step 1"; echo "a warning" >&2')
    result = cloud.launch()
    assert result.returncode == 0 and 'step 1\na warning\n' in result.stdout, result
    assert cloud.calls() == ['create', *START, 'delete']
    assert (cloud.home / 'called').read_text().splitlines() == [
        str(cloud.home / 'transxssm'),
        '-m',
        'transxssm_jax.train',
        *TRAINING,
    ], 'as it was given'
    assert (cloud.home / 'transxssm' / 'launch' / 'tpu_vm.sh').exists(), 'the source was copied'


def test_tpu_vm_starts_again_after_a_preemption(cloud):
    """The TPUs are lost once, in training: asked for again, installed again, the same training command again."""
    cloud = cloud('case $1$count in train1) rm $there; exit 255 ;; ask1) exit 255 ;; esac')
    result = cloud.launch()
    assert result.returncode == 0, result
    assert cloud.calls() == ['create', *START, 'create', *START, 'delete']
    assert 'interrupted (exit code 69); starting again' in result.stdout


@pytest.mark.parametrize('code, starts', [(2, 1), (3, 1), (75, 3), (137, 3), (255, 3)])
def test_tpu_vm_asks_worker_0_how_training_ended(cloud, code, starts):
    cloud = cloud(training=f'exit {code}')
    result = cloud.launch('--max_restarts=2')
    assert result.returncode == code, result
    assert cloud.trained() == starts
    assert cloud.calls() == ['create', *START * starts, 'delete']


def test_tpu_vm_takes_no_other_words_for_an_exit_code(cloud):
    cloud = cloud('case $1$count in ask1) echo "Using ssh batch size of 1"; exit 0 ;; esac')
    assert cloud.launch().returncode == 0
    assert cloud.calls() == ['create', *START * 2, 'delete']


def test_tpu_vm_does_not_lose_training_with_the_connection(cloud):
    """ssh breaks while training runs: training goes on, worker 0 is asked until it has ended, nothing is started again."""
    cloud = cloud(
        """case $1$count in train1)
        bash -c "${command#--command=}" > >(head -n 1) 2>&1 &  # nobody reads on after the first line
        until grep -qs begun $HOME/train.log; do /bin/sleep 0.1; done
        /bin/sleep 1; touch $HOME/broken; exit 255 ;;
    esac""",
        training="""
echo begun
until [ -e ~/broken ]; do /bin/sleep 0.1; done
/bin/sleep 1
for line in {1..2000}; do echo "step $line" || exit 9; done
echo done > ~/finished""",
    )
    result = cloud.launch()
    assert result.returncode == 0, result
    assert (cloud.home / 'finished').exists() and cloud.trained() == 1
    assert cloud.calls() == ['create', *START, 'delete']
    assert 'step 2000' in result.stderr, 'the rest of its output is shown too'


def test_tpu_vm_leaves_a_running_trainer_its_source(cloud):
    """Called again while training runs: the source is replaced when it has ended, not before."""
    cloud = cloud(
        training="""
until [ $count -gt 1 ] || [ -e ~/go ]; do /bin/sleep 0.1; done
[ -e launch/tpu_vm.sh ] || touch ~/wiped"""
    )
    command = [LAUNCH / 'tpu_vm.sh', *REQUIRED['tpu_vm'], '--keep', '--', *TRAINING]
    environment = os.environ | {'PATH': f'{cloud.log.parent}/bin:{os.environ["PATH"]}'}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as first:
        try:
            wait_for(lambda: (cloud.home / 'called').exists())
        finally:
            first.terminate()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as second:
        try:
            wait_for(lambda: cloud.calls().count('install') == 2)
            assert 'training still runs here' in second.stdout.readline()
            assert cloud.trained() == 1
            (cloud.home / 'go').touch()
            assert second.wait(60) == 0
        finally:
            (cloud.home / 'go').touch()
            second.terminate()
    assert cloud.trained() == 2 and not (cloud.home / 'wiped').exists()


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_tpu_vm_creates_nothing_while_gcloud_cannot_say_what_is_there(cloud):
    cloud = cloud("""case $1$count in
        describe1) touch $there ;&
        describe2) echo "ERROR: UNAVAILABLE: try again" >&2; exit 1 ;;
    esac""")
    result = cloud.launch()
    assert result.returncode == 0 and 'not known: ERROR: UNAVAILABLE' in result.stdout, result
    assert cloud.calls() == [*START, 'delete']


def test_tpu_vm_gives_up_where_installing_fails(cloud):
    result = (always := cloud('[ $1 != install ] || exit 1')).launch()
    assert result.returncode == 1 and 'installing failed 3 times' in result.stderr, result
    assert always.calls() == ['create', *['scp', 'install'] * 3, 'delete']


def test_tpu_vm_installs_again_after_a_preemption(cloud):
    cloud = cloud('case $1$count in install[1-4]) rm $there; exit 255 ;; esac')
    assert cloud.launch().returncode == 0
    assert cloud.calls() == [*['create', 'scp', 'install'] * 4, 'create', *START, 'delete']


def test_tpu_vm_says_that_the_tpus_could_not_be_deleted(cloud):
    result = cloud('[ $1 != delete ] || exit 1', training='exit 3').launch()
    assert result.returncode == 3 and 'it costs until it is' in result.stderr


# ---- GKE -------------------------------------------------------------------


def test_gke_creates_a_workload():
    [create] = commands('gke', '--slices=2', '--image=gcr.io/p/transxssm', '--storage=books', '--zone=z', '--project=p')
    assert create[:3] == ['xpk', 'workload', 'create']
    flags = dict(word.removeprefix('--').split('=', 1) for word in create[3:])
    command = shlex.split(flags.pop('command'))
    assert command == ['exec', 'python', '-m', 'transxssm_jax.train', *TRAINING, '--config.mesh.slices=2']
    assert flags == {
        'cluster': 'pod',
        'workload': 'books',
        'tpu-type': 'v5p-256',
        'num-slices': '2',
        'project': 'p',
        'zone': 'z',
        'docker-image': 'gcr.io/p/transxssm',
        'storage': 'books',
        'priority': 'medium',
        'max-restarts': '100',
        'restart-on-exit-codes': '69,75',
        'termination-grace-period-seconds': '120',
    }


def test_gke_without_an_image_takes_this_directory():
    [create] = commands('gke')
    assert f'--script-dir={LAUNCH.parent}' in create and '--base-docker-image=python:3.12' in create
    assert (
        create[-1].startswith('--command=pip install') and 'exec python -m transxssm_jax.train --config=' in create[-1]
    )


# ---- SLURM -----------------------------------------------------------------


def job_of(output):
    head, _, rest = output.partition("<<'JOB'\n")
    assert rest.endswith('JOB\n')
    return shlex.split(head), rest.removesuffix('JOB\n')


def test_slurm_submits_one_process_a_node():
    submit, job = job_of(call('slurm', '--nodes=4', '--time=4:00:00', '--partition=h200', '--dry-run').stdout)
    assert submit[0] == 'sbatch'
    assert {
        '--nodes=4',
        '--ntasks-per-node=1',
        '--gpus-per-node=8',
        '--requeue',
        '--signal=TERM@120',
        '--open-mode=append',
        '--time=4:00:00',
        '--partition=h200',
        f'--chdir={LAUNCH.parent}',
    } <= set(submit)
    line = next(line for line in job.splitlines() if line.startswith('srun'))
    assert shlex.split(line) == [
        'srun',
        '--kill-on-bad-exit=0',
        '.venv/bin/python',
        '-m',
        'transxssm_jax.train',
        *TRAINING,
        '--config.mesh.slices=4',
    ]


@pytest.mark.parametrize(
    'code, restarts, requeued',
    [(0, 0, False), (2, 0, False), (3, 0, False), (75, 0, True), (69, 4, True), (137, 0, True), (75, 5, False)],
)
def test_slurm_puts_an_interrupted_job_back_into_the_queue(tmp_path, code, restarts, requeued):
    _, job = job_of(call('slurm', '--nodes=2', '--max_restarts=5', '--dry-run').stdout)
    pretend(tmp_path, 'srun', f'exit {code}\n')
    pretend(tmp_path, 'scontrol', f'echo "$*" > {tmp_path}/requeued\n')
    result = subprocess.run(
        ['bash', '-c', job],
        env=os.environ
        | {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '17', 'SLURM_RESTART_COUNT': str(restarts)},
        timeout=60,
    )
    assert result.returncode == code
    assert (tmp_path / 'requeued').exists() == requeued
    assert not requeued or (tmp_path / 'requeued').read_text() == 'requeue 17\n'


def test_slurm_hands_the_job_to_sbatch(tmp_path):
    pretend(tmp_path, 'sbatch', f'cat > {tmp_path}/job; echo "$*" > {tmp_path}/arguments\n')
    result = call('slurm', '--gpus=4', PATH=f'{tmp_path}:{os.environ["PATH"]}')
    assert result.returncode == 0, result
    assert '--gpus-per-node=4' in (tmp_path / 'arguments').read_text()
    assert (tmp_path / 'job').read_text() == job_of(call('slurm', '--gpus=4', '--dry-run').stdout)[1]
