"""Tensors of a file that torch.save wrote, read without PyTorch and without running what the file says.

Such a file is a zip archive: data.pkl describes the tensors, data/KEY holds the bytes of a storage. Only the few names that
a dictionary of tensors consists of are let through the pickle.
"""

import collections
import dataclasses
import math
import pathlib
import pickle
import zipfile

import ml_dtypes
import numpy as np

from transxssm_jax.pytorch.fields import ConvertError

_STORAGES = {
    'FloatStorage': (np.dtype(np.float32), 'F32'),
    'HalfStorage': (np.dtype(np.float16), 'F16'),
    'BFloat16Storage': (np.dtype(ml_dtypes.bfloat16), 'BF16'),
    'DoubleStorage': (np.dtype(np.float64), 'F64'),
    'LongStorage': (np.dtype(np.int64), 'I64'),
}


class TorchFileError(ConvertError):
    """The file is not what torch.save writes of a dictionary of tensors."""


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Where a tensor is: a storage, and a view of it in elements."""

    key: str
    storage: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        """The name of the dtype as safetensors has it."""
        return _STORAGES[self.storage][1]


class TorchFile:
    """The tensors of a file by name, with the methods of `safetensors.safe_open` that are used here.

    Raises:
      TorchFileError: the file is something else, or holds more than tensors.
      OSError: it cannot be read.
    """

    def __init__(self, path: pathlib.Path):
        try:
            self._zip = zipfile.ZipFile(path)
            (index,) = (name for name in self._zip.namelist() if name.split('/')[1:] == ['data.pkl'])
            self._folder = index.removesuffix('data.pkl')
            with self._zip.open(index) as file:
                found = _Unpickler(file).load()
        except TorchFileError:
            raise
        except (zipfile.BadZipFile, pickle.UnpicklingError, KeyError, TypeError, ValueError, EOFError, IndexError,
                AttributeError, RecursionError) as error:  # fmt: skip
            raise TorchFileError(f'it is no file of torch.save ({type(error).__name__})') from error
        if not isinstance(found, dict) or not all(isinstance(tensor, _Tensor) for tensor in found.values()):
            raise TorchFileError('it holds more than a dictionary of tensors')
        self._tensors = {str(name): tensor for name, tensor in found.items()}

    def __enter__(self) -> 'TorchFile':
        return self

    def __exit__(self, *_) -> None:
        self._zip.close()

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_slice(self, name: str) -> _Tensor:
        return self._tensors[name]

    def get_tensor(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        dtype, _ = _STORAGES[tensor.storage]
        if not math.prod(tensor.shape):
            return np.zeros(tensor.shape, dtype)
        try:
            storage = np.frombuffer(self._zip.read(f'{self._folder}data/{tensor.key}'), np.uint8)
            storage = storage[: storage.size // dtype.itemsize * dtype.itemsize].view(dtype)[tensor.offset :]
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            raise TorchFileError(f'the bytes of {name} are damaged or missing') from error
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides))
        if min(tensor.strides, default=0) < 0 or tensor.offset < 0 or last >= storage.size:
            raise TorchFileError(f'{name} reaches beyond its bytes')
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(storage, tensor.shape, strides).copy()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) == ('collections', 'OrderedDict'):
            return collections.OrderedDict
        if (module, name) in (('torch._utils', '_rebuild_tensor_v2'), ('torch._utils', '_rebuild_parameter')):
            return _rebuild_tensor if name == '_rebuild_tensor_v2' else lambda tensor, *rest: tensor
        if module == 'torch' and name in _STORAGES:
            return name
        raise TorchFileError(f'it holds {module}.{name}, which is no tensor; save it again as a dictionary of tensors')

    def persistent_load(self, pid):
        _, storage, key, *_ = pid
        return storage, key


def _rebuild_tensor(storage, offset, size, stride, *rest) -> _Tensor:
    del rest  # whether it needs a gradient, and hooks
    kind, key = storage
    return _Tensor(str(key), kind, int(offset), tuple(map(int, size)), tuple(map(int, stride)))
