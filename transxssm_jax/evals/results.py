"""Files of results: where they go, and what made them.

Every evaluation writes to `WORKDIR/evals/KIND-step-STEP-TIME`, so that no result overwrites another, and every file
names the checkpoint, the config, the versions and the command that it comes from.
"""

import datetime
import importlib.metadata
import json
import pathlib
import shlex
import sys
import tempfile
from collections.abc import Sequence

import jax

from transxssm_jax.config import Config
from transxssm_jax.data.manifest import write_file
from transxssm_jax.inference.sampling import InputError
from transxssm_jax.inference.trained_run import TrainedRun, config_digest

PACKAGES = ('transxssm_jax', 'jax', 'jaxlib', 'flax', 'numpy')


def of_run(run: TrainedRun, module: str, arguments: Sequence[str], *, packages: tuple[str, ...] = ()) -> dict:
    """What made a result of a checkpoint, and `of_command`.

    'workdir' (absolute), 'step', 'weights' ('trained' or 'ema') and 'tokenizer' (its description).
    """
    return {
        'workdir': str(pathlib.Path(run.workdir).absolute()),
        'step': run.step,
        'weights': run.weights,
        'tokenizer': run.tokenizer.describe(),
        **of_command(run.config, module, arguments, packages=packages),
    }


def of_command(config: Config, module: str, arguments: Sequence[str], *, packages: tuple[str, ...] = ()) -> dict:
    """What made a result.

    Args:
      config: of the model.
      module: of the command, e.g. 'transxssm_jax.evals.needle'.
      arguments: of the command, without its name.
      packages: distributions whose versions matter besides PACKAGES.

    Returns:
      'config_digest', 'date' (UTC, ISO 8601), 'command' (to be pasted into a shell), 'versions' and 'device'.
    """
    return {
        'config_digest': config_digest(config),
        'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        'command': shlex.join(['python', '-m', module, *arguments]),
        'versions': {'python': sys.version.split()[0]} | {name: _version(name) for name in (*PACKAGES, *packages)},
        'device': jax.devices()[0].device_kind,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return 'unknown'


def choose_output(given: str, run: TrainedRun | None, kind: str, suffix: str = '.json') -> pathlib.Path:
    """Where a result will be written: a file, or a directory if suffix is ''. Called before the work.

    Args:
      given: --output; its directory must exist, and it must not. '': a new name in the workdir.
      run: the evaluated checkpoint; not read if `given` is not empty.
      kind: of the evaluation, e.g. 'needle'.

    Raises:
      InputError: `given` exists, or its directory does not.
      OSError: the directory cannot be written.
    """
    if given:
        path = pathlib.Path(given)
        if path.exists():
            raise InputError(f'--output={given} exists; name a new {"file" if suffix else "directory"}')
        if not path.absolute().parent.is_dir():
            raise InputError(f'--output={given}: its directory does not exist; make it first')
    else:
        folder = pathlib.Path(run.workdir) / 'evals'
        folder.mkdir(exist_ok=True)
        time = datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%dT%H-%M-%S')
        name, count = f'{kind}-step-{run.step}-{time}', 1
        path = folder / f'{name}{suffix}'
        while path.exists():
            count += 1
            path = folder / f'{name}-{count}{suffix}'
    with tempfile.TemporaryFile(dir=path.absolute().parent):  # raises where nothing can be written
        return path


def write_json(path: pathlib.Path, record: dict, **settings) -> None:
    """Writes a record as JSON, whole or not at all; settings are those of json.dumps."""
    write_file(path, (json.dumps(record, indent=1, ensure_ascii=False, **settings) + '\n').encode())
