"""Where the trainings of a sweep run while the sweep waits for them: on the devices of this machine, or on a Ray cluster."""

import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Protocol

from transxssm_jax import children, cli
from transxssm_jax.cli import ExitCode
from transxssm_jax.config_sweep import SweepError


class Started(Protocol):
    """A training under way."""

    def exit_code(self) -> int | None:
        """None while it runs."""

    def stop(self) -> None:
        """Asks it to save and stop."""


class Place(Protocol):
    """Where trainings run, some at a time."""

    slots: int

    def start(self, slot: int, command: Sequence[str], log: pathlib.Path) -> Started:
        """Starts a command in a free slot; what it prints is added to a file."""


# ---- this machine --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Process:
    process: subprocess.Popen

    def exit_code(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)


class Here:
    """This machine: a training for every group of its GPUs, or some at a time where it has none.

    Args:
      devices_per_trial: GPUs of a group.
      parallel: most trainings at a time; 0: one for each group of GPUs, one where there are none.

    Raises:
      SweepError: there are fewer GPUs than a group needs.
    """

    def __init__(self, devices_per_trial: int = 1, parallel: int = 0):
        gpus = visible_gpus()
        if gpus and devices_per_trial > len(gpus):
            raise SweepError(f'--devices_per_trial={devices_per_trial}: {len(gpus)} GPUs are here')
        if not gpus:
            self._groups = [{}] * max(parallel, 1)
        else:
            starts = range(0, len(gpus) - devices_per_trial + 1, devices_per_trial)
            groups = [gpus[start : start + devices_per_trial] for start in starts]
            self._groups = [{'CUDA_VISIBLE_DEVICES': ','.join(group)} for group in groups][: parallel or None]
        self.slots = len(self._groups)

    def start(self, slot: int, command: Sequence[str], log: pathlib.Path) -> Started:
        with open(log, 'ab') as file:
            return _Process(
                children.start(
                    command,
                    env=os.environ | self._groups[slot],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )


def visible_gpus() -> list[str]:
    """Names of the NVIDIA GPUs that JAX would use, as CUDA_VISIBLE_DEVICES has them; found without starting JAX."""
    if (os.environ.get('JAX_PLATFORMS') or 'cuda').partition(',')[0] not in ('cuda', 'gpu'):
        return []
    if (given := os.environ.get('CUDA_VISIBLE_DEVICES')) is not None:
        return [part.strip() for part in given.split(',') if part.strip() not in ('', '-1')]
    return sorted(
        (
            match[1]
            for path in pathlib.Path('/dev').glob('nvidia*')
            if (match := re.fullmatch(r'nvidia(\d+)', path.name))
        ),
        key=int,
    )


# ---- Ray -----------------------------------------------------------------------


class OnRay:
    """A Ray cluster whose nodes all see this directory and the data by the same paths.

    Args:
      address: of the cluster, 'auto' for the one that runs here, or 'local' to start one.
      devices_per_trial: GPUs of a training, where the cluster has any.
      parallel: most trainings at a time; 0: as many as there are GPUs for, or, without any, CPUs.

    Raises:
      MissingPackageError: Ray is not installed.
      SweepError: there is no such cluster, or it has too few GPUs.
    """

    def __init__(self, address: str, devices_per_trial: int = 1, parallel: int = 0):
        try:
            import ray
        except ImportError as error:
            raise cli.MissingPackageError('--ray needs Ray; pip install ray') from error
        self._ray = ray
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise SweepError(f'--ray={address}: {cli.one_line(error)}') from error
        finally:
            signal.signal(signal.SIGTERM, handler)  # Ray's own would end the process without its trials having saved
        resources = ray.cluster_resources()
        gpus = int(resources.get('GPU', 0))
        if 0 < gpus < devices_per_trial:
            raise SweepError(f'--devices_per_trial={devices_per_trial}: the cluster has {gpus} GPUs')
        self._gpus = devices_per_trial if gpus else 0
        most = gpus // devices_per_trial if gpus else int(resources.get('CPU', 1))
        self.slots = max(1, min(parallel or most, most))

    def start(self, slot: int, command: Sequence[str], log: pathlib.Path) -> Started:
        del slot  # Ray finds a node with free devices
        environment = {name: value for name, value in os.environ.items() if name != 'CUDA_VISIBLE_DEVICES'}
        task = self._ray.remote(num_gpus=self._gpus, num_cpus=1, max_retries=0)(_call)
        return _RayTask(self._ray, task.remote(list(command), os.getcwd(), environment, str(log.absolute())))

    def close(self) -> None:
        """Leaves the cluster; one that was started here ends."""
        self._ray.shutdown()


class _RayTask:
    def __init__(self, ray, reference):
        self._ray, self._reference, self._is_stopped = ray, reference, False

    def exit_code(self) -> int | None:
        ready, _ = self._ray.wait([self._reference], timeout=0)
        if not ready:
            return None
        try:
            return self._ray.get(self._reference)
        except self._ray.exceptions.RayError:  # its node is gone, or it was cancelled
            return ExitCode.TERMINATED if self._is_stopped else ExitCode.PEER_LOST

    def stop(self) -> None:
        self._is_stopped = True
        self._ray.cancel(self._reference, force=False)  # KeyboardInterrupt in _call


def _call(command: list[str], directory: str, environment: dict[str, str], log: str) -> int:
    """Runs on a node of the cluster. Returns the exit code."""
    with open(log, 'ab') as file:
        gpus = {name: os.environ[name] for name in ('CUDA_VISIBLE_DEVICES',) if name in os.environ}  # that Ray chose
        process = children.start(
            command,
            cwd=directory,
            env=environment | gpus,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    while process.poll() is None:
        try:
            time.sleep(0.1)  # a wait for the process would not be interrupted
        except KeyboardInterrupt:  # the sweep stops this trial, which saves first
            process.send_signal(signal.SIGTERM)
    return process.returncode
