"""Checkpoints on the hosts' own disks (train.checkpoint_local_dir), which cost less and can be made more often.

train.checkpoint_local_dir/RUN/process-N/STEP/ holds what the devices of process N hold of the state:

- `state.safetensors`: each of their shards once, named by the array and the range that it is of;
- `config.json`, `data.json` and `digests.json`, as those of a checkpoint on the shared file system (checkpoint.py).

RUN is a random name that WORKDIR/checkpoints/local.json keeps, so that what another run has left is never taken for this
one's. A run that starts again prefers the newest step that every process has whole, where it is newer than the newest
checkpoint of the workdir. A host that is new, or a mesh that lays the shards otherwise, has none: then the workdir's is used.
"""

import json
import logging
import pathlib
import re
import secrets
import shutil
import threading

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from transxssm_jax import config as config_lib
from transxssm_jax.config import Config
from transxssm_jax.parallel import processes
from transxssm_jax.training import checkpoint_files as files
from transxssm_jax.training import digest
from transxssm_jax.training.checkpoint import check_fits

NAME_FILE = 'local.json'  # beside the checkpoints of the workdir
KEPT = 2  # while the processes write the newest, not all of them have it
ARRAYS, TEXTS = 'state.safetensors', ('config.json', 'data.json')

log = logging.getLogger(__name__)


class LocalCheckpoints:
    """Saves and restores this process's part of the run; does nothing where train.checkpoint_local_dir is empty.

    A failure costs the local checkpoint, is logged, and never ends the run.

    Args:
      workdir: of the run.
      config: of the run, as it was given.

    Attributes:
      restored_config: after `restore`, the config that the checkpoint was trained with; None before.
    """

    def __init__(self, workdir: pathlib.Path, config: Config):
        self._config, self._thread, self.restored_config = config, None, None
        self._every, self._directory = config.train.checkpoint_local_every_steps, None
        if config.train.checkpoint_local_dir:
            name = processes.broadcast_from_0(_name_of_run(workdir) if processes.is_coordinator() else '')
            own = pathlib.Path(config.train.checkpoint_local_dir).absolute() / name
            self._directory = own / f'process-{processes.process_index()}'
            self._remove(lambda path: not path.name.isdigit())  # what an earlier start began to write

    def is_due(self, step: int) -> bool:
        return self._directory is not None and step % self._every == 0

    def steps(self) -> list[int]:
        return files.steps_in(self._directory) if self._directory else []

    def save(self, step: int, state: dict, data_position: dict) -> None:
        """Starts writing this process's part; returns once it is copied from the devices. Arguments as `Checkpoints.save`."""
        self.wait()
        if step in self.steps():
            return
        arrays = nnx.traversals.flatten_mapping(state, sep='/')
        for array in arrays.values():
            array.copy_to_host_async()
        shards = {}
        for path, array in arrays.items():
            for shard in array.addressable_shards:
                name = _name(path, shard.index, array.shape)
                if name not in shards:
                    shards[name] = np.array(shard.data)  # a copy: the next step writes over what the device has
        texts = {'config.json': config_lib.to_json(self._config), 'data.json': json.dumps(data_position)}
        self._thread = threading.Thread(
            target=self._write, args=[step, shards, texts], name='save a local checkpoint', daemon=True
        )
        self._thread.start()

    def _write(self, step: int, shards: dict[str, np.ndarray], texts: dict[str, str]) -> None:
        partial = self._directory / f'{step}{files.PARTIAL}'
        try:
            partial.mkdir(parents=True)
            save_file(shards, partial / ARRAYS)
            for name, text in texts.items():
                (partial / name).write_text(text)
            digests = digest.of_files(partial, [ARRAYS, *texts])
            digest.write_json(partial / 'digests.json', {'format': files.FORMAT, 'step': step, 'files': digests})
            partial.rename(self._directory / str(step))
            old = self.steps()[:-KEPT]
            self._remove(lambda path: path.name.isdigit() and int(path.name) in old)
        except Exception as error:  # safetensors has errors of its own for a full disk
            log.error(
                'the local checkpoint of step %d could not be written to %s: %s%s',
                step,
                self._directory,
                files.first_line(error),
                processes.process_label(),
            )
            shutil.rmtree(partial, ignore_errors=True)

    def restore(self, abstract_state: dict, newer_than: int) -> tuple[int, dict, dict] | None:
        """The newest step above `newer_than` that all processes can read, or None. Every process calls it, at the same place.

        Args:
          abstract_state: ShapeDtypeStructs with the shardings to restore into.
          newer_than: the newest step of the workdir's checkpoints.

        Returns:
          (step, state, data position).
        """
        if self._directory is None:
            return None
        own = [step for step in self.steps() if step > newer_than]
        common = set.intersection(*map(set, processes.all_gather_json(own)))
        for step in sorted(common, reverse=True):
            restored, problem = None, ''
            try:
                restored = self._read(self._directory / str(step), abstract_state)
            except Exception as error:  # whatever is wrong with it, the workdir's is there
                problem = files.first_line(error)
            problems = [text for text in processes.all_gather_json(problem) if text]
            if not problems:
                state, position, self.restored_config = restored
                return step, state, position
            log.warning(
                'the local checkpoint of step %d in %s is not used: %s', step, self._directory.parent, problems[0]
            )
        return None

    def _read(self, path: pathlib.Path, abstract_state: dict) -> tuple[dict, dict, Config]:
        digests = files.read_digests(path)
        digest.check(path, digests)
        saved = files.read_config(path, digests)
        check_fits(f'local checkpoint {path}', saved, self._config)
        position = json.loads(digest.read_checked(path, 'data.json', digests))
        shards = load_file(path / ARRAYS)

        def place(array, wanted):
            def part(index):
                name = _name(array, index, wanted.shape)
                if name not in shards:
                    raise ValueError(f'it holds no {name}: the mesh or its hosts are not those that it was saved on')
                return shards[name]

            return jax.make_array_from_callback(wanted.shape, wanted.sharding, part, dtype=wanted.dtype)

        flat = nnx.traversals.flatten_mapping(abstract_state, sep='/')
        state = {array: place(array, wanted) for array, wanted in flat.items()}
        return nnx.traversals.unflatten_mapping(jax.block_until_ready(state), sep='/'), position, saved

    def forget_after(self, step: int) -> None:
        """Removes later steps: those that the run takes from here on are others."""
        self.wait()
        self._remove(lambda path: path.name.isdigit() and int(path.name) > step)

    def remove(self) -> None:
        """Removes all: the run is finished."""
        self.wait()
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)
            if not any(self._directory.parent.glob('*')):
                shutil.rmtree(self._directory.parent, ignore_errors=True)

    def wait(self) -> None:
        """Blocks until what was started is written, or has failed."""
        if self._thread:
            self._thread.join()

    def _remove(self, is_old) -> None:
        for path in self._directory.glob('*') if self._directory else ():
            if is_old(path):
                shutil.rmtree(path, ignore_errors=True)


def _name_of_run(workdir: pathlib.Path) -> str:
    """The name of a run's local checkpoints, which it is given where it has none."""
    path = workdir / 'checkpoints' / NAME_FILE
    try:
        name = digest.read_json(path)['run']
        if re.fullmatch('[0-9a-f]{16}', name):
            return name
    except (OSError, digest.DamagedError, KeyError, TypeError):
        pass
    name = secrets.token_hex(8)
    with files.one_line_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        digest.write_json(path, {'run': name})
    return name


def _name(path: str, index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """'params/embedding[0:8,0:32]'."""
    ranges = ','.join('{}:{}'.format(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))
    return f'{path}[{ranges}]'
