"""Commands that another command starts, and that are asked to stop when that one is gone, also where it was killed.

The parent holds one end of a pipe, whose other end the child reads: it comes to its end with the parent.
"""

import os
import signal
import stat
import subprocess
import threading
import weakref
from collections.abc import Sequence

VARIABLE = 'TRANSXSSM_JAX_PARENT'  # the child's end of the pipe


def start(command: Sequence[str], env: dict[str, str] | None = None, **arguments) -> subprocess.Popen:
    """Starts a command in a session of its own, so that a Ctrl-C comes to this process alone.

    Args:
      command: of this project, all of which call `stop_with_parent`; any other runs on by itself.
      env: its environment; default: that of this process.
      arguments: of subprocess.Popen.

    Returns:
      The process; who drops it while it runs asks it to stop.
    """
    reader, writer = os.pipe()
    try:
        process = subprocess.Popen(
            command,
            env=(os.environ if env is None else env) | {VARIABLE: str(reader)},
            pass_fds=[reader],
            start_new_session=True,
            **arguments,
        )
    except BaseException:
        os.close(writer)
        raise
    finally:
        os.close(reader)
    weakref.finalize(process, os.close, writer)
    return process


def run(
    command: Sequence[str], *, input: str | None = None, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """`start`, and waits for its end; texts of stdout and stderr are kept. It is killed where waiting ends otherwise.

    Args:
      input: what it reads from stdin.
      timeout: seconds, after which subprocess.TimeoutExpired is raised.
    """
    process = start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(input, timeout)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def stop_with_parent() -> None:
    """From now on SIGTERM comes to this process when that which started it with `start` is gone."""
    reader = int(os.environ.pop(VARIABLE, -1))  # what this one starts has another parent
    try:
        if not stat.S_ISFIFO(os.fstat(reader).st_mode):
            return
    except OSError:  # nobody did, or the variable was handed on, and the pipe was not
        return
    os.set_inheritable(reader, False)
    threading.Thread(target=_wait, args=[reader], name='parent', daemon=True).start()


def _wait(reader: int) -> None:
    os.read(reader, 1)
    os.kill(os.getpid(), signal.SIGTERM)
