"""Trains a model: python -m transxssm_jax.train --config=configs/1p3b.py --workdir=DIR [--config.a.b=value].

Exit codes: 0 finished; 2 wrong input or a failed write, said in one line; 3 the
loss is not finite; 69 another process of the run is gone or did not come; 75
stopped by SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2, or because a loader process was
killed, and 130 by Ctrl-C, all after saving. After 69, 75 and 130 the same
command goes on from the last checkpoint.

On several hosts the same command runs on each. TPU slices, SLURM, Open MPI and
indexed Kubernetes jobs are recognised; elsewhere --coordinator, --num_processes
and --process_id, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID, say who is who.
"""

import contextlib
import logging
import pathlib
import sys
import traceback

import jax
from absl import flags

from transxssm_jax import config as config_lib
from transxssm_jax.config import ConfigError
from transxssm_jax.data.loader import DataError
from transxssm_jax.inference.generator import sample
from transxssm_jax.parallel import processes
from transxssm_jax.training import checkpoint, loop
from transxssm_jax.training.health import NotFiniteError
from transxssm_jax.training.stopping import StopRequest

FINISHED, CRASHED, WRONG_INPUT, NOT_FINITE, TERMINATED, INTERRUPTED = 0, 1, 2, 3, 75, 130

log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s: %(message)s')
    # Orbax logs the traceback of whatever it raises, thread by thread; checkpoint.py says it in one line.
    logging.getLogger('absl').addFilter(_not_of_orbax)
    if {'--help', '-h'} & set(argv[1:]):
        print(
            f'{__doc__}\nFlags, with their defaults:\n{_describe_flags()}\n\nSettings, with their defaults:\n'
            f'{config_lib.describe()}'
        )
        return FINISHED
    stop = StopRequest()
    stop.install()
    try:
        flag_values = _flags()
        config = config_lib.parse_flags(argv, flag_values)
        workdir = _workdir(flag_values.workdir)
        processes.join(**{name: flag_values[name].value for name in _HOST_FLAGS})
        if not processes.is_coordinator():
            logging.getLogger().setLevel(logging.ERROR)  # what concerns all, process 0 says
        exit_code = loop.train(config, workdir, stop, sample)
    except (ConfigError, DataError, checkpoint.CheckpointError, processes.ProcessesError, OSError) as error:
        exit_code = _fail(error, WRONG_INPUT)
    except NotFiniteError as error:
        exit_code = _fail(error, NOT_FINITE)
    except KeyboardInterrupt:
        exit_code = _fail(
            'interrupted again, nothing more was saved; the same command goes on from the last checkpoint', INTERRUPTED
        )
    except Exception as error:
        if not str(error).startswith('implementation='):
            _crash(error)
            raise
        # The kernels know which of their implementations there are and what each can serve.
        exit_code = _fail(f'model.ssd_implementation or model.attention_implementation: {error}', WRONG_INPUT)
    processes.shutdown(exit_code)
    return exit_code


_HOST_FLAGS = {
    'coordinator': ('', 'HOST:PORT of process 0; needed only where the processes are started by hand.'),
    'num_processes': (0, 'Processes of the run, where they are started by hand.'),
    'process_id': (-1, 'Which of them this one is, from 0.'),
    'connect_timeout_seconds': (300, 'How long a process waits for the others.'),
    'heartbeat_timeout_seconds': (30, 'Silence after which a process counts as gone.'),
}


def _flags() -> flags.FlagValues:
    flag_values = flags.FlagValues()
    flags.DEFINE_string('workdir', '', 'Directory of the run: config, checkpoints, metrics.', flag_values=flag_values)
    for name, (default, meaning) in _HOST_FLAGS.items():
        define = flags.DEFINE_string if isinstance(default, str) else flags.DEFINE_integer
        define(name, default, meaning, flag_values=flag_values)
    return flag_values


def _describe_flags() -> str:
    return '\n'.join(
        ['--config=PATH  Config file.', '--workdir=DIR  Directory of the run: config, checkpoints, metrics.']
        + [f'--{name}={default}  {meaning}' for name, (default, meaning) in _HOST_FLAGS.items()]
    )


def _workdir(given: str) -> pathlib.Path:
    if not given:
        raise ConfigError('--workdir=DIR is missing: the directory of the run')
    if '://' in given:
        raise ConfigError(
            f'--workdir={given} must be a directory; mount the bucket on every host (gcsfuse, say), give its path'
        )
    return pathlib.Path(given)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return 'orbax' not in record.pathname


def _fail(error, exit_code: int) -> int:
    """Says an error in one line and ends the other processes too."""
    _await_blame(error)
    message = ' '.join(str(error).split())
    with contextlib.suppress(OSError):  # nobody may read it any more; the others must hear of it all the same
        print(f'error{processes.process_label()}: {message}', file=sys.stderr)
    processes.abort_all(exit_code, message)
    return exit_code


def _crash(error: Exception) -> None:
    """Where there are other processes, says an unexpected error and ends them."""
    if processes.is_multiprocess():
        _await_blame(error)
        with contextlib.suppress(OSError):
            traceback.print_exc()
        processes.abort_all(CRASHED, f'{type(error).__name__}: {error}')


def _await_blame(error) -> None:
    while isinstance(error, BaseException):
        if isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' not in str(error):
            return processes.wait_for_peer_failure()
        error = error.__cause__ or error.__context__


if __name__ == '__main__':
    sys.exit(main(sys.argv))
