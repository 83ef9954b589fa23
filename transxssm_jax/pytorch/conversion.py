"""Import of PyTorch checkpoints into a workdir, and export of one in the published format. Mamba-2's are imported only.

What the transformers library loads is read here too, and written by transformers_export.py.

One stacked array of ours is in memory at a time, and one tensor; no PyTorch.

An import of what `export_pytorch` wrote gives the same model back: the settings stand in config.json (fields.py), groups of B and
C that were repeated are recognised, and so are biases that are 0 because only dt has one. All parameters have their
bits again, but for a_log, of which the file holds -exp(a_log): it is rounded, and where both use_bias and use_dt_bias
are set the two biases of dt come back as their sum, in dt_bias.
"""

import functools
import json
import pathlib

import numpy as np
import orbax.checkpoint as ocp
import tqdm
from flax import nnx

from transxssm_jax import config as config_lib
from transxssm_jax.config import Config
from transxssm_jax.data.manifest import DataError
from transxssm_jax.data.tokenizer import JsonTokenizer, load_tokenizer
from transxssm_jax.data.vocabulary import check_tokenizer
from transxssm_jax.pytorch import arrays
from transxssm_jax.pytorch.fields import ConvertError, fields_of, pytorch_model
from transxssm_jax.pytorch.files import PytorchCheckpoint, TensorFiles, Writer
from transxssm_jax.pytorch.mamba_ssm import MARK, MambaCheckpoint
from transxssm_jax.pytorch.tensors import Path, Tensor, check_exportable, shapes_of, spell_out, tensors_of
from transxssm_jax.pytorch.tokenizer_files import TOKENIZER_FILES, byte_tokenizer, tokenizer_files, tokenizer_for_export
from transxssm_jax.pytorch.transformers_checkpoint import LLAMA, TransformersCheckpoint
from transxssm_jax.pytorch.transformers_fields import MODEL_TYPE
from transxssm_jax.training import checkpoint, checkpoint_files, lease, run_directory, run_reference

MEMORY = 'published.json'  # in a workdir: what of its import a checkpoint has no place for
AnyCheckpoint = PytorchCheckpoint | MambaCheckpoint | TransformersCheckpoint


def load_pytorch(directory: pathlib.Path | str) -> tuple[dict, Config]:
    """Parameters and config of a published checkpoint, without a workdir.

    Returns:
      (params, config): nested dict of float32 numpy arrays as `parameters.init_params` makes them; the
      settings that an import begins with.

    Raises:
      ConvertError: see files.PytorchCheckpoint.
    """
    params, config = open_weights(directory)
    return nnx.traversals.unflatten_mapping({path: array.read() for path, array in params.items()}), config


def open_weights(directory: pathlib.Path | str) -> tuple[dict[Path, arrays.LazyArray], Config]:
    """The arrays of a published checkpoint, each read when it is asked for, and its config. Errors as `load_pytorch`."""
    source = open_checkpoint(directory)
    return _lazy_params(source), source.config


def open_checkpoint(directory: pathlib.Path | str) -> AnyCheckpoint:
    """The checkpoint in a directory, of the format that its config.json is of.

    Raises:
      ConvertError: see the classes.
    """
    fields = TensorFiles(directory).read_json('config.json')
    if MARK in fields:
        return MambaCheckpoint(directory)
    if fields.get('model_type') in (MODEL_TYPE, LLAMA):
        return TransformersCheckpoint(directory)
    return PytorchCheckpoint(directory)


def _lazy_params(source: AnyCheckpoint, advance=lambda: None) -> dict[Path, arrays.LazyArray]:
    return {
        path: arrays.LazyArray(shape, np.dtype(np.float32), functools.partial(source.layers, path, shape, advance))
        for path, shape in shapes_of(source.config.model).items()
    }


# ---- import ----------------------------------------------------------------


def import_pytorch(
    source_directory: pathlib.Path | str,
    workdir: pathlib.Path | str,
    *,
    tokenizer: str = '',
    overrides: dict[str, str] | None = None,
) -> AnyCheckpoint:
    """Makes `workdir` a run at step 0 with the published weights, a fresh optimizer state and no position in any data.

    Args:
      tokenizer: 'byte', a tokenizers json file or a prepared directory; '': tokenizer.json of the
        source where it has one. The config's data.path leads to it.
      overrides: dotted setting -> value, as on train's command line.

    Returns:
      The source, for what of it is unused.

    Raises:
      ConvertError, ConfigError, DataError, checkpoint.CheckpointError, lease.LeaseError: one line.
    """
    source, workdir, overrides = open_checkpoint(source_directory), pathlib.Path(workdir).absolute(), overrides or {}
    _check_unused(workdir)
    if tokenizer and 'data.path' in overrides:
        raise ConvertError('--tokenizer and --config.data.path both lead to a tokenizer; give one of them')
    changes, files = dict(overrides), {}
    if 'data.path' not in overrides:
        changes['data.path'], files = _tokenizer_for_import(source, tokenizer, workdir)
    config = config_lib.replace(source.config, changes)
    ours, theirs = config.model, source.config.model
    if ours != theirs and (ours.layer_pattern != theirs.layer_pattern or shapes_of(ours) != shapes_of(theirs)):
        raise ConvertError('--config.model.*: sizes and kinds of layers are those of the weights; leave them out')
    with lease.hold(workdir):
        _check_unused(workdir)  # another run may have had the lease in between
        run_directory.open_workdir(workdir, config)
        for name, content in files.items():
            (workdir / name).write_bytes(content)
        data_path = config.data.path if pathlib.Path(config.data.path).is_dir() else ''  # a tokenizer alone is no data
        to_train = config_lib.replace(config, {'data.path': data_path})
        (workdir / 'config.py').write_text(_config_file(to_train, 'Goes on training imported weights.'))
        fields = source.fields if isinstance(source, PytorchCheckpoint) else {}  # of the published format
        memory = {'config': fields, 'A': {name: a_H.tolist() for name, a_H in source.rates.items()}}
        (workdir / MEMORY).write_text(json.dumps(memory, indent=1) + '\n')
        with tqdm.tqdm(total=len(source.tensors), desc='import', unit=' tensors', disable=None) as bar:
            try:
                arrays.write_first(workdir, _lazy_params(source, bar.update), config)
            except checkpoint.CheckpointError as error:
                if isinstance(error.__cause__, ConvertError):
                    raise error.__cause__ from None
                reason = checkpoint_files.first_line(error.__cause__ or error)
                raise ConvertError(
                    f'the weights could not be written to --workdir={workdir}: {reason}; run the same command again '
                    'when they can, or use another --workdir'
                ) from error
    return source


def _check_unused(workdir: pathlib.Path) -> None:
    if checkpoint_files.steps_in(workdir / 'checkpoints'):
        raise ConvertError(f'--workdir={workdir} holds checkpoints already; choose another')


def _tokenizer_for_import(source: AnyCheckpoint, tokenizer: str, workdir: pathlib.Path) -> tuple[str, dict[str, bytes]]:
    """(data.path, files to put into the workdir)."""
    own = source.directory / TOKENIZER_FILES[0]
    if not tokenizer and not own.exists():
        return '', {}
    if not tokenizer and own.read_bytes() == byte_tokenizer():
        return 'byte', {}
    path = tokenizer or str(own)
    try:
        loaded = load_tokenizer(path)
    except DataError as error:
        if tokenizer:
            raise
        source.unused.append(f'tokenizer.json ({error})')
        return '', {}
    check_tokenizer(loaded, source.config.model.vocab_size, f'tokenizer {path}')
    if path == 'byte' or pathlib.Path(path).is_dir():
        return path if path == 'byte' else str(pathlib.Path(path).absolute()), {}
    return str(workdir / TOKENIZER_FILES[0]), tokenizer_files(path, loaded)


def _config_file(config: Config, title: str) -> str:
    changes = ''.join(
        f'    config.{name} = {value!r}\n' for name, (value, _) in config_lib.differences(config, Config()).items()
    )
    return (
        f'"""{title}"""\n\nfrom transxssm_jax.config import Config\n\n\ndef get_config():\n'
        f'    config = Config()\n{changes}    return config\n'
    )


# ---- export ----------------------------------------------------------------


def export_pytorch(
    workdir: pathlib.Path | str,
    out: pathlib.Path | str,
    *,
    step: int = -1,
    weights: str = 'trained',
    tokenizer: str = '',
    max_shard_bytes: int = 5 * 10**9,
    dtype: str = 'float32',
    overrides: dict[str, str] | None = None,
) -> list[str]:
    """Writes the parameters of a checkpoint in the published format.

    Args:
      workdir: of the run; @STEP, @best or @latest may follow.
      step: which checkpoint; -1: the newest that can be read.
      weights: of checkpoint.WEIGHTS.
      tokenizer: a tokenizers json file to go with it, or a prepared directory that has one; '': that of the run's
        data.path.
      max_shard_bytes: of tensors in one file.
      dtype: 'float32' or 'bfloat16', of every tensor.
      overrides: dotted setting -> value, for model.rope_scaling and its like.

    Returns:
      Notes on what is written in another form than it is trained.

    Raises:
      ConvertError, ConfigError, DataError, checkpoint.CheckpointError: one line.
    """
    (workdir, step), out = run_reference.resolve(workdir, step), pathlib.Path(out)
    check_output(out)
    params, config = checkpoint.find_params(workdir, step, weights)
    config = config_lib.replace(config, overrides or {})
    check_exportable(config.model)
    ours, model = config.model, pytorch_model(config.model)
    tensors, notes = tensors_of(model), []
    memory = _read_memory(workdir)
    fields = fields_of(config, memory['config'], dtype)
    loaded = tokenizer_for_export(tokenizer, config, notes)
    files = {}
    if loaded:
        name = tokenizer or config.data.tokenizer_path
        check_tokenizer(loaded, model.vocab_size, f'tokenizer {name}')
        fields |= {'bos_token_id': loaded.begin_id, 'eos_token_id': loaded.eos_id}
        if isinstance(loaded, JsonTokenizer):
            files = tokenizer_files(name, loaded)
    files['config.json'] = (json.dumps(fields, indent=2, sort_keys=True) + '\n').encode()
    if ours.num_ssd_groups != model.num_ssd_groups:
        notes.append(f'B and C of {ours.num_ssd_groups} groups are repeated for each of {model.num_heads} heads')
    if ours.use_dt_bias:
        notes.append(
            'the dt bias is dt_proj.bias' + ('' if ours.use_bias else '; hidden_bias gives every other map a bias of 0')
        )
    out.mkdir(parents=True, exist_ok=True)
    with (
        Writer(out, list(tensors.values()), max_shard_bytes, dtype, dtype) as writer,
        tqdm.tqdm(total=len(tensors), desc='export', unit=' tensors', disable=None) as bar,
    ):
        for path, shape in shapes_of(model).items():
            array = spell_out(path, shape, ours, functools.partial(read_array, params))
            for tensor in tensors.values():
                if tensor.path == path:
                    writer.write(tensor, _with_memory(tensor, array, memory['A']))
                    bar.update()
    for name, content in files.items():
        (out / name).write_bytes(content)
    return notes


def check_output(out: pathlib.Path, names: tuple[str, ...] = ()) -> None:
    """Raises ConvertError where a directory holds weights, or a file of these names or of those that every export has."""
    if any(out.glob('model*.safetensors*')):
        raise ConvertError(f'--output={out} holds weights already; choose another directory')
    if taken := [name for name in ('config.json', *TOKENIZER_FILES, *names) if (out / name).exists()]:
        raise ConvertError(
            f'--output={out} holds a {taken[0]} already, which would be overwritten; choose another directory'
        )


def _read_memory(workdir: pathlib.Path) -> dict:
    """What an import left in the workdir; empty where there was none."""
    path = workdir / MEMORY
    if not path.exists():
        return {'config': {}, 'A': {}}
    try:
        memory = json.loads(path.read_text())
        rates = {name: np.array(a_H, np.float64) for name, a_H in dict(memory['A']).items()}
        return {'config': dict(memory['config']), 'A': rates}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ConvertError(
            f'{path} is damaged ({checkpoint_files.first_line(error)}); delete it to export without what it keeps of the '
            'import'
        ) from error


def read_array(state: pathlib.Path, path: Path) -> np.ndarray:
    """One float32 array of the parameters; nothing else is read."""
    item = nnx.traversals.unflatten_mapping({(state.name, *path): 0})
    restore_args = nnx.traversals.unflatten_mapping({(state.name, *path): ocp.RestoreArgs(restore_type=np.ndarray)})
    arguments = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
    try:
        restored = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(state, arguments)
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file.
        raise ConvertError(
            f'{"/".join(path)} in {state} cannot be read ({str(error).splitlines()[0][:200]}); export another '
            'checkpoint with --step'
        ) from error
    return nnx.traversals.flatten_mapping(restored)[(state.name, *path)]


def _with_memory(tensor: Tensor, array: np.ndarray, rates: dict[str, np.ndarray]) -> np.ndarray:
    """The published value; A of a head that is as its import left it is the A that was imported.

    Not every float32 A is -exp(a_log) of some float32 a_log, so that A cannot be had back from a_log alone.
    """
    value = tensor.from_ours(array[tensor.index])
    imported_H = rates.get(tensor.name)
    if imported_H is None or imported_H.shape != value.shape:
        return value
    unchanged_H = np.log(-imported_H).astype(np.float32) == array[tensor.index]
    return np.where(unchanged_H, imported_H, value)
