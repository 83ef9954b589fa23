"""Several processes of one run on this machine, and what each of them does in the tests of processes.py."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import typing

import quick_compile

TESTS = pathlib.Path(__file__).parent
ROOT = TESTS.parent


class Ended(typing.NamedTuple):
    code: int
    out: str
    err: str

    def error(self) -> str:
        """The last line with an error, beneath what JAX's own client may have logged."""
        return [line for line in self.err.splitlines() if line.startswith('error')][-1]


_reserved = []  # sockets that keep the ports of the tests from other programs, as long as the tests run


def free_port() -> int:
    """A port that nobody listens at and no other program gets; JAX's coordinator shares it, by SO_REUSEPORT."""
    reserved = socket.socket(socket.AF_INET6)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    reserved.bind(('::', 0))
    _reserved.append(reserved)
    return reserved.getsockname()[1]


class Process(subprocess.Popen):
    """A process of a run: python PROGRAM with the flags that number it. Its output goes to files, which are never full."""

    def __init__(self, program: list[str], process: int, processes: int, port: int, devices: int = 1, **flags):
        environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
        environment |= {
            'JAX_PLATFORMS': 'cpu',
            'JAX_NUM_CPU_DEVICES': str(devices),
            'PYTHONPATH': str(ROOT),
            'PYTHONUNBUFFERED': '1',
            'XLA_FLAGS': quick_compile.XLA_FLAGS,
        }
        flags = dict(coordinator=f'localhost:{port}', num_processes=processes, process_id=process) | flags
        self._files = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115, they go with this object
        super().__init__(
            [sys.executable, *program, *(f'--{name}={value}' for name, value in flags.items())],
            cwd=ROOT,
            env=environment,
            stdout=self._files[0],
            stderr=self._files[1],
        )

    def output(self) -> tuple[str, str]:
        """(stdout, stderr) so far."""
        # pread: the process writes where the offset of the file is.
        return tuple(os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode() for file in self._files)


class Processes(list):
    """Processes of one run, killed where a `with` block of them is left."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self:
            process.kill()
        for process in self:
            process.wait()

    def until(self, condition, seconds: float = 600) -> None:
        """Waits for a condition; fails where it does not come in time, or one of the processes ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [process.output() for process in self if process.poll() is not None]
            assert not ended, ended
            assert time.monotonic() < deadline, [process.output() for process in self]
            time.sleep(0.05)

    def until_printed(self, line: str, *who: int) -> None:
        """Waits until those processes (none named: all) have printed a line that starts so."""
        for process in [self[index] for index in who] or self:
            self.until(
                lambda process=process: any(printed.startswith(line) for printed in process.output()[0].splitlines())
            )

    def finish(self, timeout: float = 600) -> list[Ended]:
        """Waits for all; where one does not end in time, all are killed, and the test fails."""
        deadline, ended = time.monotonic() + timeout, {}
        with self:
            while len(ended) < len(self):
                for index, process in enumerate(self):
                    if index not in ended and process.poll() is not None:
                        ended[index] = Ended(process.returncode, *process.output())
                assert time.monotonic() < deadline, [process.output() for process in self]
                time.sleep(0.05)
        return [ended[index] for index in range(len(self))]


def start(programs: list[list[str]], **settings) -> Processes:
    """Starts one process for each program, as one run."""
    running, port = Processes(), free_port()
    for process, program in enumerate(programs):
        running.append(Process(program, process, len(programs), port, **settings))
    return running


def start_all(program: list[str], processes: int, **settings) -> Processes:
    return start([program] * processes, **settings)


# ---- what the processes do, without training: python process_fixtures.py WHAT FLAGS ----


def agree(processes) -> int:
    from transxssm_jax.parallel import preemption

    print('broadcast', processes.broadcast_from_0({'n': processes.process_index() + 1}), flush=True)
    print('gathered', processes.all_gather_json(f'p{processes.process_index()}'), flush=True)
    stop, told = preemption.PreemptionSync(), 0
    for turn in range(1, 50):
        if processes.process_index() == 1 and turn == 3:
            told = 75
        if processes.process_index() == 2 and turn == 4:
            told = 130  # too late: the first announcement holds
        code = stop.should_stop(told)
        if code:
            print('stopped at turn', turn, 'with', code, flush=True)
            return code
        processes.all_gather_json(turn)  # stands for the step, which waits for all
    return 0


def wait(processes) -> int:
    while not processes.is_watching():
        time.sleep(0.05)
    print('watched', flush=True)
    threading.Event().wait()  # for ever: the loss of another ends this process
    return 0


def fail(processes) -> int:
    processes.all_gather_json('')
    print('joined', flush=True)
    if f'fail{processes.process_index()}' in sys.argv[1]:
        processes.abort_all(2, 'data.path=/nowhere: no such\n directory')
    threading.Event().wait()
    return 0


def _main() -> None:
    from transxssm_jax.parallel import processes

    what = sys.argv[1]
    flags = dict(argument[2:].split('=') for argument in sys.argv[2:])
    flags = {name: value if name == 'coordinator' else int(value) for name, value in flags.items()}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    processes.join(**flags)
    code = {'agree': agree, 'wait': wait}.get(what, fail)(processes)
    processes.shutdown(code)
    sys.exit(code)


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    _main()
