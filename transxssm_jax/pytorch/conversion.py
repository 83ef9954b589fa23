"""Import of published PyTorch checkpoints into a workdir, and export from one.

One stacked array of ours is in memory at a time, and one tensor; no PyTorch.
"""

import dataclasses
import functools
import json
import math
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
import tqdm
from flax import nnx

from transxssm_jax import config as config_lib
from transxssm_jax.config import Config, Model
from transxssm_jax.data.manifest import DataError
from transxssm_jax.data.tokenizer import JsonTokenizer, load_tokenizer
from transxssm_jax.pytorch.checkpoint_format import (
    ConvertError,
    Published,
    Tensor,
    Writer,
    published_config,
    published_model,
    shapes_of,
    tensors_of,
)
from transxssm_jax.training import checkpoint

MEMORY = 'published.json'

TOKENIZER_FILES = ('tokenizer.json', 'tokenizer_config.json')


def load_published(directory: pathlib.Path | str) -> tuple[dict, Config]:
    """Parameters and config of a published checkpoint, without a workdir.

    Returns:
      (params, config): nested dict of float32 numpy arrays as `parameters.init_params` makes them; the
      default settings with this model, data.seq_len being max_position_embeddings.

    Raises:
      ConvertError: see checkpoint_format.Published.
    """
    source = Published(directory)
    arrays = {path: np.empty(shape, np.float32) for path, shape in shapes_of(source.model).items()}
    for path, array in arrays.items():
        for index, part in source.parts(path, array.shape):
            array[index] = part
    return nnx.traversals.unflatten_mapping(arrays), config_lib.resolve(_config_for(source))


def _config_for(source: Published) -> Config:
    return Config(model=source.model, data=config_lib.Data(seq_len=source.model.rope_original_length))


@dataclasses.dataclass(frozen=True)
class _Lazy:
    """An array that is made part by part while it is written.

    Attributes:
      parts: gives (index of a part, its values), for every part.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: Callable[[], Iterable[tuple[tuple[int, ...], np.ndarray]]]

    size = property(lambda self: math.prod(self.shape))
    nbytes = property(lambda self: self.size * self.dtype.itemsize)


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes _Lazy leaves one after another and part by part; they read as any array. Orbax's own copies all first."""

    async def serialize(self, values, infos, args=None):
        for value, info, arg in zip(values, infos, args):
            await self._background_serialize([value], [info], [arg])
        return []

    async def _open_and_write(self, value, tspec, ts_context):
        store = await tensorstore.open(tensorstore.Spec(tspec), create=True, open=True, context=ts_context)
        for index, part in value.parts():
            await store[index].write(part)


def _zeros(shape: tuple[int, ...], dtype) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    for index in np.ndindex(shape[:2] if len(shape) > 2 else ()):
        yield index, np.zeros(shape[len(index) :], dtype)


def import_published(
    source_directory: pathlib.Path | str,
    workdir: pathlib.Path | str,
    *,
    tokenizer: str = '',
    overrides: dict[str, str] | None = None,
) -> Published:
    """Makes `workdir` a run at step 0 with the published weights; its moments are 0 and it stands at no place in any data.

    Args:
      tokenizer: 'byte', a tokenizers json file or a prepared directory; '': tokenizer.json of the
        source where it has one. The config's data.path leads to it.
      overrides: dotted setting -> value, as on train's command line.

    Returns:
      The source, for what of it is unused.

    Raises:
      ConvertError, ConfigError, DataError, checkpoint.CheckpointError: one line.
    """
    source, workdir, overrides = Published(source_directory), pathlib.Path(workdir).absolute(), overrides or {}
    if _steps(workdir):
        raise ConvertError(f'--workdir={workdir} holds checkpoints already; choose another')
    if tokenizer and 'data.path' in overrides:
        raise ConvertError('--tokenizer and --config.data.path both lead to a tokenizer; give one of them')
    config = _config_for(source)
    files = {}
    if 'data.path' not in overrides:
        config.data.path, files = _tokenizer_for_import(source, tokenizer, workdir)
    config = _override(config, overrides)
    if tensors_of(config.model) != source.tensors:
        raise ConvertError('--config.model.*: sizes and kinds of layers are those of the weights; leave them out')
    checkpoint.open_workdir(workdir, config)
    for name, content in files.items():
        (workdir / name).write_bytes(content)
    data_path = config.data.path if pathlib.Path(config.data.path).is_dir() else ''  # a tokenizer alone is no data
    to_train = dataclasses.replace(config, data=dataclasses.replace(config.data, path=data_path))
    (workdir / 'config.py').write_text(_config_file(to_train, 'Goes on training imported weights.'))
    memory = {'config': source.fields, 'A': {name: a_H.tolist() for name, a_H in source.rates.items()}}
    (workdir / MEMORY).write_text(json.dumps(memory, indent=1) + '\n')
    with tqdm.tqdm(total=len(source.tensors), desc='import', unit=' tensors', disable=None) as bar:
        shapes, float32 = shapes_of(config.model), np.dtype(np.float32)
        params = {
            path: _Lazy(shape, float32, functools.partial(source.parts, path, shape, bar.update))
            for path, shape in shapes.items()
        }
        zeros = {
            path: _Lazy(shape, float32, functools.partial(_zeros, shape, np.float32)) for path, shape in shapes.items()
        }
        state = {
            name: nnx.traversals.unflatten_mapping(leaves)
            for name, leaves in (('params', params), ('mu', zeros), ('nu', zeros))
        }
        state['step'] = _Lazy((), np.dtype(np.int32), functools.partial(_zeros, (), np.int32))
        try:
            _save(workdir, state, config)
        except checkpoint.CheckpointError as error:
            raise (error.__cause__ if isinstance(error.__cause__, ConvertError) else error) from None
    return source


def _tokenizer_for_import(source: Published, tokenizer: str, workdir: pathlib.Path) -> tuple[str, dict[str, bytes]]:
    """(data.path, files to put into the workdir)."""
    own = source.directory / TOKENIZER_FILES[0]
    if not tokenizer and not own.exists():
        return '', {}
    path = tokenizer or str(own)
    try:
        loaded = load_tokenizer(path)
    except DataError as error:
        if tokenizer:
            raise
        source.unused.append(f'tokenizer.json ({error})')
        return '', {}
    _check_tokenizer(path, loaded, source.model)
    if path == 'byte' or pathlib.Path(path).is_dir():
        return path if path == 'byte' else str(pathlib.Path(path).absolute()), {}
    return str(workdir / TOKENIZER_FILES[0]), _tokenizer_files(path, loaded)


def _tokenizer_files(path: str, tokenizer: JsonTokenizer) -> dict[str, bytes]:
    """What transformers' AutoTokenizer reads: the tokenizer, and the settings that stand beside it or are made here."""
    beside = pathlib.Path(path).with_name(TOKENIZER_FILES[1])
    settings = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'eos_token': tokenizer.eos_token,
        'clean_up_tokenization_spaces': False,
    }
    content = beside.read_bytes() if beside.exists() else (json.dumps(settings, indent=2) + '\n').encode()
    return dict(zip(TOKENIZER_FILES, (tokenizer.content, content)))


def _check_tokenizer(name: str, tokenizer, model: Model) -> None:
    if tokenizer.vocab_size > model.vocab_size:
        raise ConvertError(
            f'tokenizer {name} has {tokenizer.vocab_size} ids, more than the {model.vocab_size} of the model; '
            'give the tokenizer that it was trained with'
        )


def _save(workdir: pathlib.Path, state: dict, config: Config) -> None:
    """Step 0 in the layout of checkpoint.Checkpoints, from _Lazy leaves."""
    # A chunk of the file holds one layer, so that no more than it is encoded at a time; small arrays are one chunk.
    layers = {leaf: leaf.nbytes // math.prod(leaf.shape[:2]) for leaf in jax.tree.leaves(state) if len(leaf.shape) > 2}
    layouts = jax.tree.map(
        lambda leaf: (
            ocp.SaveArgs(chunk_byte_size=layers[leaf], shard_axes=(0, 1))
            if layers.get(leaf, 0) >= 1 << 20
            else ocp.SaveArgs()
        ),
        state,
    )
    types = ocp.type_handlers.create_type_handler_registry((_Lazy, _LazyHandler()))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=types)
    checkpoint.write_first(workdir, state, config, handler, layouts)


def _override(config: Config, overrides: dict[str, str]) -> Config:
    """The config with settings replaced, checked and locked, as config.load does it."""
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / 'config.py'
        path.write_text(_config_file(config, ''))
        return config_lib.load(path, overrides)


def _config_file(config: Config, title: str) -> str:
    changes = ''.join(
        f'    config.{name} = {value!r}\n' for name, (value, _) in config_lib.differences(config, Config()).items()
    )
    return (
        f'"""{title}"""\n\nfrom transxssm_jax.config import Config\n\n\ndef get_config():\n'
        f'    config = Config()\n{changes}    return config\n'
    )


def export_published(
    workdir: pathlib.Path | str,
    out: pathlib.Path | str,
    *,
    step: int = -1,
    tokenizer: str = '',
    max_shard_bytes: int = 5 * 10**9,
    dtype: str = 'float32',
    overrides: dict[str, str] | None = None,
) -> list[str]:
    """Writes the parameters of a checkpoint in the published format.

    Args:
      step: which checkpoint; -1: the newest that can be read.
      tokenizer: a tokenizers json file to go with it, or a prepared directory that has one.
      max_shard_bytes: of tensors in one file.
      dtype: 'float32' or 'bfloat16', of every tensor.
      overrides: dotted setting -> value, for model.rope_scaling and its like.

    Returns:
      Notes on what is written in another form than it is trained.

    Raises:
      ConvertError, ConfigError, DataError, checkpoint.CheckpointError: one line.
    """
    workdir, out = pathlib.Path(workdir), pathlib.Path(out)
    if any(out.glob('model*.safetensors*')):
        raise ConvertError(f'--out={out} holds weights already; choose another directory')
    params, config = checkpoint.find_params(workdir, step)
    config = _override(config, overrides or {})
    ours, model = config.model, published_model(config.model)
    memory = json.loads((workdir / MEMORY).read_text()) if (workdir / MEMORY).exists() else {'config': {}, 'A': {}}
    fields = published_config(model, config.data.seq_len, memory['config'], dtype)
    files = {}
    if tokenizer:
        loaded = load_tokenizer(tokenizer)
        if not isinstance(loaded, JsonTokenizer):
            raise ConvertError(
                f'--tokenizer={tokenizer} is the byte tokenizer, which has no file to export; leave it out'
            )
        _check_tokenizer(tokenizer, loaded, model)
        files = _tokenizer_files(tokenizer, loaded)
        fields['eos_token_id'] = loaded.eos_id
    files['config.json'] = (json.dumps(fields, indent=2, sort_keys=True) + '\n').encode()
    notes = []
    if ours.num_ssd_groups != model.num_ssd_groups:
        notes.append(f'B and C of {ours.num_ssd_groups} groups are repeated for each of {model.num_heads} heads')
    if ours.use_dt_bias:
        notes.append(
            'the dt bias is dt_proj.bias' + ('' if ours.use_bias else '; hidden_bias gives every other map a bias of 0')
        )
    out.mkdir(parents=True, exist_ok=True)
    tensors = tensors_of(model)
    with (
        Writer(out, list(tensors.values()), max_shard_bytes, dtype) as writer,
        tqdm.tqdm(total=len(tensors), desc='export', unit=' tensors', disable=None) as bar,
    ):
        for ours_path, shape in shapes_of(model).items():
            array = _array_for_export(params, ours_path, shape, ours)
            for tensor in tensors.values():
                if tensor.path == ours_path:
                    writer.write(tensor, _with_memory(tensor, array, memory['A']))
                    bar.update()
    for name, content in files.items():
        (out / name).write_bytes(content)
    return notes


def _steps(workdir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / 'checkpoints').glob('*') if path.name.isdigit())


def _array_for_export(state: pathlib.Path, path: tuple[str, ...], shape: tuple[int, ...], ours: Model) -> np.ndarray:
    """Array of the published_model of `ours`, from the checkpoint of `ours`."""
    if path[-1] == 'bias' and not ours.use_bias:
        array = np.zeros(shape, np.float32)
    else:
        array = _read_array(state, path)
    if path[-2:] == ('dt', 'bias') and ours.use_dt_bias:
        array += _read_array(state, (*path[:-3], 'dt_bias'))
    if path[-2:-1] in (('b',), ('c',)):  # [..., G, N] of kernels and biases
        array = np.repeat(array, shape[-2] // array.shape[-2], axis=-2)
    return array


def _read_array(state: pathlib.Path, path: tuple[str, ...]) -> np.ndarray:
    """One float32 array of the parameters; nothing else is read."""
    item = nnx.traversals.unflatten_mapping({('params', *path): 0})
    restore_args = nnx.traversals.unflatten_mapping({('params', *path): ocp.RestoreArgs(restore_type=np.ndarray)})
    arguments = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
    try:
        restored = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(state, arguments)
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file.
        raise ConvertError(
            f'{"/".join(path)} in {state} cannot be read ({str(error).splitlines()[0][:200]}); export another '
            'checkpoint with --step'
        ) from error
    return nnx.traversals.flatten_mapping(restored)[('params', *path)]


def _with_memory(tensor: Tensor, array: np.ndarray, rates: dict[str, list[float]]) -> np.ndarray:
    """The published value; A of a head that is as its import left it is the A that was imported.

    Not every float32 A is -exp(a_log) of some float32 a_log, so that A cannot be had back from a_log alone.
    """
    value = tensor.from_ours(array[tensor.index])
    if tensor.name not in rates:
        return value
    imported_H = np.array(rates[tensor.name], np.float64)
    unchanged_H = np.log(-imported_H).astype(np.float32) == array[tensor.index]
    return np.where(unchanged_H, imported_H, value)
