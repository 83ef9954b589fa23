"""Commands that another command starts: they are asked to stop when it is gone, and run on while it is there."""

import gc
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from transxssm_jax import children

PATIENCE = 120  # seconds until a test gives up
CHILD = """
    import signal, sys, time
    from transxssm_jax import children
    signal.signal(signal.SIGTERM, lambda *_: (print('asked to stop', flush=True), sys.exit(75)))
    children.stop_with_parent()
    print('ready', flush=True)
    while True:
        time.sleep(0.05)
"""
PARENT = """
    import sys
    from transxssm_jax import children
    child = children.start([sys.executable, '-c', sys.argv[1]], stdin=-3)
    print('started', flush=True)
    sys.stdin.read()
"""


def lines_of(process, last):
    """Lines of its output up to one; a hung test is ended by pytest's own limit."""
    found = []
    while not found or found[-1] not in (last, ''):
        found.append(process.stdout.readline().strip())
    return found


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM], ids=str)
def test_a_child_is_asked_to_stop_when_its_parent_is_killed(number):
    words = [sys.executable, '-c', textwrap.dedent(PARENT), textwrap.dedent(CHILD)]
    parent = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert set(lines_of(parent, 'ready')) <= {'started', 'ready'}
    parent.send_signal(number)
    # The child has the same output, which ends when both are gone.
    out, _ = parent.communicate(timeout=PATIENCE)
    assert parent.returncode == -number and out.split('\n')[-2] == 'asked to stop'


def test_a_child_runs_on_while_its_parent_does_and_ends_as_it_likes():
    child = children.start([sys.executable, '-c', textwrap.dedent(CHILD)], stdout=subprocess.PIPE, text=True)
    assert lines_of(child, 'ready') == ['ready']
    other = children.start([sys.executable, '-c', 'raise SystemExit(7)'])
    assert other.wait(PATIENCE) == 7 and child.poll() is None
    assert os.getsid(child.pid) == child.pid, 'a Ctrl-C comes to the parent alone'
    child.send_signal(signal.SIGTERM)
    assert child.wait(PATIENCE) == 75
    files = len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else 0
    del child, other
    gc.collect()
    assert not files or len(os.listdir('/proc/self/fd')) < files, 'the pipes are closed'


def test_a_process_that_nobody_started_so_watches_nothing(monkeypatch):
    monkeypatch.delenv(children.VARIABLE, raising=False)
    children.stop_with_parent()
    monkeypatch.setenv(children.VARIABLE, '9999')  # handed on past the processes that had the pipe
    children.stop_with_parent()
    assert children.VARIABLE not in os.environ
    subprocess.run([sys.executable, '-c', f'import os; assert {children.VARIABLE!r} not in os.environ'], check=True)


def test_run_gives_input_and_returns_what_was_written():
    words = 'import sys; text = sys.stdin.read(); print(text.upper()); print(text, file=sys.stderr); sys.exit(3)'
    done = children.run([sys.executable, '-c', words], input='as given')
    assert (done.returncode, done.stdout, done.stderr) == (3, 'AS GIVEN\n', 'as given\n')


def test_run_kills_what_takes_too_long(monkeypatch):
    started, start = [], children.start
    monkeypatch.setattr(children, 'start', lambda *args, **kwargs: started.append(start(*args, **kwargs)) or started[0])
    with pytest.raises(subprocess.TimeoutExpired):
        children.run([sys.executable, '-c', 'import time; time.sleep(600)'], timeout=0.1)
    assert started[0].returncode == -signal.SIGKILL
