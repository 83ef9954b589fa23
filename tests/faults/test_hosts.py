"""Several hosts, of which one is lost or hangs: all end with a documented code, and the next start changes no number."""

import json
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
