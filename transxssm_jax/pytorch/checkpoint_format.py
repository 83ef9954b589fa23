"""The published PyTorch format: its config, the names and shapes of its tensors, its files.

A directory with config.json and model.safetensors, or with several files and
model.safetensors.index.json. Nothing here needs PyTorch, or more memory than
one tensor.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
import safetensors
from flax import nnx

from transxssm_jax import config as config_lib
from transxssm_jax.config import Config, ConfigError, Model
from transxssm_jax.model import parameters

SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
DTYPES = {'float32': (np.dtype(np.float32), 'F32'), 'bfloat16': (np.dtype(ml_dtypes.bfloat16), 'BF16')}


class ConvertError(ValueError):
    """Weights that do not fit; the message is one line."""


# ---- the two configs ---------------------------------------------------------

# Fields of the published config with its defaults; transformers leaves some out of the file.
PUBLISHED = {
    'vocab_size': 32768,
    'hidden_size': 1024,
    'intermediate_size': 2048,
    'num_hidden_layers': 32,
    'hidden_bias': False,
    'hidden_dropout': 0.0,
    'hidden_act': 'silu',
    'max_position_embeddings': 2048,
    'rope_theta': 10000.0,
    'rope_scaling': {'rope_type': 'dynamic', 'factor': 4.0, 'original_max_position_embeddings': 2048},
    'initializer_range': 0.02,
    'rms_norm_eps': 1e-6,
    'tie_word_embeddings': True,
    'num_attention_heads': 8,
    'num_key_value_heads': None,
    'attention_dropout': 0.0,
    'dynamic_mask_ratio': 0.0,
    'attn_layer_period': 8,
    'attn_layer_offset': 7,
}
SAME = {  # published field -> the setting of ours that means the same
    'vocab_size': 'vocab_size',
    'hidden_size': 'd_model',
    'intermediate_size': 'd_mlp',
    'num_hidden_layers': 'num_layers',
    'hidden_bias': 'use_bias',
    'rope_theta': 'rope_theta',
    'initializer_range': 'init_std',
    'rms_norm_eps': 'norm_epsilon',
    'tie_word_embeddings': 'tie_embeddings',
    'num_attention_heads': 'num_heads',
    'num_key_value_heads': 'num_kv_heads',
    'attn_layer_period': 'attention_period',
    'attn_layer_offset': 'attention_offset',
}
DROPOUT = ('hidden_dropout', 'attention_dropout', 'dynamic_mask_ratio')  # which only training with PyTorch knows
BOOKKEEPING = {  # of transformers; kept for an export, without effect here
    'architectures',
    'auto_map',
    'model_type',
    'transformers_version',
    'torch_dtype',
    'dtype',
    'use_cache',
    'bos_token_id',
    'eos_token_id',
    'pad_token_id',
    '_name_or_path',
    '_attn_implementation_autoset',
    'ssd_chunk_size',
}


def model_of(published: dict, where: str) -> tuple[Model, list[str]]:
    """(our model settings, a phrase for each field that has no effect) of a published config.

    Raises:
      ConvertError: a field has a value that our model cannot compute, naming both.
    """

    def refuse(name, value, rule):
        raise ConvertError(f'{where}: {name}={json.dumps(value)} {rule}')

    fields = PUBLISHED | published
    if fields.get('model_type', 'TransXSSM').lower() != 'transxssm':
        refuse('model_type', fields['model_type'], 'is another model; only TransXSSM is read')
    if fields['hidden_act'] not in ('silu', 'swish'):
        refuse('hidden_act', fields['hidden_act'], 'is not computed here; only silu is')
    if fields['num_key_value_heads'] is None:
        fields['num_key_value_heads'] = fields['num_attention_heads']
    if 'rope_parameters' in fields:  # as transformers 5 writes both
        fields['rope_scaling'] = fields['rope_parameters']
    scaling = fields['rope_scaling'] or {}
    if not isinstance(scaling, dict):
        refuse('rope_scaling', scaling, 'must be an object or null')
    fields['rope_theta'] = scaling.get('rope_theta', fields['rope_theta'])
    kind = scaling.get('rope_type', scaling.get('type', 'default'))
    kinds = {'default': 'none', 'linear': 'linear', 'dynamic': 'dynamic'}
    if kind not in kinds:
        refuse('rope_scaling.rope_type', kind, f'is not computed here; only {", ".join(kinds)} are')
    try:
        layers, period, offset = (fields[f] for f in ('num_hidden_layers', 'attn_layer_period', 'attn_layer_offset'))
        if offset >= min(period, layers):  # no layer has it
            fields |= {'attn_layer_period': 0, 'attn_layer_offset': 0}
        elif layers % period:
            refuse(
                'num_hidden_layers', layers, f'must be a multiple of attn_layer_period={period}, the layers of a module'
            )
        model = Model(**{ours: fields[theirs] for theirs, ours in SAME.items()})
        # The transformers library (4.48, of the published code) stretches from max_position_embeddings.
        model.rope_scaling, model.rope_original_length = kinds[kind], fields['max_position_embeddings']
        if kind != 'default':
            model.rope_factor = scaling['factor']
        # B and C are per head and as wide as it; dt = softplus(u W + bias of dt_proj, where hidden_bias is set).
        model.num_ssd_groups, model.d_state, model.use_dt_bias = (
            model.num_heads,
            model.d_model // model.num_heads,
            False,
        )
        # float16 would overflow where bfloat16, of the same size, does not.
        torch_dtype = fields.get('torch_dtype', fields.get('dtype')) or 'float32'
        model.dtype = 'float32' if torch_dtype == 'float32' else 'bfloat16'
    except KeyError as error:
        raise ConvertError(f'{where}: rope_scaling lacks {error}') from error
    except (ConfigError, TypeError) as error:
        raise ConvertError(f'{where}: {error}') from error
    for name, own in (('head_dim', model.head_dim), ('partial_rotary_factor', 1.0)):
        if fields.get(name, own) not in (own, None):
            refuse(name, fields[name], f'is not computed here; it must be {own}')
    unused = [f'{name}={json.dumps(fields[name])}' for name in DROPOUT if fields[name]]
    original = scaling.get('original_max_position_embeddings', model.rope_original_length)
    if kind == 'dynamic' and original != model.rope_original_length:
        unused.append(
            f'rope_scaling.original_max_position_embeddings={original} (the published code stretches from '
            f'max_position_embeddings={model.rope_original_length})'
        )
    known = PUBLISHED.keys() | BOOKKEEPING | {'head_dim', 'partial_rotary_factor', 'rope_parameters'}
    unused += [f'{name}={json.dumps(value)}' for name, value in sorted(published.items()) if name not in known]
    return model, unused


def published_model(model: Model) -> Model:
    """The model that the published code can hold and that computes the same: B and C for every head, dt bias in dt_proj.

    Raises:
      ConvertError: there is none.
    """
    if model.d_state != model.head_dim:
        raise ConvertError(
            f'model.d_state={model.d_state} has no place in the published format, where the state is as wide '
            f'as a head; only model.d_state=model.d_model/model.num_heads={model.head_dim} can be exported'
        )
    if model.rope_scaling == 'length':
        raise ConvertError(
            "model.rope_scaling='length' has no place in the published format; add "
            '--config.model.rope_scaling=none, linear or dynamic'
        )
    return dataclasses.replace(
        model, num_ssd_groups=model.num_heads, use_bias=model.use_bias or model.use_dt_bias, use_dt_bias=False
    )


def published_config(model: Model, seq_len: int, memory: dict, dtype: str) -> dict:
    """config.json of an export of `model`, a published_model; `memory` holds fields of the config it was imported with."""
    fields = {
        'bos_token_id': None,
        'eos_token_id': None,
        'pad_token_id': None,
        'ssd_chunk_size': 256,
        'use_cache': True,
        'max_position_embeddings': seq_len,
    }
    fields = PUBLISHED | fields | memory | {theirs: getattr(model, ours) for theirs, ours in SAME.items()}
    if model.attention_period == 0:  # an offset that no layer has
        fields['attn_layer_period'] = fields['attn_layer_offset'] = model.num_layers
    for name in ('rope_parameters', 'dtype'):  # other spellings of what is written below
        fields.pop(name, None)
    fields['rope_scaling'] = None
    if model.rope_scaling != 'none':
        fields['rope_scaling'] = {'rope_type': model.rope_scaling, 'factor': model.rope_factor}
    if model.rope_scaling == 'dynamic':
        fields['max_position_embeddings'] = model.rope_original_length
        fields['rope_scaling']['original_max_position_embeddings'] = model.rope_original_length
    return fields | {'model_type': 'TransXSSM', 'architectures': ['TransXSSMForCausalLM'], 'torch_dtype': dtype}


# ---- names and shapes ----------------------------------------------------------

PLAIN = {  # ours, within a layer or at the top -> published
    'embedding': 'model.word_embed.weight',
    'head': 'lm_head.weight',
    'final_norm/scale': 'model.final_layernorm.weight',
    'mixer/in_proj/norm/scale': 'pre_sequence_layernorm.weight',
    'mixer_residual/weight': 'post_sequence_residual.weight',
    'mlp/in_proj/norm/scale': 'pre_state_layernorm.weight',
    'mlp_residual/weight': 'post_state_residual.weight',
    'mixer/a_log': 'ssd.A',
}
# (kind of layer, block of it) -> published block, and its output map; the input maps are MAP_proj.
BLOCKS = {
    ('ssd', 'mixer'): 'ssd',
    ('attention', 'mixer'): 'attn',
    ('ssd', 'mlp'): 'feed_forward',
    ('attention', 'mlp'): 'feed_forward',
}
OUTPUTS = {
    ('ssd', 'mixer'): 'out_proj',
    ('attention', 'mixer'): 'o_proj',
    ('ssd', 'mlp'): 'down_proj',
    ('attention', 'mlp'): 'down_proj',
}
LEAVES = {'kernel': 'weight', 'bias': 'bias'}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One published tensor: its name and shape, the path of the array of ours that holds it, and where in it.

    A published matrix is [outputs, inputs]; ours has the input axes first, each axis by itself.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    index: tuple[int, ...]  # (module, layer of its kind in the module), or () for an array that is not stacked

    def to_ours(self, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The published value as a layer of our array, float32 of `shape`; nothing is rounded but log(-A)."""
        if self.path[-1] == 'a_log':
            value = np.log(-value.astype(np.float64))
        if self.path[-1] == 'kernel':
            value = value.T
        return np.ascontiguousarray(value, np.float32).reshape(shape)

    def from_ours(self, part: np.ndarray) -> np.ndarray:
        """The published value of a layer of our array, a view of it; A is float64 and new."""
        if self.path[-1] == 'kernel':
            return part.reshape(self.shape[::-1]).T
        if self.path[-1] == 'a_log':
            return -np.exp(part.astype(np.float64))
        return part.reshape(self.shape)


def shapes_of(model: Model) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path -> shape of every array of ours."""
    _, abstract = parameters.split_model(model)
    return {path: leaf.shape for path, leaf in nnx.traversals.flatten_mapping(nnx.to_pure_dict(abstract)).items()}


def tensors_of(model: Model) -> dict[str, Tensor]:
    """Every published tensor of a model by name, layer by layer."""
    tensors, kinds = [], model.layer_pattern
    for path, shape in shapes_of(model).items():
        if path[0] != 'layers':
            tensors.append(
                (-1 if path == ('embedding',) else model.num_layers, Tensor(PLAIN['/'.join(path)], shape, path, ()))
            )
            continue
        kind, rest, shape = path[1], path[2:], shape[2:]
        if '/'.join(rest) in PLAIN:
            name = PLAIN['/'.join(rest)]
        else:
            block, *linear, leaf = rest
            name = f'{BLOCKS[kind, block]}.{OUTPUTS[kind, block] if linear == ["out_proj"] else f"{linear[-1]}_proj"}'
            name += f'.{LEAVES[leaf]}'
        inputs = (2 if rest[:2] == ('mixer', 'out_proj') else 1) if rest[-1] == 'kernel' else 0
        flat = (math.prod(shape[inputs:]), math.prod(shape[:inputs])) if inputs else (math.prod(shape),)
        layers = [i for i in range(model.num_layers) if kinds[i % len(kinds)] == kind]
        tensors += [
            (layer, Tensor(f'model.layers.{layer}.{name}', flat, path, divmod(n, kinds.count(kind))))
            for n, layer in enumerate(layers)
        ]
    return {tensor.name: tensor for _, tensor in sorted(tensors, key=lambda item: item[0])}


# ---- reading the published format ------------------------------------------------


class Published:
    """A published checkpoint whose names, shapes and decay rates have been checked.

    Attributes:
      fields: its config.json.
      model: our settings for it.
      tensors: name -> Tensor.
      unused: a phrase for each field and tensor that has no effect.
      rates: name -> float64 [H] of every A.

    Raises:
      ConvertError: something is missing, unexpected, of another shape, or cannot be held.
    """

    def __init__(self, directory: pathlib.Path | str):
        self.directory = pathlib.Path(directory)
        self.fields = self._read_json('config.json')
        self.model, self.unused = model_of(self.fields, f'{self.directory / "config.json"}')
        try:
            config_lib.resolve(Config(model=dataclasses.replace(self.model)))
        except ConfigError as error:
            raise ConvertError(f'{self.directory / "config.json"}: {error}') from error
        self.tensors = tensors_of(self.model)
        self._files = self._find_tensors()
        self._check_names_and_shapes()
        self.rates = {
            name: self.read(name).astype(np.float64)
            for name, tensor in self.tensors.items()
            if tensor.path[-1] == 'a_log'
        }
        self._check_rates()

    def _read_json(self, name: str) -> dict:
        path = self.directory / name
        try:
            content = json.loads(path.read_text())
        except OSError as error:
            raise ConvertError(
                f'{path}: {error.strerror}; --source must be a directory with config.json and {SINGLE} (or {INDEX})'
            ) from error
        except ValueError as error:
            raise ConvertError(f'{path} is not JSON ({error}); fetch it again') from error
        if not isinstance(content, dict):
            raise ConvertError(f'{path} must hold a JSON object, not {type(content).__name__}')
        return content

    def _find_tensors(self) -> dict[str, str]:
        """Tensor name -> file name."""
        if (self.directory / SINGLE).exists() or not (self.directory / INDEX).exists():
            listed, files = {}, [SINGLE]
        else:
            listed = self._read_json(INDEX).get('weight_map', {})
            files = sorted(set(listed.values()))
        found = {}
        for file in files:
            with self._open(file) as handle:
                found |= dict.fromkeys(handle.keys(), file)
        for name, file in listed.items():
            if found.get(name) != file:
                raise ConvertError(
                    f'{self.directory / file} lacks tensor {name}, which {INDEX} places there; fetch both again'
                )
        return found

    def _open(self, file: str):
        path = self.directory / file
        if not path.is_file():
            raise ConvertError(
                f'{path}: no such file; the weights must be in {SINGLE}, or in the files that {INDEX} lists'
            )
        try:
            return safetensors.safe_open(path, 'numpy')
        except (safetensors.SafetensorError, OSError) as error:
            raise ConvertError(f'{path} cannot be read ({str(error).splitlines()[0]}); fetch it again') from error

    def read(self, name: str) -> np.ndarray:
        """One tensor in its own dtype. The file is opened for it alone, so that nothing of it stays mapped."""
        with self._open(self._files[name]) as handle:
            return handle.get_tensor(name)

    def _check_names_and_shapes(self) -> None:
        missing = [name for name in self.tensors if name not in self._files]
        if missing:
            raise ConvertError(f'{self.directory} lacks tensor {_some(missing)}, which its config.json calls for')
        extra = [name for name in self._files if name not in self.tensors]
        for name in [name for name in extra if name.endswith('rotary_emb.inv_freq')]:
            extra.remove(name)
            self.unused.append(f'{name} (computed from rope_theta)')
        if 'lm_head.weight' in extra and self.model.tie_embeddings:
            head, embedding = self.read('lm_head.weight'), self.read('model.word_embed.weight')
            if head.shape != embedding.shape or head.tobytes() != embedding.tobytes():
                raise ConvertError(
                    f'{self.directory}: lm_head.weight differs from model.word_embed.weight, although '
                    'tie_word_embeddings is true (its default); set it to false in config.json, or remove one'
                )
            extra.remove('lm_head.weight')
            self.unused.append('lm_head.weight (tied, equal to model.word_embed.weight)')
        if extra:
            raise ConvertError(
                f'{self.directory} has unexpected tensor {_some(extra)}, which its config.json has no place for'
            )
        for name, tensor in self.tensors.items():
            with self._open(self._files[name]) as handle:
                entry = handle.get_slice(name)
            shape, dtype = tuple(entry.get_shape()), entry.get_dtype()
            if shape != tensor.shape:
                raise ConvertError(
                    f'{self.directory}: {name} has shape {list(shape)}, its config.json calls for {list(tensor.shape)}'
                )
            if dtype not in ('F32', 'F16', 'BF16'):
                raise ConvertError(f'{self.directory}: {name} is of type {dtype}; F32, F16 and BF16 are read')

    def _check_rates(self) -> None:
        bad = {
            name.split('.')[2]: float(a_H.max())
            for name, a_H in self.rates.items()
            if not (np.isfinite(a_H) & (a_H < 0)).all()
        }
        if bad:
            layers = ', '.join(f'{layer} (to {a:g})' for layer, a in bad.items())
            raise ConvertError(
                f'{self.directory}: A >= 0 in layers {layers}: their state grows by exp(dt A) a token and overflows, in training '
                'and in use; a = -exp(a_log) here is below 0; train the published model with A < 0 first'
            )

    def parts(
        self, path: tuple[str, ...], shape: tuple[int, ...], advance: Callable = lambda: None
    ) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """(index, float32 values) of every part of our array at `path`, a layer each, read one at a time.

        advance() is called after each.
        """
        for tensor in self.tensors.values():
            if tensor.path == path:
                yield tensor.index, tensor.to_ours(self.read(tensor.name), shape[len(tensor.index) :])
                advance()


def _some(names: list[str]) -> str:
    return names[0] + (f' (and {len(names) - 1} more)' if len(names) > 1 else '')


# ---- writing the published format ------------------------------------------------


class Writer:
    """Safetensors files of known tensors, written in any order; the package itself wants all of a file at once.

    The files get their names when the `with` block ends without an error.

    Args:
      directory: exists.
      tensors: what will be written, in the order of the files.
      max_shard_bytes: of tensors in one file; a larger tensor has a file of its own.
      dtype: 'float32' or 'bfloat16', of every tensor.
    """

    def __init__(self, directory: pathlib.Path, tensors: list[Tensor], max_shard_bytes: int, dtype: str):
        self._directory, self._tensors, self._max_shard_bytes = directory, tensors, max_shard_bytes
        self._dtype, self._dtype_name = DTYPES[dtype]

    def __enter__(self) -> 'Writer':
        self._files, self._places = {}, {}
        shards = self._cut()
        for i, shard in enumerate(shards, start=1):
            name = SINGLE if len(shards) == 1 else f'model-{i:05d}-of-{len(shards):05d}.safetensors'
            header, end = {'__metadata__': {'format': 'pt'}}, 0  # the mark that transformers asks for
            for tensor in shard:
                start, end = end, end + self._size(tensor)
                header[tensor.name] = {
                    'dtype': self._dtype_name,
                    'shape': list(tensor.shape),
                    'data_offsets': [start, end],
                }
            text = json.dumps(header).encode()
            text += b' ' * (-len(text) % 8)
            self._files[name] = open(self._temporary(name), 'wb')  # closed by __exit__
            self._files[name].write(len(text).to_bytes(8, 'little') + text)
            for tensor in shard:
                self._places[tensor.name] = name, 8 + len(text) + header[tensor.name]['data_offsets'][0]
        return self

    def write(self, tensor: Tensor, value: np.ndarray) -> None:
        """Rounds a tensor to the files' dtype and writes it at its place."""
        name, offset = self._places[tensor.name]
        self._files[name].seek(offset)
        self._files[name].write(np.ascontiguousarray(value, self._dtype).view(np.uint8))

    def __exit__(self, kind, error, traceback) -> None:
        for name, file in self._files.items():
            file.close()
            if kind is not None:
                self._temporary(name).unlink()
        if kind is None:
            for name in self._files:
                self._temporary(name).replace(self._directory / name)
            if len(self._files) > 1:
                index = {
                    'metadata': {'total_size': sum(map(self._size, self._tensors))},
                    'weight_map': {tensor: name for tensor, (name, _) in self._places.items()},
                }
                (self._directory / INDEX).write_text(json.dumps(index, indent=2) + '\n')

    def _temporary(self, name: str) -> pathlib.Path:
        return self._directory / f'.{name}.tmp'

    def _size(self, tensor: Tensor) -> int:
        return math.prod(tensor.shape) * self._dtype.itemsize

    def _cut(self) -> list[list[Tensor]]:
        shards, room = [[]], self._max_shard_bytes
        for tensor in self._tensors:
            if shards[-1] and self._size(tensor) > room:
                shards.append([])
                room = self._max_shard_bytes
            shards[-1].append(tensor)
            room -= self._size(tensor)
        return shards
