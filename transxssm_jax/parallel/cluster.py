"""Which cluster started this process, by the variables of its environment."""

import importlib.metadata
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
    """Whether libtpu is installed and chips are there."""
    return bool(_of_jax('cloud_tpu_init', 'running_in_cloud_tpu_vm'))  # set when jax is imported


def distributed_state():
    """JAX's own place in a run of several processes: its client is the only way to the key-value store.

    Orbax takes the same one. Raises ProcessesError where this version of jax has none.
    """
    return _of_jax('distributed', 'global_state')


def _of_jax(module: str, name: str):
    """A name of JAX's internals, which are no part of its interface."""
    try:
        return getattr(importlib.import_module(f'jax._src.{module}'), name)
    except (ImportError, AttributeError) as error:
        version = importlib.metadata.version('jax')
        raise ProcessesError(
            f'this project uses jax._src.{module}.{name}, which jax {version} does not have ({error}); install jax 0.11.2'
        ) from error


def slurm_devices() -> dict:
    """JAX gives a SLURM task one GPU, its local id; a task that has the node to itself takes all of them."""
    tasks_here = os.environ.get('SLURM_STEP_TASKS_PER_NODE', os.environ.get('SLURM_TASKS_PER_NODE', ''))
    gpus = environment_number('SLURM_GPUS_ON_NODE', 0)
    alone = re.fullmatch(r'1(\(x\d+\))?', tasks_here)
    return {'local_device_ids': list(range(gpus))} if alone and gpus > 1 else {}
