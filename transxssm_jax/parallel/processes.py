"""Several processes as one run: how they find each other, agree, and end together.

A single process needs none of this: every function here then returns at once.
Several processes communicate through the key-value store of JAX's coordination
service, which process 0 runs, and never through the devices: a message arrives
also where a collective hangs because a process is missing.

- `join` connects the processes, before any device is touched.
- `broadcast_from_0` and `all_gather_json` exchange values.
- `preemption.PreemptionSync` makes all stop after the same step.
- `abort_all` ends all of them when one fails. Where a process vanishes (killed, stopped,
  its machine lost), its heartbeat stops, and the others end with `PEER_LOST`.
- `shutdown` ends a run in good order.
"""

import contextlib
import ctypes
import dataclasses
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time

import jax

from transxssm_jax import cli
from transxssm_jax.parallel import cluster
from transxssm_jax.parallel.cluster import ProcessesError

PEER_LOST = cli.ExitCode.PEER_LOST

KEY_ROOT = 'transxssm_jax/'  # of the keys in the store
_FAILURE = KEY_ROOT + 'failure'
_COLLECTIVE_TIMEOUT_MS = 6 * 3600 * 1000  # a process that will never come is noticed by its heartbeat
_FAILURE_KNOWN_MS = 5000  # until all processes have received a failure


@dataclasses.dataclass
class _Membership:
    """This process's place in the run, and what it knows of the other processes."""

    coordinator: str = ''
    process: int = 0
    processes: int = 1
    connect_timeout_seconds: int = 0
    heartbeat_timeout_seconds: int = 0
    connecting: bool = False
    leaving: bool = False  # this process is ending: the loss of others is expected from here on
    exit_code: int = 0  # that it ends with
    rounds: itertools.count = dataclasses.field(
        default_factory=itertools.count
    )  # numbers the collective calls, the same in all
    incarnations: dict = dataclasses.field(default_factory=dict)  # process -> a number that each start of it gets anew


_membership = _Membership()


def is_multiprocess() -> bool:
    """Whether this run has more than one process; touches no device."""
    return _membership.processes > 1


def is_coordinator() -> bool:
    """Whether this is process 0, which writes and prints for all; touches no device."""
    return _membership.process == 0


def process_index() -> int:
    """Which process of the run this is, from 0; touches no device."""
    return _membership.process


def is_watching() -> bool:
    """Whether all processes were seen at once, so that from here on the loss of any is noticed."""
    return bool(_membership.incarnations)


# ---- joining ---------------------------------------------------------------


def join(
    coordinator: str = '',
    num_processes: int = 0,
    process_id: int = -1,
    connect_timeout_seconds: int = 300,
    heartbeat_timeout_seconds: int = 30,
) -> None:
    """Connects this process to the others of its run, if there are others; to be called before any device is used.

    The run is given by hand (arguments, else JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID), or detected: a SLURM step or Open MPI job of several tasks, the
    hosts of a TPU slice (TPU VM or GKE), or an indexed Kubernetes job. Anything
    else is a single process, which waits for no other.

    Args:
      coordinator: HOST:PORT of process 0; '': from the environment.
      num_processes: of the run; 0: from the environment.
      process_id: 0 .. num_processes - 1; -1: from the environment.
      connect_timeout_seconds: how long to wait for the others.
      heartbeat_timeout_seconds: silence after which a process counts as gone.

    Raises:
      ProcessesError: an argument that is missing or out of range.

    Where the others do not come in time, or do not answer, this process ends with the exit code `PEER_LOST`.
    """
    coordinator = coordinator or os.environ.get('JAX_COORDINATOR_ADDRESS', '')
    how = {}
    if coordinator:
        num_processes = num_processes or cluster.environment_number('JAX_NUM_PROCESSES', 0)
        process_id = process_id if process_id != -1 else cluster.environment_number('JAX_PROCESS_ID', -1)
        by_hand = num_processes or process_id != -1
        if by_hand or not (method := cluster.detect()):
            _check(coordinator, num_processes, process_id)
            if num_processes == 1:
                return
            how = dict(num_processes=num_processes, process_id=process_id, cluster_detection_method='deactivate')
        else:
            how = dict(cluster_detection_method=method)
        how['coordinator_address'] = coordinator
    elif num_processes or process_id != -1:
        raise ProcessesError(
            f'--num_processes={num_processes} and --process_id={process_id} need --coordinator=HOST:PORT, '
            'the address of process 0'
        )
    elif method := cluster.detect():
        how = dict(cluster_detection_method=method)
    else:
        return
    if how['cluster_detection_method'] == 'slurm':
        how |= cluster.slurm_devices()
    _membership.coordinator, _membership.connect_timeout_seconds = coordinator, connect_timeout_seconds
    _membership.heartbeat_timeout_seconds = heartbeat_timeout_seconds
    # JAX's handler would take SIGTERM away from this program, which has its own way to stop (preemption.py).
    jax.config.update('jax_enable_preemption_service', False)
    # Otherwise JAX's client aborts every process when one is lost, before any can report which.
    jax.config.update('jax_enable_recoverability', True)
    _catch_abort()
    _membership.connecting = True
    if process_id > 0:
        _wait_for_coordinator()
    try:
        jax.distributed.initialize(
            initialization_timeout=connect_timeout_seconds, heartbeat_timeout_seconds=heartbeat_timeout_seconds, **how
        )
    except (RuntimeError, OSError) as error:  # of the network or another process: to be tried again
        _end(
            PEER_LOST,
            f'the processes of this run could not be joined ({_one_line(error)}); start the same command again on '
            'every host',
        )
    except ValueError as error:
        raise ProcessesError(
            f'the processes of this run could not be joined ({_one_line(error)}); see --help for '
            '--coordinator, --num_processes and --process_id'
        ) from error
    state = cluster.distributed_state()
    _membership.coordinator, _membership.process, _membership.processes = (
        state.coordinator_address,
        state.process_id,
        state.num_processes,
    )
    _membership.connecting = False
    if is_multiprocess():
        for watch in (_watch_for_failure, _watch_live_processes):
            threading.Thread(target=watch, name=watch.__name__, daemon=True).start()


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    if not re.fullmatch(r'.+:\d+', coordinator):
        raise ProcessesError(f'--coordinator={coordinator} must be HOST:PORT of process 0, e.g. 10.0.0.1:8476')
    if num_processes < 1:
        raise ProcessesError(
            f'--coordinator={coordinator} needs --num_processes=N (or JAX_NUM_PROCESSES), at least 1, '
            f'not {num_processes}'
        )
    if not 0 <= process_id < num_processes:
        raise ProcessesError(
            f'--process_id={process_id} (or JAX_PROCESS_ID) must be of 0 .. {num_processes - 1}, another for '
            'each process'
        )


def _wait_for_coordinator() -> None:
    """Ends the process with one line where JAX would abort it with a stack trace."""
    host, _, port = _membership.coordinator.rpartition(':')
    deadline = time.monotonic() + _membership.connect_timeout_seconds
    while True:
        try:
            socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                _end(
                    PEER_LOST,
                    f'process 0 does not answer at --coordinator={_membership.coordinator} within '
                    f'{_membership.connect_timeout_seconds} s ({error.strerror or error}); start the command on every host, '
                    'and see that the address is that of process 0 and the port is open between them',
                )
            time.sleep(0.5)


# ---- agreeing --------------------------------------------------------------


def broadcast_from_0(value, topic: str = ''):
    """Returns the value that process 0 passed. Every process calls it, at the same place. JSON types only.

    Args:
      topic: a name that is used once, for a thread beside the main one; '': numbered by the main thread's calls.
    """
    if not is_multiprocess():
        return value
    key = f'{KEY_ROOT}{topic}' if topic else f'{KEY_ROOT}round/{next(_membership.rounds)}'
    if is_coordinator():
        client().key_value_set(key, json.dumps(value))
        return value
    return json.loads(client().blocking_key_value_get(key, _COLLECTIVE_TIMEOUT_MS))


def gather_at_0(value, topic: str) -> list:
    """Returns the values of all processes, by process, at process 0; elsewhere []. JSON types only; any thread may call it.

    Args:
      topic: a name that is used once.
    """
    if not is_multiprocess():
        return [value]
    if not is_coordinator():
        client().key_value_set(f'{KEY_ROOT}{topic}/{_membership.process}', json.dumps(value))
        return []
    values = [value]
    for process in range(1, _membership.processes):
        values.append(
            json.loads(client().blocking_key_value_get(f'{KEY_ROOT}{topic}/{process}', _COLLECTIVE_TIMEOUT_MS))
        )
        client().key_value_delete(f'{KEY_ROOT}{topic}/{process}')  # it may be large
    return values


def all_gather_json(value) -> list:
    """Returns the values of all processes, by process. Every process calls it, at the same place. JSON types only."""
    if not is_multiprocess():
        return [value]
    key = f'{KEY_ROOT}round/{next(_membership.rounds)}'
    client().key_value_set(f'{key}/{_membership.process}', json.dumps(value))
    client().wait_at_barrier(key, _COLLECTIVE_TIMEOUT_MS)
    values = {int(name.rpartition('/')[2]): json.loads(text) for name, text in client().key_value_dir_get(key)}
    return [values[process] for process in range(_membership.processes)]


def client():
    """The client of JAX's coordination service; None in a single process."""
    return cluster.distributed_state().client


# ---- ending ----------------------------------------------------------------


def abort_all(exit_code: int, message: str) -> None:
    """Ends all processes because this one cannot go on; returns only where it is the only one.

    The first failure counts: the other processes print which process failed and
    why, and end with the same exit code.
    """
    if not is_multiprocess():
        return
    _membership.leaving, _membership.exit_code = True, exit_code
    failure = json.dumps(dict(process=_membership.process, exit_code=exit_code, message=message))
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first, or process 0 is gone
        client().key_value_set(_FAILURE, failure)
    _wait_until_failure_is_known()
    _exit(exit_code)


def end_all(exit_code: int, message: str) -> None:
    """Prints an error and ends all processes at once, from any thread of one of them."""
    _print_error(message)
    abort_all(exit_code, message)
    _exit(exit_code)


def wait_for_peer_failure() -> None:
    """Waits as long as it takes to notice a lost process; to be called for an error that a lost process may have caused.

    A collective or a barrier can fail before the loss is noticed. Returns where no
    process is lost; otherwise this process ends meanwhile, with `PEER_LOST`.
    """
    if is_multiprocess():
        time.sleep(_membership.heartbeat_timeout_seconds + 15)


def shutdown(exit_code: int) -> None:
    """Ends the run in good order: no process exits before all are here. Returns only where this process is the only one."""
    if not is_multiprocess():
        return
    try:
        all_gather_json('done')
    except jax.errors.JaxRuntimeError:
        wait_for_peer_failure()
    _membership.leaving, _membership.exit_code = True, exit_code
    service = client()  # the watching threads may still be using it
    if is_coordinator():
        # The others' connections must not outlive the service that this process runs.
        deadline = time.monotonic() + 30
        while len(service.get_live_nodes(range(_membership.processes))) > 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)  # until the last of them has received its release
    else:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            service.shutdown()
    _exit(exit_code)


def _watch_for_failure() -> None:
    """A thread that waits for the failure of another process."""
    while not _membership.leaving:
        try:
            failure = json.loads(client().blocking_key_value_get(_FAILURE, 10_000))
        except jax.errors.JaxRuntimeError as error:
            if 'DEADLINE_EXCEEDED' in str(error):
                continue
            return None if _membership.leaving else _end(PEER_LOST, _lost_message([0]))
        if not _membership.leaving:
            _membership.leaving, _membership.exit_code = True, failure['exit_code']
            _print_error(f'process {failure["process"]} ended: {failure["message"]}')
            _wait_until_failure_is_known()
            _exit(failure['exit_code'])


def _watch_live_processes() -> None:
    """A thread that asks, together with those of the other processes, which processes are alive."""
    everybody = list(range(_membership.processes))
    while not _membership.leaving:
        try:
            # Process -> a number of its own: a process that was started again has another number.
            seen = client().get_live_nodes(everybody)
        except jax.errors.JaxRuntimeError:
            return  # process 0 is lost, which _watch_for_failure reports
        _membership.incarnations = _membership.incarnations or seen
        lost = {
            process
            for process in everybody
            if process not in seen or seen[process] != _membership.incarnations.get(process)
        }
        if lost:
            time.sleep(1)  # a process that reported why it ended is not lost
            if not _membership.leaving:
                _end(PEER_LOST, _lost_message(sorted(lost)))
        time.sleep(max(2, _membership.processes / 100))  # process 0 answers all of them


def _lost_message(lost: list[int]) -> str:
    named = ', '.join(map(str, lost[:8])) + (f' and {len(lost) - 8} more' if len(lost) > 8 else '')
    coordinator = f' (the coordinator, {_membership.coordinator})' if lost == [0] else ''
    return (
        f'process {named} of {_membership.processes}{coordinator} is gone: it was killed or stopped, or its machine was '
        'lost; start the same command again on every host: training goes on from the last checkpoint'
    )


def _catch_abort() -> None:
    """Reports in one line why JAX's client aborts the process: process 0 is lost, or the others did not come.

    The client ends the process from C++, with SIGABRT, where Python's own signal handlers never run. This handler needs the
    interpreter's lock: it runs as soon as no other thread is in Python, and never where a library holds the lock for ever.
    """
    libc = ctypes.CDLL(None)
    handler_type = ctypes.CFUNCTYPE(None, ctypes.c_int)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p

    def on_abort(_):
        if _membership.leaving:
            _exit(_membership.exit_code)
        if _membership.connecting:
            _end(
                PEER_LOST,
                f'not all processes of the run came within {_membership.connect_timeout_seconds} s (coordinator '
                f'{_membership.coordinator or "found by JAX"}); start the command on every host, with the same --num_processes',
            )
        time.sleep(3)  # _watch_for_failure ends the process if the coordinator is lost
        if is_multiprocess() and not _coordinator_answers():
            _end(PEER_LOST, _lost_message([0]))
        # gloo aborts a process whose peer was killed in the middle of a message, before the peer is missed.
        wait_for_peer_failure()
        libc.signal(signal.SIGABRT, None)  # a real abort

    _catch_abort.keep = handler_type(on_abort)  # as long as the process lives
    libc.signal(signal.SIGABRT, ctypes.cast(_catch_abort.keep, ctypes.c_void_p))


def _coordinator_answers(timeout_seconds: float = 5.0) -> bool:
    """Whether process 0 answers a request in time. To accept a connection is no answer: the kernel does that for it."""
    answered = threading.Event()

    def ask():
        try:
            client().key_value_try_get(KEY_ROOT + 'no such key')
        except jax.errors.JaxRuntimeError as error:
            if 'NOT_FOUND' not in str(error):
                return
        answered.set()

    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(timeout_seconds)


def _wait_until_failure_is_known() -> None:
    """Waits until all processes have received the failure, or for a moment."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client().wait_at_barrier(KEY_ROOT + 'failure_known', _FAILURE_KNOWN_MS)


def process_label() -> str:
    """' (process 1 of 4)', to name this process in a message; '' where it is the only one."""
    return f' (process {_membership.process} of {_membership.processes})' if is_multiprocess() else ''


def _print_error(message: str) -> None:
    os.write(2, f'error{process_label()}: {" ".join(message.split())}\n'.encode())


def _end(exit_code: int, message: str) -> None:
    _membership.leaving, _membership.exit_code = True, exit_code
    _exit(exit_code, message)


def _exit(exit_code: int, message: str = '') -> None:
    """Ends the process at once: a thread may wait for ever for a process that is lost, or a write for a reader."""
    output = threading.Thread(target=_finish_output, args=[message], daemon=True)
    output.start()
    output.join(5)
    os._exit(exit_code)


def _finish_output(message: str) -> None:
    for finish in (lambda: message and _print_error(message), sys.stdout.flush, sys.stderr.flush):
        with contextlib.suppress(Exception):
            finish()


def _one_line(error: BaseException) -> str:
    return ' '.join(str(error).split())[:300] or type(error).__name__
