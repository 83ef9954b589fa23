"""The files of a published PyTorch checkpoint, read and written.

A directory with config.json and model.safetensors, or with several files and
model.safetensors.index.json, or with pytorch_model.bin. Nothing here needs
PyTorch, or more memory than one tensor.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
import safetensors

from transxssm_jax import cli
from transxssm_jax import config as config_lib
from transxssm_jax.config import Model
from transxssm_jax.pytorch import fields, tensors
from transxssm_jax.pytorch.fields import ConvertError
from transxssm_jax.pytorch.tensors import Path, Tensor
from transxssm_jax.pytorch.torch_files import TorchFile, TorchFileError

SINGLE, INDEX, TORCH = 'model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin'
DTYPES = {'float32': (np.dtype(np.float32), 'F32'), 'bfloat16': (np.dtype(ml_dtypes.bfloat16), 'BF16')}


# ---- reading ---------------------------------------------------------------


class TensorFiles:
    """The tensors in the files of a directory, by name, read one at a time.

    Attributes (of those that have checked the names):
      tensors: name -> what is known of it.
      unused: a phrase for each field and tensor that has no effect.

    Raises:
      ConvertError: a file is missing, cannot be read, or lacks a tensor that it is said to hold.
    """

    tensors: dict
    unused: list[str]

    def __init__(self, directory: pathlib.Path | str):
        self.directory = pathlib.Path(directory)

    def read_json(self, name: str) -> dict:
        path = self.directory / name
        try:
            content = json.loads(path.read_text())
        except OSError as error:
            raise ConvertError(
                f'{path}: {error.strerror}; --source must be a directory with config.json and {SINGLE} (or {INDEX})'
            ) from error
        except (ValueError, RecursionError) as error:
            raise ConvertError(f'{path} is not JSON ({error}); fetch it again') from error
        if not isinstance(content, dict):
            raise ConvertError(f'{path} must hold a JSON object, not {type(content).__name__}')
        return content

    def _find_tensors(self) -> dict[str, str]:
        """Tensor name -> file name."""
        if (self.directory / SINGLE).exists():
            listed, files = {}, [SINGLE]
        elif not (self.directory / INDEX).exists():
            listed, files = {}, [TORCH if (self.directory / TORCH).exists() else SINGLE]
        else:
            listed = self.read_json(INDEX).get('weight_map')
            if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
                raise ConvertError(f'{self.directory / INDEX} must hold a weight_map of names of files; fetch it again')
            files = sorted(set(listed.values()))
        found = {}
        for file in files:
            with self._open(file) as handle:
                found |= dict.fromkeys(handle.keys(), file)
        for name, file in listed.items():
            if found.get(name) != file:
                raise ConvertError(
                    f'{self.directory / file} lacks tensor {cli.shorten(name)}, which {INDEX} lists in it; fetch both again'
                )
        return found

    def _open(self, file: str):
        path = self.directory / file
        if not os.path.isfile(path):  # False for a name that the system does not take, too
            raise ConvertError(
                f'{self.directory / cli.shorten(file)}: no such file; the weights must be in {SINGLE}, in the files that '
                f'{INDEX} lists, or in {TORCH}'
            )
        try:
            return TorchFile(path) if path.suffix == '.bin' else safetensors.safe_open(path, 'numpy')
        except (safetensors.SafetensorError, TorchFileError, OSError) as error:
            raise ConvertError(f'{path} cannot be read ({str(error).splitlines()[0]}); fetch it again') from error

    def read(self, name: str) -> np.ndarray:
        """One tensor in its own dtype. The file is opened for it alone, so that nothing of it stays mapped."""
        with self._open(self._files[name]) as handle:
            try:
                return handle.get_tensor(name)
            except TorchFileError as error:
                raise ConvertError(f'{self.directory / self._files[name]}: {error}; fetch it again') from error

    def _check_names(self, head: str, embedding: str, field: str, is_tied: bool) -> None:
        """Raises ConvertError unless the files hold `tensors` and no others, but for what is noted as unused.

        Args:
          head, embedding: names of two tensors, which are equal where is_tied, which is what `field` of config.json says.
        """
        missing = [name for name in self.tensors if name not in self._files]
        if missing:
            raise ConvertError(f'{self.directory} lacks tensor {_some(missing)}, which its config.json calls for')
        extra = [name for name in self._files if name not in self.tensors]
        for name in [name for name in extra if name.endswith('rotary_emb.inv_freq')]:
            extra.remove(name)
            self.unused.append(f'{name} (computed from rope_theta)')
        if head in extra and is_tied:
            values = self.read(head), self.read(embedding)
            if values[0].shape != values[1].shape or values[0].tobytes() != values[1].tobytes():
                raise ConvertError(
                    f'{self.directory}: {head} differs from {embedding}, although {field} is true (its default); set it to '
                    'false in config.json, or remove one'
                )
            extra.remove(head)
            self.unused.append(f'{head} (tied, equal to {embedding})')
        if extra:
            raise ConvertError(
                f'{self.directory} has unexpected tensor {_some(extra)}, which its config.json has no place for'
            )

    def _check_tensor(self, name: str, wanted: tuple[int, ...]) -> None:
        """Raises ConvertError unless a tensor has this shape and a floating-point type."""
        with self._open(self._files[name]) as handle:
            entry = handle.get_slice(name)
        shape, dtype = tuple(entry.get_shape()), entry.get_dtype()
        if shape != wanted:
            raise ConvertError(
                f'{self.directory}: {name} has shape {list(shape)}, its config.json calls for {list(wanted)}'
            )
        if dtype not in ('F32', 'F16', 'BF16'):
            raise ConvertError(f'{self.directory}: {name} is of type {dtype}; F32, F16 and BF16 are read')


class PytorchCheckpoint(TensorFiles):
    """A published checkpoint whose names, shapes and decay rates have been checked.

    Attributes:
      fields: its config.json.
      config: the config that an import begins with; its model is the one that `layers` gives arrays of.
      tensors: name -> Tensor.
      unused: a phrase for each field and tensor that has no effect.
      rates: name -> float64 [H] of every A.

    Raises:
      ConvertError: something is missing, unexpected, of another shape, or cannot be held.
    """

    def __init__(self, directory: pathlib.Path | str):
        super().__init__(directory)
        self.fields = self.read_json('config.json')
        where = f'{self.directory / "config.json"}'
        self._published, self.unused = fields.model_of(self.fields, where)  # the model with all spelled out
        try:
            plain = {name: value for name, value in self.fields.items() if name != fields.SETTINGS}
            self.config = fields.config_of(plain, self._published)
        except config_lib.ConfigError as error:
            raise ConvertError(f'{where}: {error}') from error
        self.tensors = tensors.tensors_of(self._published)
        self._files = self._find_tensors()
        self._check_names(
            'lm_head.weight', 'model.word_embed.weight', 'tie_word_embeddings', self._published.tie_embeddings
        )
        for name, tensor in self.tensors.items():
            self._check_tensor(name, tensor.shape)
        self.rates = {
            name: self.read(name).astype(np.float64)
            for name, tensor in self.tensors.items()
            if tensor.path[-1] == 'a_log'
        }
        self._check_rates()
        if fields.SETTINGS in self.fields:
            self._restore_settings()

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

    def _restore_settings(self) -> None:
        """Takes the settings that an export put into config.json, as far as the other fields and the tensors agree."""
        try:
            config = fields.config_of(self.fields, self._published)
        except ConvertError as error:
            self.unused.append(f'{fields.SETTINGS} ({error})')
            return
        ours, published, changes = config.model, self._published, {}
        if ours.num_ssd_groups != published.num_ssd_groups and (name := self._find_head_of_its_own(ours)):
            self.unused.append(
                f'{fields.SETTINGS}: model.num_ssd_groups={ours.num_ssd_groups} (heads of a group differ in {name})'
            )
            changes['model.num_ssd_groups'] = published.num_ssd_groups
        if ours.use_bias != published.use_bias and (name := self._find_bias()):
            self.unused.append(f'{fields.SETTINGS}: model.use_bias={ours.use_bias} ({name} is not 0)')
            changes |= {'model.use_bias': True, 'model.use_dt_bias': False}
        self.config = config_lib.replace(config, changes)

    def _find_head_of_its_own(self, ours: Model) -> str:
        """A tensor of B or C in which two heads of one group of `ours` differ; '' where there is none."""
        for name, tensor in self.tensors.items():
            if tensors.is_grouped(tensor.path):
                value_GRX = self.read(name).reshape(ours.num_ssd_groups, ours.num_heads // ours.num_ssd_groups, -1)
                if (value_GRX != value_GRX[:, :1]).any():
                    return name
        return ''

    def _find_bias(self) -> str:
        """A bias other than that of dt that is not 0; '' where there is none."""
        for name, tensor in self.tensors.items():
            if tensor.path[-1] == 'bias' and tensor.path[-2] != 'dt' and self.read(name).any():
                return name
        return ''

    def layers(
        self, path: Path, shape: tuple[int, ...], advance: Callable = lambda: None
    ) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """(index, float32 values) of every layer of one array of ours, read one at a time; () of one without layers.

        Args:
          path, shape: of the array of `config.model`.
          advance: is called after each.
        """
        source = tensors.spelled_out_path(path, self.config.model)
        for tensor in self.tensors.values():
            if tensor.path == (source or path):
                yield tensor.index, self._layer(tensor, path, shape[len(tensor.index) :], source is None)
                advance()

    def _layer(self, tensor: Tensor, path: Path, shape: tuple[int, ...], is_zero: bool) -> np.ndarray:
        if is_zero:
            return np.zeros(shape, np.float32)
        spelled = (*shape[:-2], self._published.num_heads, shape[-1]) if tensors.is_grouped(path) else shape
        return tensors.fold(path, tensor.to_ours(self.read(tensor.name), spelled), shape)


def _some(names: list[str]) -> str:
    return names[0] + (f' (and {len(names) - 1} more)' if len(names) > 1 else '')


# ---- writing ---------------------------------------------------------------


class Writer:
    """Safetensors files of known tensors, written in any order; the package itself wants all of a file at once.

    The files get their names when the `with` block ends without an error.

    Args:
      directory: exists.
      tensors: what will be written, in the order of the files.
      max_shard_bytes: of tensors in one file; a larger tensor has a file of its own.
      dtype: 'float32' or 'bfloat16', of the matrices.
      other_dtype: of all else, vectors and filters [C, 1, W].
    """

    def __init__(
        self, directory: pathlib.Path, tensors: list[Tensor], max_shard_bytes: int, dtype: str, other_dtype: str
    ):
        self._directory, self._tensors, self._max_shard_bytes = directory, tensors, max_shard_bytes
        self._dtype, self._other_dtype = dtype, other_dtype

    def __enter__(self) -> 'Writer':
        self._files, self._offsets = {}, {}
        shards = self._cut()
        for i, shard in enumerate(shards, start=1):
            name = SINGLE if len(shards) == 1 else f'model-{i:05d}-of-{len(shards):05d}.safetensors'
            header, end = {'__metadata__': {'format': 'pt'}}, 0  # the mark that transformers asks for
            for tensor in shard:
                start, end = end, end + self._size(tensor)
                header[tensor.name] = {
                    'dtype': self._dtype_of(tensor)[1],
                    'shape': list(tensor.shape),
                    'data_offsets': [start, end],
                }
            text = json.dumps(header).encode()
            text += b' ' * (-len(text) % 8)
            self._files[name] = open(self._temporary(name), 'wb')  # closed by __exit__
            self._files[name].write(len(text).to_bytes(8, 'little') + text)
            for tensor in shard:
                self._offsets[tensor.name] = name, 8 + len(text) + header[tensor.name]['data_offsets'][0]
        return self

    def write(self, tensor: Tensor, value: np.ndarray) -> None:
        """Rounds a tensor to its dtype and writes it where its file has it."""
        name, offset = self._offsets[tensor.name]
        self._files[name].seek(offset)
        self._files[name].write(np.ascontiguousarray(value, self._dtype_of(tensor)[0]).view(np.uint8))

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
                    'weight_map': {tensor: name for tensor, (name, _) in self._offsets.items()},
                }
                (self._directory / INDEX).write_text(json.dumps(index, indent=2) + '\n')

    def _temporary(self, name: str) -> pathlib.Path:
        return self._directory / f'.{name}.tmp'

    def _size(self, tensor: Tensor) -> int:
        return math.prod(tensor.shape) * self._dtype_of(tensor)[0].itemsize

    def _dtype_of(self, tensor: Tensor) -> tuple[np.dtype, str]:
        """(dtype, its name in the file) of a tensor."""
        return DTYPES[self._dtype if len(tensor.shape) == 2 else self._other_dtype]

    def _cut(self) -> list[list[Tensor]]:
        shards, room = [[]], self._max_shard_bytes
        for tensor in self._tensors:
            if shards[-1] and self._size(tensor) > room:
                shards.append([])
                room = self._max_shard_bytes
            shards[-1].append(tensor)
            room -= self._size(tensor)
        return shards
