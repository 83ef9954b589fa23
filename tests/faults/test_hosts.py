"""Several hosts, of which one is lost or hangs: all end with a documented code, and the next start changes no number."""

import json
import shutil
import signal

import pytest
from process_fixtures import start_all
from train_fixtures import arguments, losses, prepare_bytes, write_config

SETTINGS = dict(train__checkpoint_every_steps=4, train__eval_every_steps=0, mesh__data=1, mesh__fsdp=2)
ENDLESS = 10**9

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp('run')
    return write_config(directory, prepare_bytes(directory))


def start(config, workdir, steps, **flags):
    words = arguments(config, workdir, **SETTINGS, train__steps=steps)[1:]
    return start_all(['-m', 'transxssm_jax.train', *words], 2, heartbeat_timeout_seconds=10, **flags)


def numbers(workdir, process):
    lines = map(json.loads, (workdir / 'ledger' / f'process-{process}.jsonl').read_text().splitlines())
    return [{name: line[name] for name in ('step', 'batch', 'rows', 'loss', 'param_norm')} for line in lines]


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize('struck', [0, 1])
def test_a_host_that_is_struck(config, tmp_path, struck, number):
    workdir = tmp_path / 'run'
    with start(config, workdir, ENDLESS) as running:
        running.until(lambda: (workdir / 'checkpoints' / '8').exists())
        running[struck].send_signal(number)
        code = running[1 - struck].wait(600)
        out, err = running[1 - struck].output()
    assert code == (75 if number == signal.SIGTERM else 69) and 'Traceback' not in err, (code, err)
    if code == 69:
        [error] = [line for line in err.splitlines() if line.startswith('error')]
        assert f'process {struck} of 2' in error and 'is gone' in error
    steps = max(int(path.name) for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit()) + 3
    assert [end.code for end in start(config, workdir, steps).finish()] == [0, 0]
    assert [end.code for end in start(config, tmp_path / 'undisturbed', steps).finish()] == [0, 0]
    assert losses(workdir) == losses(tmp_path / 'undisturbed')
    for process in range(2):
        assert numbers(workdir, process) == numbers(tmp_path / 'undisturbed', process)
    print(f'\n{number.name} to host {struck} of 2: exit code {code}, {steps} steps as undisturbed')


def test_local_checkpoints_serve_where_every_host_has_them(config, tmp_path):
    workdir, local = tmp_path / 'run', tmp_path / 'local'
    settings = SETTINGS | dict(train__checkpoint_every_steps=50, train__sample_tokens=0)
    settings |= dict(train__checkpoint_local_dir=local, train__checkpoint_local_every_steps=5)

    def start(steps):
        words = arguments(config, workdir, **settings, train__steps=steps)[1:]
        return start_all(['-m', 'transxssm_jax.train', *words], 2, heartbeat_timeout_seconds=10)

    def kill_after(step):
        with start(ENDLESS) as running:
            running.until(lambda: all(list(local.glob(f'*/process-{process}/{step}')) for process in range(2)))
            for process in running:
                process.kill()

    def steps_of(process):
        return sorted(int(path.name) for path in local.glob(f'*/process-{process}/*') if path.name.isdigit())

    kill_after(15)
    newest = max(set(steps_of(0)) & set(steps_of(1)))
    [ended, _] = start(newest + 1).finish()
    assert ended.code == 0 and f'resuming from step {newest}, local' in ended.out, str(ended)
    shutil.rmtree(workdir)
    kill_after(65)
    for path in local.glob('*/process-1/*'):
        shutil.rmtree(path)
    saved = max(int(path.name) for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit())
    [ended, _] = start(saved + 1).finish()
    assert ended.code == 0 and f'resuming from step {saved}\n' in ended.out, 'host 1 is a new one'
    print(f'\nlocal checkpoints: resumed from {newest} of both hosts; from {saved} of the workdir where one had none')


def test_all_hosts_go_back_together(config, tmp_path):
    """A threshold that every run crosses now and then."""
    workdir = tmp_path / 'run'
    spiky = dict(train__spike_action='rollback', train__spike_threshold=1.0, train__spike_window=8, train__max_spikes=8)
    words = arguments(config, workdir, **SETTINGS | spiky, train__rollback_steps=2, train__steps=30)[1:]
    ends = start_all(['-m', 'transxssm_jax.train', *words], 2, heartbeat_timeout_seconds=10).finish()
    assert [end.code for end in ends] in ([0, 0], [3, 3]), ends
    times = ends[0].out.count('went wrong: back to step')
    assert times >= 1, ends
    own = []
    for process in range(2):
        lines = map(json.loads, (workdir / 'ledger' / f'process-{process}.jsonl').read_text().splitlines())
        own.append([(line['step'], line.get('batch_number'), line['loss']) for line in lines])
    assert own[0] == own[1]
    print(f'\ntwo hosts went back {times} times together')
