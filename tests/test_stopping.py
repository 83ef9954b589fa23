"""Requests to stop: which signals ask for which exit code, and when they no longer do."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from transxssm_jax.training import stopping


@pytest.fixture
def request_(monkeypatch):
    handlers = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    request = stopping.StopRequest()
    request.install()
    yield request
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    'name, exit_code', [('SIGTERM', 75), ('SIGHUP', 75), ('SIGUSR1', 75), ('SIGUSR2', 75), ('SIGINT', 130)]
)
def test_signals_ask_for_an_exit_code(request_, name, exit_code):
    assert request_.exit_code == 0
    os.kill(os.getpid(), getattr(signal, name))
    assert request_.exit_code == exit_code


def test_the_first_request_counts_and_a_later_ctrl_c_interrupts(request_):
    for name in ('SIGUSR1', 'SIGTERM'):
        os.kill(os.getpid(), getattr(signal, name))
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert request_.exit_code == 75


def test_a_hangup_that_nohup_ignores_stays_ignored(request_):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request = stopping.StopRequest()
    request.install()
    os.kill(os.getpid(), signal.SIGHUP)
    assert request.exit_code == 0


def test_a_block_that_saves_first_may_be_within_another():
    """After the inner one, a signal still waits: the outer one has something to copy."""
    program = (
        'import os, signal, sys, time\n'
        'from transxssm_jax.training.stopping import StopRequest\n'
        'stop = StopRequest(); stop.install()\n'
        'with stop.watch():\n'
        '    with stop.saves_first():\n'
        '        with stop.saves_first(): pass\n'
        '        os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.5)\n'
        '        print("copied", flush=True)\n'
        'sys.exit(stop.exit_code)'
    )
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (75, 'copied\n'), done


def test_signals_after_saving_change_nothing():
    """In a process of its own, which they would end while Python shuts down."""
    program = (
        'import atexit, os, signal, sys\n'
        'from transxssm_jax.training.stopping import SIGNALS, StopRequest\n'
        'def send_all():\n'
        '    for number in SIGNALS: os.kill(os.getpid(), number)\n'
        'stop = StopRequest(); stop.install()\n'
        'os.kill(os.getpid(), signal.SIGTERM)\n'
        'stop.finish(); send_all(); atexit.register(send_all)\n'
        'sys.exit(stop.exit_code)'
    )
    root = str(pathlib.Path(__file__).parents[1])
    ended = subprocess.run(
        [sys.executable, '-c', program], env=os.environ | {'PYTHONPATH': root}, capture_output=True, text=True
    )
    assert ended.returncode == 75 and ended.stderr == '', ended
