"""What a training run left in its workdir, and whether two runs can be compared."""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Sequence

from transxssm_jax import cli
from transxssm_jax import config as config_lib
from transxssm_jax.config import Config, ConfigError
from transxssm_jax.training import run_directory


class RunError(cli.UserError, ValueError):
    """A directory that is no run, or runs that cannot be compared; the message is one line."""


class NotAlikeError(RunError):
    """Runs that differ in what is not compared: `difference` tells in what, the message the remedy too."""

    def __init__(self, difference: str, remedy: str):
        super().__init__(f'{difference}; {remedy}')
        self.difference = difference


SEEDS = ('train.seed', 'data.seed')  # runs that differ in these alone are repeats of one
# Settings that decide how fast or how often something is done, and not what is trained or measured.
WITHOUT_EFFECT = (
    'mesh',
    'model.remat',
    'model.layer_loop',
    'model.ssd_implementation',
    'model.ssd_chunk_size',
    'model.attention_implementation',
    'data.num_workers',
    'data.prefetch_batches',
    'data.verify',
    'train.accumulation_steps',
    'train.loss_chunk_tokens',
    'train.log_every_steps',
    'train.eval_every_steps',
    'train.checkpoint_every_steps',
    'train.keep_last',
    'train.keep_best',
    'train.keep_every_steps',
    'train.checkpoint_local_dir',
    'train.checkpoint_local_every_steps',
    'train.health_every_steps',
    'train.watchdog_factor',
    'train.watchdog_seconds',
    'train.watchdog_action',
    'train.tensorboard',
    'train.trackers',
    'train.compilation_cache',
    'train.progress',
    'train.profile_start_step',
    'train.profile_steps',
    'train.sample_tokens',
)
_NO_METRIC = {'step', 'tokens', 'seconds'}


@dataclasses.dataclass(frozen=True)
class RunRecords:
    """A run as its workdir tells it.

    Attributes:
      name: how the run is called beside others.
      workdir: its directory.
      config: its config.
      fingerprint: that of its data, as its newest checkpoint has it; '' before the first.
      training: the records of metrics.jsonl that hold a loss, in the order of steps.
      evaluations: those that hold an evaluation, each with the 'tokens' and, where known, the 'seconds' of its step.
    """

    name: str
    workdir: pathlib.Path
    config: Config
    fingerprint: str
    training: list[dict]
    evaluations: list[dict]

    @property
    def metrics(self) -> set[str]:
        """Names of what was measured."""
        return {name for record in (*self.training, *self.evaluations) for name in record} - _NO_METRIC

    @property
    def is_finished(self) -> bool:
        """Whether the last step was taken, and evaluated where that was asked for."""
        last = self.config.train.steps
        wants_evaluation = bool(self.config.train.eval_every_steps and self.config.data.eval_split_names)
        evaluated = any(record['step'] == last for record in self.evaluations)
        return bool(self.training) and self.training[-1]['step'] == last and (evaluated or not wants_evaluation)

    def series(self, metric: str, x: str = 'tokens') -> list[tuple[float, float]]:
        """(x, value) of every record that has both; x: 'step', 'tokens' or 'seconds'."""
        records = self.evaluations if metric.startswith('eval') else self.training
        return [(record[x], record[metric]) for record in records if metric in record and x in record]

    def last(self, metric: str) -> float | None:
        """The newest value of a metric, None where there is none."""
        found = self.series(metric, 'step')
        return found[-1][1] if found else None

    def usual(self, metric: str) -> float | None:
        """The median of a metric over the run, None where there is none."""
        values = [value for _, value in self.series(metric, 'step')]
        return statistics.median(values) if values else None


def read_run(workdir: pathlib.Path | str, name: str = '') -> RunRecords:
    """Reads a workdir of train.

    Raises:
      RunError: it is no run, or holds no records.
    """
    workdir = pathlib.Path(workdir)
    try:
        config = config_lib.from_json((workdir / 'config.json').read_bytes())
    except OSError as error:
        raise RunError(
            f'{workdir} is no run ({workdir / "config.json"}: {error.strerror}); give directories that train wrote'
        ) from error
    except ConfigError as error:
        raise RunError(f'{workdir / "config.json"}: {error}') from error
    records = list(run_directory.read_metrics(workdir))
    training = [record for record in records if 'loss' in record]
    seconds = {record['step']: record['seconds'] for record in training if 'seconds' in record}
    evaluations = [
        {'tokens': record['step'] * config.tokens_per_step}
        | ({'seconds': seconds[record['step']]} if record['step'] in seconds else {})
        | record
        for record in records
        if any(key.startswith('eval') for key in record)
    ]
    if not records:
        raise RunError(f'{workdir} has no records in metrics.jsonl; train it first')
    return RunRecords(name or workdir.name, workdir, config, data_fingerprint(workdir), training, evaluations)


def data_fingerprint(workdir: pathlib.Path) -> str:
    """The fingerprint of the data that the newest checkpoint was trained on; '' where there is none."""
    folders = [path for path in workdir.glob('checkpoints/*') if path.name.isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name), reverse=True):
        try:
            position = json.loads((folder / 'data.json').read_text())
            return str(position['fingerprint'])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return ''


def read_runs(workdirs: Sequence[str]) -> list[RunRecords]:
    """Several runs, named by what tells their paths apart.

    Raises:
      RunError: see `read_run`; or a directory is given twice.
    """
    paths = [pathlib.Path(workdir).absolute() for workdir in workdirs]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice:
        raise RunError(f'{twice} is given twice')
    for count in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        names = ['/'.join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return [read_run(path, name) for path, name in zip(workdirs, names, strict=True)]


# ---- comparing ---------------------------------------------------------------


def _settings(runs: Sequence[RunRecords]) -> list[dict]:
    """The flat config of each run, whose data.path says which data it is, wherever that lies.

    A run without a checkpoint has the data of any other run with its path; where there is none, its path must do.
    """
    names = {run.config.data.path: f'data {run.fingerprint}' for run in runs if run.fingerprint}
    flat = [config_lib.flatten(run.config) for run in runs]
    for run, values in zip(runs, flat, strict=True):
        path = values['data.path']
        values['data.path'] = f'data {run.fingerprint}' if run.fingerprint else names.get(path, path)
    return flat


def differing_settings(runs: Sequence[RunRecords]) -> dict[str, list]:
    """Settings in which any two runs differ: dotted name -> the value in each run."""
    flat = _settings(runs)
    return {
        name: [values[name] for values in flat] for name in flat[0] if len({repr(values[name]) for values in flat}) > 1
    }


def check_comparable(runs: Sequence[RunRecords], compared: Sequence[str]) -> None:
    """Raises RunError where configs differ in what is not compared, or nothing was measured in all runs.

    Args:
      compared: sections and dotted settings in which the runs may differ, besides SEEDS and WITHOUT_EFFECT.
    """
    known = {name for setting in config_lib.flatten(Config()) for name in (setting, setting.partition('.')[0])}
    for name in compared:
        if name not in known:
            raise RunError(f'--compared={name} is no setting and no section{cli.nearest(name, known)}')
    allowed = {*compared, *SEEDS, *WITHOUT_EFFECT}
    for name, values in differing_settings(runs).items():
        if allowed.isdisjoint({name, name.partition('.')[0]}):
            i = next(i for i, value in enumerate(values) if value != values[0])
            raise NotAlikeError(
                f'{name} is {cli.shorten(repr(values[0]), 60)} in {runs[0].name} and {cli.shorten(repr(values[i]), 60)} in '
                f'{runs[i].name}, which is not what is compared',
                f'add it to --compared={",".join(compared)}, or give --allow',
            )
    common_metrics(runs)


def common_metrics(runs: Sequence[RunRecords]) -> set[str]:
    """Names of what was measured in every run. Raises RunError where there is nothing."""
    common = set.intersection(*(run.metrics for run in runs))
    if not common:
        raise RunError(f'{", ".join(run.name for run in runs)} have no metric in common; nothing can be compared')
    return common


def repeats(runs: Sequence[RunRecords]) -> list[list[RunRecords]]:
    """Runs in groups, each of one config but for SEEDS and WITHOUT_EFFECT."""
    groups: dict[str, list[RunRecords]] = {}
    for run, flat in zip(runs, _settings(runs), strict=True):
        key = {name: value for name, value in flat.items() if name not in SEEDS and not is_without_effect(name)}
        groups.setdefault(json.dumps(key), []).append(run)
    return list(groups.values())


def is_without_effect(name: str) -> bool:
    """Whether a setting is one of WITHOUT_EFFECT, or of such a section."""
    return name in WITHOUT_EFFECT or name.partition('.')[0] in WITHOUT_EFFECT
