"""Trials that a cluster's own queue starts: a SLURM array, or workloads of xpk on GKE. The same command later collects them."""

import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

from transxssm_jax.config_sweep import SweepError
from transxssm_jax.evals.sweep_trials import Trial

GRACE_SECONDS = 120  # between SIGTERM and the end of a job: two more steps and a checkpoint
MAX_RESTARTS = 100


def slurm_job(
    trials: Sequence[Trial],
    output: pathlib.Path,
    options: str,
    trial_command: Sequence[str],
    parallel: int,
    retries: int,
) -> tuple[list[str], str]:
    """(sbatch and its arguments, the job script) of an array with an element for every trial.

    Args:
      trials: that are not finished; an element's number is the trial's.
      options: of sbatch, as typed, e.g. '--time=4:00:00 --gpus-per-node=8'; they come after, and go before, ours.
      trial_command: runs one trial, the number of which is to be added.
      parallel: most elements at a time; 0: any number.
      retries: how often a trial that fails is put back into the queue.
    """
    numbers = ','.join(str(trial.number) for trial in trials) + (f'%{parallel}' if parallel else '')
    submit = [
        'sbatch',
        f'--job-name={job_name(output)}',
        f'--array={numbers}',
        '--nodes=1',
        '--ntasks-per-node=1',
        '--gpus-per-node=1',
        '--requeue',
        f'--signal=TERM@{GRACE_SECONDS}',
        '--open-mode=append',
        f'--output={str(output).replace("%", "%%")}/slurm-%A_%a.out',
        f'--chdir={pathlib.Path.cwd()}',
        *shlex.split(options),
    ]
    job = f"""#!/usr/bin/env bash
srun --kill-on-bad-exit=0 {shlex.join(trial_command)} --trial="$SLURM_ARRAY_TASK_ID"
code=$?
case $code in
    # Told to stop, having saved; or a process was lost: it goes on from its last checkpoint.
    69 | 75 | 129 | 137 | 138 | 140 | 143) most={MAX_RESTARTS} ;;
    0 | 2 | 3) most=0 ;;  # done, or it would end like this again
    *) most={retries} ;;
esac
if [ "${{SLURM_RESTART_COUNT:-0}}" -lt $most ]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit $code
"""
    return submit, job


def gke_commands(trials: Sequence[Trial], output: pathlib.Path, options: str) -> list[list[str]]:
    """A call of launch/gke.sh, which calls xpk, for every trial.

    Args:
      options: of launch/gke.sh, as typed, e.g. '--cluster=pod --tpu_type=v5litepod-8 --storage=books'.

    Raises:
      SweepError: the scripts are not here.
    """
    script = pathlib.Path(__file__).parents[2] / 'launch' / 'gke.sh'
    if not script.exists():
        raise SweepError('--gke needs a checkout of this project, which xpk copies to the cluster (launch/gke.sh)')
    name = job_name(output)
    return [
        [str(script), *shlex.split(options), f'--name={name}-{trial.number}', '--', *trial.arguments()]
        for trial in trials
    ]


def job_name(output: pathlib.Path) -> str:
    """A name that SLURM and Kubernetes take."""
    return re.sub(r'[^a-z0-9]+', '-', output.name.lower()).strip('-')[:30] or 'sweep'


def submit(command: Sequence[str], script: str = '') -> None:
    """Hands a job to a cluster's program. Raises SweepError where that is not here, or refuses it."""
    if shutil.which(command[0]) is None:
        raise SweepError(f'{command[0]} is not here; start this where jobs are submitted, or look with --dry-run')
    result = subprocess.run(command, input=script, text=True, capture_output=True, check=False)
    sys.stdout.write(result.stdout)
    if result.returncode:
        raise SweepError(f'{command[0]} ended with exit code {result.returncode}: {result.stderr.strip()}')
