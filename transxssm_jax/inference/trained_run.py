"""The one way to open a training run for use: parameters, config, tokenizer, and what identifies them."""

import contextlib
import dataclasses
import math
import pathlib
import sys

import jax

from transxssm_jax import config as config_lib
from transxssm_jax.config import Config, ConfigError
from transxssm_jax.data.manifest import DataError
from transxssm_jax.data.tokenizer import load_tokenizer
from transxssm_jax.data.vocabulary import check_tokenizer, describe, is_same
from transxssm_jax.inference.sampling import InputError
from transxssm_jax.parallel import mesh
from transxssm_jax.training import checkpoint, run_reference
from transxssm_jax.training.digest import of_config as config_digest


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A checkpoint of a run, read.

    Attributes:
      workdir: directory of the run.
      step: of the checkpoint.
      config: that the checkpoint was trained with; with overrides, as changed by them.
      tokenizer: of the training data.
      params: nested dict of float32 arrays, in shards over `mesh`, or whole on the first device.
      weights: of checkpoint.WEIGHTS, which of them `params` is.
      mesh: devices that share the work; None: the first device.
    """

    workdir: str
    step: int
    config: Config
    tokenizer: object
    params: dict = dataclasses.field(repr=False)
    mesh: jax.sharding.Mesh | None = None
    weights: str = 'trained'

    @property
    def config_digest(self) -> str:
        """sha256 of the config, in hexadecimal digits."""
        return config_digest(self.config)

    def on_devices(self):
        """A context in which `mesh` is the mesh in use."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


def open_trained_run(
    workdir: str,
    step: int = -1,
    tokenizer: str = '',
    *,
    overrides: dict[str, str] | None = None,
    flag: str = '--tokenizer',
    weights: str = 'trained',
) -> TrainedRun:
    """Reads a checkpoint of a run; the tokenizer is read and checked before the parameters.

    Args:
      workdir: directory of the run; @STEP, @best or @latest may follow.
      step: which checkpoint; -1: the newest that can be read.
      tokenizer: 'byte', a tokenizers json file or a prepared directory; '': that of the run's training data.
      overrides: dotted name -> value or text of settings that the checkpoint is not bound to. data.path is where the
        training data, and so the tokenizer, is now. mesh.data devices share
        the rows, mesh.tensor devices the heads and the vocabulary; without overrides one device does the work, whatever
        the mesh of training was.
      weights: the 'trained' ones, or 'ema', their average over steps.
      flag: that errors name as the remedy for a missing or wrong tokenizer.

    Raises:
      CheckpointError: there is no such checkpoint, or it cannot be read.
      DataError: there is no such tokenizer, or it is not the one of the training data. Where the training data is not
        here any more, only the size of the vocabulary can be checked; a line on stderr reports that.
      InputError, ConfigError: an unknown setting, one that the checkpoint is bound to, or a mesh with more devices than
        there are or that does not divide the model.
    """
    workdir, step = run_reference.resolve(workdir, step)
    config = checkpoint.load_config(workdir, step)
    used = _config_here(config, overrides) if overrides else config
    if not tokenizer and used.data.path != config.data.path:
        tokenizer, flag = used.data.path, '--config.data.path'  # the data lies elsewhere now
    loaded = _load_tokenizer(workdir, config, tokenizer, flag)
    device_mesh = _mesh_of(used) if overrides else None
    with contextlib.nullcontext() if device_mesh is None else jax.set_mesh(device_mesh):
        params, _, step = checkpoint.load_trained_step(workdir, step, weights)
    return TrainedRun(str(workdir), step, used, loaded, params, device_mesh, weights)


def _load_tokenizer(workdir, config: Config, source: str, flag: str):
    trained = config.data.tokenizer_path
    if not (source or trained):
        raise DataError(
            f'the config of --workdir={workdir} does not name its training data (data.path is empty); give {flag}=PATH'
        )
    try:
        tokenizer = load_tokenizer(source or trained)
    except DataError as error:
        if source:
            raise DataError(f'{error} ({flag})') from error
        is_relative = '://' not in trained and not pathlib.Path(trained).is_absolute()
        raise DataError(
            f'{error}; that is {_setting(config)} of the run, whose tokenizer is needed: give it with {flag}=PATH'
            + (', or call this where the run was started, because that path is relative' if is_relative else '')
        ) from error
    name = f'{flag}={source}' if source else f'{_setting(config)}={trained}'
    check_tokenizer(tokenizer, config.model.vocab_size, f'the tokenizer of {name}')
    if source:
        _check_same(tokenizer, config, name)
    return tokenizer


def _setting(config: Config) -> str:
    """The setting that leads to the tokenizer of the training data."""
    return 'data.path' if config.data.path else 'data.sources'


def _check_same(tokenizer, config: Config, name: str) -> None:
    """Raises DataError if the tokenizer is not the one whose digest the training data records."""
    trained = config.data.tokenizer_path
    try:
        expected = describe(trained) if trained else None
    except DataError:
        expected = None
    if expected is None:
        where = (
            f'the training data ({_setting(config)}={trained}) is not here'
            if trained
            else 'data.path of the run is empty'
        )
        print(
            f'note: {name} has {tokenizer.vocab_size} ids, which fit model.vocab_size={config.model.vocab_size}; its '
            f'digest could not be checked, because {where}',
            file=sys.stderr,
        )
    elif not is_same(tokenizer.describe(), expected):
        raise DataError(
            f'{name} has another tokenizer than the training data, {_setting(config)}={trained}; give the tokenizer of the '
            'training data'
        )


def _config_here(saved: Config, overrides: dict) -> Config:
    """The run's config with the overrides of a command: one device unless its mesh is set.

    Raises:
      ConfigError: an unknown setting, or one that the checkpoint is bound to.
    """
    alone = dict.fromkeys((f'mesh.{name}' for name in (*mesh.AXES, 'slices')), 1)
    # The batch of a training step does not matter here; as many rows as devices divide by any mesh.
    batch = {'data.global_batch': max(jax.device_count(), 1), 'train.accumulation_steps': 1}
    config = config_lib.replace(saved, alone | overrides)
    unfit = config_lib.unfit_for_checkpoint(saved, config)
    if unfit:
        raise ConfigError(f'--config.{unfit[0].replace(" in this config", "")}; it cannot be changed after training')
    return config_lib.replace(config, batch)


def _mesh_of(config: Config) -> jax.sharding.Mesh | None:
    """The mesh of the settings; None for one device."""
    for name in (*mesh.AXES, 'slices'):
        size = getattr(config.mesh, name)
        if size != 1 and name not in ('data', 'tensor'):
            raise InputError(f'mesh.{name}={size} must be 1 here; use mesh.data and mesh.tensor')
    sizes = [getattr(config.mesh, name) for name in mesh.AXES]
    if -1 in sizes:
        return mesh.build(config)
    if (count := math.prod(sizes)) == 1:
        return None
    if count > jax.device_count():
        shape = ' x '.join(f'mesh.{name}={size}' for name, size in zip(mesh.AXES, sizes) if size != 1)
        raise InputError(f'{shape} must be at most the {jax.device_count()} devices that are here')
    return mesh.build(config, jax.devices()[:count])
