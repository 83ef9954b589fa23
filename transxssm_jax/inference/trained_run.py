"""The one way to open a training run for use: parameters, config, tokenizer, and what identifies them."""

import contextlib
import dataclasses
import hashlib
import json
import sys

import jax

from transxssm_jax import config as config_lib
from transxssm_jax.config import Config
from transxssm_jax.data.manifest import DataError
from transxssm_jax.data.tokenizer import load_tokenizer
from transxssm_jax.data.vocabulary import check_tokenizer, describe, is_same
from transxssm_jax.inference.sampling import InputError
from transxssm_jax.parallel import mesh
from transxssm_jax.training import checkpoint


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A checkpoint of a run, read.

    Attributes:
      workdir: directory of the run, as given.
      step: of the checkpoint.
      config: that the checkpoint was trained with.
      tokenizer: of the training data.
      params: nested dict of float32 arrays, in shards over `mesh`, or whole on the first device.
      mesh: devices that share the work; None: the first device.
    """

    workdir: str
    step: int
    config: Config
    tokenizer: object
    params: dict = dataclasses.field(repr=False)
    mesh: jax.sharding.Mesh | None = None

    @property
    def config_digest(self) -> str:
        """sha256 of the config, in hexadecimal digits."""
        return config_digest(self.config)

    def on_devices(self):
        """A context in which `mesh` is the mesh in use."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


def config_digest(config: Config) -> str:
    """sha256 of a config's settings and values, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(json.loads(config_lib.to_json(config)), sort_keys=True).encode()).hexdigest()


def open_run(
    workdir: str, step: int = -1, tokenizer: str = '', *, data: int = 1, tensor: int = 1, flag: str = '--tokenizer'
) -> TrainedRun:
    """Reads a checkpoint of a run; the tokenizer is read and checked before the parameters.

    Args:
      workdir: directory of the run.
      step: which checkpoint; -1: the newest that can be read.
      tokenizer: 'byte', a tokenizers json file or a prepared directory; '': that of the run's training data.
      data, tensor: devices that split the rows, and the heads and the vocabulary.
      flag: that errors name as the remedy for a missing or wrong tokenizer.

    Raises:
      CheckpointError: there is no such checkpoint, or it cannot be read.
      DataError: there is no such tokenizer, or it is not the one of the training data. Where the training data is not
        here any more, only the size of the vocabulary can be checked; a line on stderr reports that.
      InputError, ConfigError: data x tensor are more devices than there are, or do not divide the model.
    """
    config = checkpoint.load_config(workdir, step)
    loaded = _load_tokenizer(workdir, config, tokenizer, flag)
    device_mesh = _decoding_mesh(config, data, tensor)
    with contextlib.nullcontext() if device_mesh is None else jax.set_mesh(device_mesh):
        params, config, step = checkpoint.load_trained_step(workdir, step)
    return TrainedRun(str(workdir), step, config, loaded, params, device_mesh)


def _load_tokenizer(workdir, config: Config, source: str, flag: str):
    trained = config.data.path
    if not (source or trained):
        raise DataError(
            f'the config of --workdir={workdir} does not name its training data (data.path is empty); give {flag}=PATH'
        )
    try:
        tokenizer = load_tokenizer(source or trained)
    except DataError as error:
        raise DataError(
            f'{error} ({flag})'
            if source
            else f'{error}; that is data.path of the run, whose tokenizer is needed: give it with {flag}=PATH'
        ) from error
    name = f'{flag}={source}' if source else f'data.path={trained}'
    check_tokenizer(tokenizer, config.model.vocab_size, f'the tokenizer of {name}')
    if source:
        _check_same(tokenizer, config, name)
    return tokenizer


def _check_same(tokenizer, config: Config, name: str) -> None:
    """Raises DataError if the tokenizer is not the one whose digest the training data records."""
    trained = config.data.path
    try:
        expected = describe(trained) if trained else None
    except DataError:
        expected = None
    if expected is None:
        where = f'the training data (data.path={trained}) is not here' if trained else 'data.path of the run is empty'
        print(
            f'note: {name} has {tokenizer.vocab_size} ids, which fit model.vocab_size={config.model.vocab_size}; its '
            f'digest could not be checked, because {where}',
            file=sys.stderr,
        )
    elif not is_same(tokenizer.describe(), expected):
        raise DataError(
            f'{name} has another tokenizer than the training data, data.path={trained}; give the tokenizer of the '
            'training data'
        )


def _decoding_mesh(config: Config, data: int, tensor: int) -> jax.sharding.Mesh | None:
    count = data * tensor
    if count == 1 and data == 1:
        return None
    if not (data > 0 and 0 < count <= len(jax.devices())):
        raise InputError(
            f'--data={data} x --tensor={tensor} must be from 1 to the {len(jax.devices())} devices that are here'
        )
    settings = json.loads(config_lib.to_json(config))
    settings['mesh'] |= dict(data=data, fsdp=1, context=1, tensor=tensor, slices=1)
    settings['data']['global_batch'] = data
    settings['train']['accumulation_steps'] = 1
    return mesh.build(config_lib.from_json(json.dumps(settings)), jax.devices()[:count])
