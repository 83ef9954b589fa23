"""Which cluster started this process, by the variables of its environment."""

import os
import re

from transxssm_jax import cli


class ProcessesError(cli.UserError, RuntimeError):
    """The processes cannot be joined as asked; the message is one line."""


def environment_number(variable: str, default: int) -> int:
    """A whole number in the environment. Raises ProcessesError where it is none."""
    text = os.environ.get(variable, '')
    if not re.fullmatch(r'-?\d*', text):
        raise ProcessesError(f'{variable}={text} must be a whole number')
    return int(text or default)


def detect() -> str:
    """JAX's name for the cluster that started this process as one of several; '' for none."""
    environment = os.environ
    # JAX takes the job's number of tasks; within `srun --pty` in an allocation, the step has one all the same.
    if 'SLURM_STEP_NODELIST' in environment and environment_number('SLURM_STEP_NUM_TASKS', 1) > 1:
        return 'slurm'
    if environment_number('OMPI_COMM_WORLD_SIZE', 1) > 1:
        return 'ompi'
    if (environment.get('JAX_PLATFORMS') or 'tpu').startswith('tpu') and has_tpu():
        by_name = {'TPU_PROCESS_ADDRESSES_PATH', 'TPU_PROCESS_ADDRESSES', 'TPU_WORKER_HOSTNAMES'} & environment.keys()
        if by_name:
            return 'gketpu'
        return '' if 'TPU_SKIP_MDS_QUERY' in environment else 'gcetpu'
    if {'KUBERNETES_SERVICE_HOST', 'JOB_COMPLETION_INDEX'} <= environment.keys():
        return 'k8s'
    return ''


def has_tpu() -> bool:
    from jax._src import cloud_tpu_init  # set when jax is imported: libtpu is installed and chips are there

    return cloud_tpu_init.running_in_cloud_tpu_vm


def slurm_devices() -> dict:
    """JAX gives a SLURM task one GPU, its local id; a task that has the node to itself takes all of them."""
    tasks_here = os.environ.get('SLURM_STEP_TASKS_PER_NODE', os.environ.get('SLURM_TASKS_PER_NODE', ''))
    gpus = environment_number('SLURM_GPUS_ON_NODE', 0)
    alone = re.fullmatch(r'1(\(x\d+\))?', tasks_here)
    return {'local_device_ids': list(range(gpus))} if alone and gpus > 1 else {}
