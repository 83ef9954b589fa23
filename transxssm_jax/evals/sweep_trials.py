"""The trials of a sweep: each a training in a directory that is named by what differs; and the file of what became of them."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from transxssm_jax import cli
from transxssm_jax import config as config_lib
from transxssm_jax.config import ConfigError
from transxssm_jax.config_sweep import SweepError
from transxssm_jax.data.manifest import write_file
from transxssm_jax.evals.training_process import Training

LONGEST_NAME = 180  # characters of a directory's name; file systems take 255 bytes
STATE_FILE = 'sweep.json'

WAITING, RUNNING, DONE, PRUNED, FAILED = STATUSES = 'waiting', 'running', 'finished', 'pruned', 'failed'
SAFE_NAME = r'\w[\w.,=+\-]*'  # of a directory: one part of a path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial(Training):
    """One training of a sweep.

    Attributes:
      number: from 0, in the order of the sweep.
      varied: the settings that the sweep sets; `overrides` has those of the command line too.
    """

    number: int
    varied: dict[str, Any]

    @property
    def title(self) -> str:
        return f'trial {self.number}'


@dataclasses.dataclass
class Fate:
    """What became of a trial; it is kept in STATE_FILE.

    Attributes:
      status: WAITING, RUNNING, DONE, PRUNED or FAILED.
      starts: how often it was started, in all calls of the command.
      reason: why it failed or was pruned, a line.
      study_number: of the trial in Optuna's study; -1 without one.
    """

    status: str = WAITING
    starts: int = 0
    reason: str = ''
    study_number: int = -1


def names_of(varied: Sequence[dict[str, Any]], begun: Sequence[dict] = ()) -> list[str]:
    """A name for each trial: 'optimizer.learning_rate=0.001,data.seed=0' of the settings that differ between trials.

    Args:
      varied: the settings of each trial, of one at least.
      begun: 'varied' and 'name' of trials of an earlier call. They keep their names, so that a sweep file to which a setting
        is added finds what is trained.

    Raises:
      SweepError: two trials are the same, or would have the same directory.
    """
    for i, trial in enumerate(varied):
        if (first := varied.index(trial)) != i:
            raise SweepError(f'trials {first} and {i} of the sweep are the same: {name_of(trial)}')
    same = {
        name: value
        for name, value in varied[0].items()
        if len(varied) > 1 and all(trial.get(name, _MISSING) == value for trial in varied)
    }
    names = [name_of({name: value for name, value in trial.items() if name not in same}) for trial in varied]
    for i, trial in enumerate(varied):
        names[i] = next((record['name'] for record in begun if record['varied'] == trial), names[i])
    for i, name in enumerate(names):
        if (first := names.index(name)) != i:
            raise SweepError(f'trials {first} and {i} would both be in the directory {name}; name another --output')
    return names


_MISSING = object()


def name_of(varied: dict[str, Any]) -> str:
    """The name of a trial's directory; a hash ends it where it does not tell all, so that no two trials share one."""
    words = [f'{name}={_shown(value)}' for name, value in varied.items()]
    whole = ','.join(words) or 'all'
    name = re.sub(r'[^\w.,=+\-]', '_', whole, flags=re.ASCII)
    if len(name) <= LONGEST_NAME and name == whole:
        return name
    return f'{name[: LONGEST_NAME - 13]}-{hashlib.sha256(json.dumps(words).encode()).hexdigest()[:12]}'


def _shown(value) -> str:
    return f'{value:g}' if isinstance(value, float) and float(f'{value:g}') == value else str(value)


def make_trial(
    file: pathlib.Path, output: pathlib.Path, base: dict, varied: dict, number: int, name: str = ''
) -> Trial:
    """One trial, its config checked.

    Args:
      file: config file.
      output: directory above those of the trials.
      base: overrides of the command line.
      varied: overrides of the sweep.

    Raises:
      ConfigError: naming the trial.
    """
    name = name or name_of(varied)
    if twice := base.keys() & varied.keys():
        raise SweepError(f'--config.{min(twice)} is given, and the sweep varies it; leave it out')
    overrides = {**base, **varied}
    try:
        config = config_lib.load(file, overrides)
    except ConfigError as error:
        raise SweepError(f'trial {number} ({name}): {error}') from error
    return Trial(
        name=name,
        file=file,
        overrides=overrides,
        config=config,
        workdir=output / name,
        number=number,
        varied=varied,
    )


# ---- what is kept --------------------------------------------------------------


@dataclasses.dataclass
class State:
    """Trials and their fates, as STATE_FILE keeps them."""

    directory: pathlib.Path
    settings: dict[str, Any]  # of the command: what a second call must agree in
    trials: list[Trial] = dataclasses.field(default_factory=list)
    fates: list[Fate] = dataclasses.field(default_factory=list)

    def add(self, trial: Trial, fate: Fate | None = None) -> None:
        self.trials.append(trial)
        self.fates.append(fate or Fate())

    def save(self) -> None:
        """Writes STATE_FILE anew."""
        self.directory.mkdir(parents=True, exist_ok=True)
        records = [
            {'name': trial.name, 'varied': trial.varied, **dataclasses.asdict(fate)}
            for trial, fate in zip(self.trials, self.fates, strict=True)
        ]
        text = json.dumps({'settings': self.settings, 'trials': records}, indent=1)
        write_file(self.directory / STATE_FILE, (text + '\n').encode())


def read_state(directory: pathlib.Path) -> dict | None:
    """What STATE_FILE holds, checked: {'settings': {...}, 'trials': [{'name', 'varied', ...}]}; None where no sweep has begun.

    Raises:
      SweepError: the file is damaged.
    """
    path = directory / STATE_FILE
    try:
        saved = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, cli.one_line(error)) from None
    kinds = {'name': str, 'varied': dict} | {field.name: field.type for field in dataclasses.fields(Fate)}
    try:
        kept = saved['settings']
        if not isinstance(kept['config'], str) or not isinstance(kept['overrides'], dict):
            raise TypeError('settings')
        for record in saved['trials']:
            for name, kind in kinds.items():
                if type(record[name]) is not kind:
                    raise TypeError(name)
            if not re.fullmatch(SAFE_NAME, record['name']) or record['status'] not in STATUSES:
                raise TypeError('name')
    except (KeyError, TypeError, IndexError) as error:
        raise _damaged(path, cli.one_line(error)) from None
    return saved


def _damaged(path: pathlib.Path, why: str) -> SweepError:
    return SweepError(
        f'{path} is damaged ({cli.shorten(why, 80)}); delete it: trials that are finished are found by their directories'
    )


def with_fates(state: State, saved: dict | None, *, again: bool = True) -> None:
    """Gives trials the fates that an earlier call has left. again: those that were running then, or failed, wait again."""
    kept = {record['name']: record for record in (saved or {}).get('trials', [])}
    for i, trial in enumerate(state.trials):
        if record := kept.get(trial.name):
            fate = Fate(**{field.name: record[field.name] for field in dataclasses.fields(Fate)})
            if again and fate.status in (RUNNING, FAILED):
                fate.status, fate.reason = WAITING, ''
            state.fates[i] = fate
        if trial.is_finished():
            state.fates[i].status, state.fates[i].reason = DONE, ''
        elif state.fates[i].status == DONE:  # its directory is gone
            state.fates[i].status = WAITING


def check_same_sweep(saved: dict | None, settings: dict[str, Any], directory: pathlib.Path) -> None:
    """Raises SweepError where the directory holds a sweep of another config or of other common overrides."""
    if saved is None:
        if directory.exists() and not directory.is_dir():
            raise SweepError(f'--output={directory} is a file; name a directory')
        return
    for name, value in settings.items():
        was = saved.get('settings', {}).get(name)
        if name == 'config' and isinstance(was, str):
            was = os.path.abspath(was)
        if was != json.loads(json.dumps(value)):
            raise SweepError(f'{directory} holds a sweep with {name} {was!r}, not {value!r}; name another --output')


def relative(path: pathlib.Path) -> pathlib.Path:
    """The path from where one stands, where it lies below; else as it is."""
    absolute = pathlib.Path(os.path.abspath(path))
    here = pathlib.Path.cwd()
    return absolute.relative_to(here) if absolute.is_relative_to(here) else absolute


# ---- what configs have in common -----------------------------------------------


def data_settings(config) -> str:
    """What a check of the data depends on."""
    return json.dumps([dataclasses.asdict(config.data), config.model.vocab_size, config.train.steps])


CHANGES_THE_STEP = ('train.accumulation_steps',)


def step_settings(config) -> str:
    """What the compiled step depends on, but for numbers that change no shape."""
    flat = config_lib.flatten(config)
    free = ('seed', 'learning_rate', 'steps', 'weight_decay', 'path')
    kept = {name: value for name, value in flat.items() if not name.endswith(free) or name in CHANGES_THE_STEP}
    return json.dumps(kept)
