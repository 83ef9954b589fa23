"""Services that show a run's metrics beside TensorBoard and metrics.jsonl: Weights & Biases and MLflow.

A tracker is a class with `start`, `write` and `close`; a new one is a line of `TRACKERS`. A thread calls it, so that no
step waits for a network, and whatever it raises is a warning, so that no service stops a run: one that cannot be
reached gets nothing more until the run is started again.

A resumed run goes on in the same chart: WORKDIR/trackers.json keeps the id of the run at each service, and the last step
that was sent with the names of its metrics. What a resumed run writes again is not sent twice. Where the services are, and
which project or experiment a run belongs to, their own environment variables tell (WANDB_PROJECT, WANDB_MODE,
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME).
"""

import importlib.util
import json
import logging
import os
import pathlib
import queue
import secrets
import threading
import time
import typing

from transxssm_jax import config as config_lib
from transxssm_jax.config import Config, ConfigError
from transxssm_jax.data.manifest import write_file
from transxssm_jax.training import checkpoint_files

FILE = 'trackers.json'
NAME = 'transxssm_jax'  # of the project or experiment, where the environment names none
CLOSE_SECONDS = 30.0  # that a run waits at its end for what is under way

log = logging.getLogger(__name__)


class Tracker(typing.Protocol):
    """What a service is to do; every method may raise anything. All are called by one thread."""

    def start(self, workdir: pathlib.Path, config: Config, run_id: str) -> str:
        """Opens the run of an id, or a new one where it is ''. Returns its id."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Sends the metrics of a step, by the name that charts show."""

    def close(self) -> None:
        """Sends what is left."""


class WeightsAndBiases:
    """https://wandb.ai, or a directory in the workdir with WANDB_MODE=offline."""

    package = 'wandb'

    def start(self, workdir, config, run_id):
        import wandb

        self._run = wandb.init(
            id=run_id or secrets.token_hex(8),
            resume='allow',
            project=os.environ.get('WANDB_PROJECT', NAME),
            name=workdir.absolute().name,
            dir=str(workdir),
            config=config_lib.flatten(config),
            settings=wandb.Settings(silent=True),
        )
        return self._run.id

    def write(self, step, values):
        self._run.log(values, step=step)

    def close(self):
        self._run.finish()


class MlFlow:
    """A tracking server, or the store that MLFLOW_TRACKING_URI names."""

    package = 'mlflow'

    def start(self, workdir, config, run_id):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        if run_id:
            self._id = run_id
            self._client.update_run(run_id, status='RUNNING')
            return run_id
        name = os.environ.get('MLFLOW_EXPERIMENT_NAME', NAME)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._id = self._client.create_run(experiment_id, run_name=workdir.absolute().name).info.run_id
        # Parameters of a run cannot change, so a resumed one, whose settings may, leaves them as they are.
        flat = [Param(key, str(value)) for key, value in config_lib.flatten(config).items()]
        for first in range(0, len(flat), 100):  # as many as a call takes
            self._client.log_batch(self._id, params=flat[first : first + 100])
        return self._id

    def write(self, step, values):
        now = int(1000 * time.time())
        self._client.log_batch(self._id, [self._metric(key, value, now, step) for key, value in values.items()])

    def close(self):
        self._client.set_terminated(self._id)


TRACKERS = {'wandb': WeightsAndBiases, 'mlflow': MlFlow}  # the words of train.trackers


def check_installed(config: Config) -> None:
    """Raises ConfigError where a service of train.trackers has no package here."""
    for name in config.train.tracker_names:
        package = TRACKERS[name].package
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f'train.trackers={config.train.trackers!r} needs the package {package}, which is not installed; '
                f'pip install {package}, or leave {name} out'
            )


class InBackground:
    """A tracker in a thread of its own; its methods return at once and raise nothing, but `close`, which waits.

    Args:
      name: of TRACKERS.
      workdir, config: of the run.
    """

    def __init__(self, name: str, workdir: pathlib.Path, config: Config):
        self._name, self._workdir, self._config = name, workdir, config
        self._records = queue.SimpleQueue()  # (step, values); None ends it
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name=f'send metrics to {name}', daemon=True)
        self._thread.start()

    def write(self, step: int, values: dict[str, float]) -> None:
        if self._thread.is_alive():  # else nobody takes them, and they would pile up
            self._records.put((step, values))

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._records.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            log.warning('%s has not answered for %.0f s; what it lacks is in metrics.jsonl', self._name, CLOSE_SECONDS)

    def _work(self) -> None:
        tracker = TRACKERS[self._name]()
        try:
            saved = _read(self._workdir).get(self._name, {})
            run_id, last = str(saved.get('id', '')), int(saved.get('last_step', -1))
            # A step has several records, of training and of evaluations; a name comes once.
            sent = set(saved.get('last_names', []))
            run_id = tracker.start(self._workdir, self._config, run_id)
            self._keep(run_id, last, sent)
            while record := self._records.get():
                step, values = record
                if step > last:
                    last, sent = step, set()
                values = {name: value for name, value in values.items() if name not in sent}
                if step == last and values:
                    tracker.write(step, values)
                    sent |= values.keys()
                    self._keep(run_id, step, sent)
            tracker.close()
        except Exception as error:  # whatever a network, a service or its package raises
            log.warning(
                'metrics no longer go to %s (%s); the run goes on, and metrics.jsonl has them',
                self._name,
                checkpoint_files.first_line(error),
            )

    def _keep(self, run_id: str, last_step: int, names: set[str]) -> None:
        with _file_lock:
            entry = {'id': run_id, 'last_step': last_step, 'last_names': sorted(names)}
            content = _read(self._workdir) | {self._name: entry}
            write_file(self._workdir / FILE, (json.dumps(content, indent=2) + '\n').encode())


_file_lock = threading.Lock()  # of two trackers' threads


def _read(workdir: pathlib.Path) -> dict:
    """{name: {'id', 'last_step', 'last_names'}} of what was sent so far; what is damaged counts as nothing."""
    try:
        content = json.loads((workdir / FILE).read_bytes())
        return {name: entry for name, entry in content.items() if isinstance(entry, dict)}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
