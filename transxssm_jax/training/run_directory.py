"""The workdir of a run: made, or found to be of the same run, and seen alike by every process."""

import hashlib
import json
import pathlib
import secrets
import time
from collections.abc import Iterable

from transxssm_jax import config as config_lib
from transxssm_jax.config import Config, ConfigError
from transxssm_jax.data.loader import Loader
from transxssm_jax.data.manifest import write_file
from transxssm_jax.parallel import processes
from transxssm_jax.training import checkpoint
from transxssm_jax.training import checkpoint_files as files
from transxssm_jax.training.checkpoint_files import CheckpointError

METRICS = 'metrics.jsonl'


def read_metrics(workdir: pathlib.Path) -> Iterable[dict]:
    """Records of a run's metrics, each step's once; a line that is none, as a killed run may leave, is passed over."""
    path = workdir / METRICS
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line.decode())
        except ValueError:
            continue
        if isinstance(record, dict) and type(record.get('step')) is int:
            yield {name: value for name, value in record.items() if isinstance(value, int | float)}


def open_workdir(workdir: pathlib.Path, config: Config, is_shared: bool = True) -> None:
    """Makes the workdir or checks that it is a run of the same config, and saves the config in it.

    Args:
      is_shared: whether all processes of the run have this directory; else that of process 0 alone is checked.

    Raises:
      CheckpointError: the workdir holds a run whose checkpoints this config
        does not fit, or a config.json of another program, or it cannot be written,
        or the processes of this run do not all see the same directory.
    """
    path = workdir / 'config.json'
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # A run without a checkpoint does not fix the config of its workdir.
        if not files.steps_in(workdir / 'checkpoints'):
            files.refuse_foreign(path)
        elif path.exists():
            checkpoint.check_fits(f'--workdir={workdir}', _read_config(path), config)
        if processes.is_coordinator():
            write_file(path, config_lib.to_json(config).encode())
        if is_shared:
            _check_shared(workdir)
    except OSError as error:
        raise CheckpointError(
            f'--workdir={workdir} cannot be written ({error.strerror or error}); choose another'
        ) from error


def saved_config(workdir: pathlib.Path) -> Config | None:
    """The config of the run in a workdir; None where it has no checkpoint. Errors as those of `load_config`.

    It is that of a checkpoint, which has a digest; the workdir's own, which has none, is for people.
    """
    if not files.steps_in(workdir / 'checkpoints'):
        return None
    return checkpoint.load_config(workdir)


def check_same_on_all_processes(config: Config, loader: Loader) -> None:
    """Raises ConfigError where processes were started with different settings or see different data."""
    own = {'settings': config_lib.to_json(config), 'data.path or data.sources': loader.fingerprint}
    digests = {name: hashlib.sha256(str(value).encode()).hexdigest() for name, value in own.items()}
    all_digests = processes.all_gather_json(digests)
    for name in own:
        others = [process for process, theirs in enumerate(all_digests) if theirs[name] != all_digests[0][name]]
        if others:
            raise ConfigError(
                f'{name}: those of process {others[0]} are not those of process 0; start the same command '
                'on every host, with the same files'
            )


def _check_shared(workdir: pathlib.Path, patience_seconds: float = 20.0) -> None:
    """Raises CheckpointError unless all processes see the directory that process 0 sees."""
    if not processes.is_multiprocess():
        return
    witness = workdir / f'.shared-{secrets.token_hex(8)}'
    if processes.is_coordinator():
        witness.touch()
    witness = workdir / processes.broadcast_from_0(witness.name)
    deadline = time.monotonic() + patience_seconds  # network file systems show a new file late
    while not witness.exists() and time.monotonic() < deadline:
        list(workdir.iterdir())  # makes some of them look again
        time.sleep(0.2)
    blind = [process for process, sees in enumerate(processes.all_gather_json(witness.exists())) if not sees]
    if processes.is_coordinator():
        witness.unlink()
    if blind:
        raise CheckpointError(
            f'--workdir={workdir} of process {blind[0]} is not the directory of process 0; it must be on a '
            'file system that all hosts share (NFS, Lustre, a mounted bucket)'
        )


def _read_config(path: pathlib.Path) -> Config:
    try:
        return config_lib.from_json(path.read_text(encoding='utf-8'))
    except OSError:
        raise
    except Exception as error:  # no UTF-8, no JSON, no config
        raise CheckpointError(
            f'{path}: {files.first_line(error)}; delete it if its checkpoints are of this config'
        ) from error
