"""What a new run starts from: random parameters, or the weights that train.init_from names.

The weights are those of a checkpoint of another run, read shard by shard and checked against their digests, or of a
directory in the published format. Data, lengths, batch, schedule, rope and everything else that no array depends on is
free. An embedding with fewer rows than model.vocab_size is taken, and the rows that it lacks are initialised as in a
new model.

The config that a run saves names what it started from (`settle`), so that a resumed run knows it whatever its command
line tells now.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from transxssm_jax import config as config_lib
from transxssm_jax.config import Config
from transxssm_jax.data.manifest import DataError
from transxssm_jax.data.vocabulary import describe, is_same
from transxssm_jax.model.parameters import param_axes
from transxssm_jax.parallel import collectives, mesh, processes
from transxssm_jax.training import checkpoint, optimizer, run_directory, run_reference
from transxssm_jax.training import checkpoint_files as files
from transxssm_jax.training import step as step_lib
from transxssm_jax.training.checkpoint_files import CheckpointError

# Reads a directory in the published format: ({path of an array: what has `shape` and `read()`}, its config).
OpenWeights = Callable[[pathlib.Path], tuple[dict, Config]]
RECORDED = ('train.init_from', 'train.init_what', 'optimizer.updates_before')


def settle(config: Config, workdir: pathlib.Path, open_weights: OpenWeights) -> Config:
    """The config with what the run started from, or starts from now: a directory and a step, whatever was typed.

    Nothing is written. Only process 0 looks, for a run that is training may meanwhile save a better checkpoint.

    Raises:
      CheckpointError: the weights are not there or do not fit the model, naming an array and both shapes.
    """
    return config_lib.replace(config, processes.broadcast_from_0(_recorded(config, workdir, open_weights)))


def _recorded(config: Config, workdir: pathlib.Path, open_weights: OpenWeights) -> dict:
    if not processes.is_coordinator():
        return {}
    if saved := run_directory.saved_config(workdir):
        flat = config_lib.flatten(saved)
        return {name: flat[name] for name in RECORDED}
    if not config.train.init_from:
        return dict(zip(RECORDED, ('', config.train.init_what, 0)))
    source = _find(config, open_weights)
    _check_fits(source, config)
    return dict(zip(RECORDED, (source.reference, config.train.init_what, source.updates(config))))


def create(
    config: Config, device_mesh: jax.sharding.Mesh, open_weights: OpenWeights
) -> tuple[step_lib.State, list[str]]:
    """The state of a new run, in its shards, and lines that tell what it was made of; none for random parameters.

    Args:
      config: from `settle`.
    """
    if not config.train.init_from:
        return step_lib.create_state(config, device_mesh), []
    source = _find(config, open_weights)
    wanted = step_lib.abstract_state(config, device_mesh)
    with jax.set_mesh(device_mesh):
        given = source.read(_as_stored(source, config, device_mesh))
        params, grown = _fill(config, given['params'], wanted['params'], 'params')
        if 'opt_state' in given:
            opt_state, _ = _fill(config, given['opt_state'], wanted['opt_state'], 'opt_state')
        else:
            init = functools.partial(optimizer.init, optimizer.make_optimizer(config))
            shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted['opt_state'])
            opt_state = jax.jit(init, out_shardings=shardings)(params)
        step = jax.device_put(jnp.zeros((), jnp.int32), wanted['step'].sharding)
        average = step_lib.average_in_shards(config, params)
    lines = [f'started from {config.train.init_what} of {source.reference}']
    lines += [
        f'  {path}: {rows:,} rows there, {size:,} here; the other {size - rows:,} are initialised as in a new model'
        for path, rows, size in grown
    ]
    state = {'step': step, 'params': params, 'opt_state': opt_state} | average
    return state, lines + _note_of_tokenizer(source.config, config)


# ---- what is there -----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Source:
    """Weights to start from.

    Attributes:
      reference: the directory, absolute, with @STEP behind that of a run.
      config: of the run, or as an import of the published directory begins with.
      step: of the checkpoint; -1 where no optimizer state is there.
      read: (ShapeDtypeStructs with shardings of what is wanted of a state) -> arrays.
    """

    reference: str
    config: Config
    step: int
    read: Callable[[dict], dict]

    @property
    def name(self) -> str:
        return f'--init_from={self.reference}'

    def updates(self, config: Config) -> int:
        """How many updates the optimizer state has seen that a run of `config` starts from."""
        with_optimizer = config.train.init_what == 'params+optimizer'
        return self.step + self.config.optimizer.updates_before if with_optimizer else 0


def _find(config: Config, open_weights: OpenWeights) -> _Source:
    given = config.train.init_from
    directory, step = run_reference.resolve(given, flag='--init_from')
    if not directory.is_dir():
        raise CheckpointError(f'--init_from={given}: no such directory; give a workdir or a directory of weights')
    if not (directory / 'checkpoints').is_dir():
        if not (directory / 'config.json').exists() or not any(directory.glob('*.safetensors')):
            raise CheckpointError(
                f'--init_from={given} has neither checkpoints nor config.json and *.safetensors; give the workdir of a '
                'run that has saved, or a directory in the published format'
            )
        arrays, found = open_weights(directory)
        return _Source(str(directory.absolute()), found, -1, functools.partial(_read_arrays, arrays))

    def find(path):
        return files.read_config(path, files.read_digests(path)), int(path.name)

    found, step = checkpoint.read_trained(directory, step, find, '--init_from')
    return _Source(f'{directory.absolute()}@{step}', found, step, functools.partial(_read_groups, directory, step))


def _read_arrays(arrays: dict, abstract: dict) -> dict:
    """The parameters of a published directory, one array at a time."""

    def place(path, wanted):
        array = arrays[path].read()
        return jax.make_array_from_callback(array.shape, wanted.sharding, lambda index: array[index])

    wanted = nnx.traversals.flatten_mapping(abstract['params'])
    return {'params': nnx.traversals.unflatten_mapping({path: place(path, leaf) for path, leaf in wanted.items()})}


def _read_groups(directory: pathlib.Path, step: int, abstract: dict) -> dict:
    """The wanted part of a checkpoint's state; each process checks its share of the files."""

    def read(path):
        digests, state = files.read_digests(path), {}
        share = (jax.process_index(), jax.process_count()) if processes.is_multiprocess() else (0, 1)
        for group, wanted in files.grouped(abstract).items():
            state |= files.read_group(path, group, wanted, digests, *share)
        return state

    return checkpoint.read_trained(directory, step, read, '--init_from')


# ---- does it fit -------------------------------------------------------------


def _axes(config: Config) -> dict:
    """Logical axes of every array of a state, a tuple per leaf."""
    shapes = jax.eval_shape(functools.partial(step_lib.init_state, config), 0)
    params = param_axes(config.model)
    opt_state = optimizer.like_params(shapes['opt_state'], shapes['params'], params, ())
    return {'step': (), 'params': params, 'opt_state': opt_state}


def _as_stored(source: _Source, config: Config, device_mesh: jax.sharding.Mesh) -> dict:
    """What is read of the source: its shapes, in this run's shards. Rows of a vocabulary that grows are not split."""
    stored = jax.eval_shape(functools.partial(step_lib.init_state, source.config), 0)
    wanted = jax.eval_shape(functools.partial(step_lib.init_state, config), 0)

    def place(axes, leaf, ours):
        axes = axes if leaf.shape == ours.shape else tuple(None if axis == 'vocab' else axis for axis in axes)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=mesh.sharding(device_mesh, axes))

    # Orbax reads a whole group: with the optimizer's state comes the step of the source, which is not used.
    names = ['params'] if config.train.init_what == 'params' else ['params', 'step', 'opt_state']
    axes = _axes(config)
    return {
        name: jax.tree.map(place, axes[name], stored[name], wanted[name], is_leaf=collectives.is_axes) for name in names
    }


def _check_fits(source: _Source, config: Config) -> None:
    """Raises CheckpointError unless the source's arrays are those of the config, but for rows of the vocabulary."""
    theirs, ours = source.config, config
    if theirs.model.layer_pattern != ours.model.layer_pattern:
        raise CheckpointError(
            f'{source.name} has layers {"/".join(theirs.model.layer_pattern)} in a period and this config has '
            f'{"/".join(ours.model.layer_pattern)}; {_advice(theirs, ours, ("attention_period", "attention_offset"))}'
        )
    if config.train.init_what == 'params+optimizer':
        if source.step < 0:
            raise CheckpointError(f'{source.name} holds no optimizer state; give --init_what=params')
        if theirs.optimizer.name != ours.optimizer.name:
            raise CheckpointError(
                f'{source.name} holds the state of optimizer.name={theirs.optimizer.name!r}, not of '
                f'{ours.optimizer.name!r}; give --init_what=params, or the same optimizer'
            )
    parts = ('params',) if config.train.init_what == 'params' else ('params', 'opt_state')
    stored, wanted = _shapes(theirs, parts), _shapes(ours, parts)
    for path in sorted(wanted.keys() ^ stored.keys()):
        what = f'lacks {path}, which this config has' if path in wanted else f'has {path}, which this config lacks'
        raise CheckpointError(f'{source.name} {what}; {_advice(theirs, ours)}')
    unfit = [path for path in wanted if stored[path] != wanted[path] and not _grows(path, stored, wanted)]
    if unfit:
        more = f' (and {len(unfit) - 1} more)' if len(unfit) > 1 else ''
        raise CheckpointError(
            f'{source.name}: {unfit[0]} has shape {list(stored[unfit[0]])} there and {list(wanted[unfit[0]])} in this '
            f'config{more}; {_advice(theirs, ours)}'
        )


def _shapes(config: Config, parts: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Shape of every array in parts of a state, by its path; without 'params/' before parameters."""
    state = jax.eval_shape(functools.partial(step_lib.init_state, config), 0)
    shapes = nnx.traversals.flatten_mapping({part: state[part] for part in parts})
    return {'/'.join(path).removeprefix('params/'): leaf.shape for path, leaf in shapes.items()}


def _grows(path: str, stored: dict, wanted: dict) -> bool:
    """Whether an array has a row for each token, and more of them here."""
    (rows, *rest), (size, *rest_here) = stored[path], wanted[path]
    return path.rpartition('/')[2] in ('embedding', 'head') and rest == rest_here and rows < size


def _advice(theirs: Config, ours: Config, names=()) -> str:
    """What differs, as a remedy."""
    names = names or [field.name for field in dataclasses.fields(ours.model) if field.metadata['of_checkpoint']]
    for name in names:
        there, here = getattr(theirs.model, name), getattr(ours.model, name)
        if there != here:
            return f'model.{name} is {there!r} there and {here!r} here'
    return 'give a config of the same model'


# ---- into the state ----------------------------------------------------------


def _fill(config: Config, given: dict, wanted: dict, part: str) -> tuple[dict, list[tuple[str, int, int]]]:
    """(arrays of the wanted shapes, [(path, rows given, rows wanted)] of those that grew)."""
    flat, target = nnx.traversals.flatten_mapping(given), nnx.traversals.flatten_mapping(wanted)
    small = {path: flat[path] for path in flat if flat[path].shape != target[path].shape}
    if small:

        def grow(small):
            fresh = nnx.traversals.flatten_mapping(step_lib.init_state(config, config.train.seed)[part])
            return {path: fresh[path].at[: old.shape[0]].set(old) for path, old in small.items()}

        flat |= jax.jit(grow, out_shardings={path: target[path].sharding for path in small})(small)
    sizes = [('/'.join(path), old.shape[0], target[path].shape[0]) for path, old in small.items()]
    return nnx.traversals.unflatten_mapping(flat), sizes


def _note_of_tokenizer(theirs: Config, ours: Config) -> list[str]:
    try:
        before, now = (describe(config.data.tokenizer_path) for config in (theirs, ours) if config.data.tokenizer_path)
    except (DataError, ValueError):  # one of them is not here
        return []
    if is_same(before, now):
        return []
    return [
        f'  note: the tokenizer of {ours.data.tokenizer_path} is not that of the weights ({theirs.data.tokenizer_path})'
    ]
