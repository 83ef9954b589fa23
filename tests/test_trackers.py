"""Trackers: a run goes on in the same chart, its steps come once, and no service stops it or keeps it waiting."""

import json
import threading
import time

import pytest
from small import small_config
from train_fixtures import compiled_once, prepare_bytes, train, write_config

from transxssm_jax import config as config_lib
from transxssm_jax.training import metrics, trackers


class Recorder:
    """A service in this process."""

    package = 'json'
    runs = {}  # id -> [(step, values), ...]

    def start(self, workdir, config, run_id):
        self.id = run_id or f'run{len(self.runs)}'
        self.runs.setdefault(self.id, [])
        return self.id

    def write(self, step, values):
        self.runs[self.id].append((step, values))

    def close(self):
        pass


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(Recorder, 'runs', {})
    monkeypatch.setitem(trackers.TRACKERS, 'mlflow', Recorder)
    return Recorder


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp('trackers')
    with compiled_once(directory):
        yield write_config(directory, prepare_bytes(directory))


def test_a_resumed_run_goes_on_in_the_same_chart_and_sends_a_step_once(config, tmp_path, recorder):
    settings = dict(train__trackers='mlflow', train__checkpoint_every_steps=2, train__eval_every_steps=0)
    assert train(config, tmp_path / 'run', train__steps=3, **settings).code == 0
    # As of a run that died after step 3 and goes on from its checkpoint of step 2.
    import shutil

    shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '3')
    assert train(config, tmp_path / 'run', train__steps=5, **settings).code == 0
    (sent,) = recorder.runs.values()
    steps = [step for step, _ in sent]
    assert steps == [1, 2, 3, 4, 5]
    assert {'train/loss', 'optimizer/learning_rate', 'run/tokens'} <= sent[-1][1].keys()
    kept = json.loads((tmp_path / 'run' / trackers.FILE).read_text())
    assert kept == {'mlflow': {'id': 'run0', 'last_step': 5, 'last_names': sorted(sent[-1][1])}}


@pytest.mark.parametrize('method', ['start', 'write', 'close'])
def test_what_a_service_raises_is_one_warning(tmp_path, recorder, monkeypatch, caplog, method):
    def fail(self, *args):
        raise ConnectionError('no route to host\nand more')

    monkeypatch.setattr(Recorder, method, fail)
    writers = metrics.Writers(tmp_path, small_config(train_trackers='mlflow', train_tensorboard=False), 0)
    for step in range(1, 4):
        writers.write(step, {'loss': 1.0})
    writers.close()
    (warning,) = [record.message for record in caplog.records]
    assert warning.startswith('metrics no longer go to mlflow (no route to host)') and '\n' not in warning
    assert len((tmp_path / 'metrics.jsonl').read_text().splitlines()) == 3


def test_of_the_last_step_what_is_lacking_is_sent(tmp_path, recorder):
    """Of a run that died between the records of one step, and writes all of them again."""
    for names in (['train/loss'], ['train/loss', 'eval/loss']):
        tracker = trackers.InBackground('mlflow', tmp_path, small_config())
        for name in names:
            tracker.write(3, {name: 1.0})
        tracker.close()
    assert recorder.runs == {'run0': [(3, {'train/loss': 1.0}), (3, {'eval/loss': 1.0})]}


def test_nothing_piles_up_for_a_service_that_failed(tmp_path, recorder, monkeypatch):
    monkeypatch.setattr(Recorder, 'start', lambda self, *args: 1 / 0)
    tracker = trackers.InBackground('mlflow', tmp_path, small_config())
    tracker._thread.join(60)
    for step in range(100):
        tracker.write(step, {'train/loss': 1.0})
    assert tracker._records.empty()


def test_a_service_that_hangs_keeps_nobody_waiting(tmp_path, recorder, monkeypatch, caplog):
    answered = threading.Event()
    monkeypatch.setattr(Recorder, 'start', lambda self, *args: answered.wait(60) and '')
    monkeypatch.setattr(trackers, 'CLOSE_SECONDS', 0.05)
    tracker = trackers.InBackground('mlflow', tmp_path, small_config())
    for step in range(1000):
        tracker.write(step, {'train/loss': 1.0})
    tracker.close()
    tracker.close()
    answered.set()
    assert [record.message for record in caplog.records] == [
        'mlflow has not answered for 0 s; what it lacks is in metrics.jsonl'
    ]


def test_a_damaged_file_of_ids_starts_a_new_chart(tmp_path, recorder):
    (tmp_path / trackers.FILE).write_text('[5')
    tracker = trackers.InBackground('mlflow', tmp_path, small_config())
    tracker.write(1, {'train/loss': 1.0})
    tracker.close()
    assert recorder.runs == {'run0': [(1, {'train/loss': 1.0})]}


def test_words_and_packages(config, tmp_path, monkeypatch):
    with pytest.raises(config_lib.ConfigError, match="train.trackers='wandb,tensorbord': tensorbord is not one of"):
        small_config(train_trackers='wandb,tensorbord')
    monkeypatch.setattr(trackers.WeightsAndBiases, 'package', 'no_such_package')
    result = train(config, tmp_path / 'run', train__trackers='wandb')
    assert result.code == 2 and 'needs the package no_such_package, which is not installed' in result.err
    assert not (tmp_path / 'run').exists()


# ---- the services themselves ---------------------------------------------------


def test_mlflow_keeps_one_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip('mlflow')
    monkeypatch.setenv('MLFLOW_TRACKING_URI', (tmp_path / 'store').as_uri())
    monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')
    settings = small_config(train_trackers='mlflow', train_tensorboard=False)
    (tmp_path / 'run').mkdir()
    for first in (1, 3):  # two starts
        writers = metrics.Writers(tmp_path / 'run', settings, first - 1)
        for step in (first, first + 1):
            writers.write(step, {'loss': 1.0 / step, 'learning_rate': 0.1})
        writers.close()
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / 'store').as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == trackers.NAME]
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, 'train/loss')
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [(s, 1.0 / s) for s in (1, 2, 3, 4)]
    assert run.data.params['model.d_model'] == '64' and run.info.status == 'FINISHED'
    assert run.info.run_name == 'run'


def test_wandb_offline_keeps_one_id(tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    settings = small_config(train_trackers='wandb', train_tensorboard=False)
    ids = []
    for first in (1, 3):
        writers = metrics.Writers(tmp_path, settings, first - 1)
        writers.write(first, {'loss': 1.0})
        writers.close()
        ids.append(json.loads((tmp_path / trackers.FILE).read_text())['wandb'])
        time.sleep(1.1)  # names of its directories are in seconds
    assert ids[0]['id'] == ids[1]['id'] and ids[1]['last_step'] == 3
    directories = list((tmp_path / 'wandb').glob(f'offline-run-*-{ids[0]["id"]}'))
    assert len(directories) == 2 and all(list(path.glob('*.wandb')) for path in directories)
