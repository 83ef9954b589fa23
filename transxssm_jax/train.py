"""Trains a model: python -m transxssm_jax.train --config=configs/1p3b.py --workdir=DIR [--config.a.b=value].

Exit codes: 0 finished; 2 wrong input or a failed write, with one line; 3 the
loss is not finite; 69 another process of the run is gone or did not come, or
this one hung; 75 stopped by SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2, or because a
loader process was killed or gave nothing, and 130 by Ctrl-C, all after saving.
After 69, 75 and 130 the same command goes on from the last checkpoint.

--init_from=RUN@best starts a new workdir from the weights of another run, or of a directory in the published format,
with other data, lengths, batch and schedule. Called again, the run goes on from its own checkpoints.

On several hosts the same command runs on each. TPU slices, SLURM, Open MPI and
indexed Kubernetes jobs are recognised; elsewhere --coordinator, --num_processes
and --process_id, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID, number the processes.
"""

from transxssm_jax import cli

if __name__ == '__main__':
    cli.start('transxssm_jax.train', takes_signals=True)

import contextlib
import logging
import os
import sys
import traceback

import jax

from transxssm_jax import config as config_lib
from transxssm_jax.cli import ExitCode, Flag
from transxssm_jax.data import object_store
from transxssm_jax.inference.generator import sample
from transxssm_jax.parallel import processes
from transxssm_jax.planning.fitting import fit
from transxssm_jax.pytorch.conversion import open_weights
from transxssm_jax.training import loop, remote_workdir
from transxssm_jax.training.stopping import StopRequest
from transxssm_jax.training.watchdog import StalledLoaderError

COMMAND = cli.Command(
    'transxssm_jax.train',
    __doc__,
    [
        Flag(
            'workdir',
            cli.REQUIRED,
            'Directory of the run: config, checkpoints, metrics. s3://... and gs://... need no mount.',
            example='runs/a',
            is_path=True,
            is_place=True,
        ),
        Flag(
            'init_from',
            '',
            'Weights that a new run starts from, as train.init_from: RUN, RUN@STEP, RUN@best, RUN@latest or a directory.',
            example='runs/a@best',
            is_path=True,
        ),
        Flag(
            'init_what',
            'params',
            'What is taken of them, as train.init_what.',
            choices=('params', 'params+optimizer'),
        ),
        Flag('coordinator', '', 'HOST:PORT of process 0; needed only where the processes are started by hand.'),
        Flag('num_processes', 0, 'Processes of the run, where they are started by hand.', minimum=0),
        Flag('process_id', -1, 'Number of this process, from 0, where they are started by hand.', minimum=-1),
        Flag('connect_timeout_seconds', 300, 'How long a process waits for the others.', minimum=1),
        Flag('heartbeat_timeout_seconds', 30, 'Silence after which a process counts as gone.', minimum=1),
    ],
    settings=config_lib.describe,
)
INIT_FLAGS = ('init_from', 'init_what')
HOST_FLAGS = ('coordinator', 'num_processes', 'process_id', 'connect_timeout_seconds', 'heartbeat_timeout_seconds')


def main(argv: list[str] | None = None) -> int:
    """The command; see --help. Returns its exit code."""
    return cli.run(COMMAND, _train, argv)


def _train(flags) -> int:
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s: %(message)s')
    # Orbax logs the traceback of whatever it raises, thread by thread; checkpoint.py reports it in one line.
    logging.getLogger('absl').addFilter(_not_of_orbax)
    stop = StopRequest()
    stop.install()
    with stop.watch():
        exit_code = _run(flags, stop)
    processes.shutdown(exit_code)
    return exit_code


def _run(flags, stop: StopRequest) -> int:
    try:
        flags.overrides |= {f'train.{name}': getattr(flags, name) for name in INIT_FLAGS if name in flags.given}
        config = config_lib.from_flags(flags)
        processes.join(**{name: getattr(flags, name) for name in HOST_FLAGS})
        if not processes.is_coordinator():
            logging.getLogger().setLevel(logging.ERROR)  # process 0 warns of what concerns all
        # What a run on an object store has saved is not there before it is copied, so nothing ends it at once.
        copied_first = stop.saves_first() if object_store.is_url(flags.workdir) else contextlib.nullcontext()
        with copied_first, remote_workdir.local(flags.workdir) as (workdir, exchange):
            return loop.train(config, workdir, stop, sample, open_weights, fit, exchange)
    except (Exception, KeyboardInterrupt) as error:
        return _end_all(error)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return 'orbax' not in record.pathname


def _end_all(error: BaseException) -> int:
    """Prints why this process ends, in one line, and ends the other processes too. A fault of the program goes on."""
    _await_blame(error)
    if isinstance(error, KeyboardInterrupt):
        explained = (
            ExitCode.INTERRUPTED,
            'interrupted again, nothing more was saved; the same command goes on from the last checkpoint',
        )
    else:
        explained = cli.explain(error)
    if explained is None:
        if processes.is_multiprocess():
            with contextlib.suppress(OSError):
                traceback.print_exception(error)
            processes.abort_all(ExitCode.CRASHED, f'{type(error).__name__}: {error}')
        raise error
    exit_code, message = explained
    cli.print_error(message, prefix=f'error{processes.process_label()}: ')
    processes.abort_all(exit_code, message)
    if isinstance(error, StalledLoaderError):  # its threads may wait for ever, and the end of Python for them
        sys.stdout.flush()
        os._exit(exit_code)
    return exit_code


def _await_blame(error) -> None:
    """Where the loss of another process may be the cause, waits for that to be found; see wait_for_peer_failure."""
    while isinstance(error, BaseException):
        if isinstance(error, jax.errors.JaxRuntimeError) and not cli.is_out_of_memory(error):
            return processes.wait_for_peer_failure()
        error = error.__cause__ or error.__context__
