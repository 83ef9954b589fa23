"""Takes a step of a run again and compares it with the run's ledger:

    python -m transxssm_jax.replay --workdir=runs/a --step=1200 [--documents] [--tolerance=1e-3] [--config.a.b=value]

The nearest checkpoint before the step is restored, and the steps up to it are taken with the config that the run had. Of
each the digest of the batch, the learning rate, the loss and the norms must be those of the ledger; the first that is not
is named. On the same devices, with the same code, they are equal bit for bit; on others give --tolerance. Nothing in the
workdir is changed, and the run may be training.

Settings replace those of the run, to find out what they change, or where its data is now (--config.data.path=DIR) and over
which devices to run (--config.mesh.data=1).

Exit codes: 0 equal; 2 wrong input, with one line: no line of the step, no checkpoint before it, other data; 4 a difference.
"""

from transxssm_jax import cli

if __name__ == '__main__':
    cli.start('transxssm_jax.replay')

import logging
import pathlib

from transxssm_jax import config as config_lib
from transxssm_jax.cli import ExitCode, Flag
from transxssm_jax.training import checkpoint_files as files
from transxssm_jax.training import replay as replay_lib
from transxssm_jax.training import run_reference

COMMAND = cli.Command(
    'transxssm_jax.replay',
    __doc__,
    [
        Flag(
            'workdir',
            cli.REQUIRED,
            'Run: a directory, alone or with @STEP, @best or @latest.',
            example='runs/a',
            is_path=True,
        ),
        Flag('step', -1, 'Step to take again, from 1; -1: the one that --workdir names.', minimum=1),
        Flag('documents', False, 'Whether to print which documents the batch of the step held.'),
        Flag('tolerance', 0.0, 'Largest relative difference of a number that counts as equal.', minimum=0.0),
    ],
    settings=config_lib.describe,
    takes_file=False,
)


def main(argv: list[str] | None = None) -> int:
    """The command; see the module's docstring. Returns its exit code."""
    return cli.run(COMMAND, _replay, argv)


def _replay(flags) -> int:
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s: %(message)s')
    workdir, step = _step(flags.workdir, flags.step)
    if flags.documents:
        print('\n'.join(replay_lib.describe_documents(workdir, step, flags.overrides)), flush=True)
    difference = replay_lib.replay(workdir, step, flags.overrides, flags.tolerance, _print)
    if difference:
        print(difference)
        return ExitCode.DIFFERS
    how = f'within {flags.tolerance:g}' if flags.tolerance else 'bit for bit'
    print(f'equal: batches, and {how} the learning rate, the loss and the norms, up to step {step}')
    return ExitCode.FINISHED


def _step(given: str, step: int) -> tuple[pathlib.Path, int]:
    """The workdir and the step to take again; @latest is the newest checkpoint's."""
    workdir, step = run_reference.resolve(given, step)
    if step == run_reference.NEWEST:
        steps = files.steps_in(workdir / 'checkpoints') if str(workdir) != given else []
        if not steps:
            raise cli.UsageError(f'--step is missing, e.g. --step=1200, or --workdir={workdir}@STEP')
        step = steps[-1]
    return workdir, step


def _print(line: str) -> None:
    print(line, flush=True)
