"""Several processes of one run on this machine, and what each of them does in the tests of hosts.py."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import typing

TESTS = pathlib.Path(__file__).parent
ROOT = TESTS.parent


class Ended(typing.NamedTuple):
    code: int
    out: str
    err: str
    seconds: float  # from the call of `finish`

    def error(self) -> str:
        """The last line that says an error, beneath what JAX's own client may have logged."""
        return [line for line in self.err.splitlines() if line.startswith('error')][-1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        return probe.getsockname()[1]


def start(program: list[str], process: int, processes: int, port: int, devices: int = 1, **flags) -> subprocess.Popen:
    """A process of a run: python PROGRAM with the flags that say who it is."""
    environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
    environment |= {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices), 'PYTHONUNBUFFERED': '1',
                    'XLA_FLAGS': '--xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0'}
    flags = dict(coordinator=f'localhost:{port}', num_processes=processes, process_id=process) | flags
    return subprocess.Popen([sys.executable, *program, *(f'--{name}={value}' for name, value in flags.items())], cwd=ROOT,
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_all(program: list[str], processes: int, devices: int = 1, **flags) -> list[subprocess.Popen]:
    port = free_port()
    return [start(program, process, processes, port, devices, **flags) for process in range(processes)]


def finish(running: list[subprocess.Popen], timeout: float = 300) -> list[Ended]:
    """Waits for all; those that do not end in time are killed, and the test fails."""
    started, ended = time.monotonic(), []
    try:
        for process in running:
            out, err = process.communicate(timeout=max(timeout - (time.monotonic() - started), 1))
            ended.append(Ended(process.returncode, out, err, time.monotonic() - started))
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    return ended


def said(process: subprocess.Popen, line: str) -> None:
    """Waits until a process prints a line that starts so."""
    for got in process.stdout:
        if got.startswith(line):
            return
    raise AssertionError(f'the process ended before it said {line!r}: {process.communicate()[1]}')


# ---- what the processes do, without training: python hosts_fixtures.py WHAT FLAGS ----


def agree(hosts) -> int:
    print('first said', hosts.from_first({'n': hosts._us.process + 1}), flush=True)
    print('gathered', hosts.gather(f'p{hosts._us.process}'), flush=True)
    stop, told = hosts.StopTogether(), 0
    for turn in range(1, 50):
        if hosts._us.process == 1 and turn == 3:
            told = 75
        if hosts._us.process == 2 and turn == 4:
            told = 130  # too late: the first announcement holds
        code = stop.turn(told)
        if code:
            print('stopped at turn', turn, 'with', code, flush=True)
            return code
        hosts.gather(turn)  # stands for the step, which waits for all
    return 0


def wait(hosts) -> int:
    print('joined', flush=True)
    time.sleep(100)
    return 0


def fail(hosts) -> int:
    hosts.gather('')
    print('joined', flush=True)
    if f'fail{hosts._us.process}' in sys.argv[1]:
        hosts.leave(2, 'data.path=/nowhere: no such\n directory')
    time.sleep(100)
    return 0


def _main() -> None:
    from transxssm_jax import hosts

    what = sys.argv[1]
    flags = dict(argument[2:].split('=') for argument in sys.argv[2:])
    flags = {name: value if name == 'coordinator' else int(value) for name, value in flags.items()}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    hosts.join(**flags)
    code = {'agree': agree, 'wait': wait}.get(what, fail)(hosts)
    hosts.part(code)
    sys.exit(code)


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    _main()
