"""Several processes as one run: how they find each other, agree, and end together.

One process needs none of this: every function here then answers at once. With
is_multiprocess, processes speak through the key-value store of JAX's coordination
service, which process 0 runs, and never through the devices: a message arrives
also where a collective hangs because a process is missing.

- `join` connects the processes, before any device is touched.
- `broadcast_from_0` and `all_gather_json` let them agree on a value.
- `PreemptionSync` makes all stop after the same step.
- `abort_all` ends all of them when one fails. A process that vanishes (killed, its
  machine lost) is missed by its heartbeat, and the others end with `PEER_LOST`.
- `shutdown` ends an orderly run.
"""

import contextlib
import ctypes
import dataclasses
import itertools
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time

import jax
from jax._src import distributed  # its client is the only way to the key-value store; Orbax takes the same one

from transxssm_jax import cli

PEER_LOST = cli.ExitCode.PEER_LOST

_ROOT = 'transxssm_jax/'
_FAILURE = _ROOT + 'failure'
_STOP = _ROOT + 'stop'
_PATIENCE_MS = 6 * 3600 * 1000  # of agreements; a process that will never come is missed by its heartbeat
_GOODBYE_MS = 5000  # for all to have heard of a failure

log = logging.getLogger(__name__)


class ProcessesError(cli.UserError, RuntimeError):
    """The processes cannot be joined as asked; the message is one line."""


@dataclasses.dataclass
class _Membership:
    """What this process knows of the others."""

    coordinator: str = ''
    process: int = 0
    processes: int = 1
    connect_timeout_seconds: int = 0
    heartbeat_timeout_seconds: int = 0
    connecting: bool = False
    parting: bool = False  # from here on it is no news that others are gone
    exit_code: int = 0  # once this process is leaving
    sayings: itertools.count = dataclasses.field(default_factory=itertools.count)  # agreements so far, alike in all
    first_seen: dict = dataclasses.field(default_factory=dict)  # process -> a number of its own, once all were seen


_us = _Membership()


def is_multiprocess() -> bool:
    """Whether this run has more than one process; touches no device."""
    return _us.processes > 1


def is_coordinator() -> bool:
    """Whether this is process 0, which writes and prints for all; touches no device."""
    return _us.process == 0


# ---- joining ---------------------------------------------------------------


def join(
    coordinator: str = '',
    num_processes: int = 0,
    process_id: int = -1,
    connect_timeout_seconds: int = 300,
    heartbeat_timeout_seconds: int = 30,
) -> None:
    """Makes this process one of is_multiprocess, if there are is_multiprocess; to be called before any device is used.

    Given by hand (arguments, else JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID), or found: a SLURM step or Open MPI job of is_multiprocess tasks, the
    hosts of a TPU slice (TPU VM or GKE), or an indexed Kubernetes job. Anything
    else is a single process, which waits for nobody.

    Args:
      coordinator: HOST:PORT of process 0; '': from the environment.
      num_processes: of the run; 0: from the environment.
      process_id: 0 .. num_processes - 1; -1: from the environment.
      connect_timeout_seconds: how long to wait for the others.
      heartbeat_timeout_seconds: silence after which a process counts as gone.

    Raises:
      ProcessesError: an argument that is missing or out of range.

    Where the others do not come in time, or do not answer, this process ends with `PEER_LOST`.
    """
    coordinator = coordinator or os.environ.get('JAX_COORDINATOR_ADDRESS', '')
    how = {}
    if coordinator:
        num_processes = num_processes or _number('JAX_NUM_PROCESSES', 0)
        process_id = process_id if process_id != -1 else _number('JAX_PROCESS_ID', -1)
        by_hand = num_processes or process_id != -1
        if by_hand or not (method := _detected()):
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
    elif method := _detected():
        how = dict(cluster_detection_method=method)
    else:
        return
    if how['cluster_detection_method'] == 'slurm':
        how |= _slurm_devices()
    _us.coordinator, _us.connect_timeout_seconds = coordinator, connect_timeout_seconds
    _us.heartbeat_timeout_seconds = heartbeat_timeout_seconds
    # Its handler would take SIGTERM away from this program, which has its own way to stop (PreemptionSync).
    jax.config.update('jax_enable_preemption_service', False)
    # Otherwise JAX's client aborts every process when one is lost, before anyone can say which.
    jax.config.update('jax_enable_recoverability', True)
    _catch_abort()
    _us.connecting = True
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
    state = distributed.global_state
    _us.coordinator, _us.process, _us.processes = state.coordinator_address, state.process_id, state.num_processes
    _us.connecting = False
    if is_multiprocess():
        for watch in (_hear_of_failure, _miss_the_lost):
            threading.Thread(target=watch, name=watch.__name__, daemon=True).start()


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, '')
    if not re.fullmatch(r'-?\d*', text):
        raise ProcessesError(f'{variable}={text} must be a whole number')
    return int(text or default)


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


def _detected() -> str:
    """JAX's name for the cluster that started this process as one of is_multiprocess; '' for none."""
    environment = os.environ
    # JAX takes the job's number of tasks; within `srun --pty` in an allocation, the step has one all the same.
    if 'SLURM_STEP_NODELIST' in environment and _number('SLURM_STEP_NUM_TASKS', 1) > 1:
        return 'slurm'
    if _number('OMPI_COMM_WORLD_SIZE', 1) > 1:
        return 'ompi'
    if (environment.get('JAX_PLATFORMS') or 'tpu').startswith('tpu') and _has_tpu():
        by_name = {'TPU_PROCESS_ADDRESSES_PATH', 'TPU_PROCESS_ADDRESSES', 'TPU_WORKER_HOSTNAMES'} & environment.keys()
        if by_name:
            return 'gketpu'
        return '' if 'TPU_SKIP_MDS_QUERY' in environment else 'gcetpu'
    if {'KUBERNETES_SERVICE_HOST', 'JOB_COMPLETION_INDEX'} <= environment.keys():
        return 'k8s'
    return ''


def _has_tpu() -> bool:
    from jax._src import cloud_tpu_init  # set when jax is imported: libtpu is installed and chips are there

    return cloud_tpu_init.running_in_cloud_tpu_vm


def _slurm_devices() -> dict:
    """JAX gives a SLURM task one GPU, its local id; a task that has the node to itself takes all of them."""
    tasks_here = os.environ.get('SLURM_STEP_TASKS_PER_NODE', os.environ.get('SLURM_TASKS_PER_NODE', ''))
    gpus = _number('SLURM_GPUS_ON_NODE', 0)
    alone = re.fullmatch(r'1(\(x\d+\))?', tasks_here)
    return {'local_device_ids': list(range(gpus))} if alone and gpus > 1 else {}


def _wait_for_coordinator() -> None:
    """Ends the process with one line where JAX would abort it with a stack trace."""
    host, _, port = _us.coordinator.rpartition(':')
    deadline = time.monotonic() + _us.connect_timeout_seconds
    while True:
        try:
            socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                _end(
                    PEER_LOST,
                    f'process 0 does not answer at --coordinator={_us.coordinator} within '
                    f'{_us.connect_timeout_seconds} s ({error.strerror or error}); start the command on every host, '
                    'and see that the address is that of process 0 and the port is open between them',
                )
            time.sleep(0.5)


# ---- agreeing --------------------------------------------------------------


def broadcast_from_0(value):
    """The value that process 0 passed; every process calls it, at the same place. JSON types only."""
    if not is_multiprocess():
        return value
    key = f'{_ROOT}said/{next(_us.sayings)}'
    if is_coordinator():
        _client().key_value_set(key, json.dumps(value))
        return value
    return json.loads(_client().blocking_key_value_get(key, _PATIENCE_MS))


def all_gather_json(value) -> list:
    """The values that the processes passed, in their order; every process calls it, at the same place. JSON types only."""
    if not is_multiprocess():
        return [value]
    key = f'{_ROOT}said/{next(_us.sayings)}'
    _client().key_value_set(f'{key}/{_us.process}', json.dumps(value))
    _client().wait_at_barrier(key, _PATIENCE_MS)
    said = {int(name.rpartition('/')[2]): json.loads(text) for name, text in _client().key_value_dir_get(key)}
    return [said[process] for process in range(_us.processes)]


class PreemptionSync:
    """Makes a request to stop that reached one process reach all, at the same turn.

    Every process calls `turn` at the same places: before each step of training
    and each batch of an evaluation, whose result it waits for before the turn
    after the next. So when a process announces at turn t that it was told to
    stop, none can have come further than to turn t + 1, and all stop at t + 2.
    That costs one message to process 0 a turn, while the devices work.
    """

    def __init__(self):
        self._turn = 0

    def should_stop(self, exit_code: int) -> int:
        """
        Args:
          exit_code: what this process was told to stop with, by a signal; 0: nothing.

        Returns:
          What all stop with now; 0: go on.
        """
        if not is_multiprocess():
            return exit_code
        self._turn += 1
        if exit_code:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was told too, and was first
                _client().key_value_set(_STOP, json.dumps([self._turn + 2, exit_code]))
        try:
            at, exit_code = json.loads(_client().key_value_try_get(_STOP))
        except jax.errors.JaxRuntimeError as error:
            if 'NOT_FOUND' not in str(error):
                raise
            return 0
        if self._turn > at:
            raise AssertionError(f'turn {self._turn} came before the announcement to stop at turn {at}')
        return exit_code if self._turn == at else 0


def _client():
    return distributed.global_state.client


# ---- ending ----------------------------------------------------------------


def abort_all(exit_code: int, message: str) -> None:
    """Ends all processes because this one cannot go on; returns only where it is the only one.

    The first to fail speaks for all: the others say which process failed and why,
    and end with the same exit code.
    """
    if not is_multiprocess():
        return
    _us.parting, _us.exit_code = True, exit_code
    failure = json.dumps(dict(process=_us.process, exit_code=exit_code, message=message))
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first, or process 0 is gone
        _client().key_value_set(_FAILURE, failure)
    _say_goodbye()
    _exit(exit_code)


def wait_for_peer_failure() -> None:
    """To be called before blaming this process for an error that a lost one may have caused.

    A collective or a barrier can break before the lost process is missed. Returns
    when nobody was missed; otherwise this process ends meanwhile.
    """
    if is_multiprocess():
        time.sleep(_us.heartbeat_timeout_seconds + 15)


def shutdown(exit_code: int) -> None:
    """Ends an orderly run: no process goes before all have come this far. Returns only where it is the only one."""
    if not is_multiprocess():
        return
    try:
        all_gather_json('done')
    except jax.errors.JaxRuntimeError:
        wait_for_peer_failure()
    _us.parting, _us.exit_code = True, exit_code
    client = _client()  # the watching threads may still be in it
    if is_coordinator():
        # The others' connections must not outlive the service that this process runs.
        deadline = time.monotonic() + 30
        while len(client.get_live_nodes(range(_us.processes))) > 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)  # for the last of them to hear that it is released
    else:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            client.shutdown()
    _exit(exit_code)


def _hear_of_failure() -> None:
    """A thread that waits for the failure of another process."""
    while not _us.parting:
        try:
            failure = json.loads(_client().blocking_key_value_get(_FAILURE, 10_000))
        except jax.errors.JaxRuntimeError as error:
            if 'DEADLINE_EXCEEDED' in str(error):
                continue
            return None if _us.parting else _end(PEER_LOST, _gone([0]))
        if not _us.parting:
            _us.parting, _us.exit_code = True, failure['exit_code']
            _say(f'process {failure["process"]} ended: {failure["message"]}')
            _say_goodbye()
            _exit(failure['exit_code'])


def _miss_the_lost() -> None:
    """A thread that asks, together with those of the others, who is still there."""
    everybody = list(range(_us.processes))
    while not _us.parting:
        try:
            # Process -> a number of its own: one that was started again while we run is another.
            seen = _client().get_live_nodes(everybody)
        except jax.errors.JaxRuntimeError:
            return  # process 0 is gone, which _hear_of_failure says
        _us.first_seen = _us.first_seen or seen
        lost = {process for process in everybody if process not in seen or seen[process] != _us.first_seen.get(process)}
        if lost:
            time.sleep(1)  # a process that said why it ended is not lost
            if not _us.parting:
                _end(PEER_LOST, _gone(sorted(lost)))
        time.sleep(max(2, _us.processes / 100))  # process 0 answers all of them


def _gone(lost: list[int]) -> str:
    named = ', '.join(map(str, lost[:8])) + (f' and {len(lost) - 8} more' if len(lost) > 8 else '')
    coordinator = f' (the coordinator, {_us.coordinator})' if lost == [0] else ''
    return (
        f'process {named} of {_us.processes}{coordinator} is gone: it was killed or its machine was lost; start the same '
        'command again on every host: training goes on from the last checkpoint'
    )


def _catch_abort() -> None:
    """Says in one line what JAX's client aborts the process for: process 0 is gone, or the others did not come.

    The client ends the process from C++, with SIGABRT, where Python's own handlers never run. This one needs the
    interpreter's lock: it comes as soon as no other thread is in Python, and not at all where a library holds the lock for ever.
    """
    libc = ctypes.CDLL(None)
    handler_type = ctypes.CFUNCTYPE(None, ctypes.c_int)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p

    def on_abort(_):
        if _us.parting:
            _exit(_us.exit_code)
        if _us.connecting:
            _end(
                PEER_LOST,
                f'not all processes of the run came within {_us.connect_timeout_seconds} s (coordinator '
                f'{_us.coordinator or "found by JAX"}); start the command on every host, with the same --num_processes',
            )
        time.sleep(3)  # _hear_of_failure ends the process if the coordinator is gone
        if is_multiprocess() and not _answers():
            _end(PEER_LOST, _gone([0]))
        libc.signal(signal.SIGABRT, None)  # a real abort

    _catch_abort.keep = handler_type(on_abort)  # as long as the process lives
    libc.signal(signal.SIGABRT, ctypes.cast(_catch_abort.keep, ctypes.c_void_p))


def _answers() -> bool:
    host, _, port = _us.coordinator.rpartition(':')
    try:
        socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
        return True
    except OSError:
        return False


def _say_goodbye() -> None:
    """Waits until all have heard of the failure, or for a moment."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().wait_at_barrier(_ROOT + 'goodbye', _GOODBYE_MS)


def process_label() -> str:
    """' (process 1 of 4)', to name this process in a message; '' where it is the only one."""
    return f' (process {_us.process} of {_us.processes})' if is_multiprocess() else ''


def _say(message: str) -> None:
    os.write(2, f'error{process_label()}: {" ".join(message.split())}\n'.encode())


def _end(exit_code: int, message: str) -> None:
    _us.parting, _us.exit_code = True, exit_code
    _exit(exit_code, message)


def _exit(exit_code: int, message: str = '') -> None:
    """Ends the process at once: a thread may wait for ever for a process that is gone, or a write for a reader."""
    last_words = threading.Thread(target=_finish_output, args=[message], daemon=True)
    last_words.start()
    last_words.join(5)
    os._exit(exit_code)


def _finish_output(message: str) -> None:
    for finish in (lambda: message and _say(message), sys.stdout.flush, sys.stderr.flush):
        with contextlib.suppress(Exception):
            finish()


def _one_line(error: BaseException) -> str:
    return ' '.join(str(error).split())[:300] or type(error).__name__
