"""A directory that the transformers library loads, read: our own export of either layout, and any Llama.

A Llama has no learned residuals; ours of it are 1.
"""

import itertools
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from transxssm_jax.config import ConfigError
from transxssm_jax.pytorch import transformers_fields as fields_lib
from transxssm_jax.pytorch import transformers_tensors as tensors_lib
from transxssm_jax.pytorch.fields import ConvertError
from transxssm_jax.pytorch.files import TensorFiles
from transxssm_jax.pytorch.tensors import Path

LLAMA = 'llama'  # model_type


class TransformersCheckpoint(TensorFiles):
    """An export whose names and shapes have been checked.

    Attributes:
      fields: its config.json.
      config: the config that an import begins with.
      tensors: name -> PlainTensor.
      unused: a phrase for each field and tensor that has no effect.
      rates: empty; a_log is stored as it is.

    Raises:
      ConvertError: something is missing, unexpected, of another shape, or cannot be computed here.
    """

    rates: dict = {}

    def __init__(self, directory: pathlib.Path | str):
        super().__init__(directory)
        self.fields = self.read_json('config.json')
        is_llama = self.fields.get('model_type') == LLAMA
        try:
            model = fields_lib.llama_model_of(self.fields) if is_llama else fields_lib.model_of(self.fields)
            self.config, self.unused = fields_lib.config_of(self.fields, model, is_llama)
        except ConfigError as error:
            raise ConvertError(f'{self.directory / "config.json"}: {error}') from error
        make = tensors_lib.llama_tensors if is_llama else tensors_lib.own_tensors
        self.tensors = make(self.config.model)
        self._files = self._find_tensors()
        self._check_names(
            tensors_lib.HEAD, tensors_lib.EMBEDDING, 'tie_word_embeddings', self.config.model.tie_embeddings
        )
        for name, tensor in self.tensors.items():
            self._check_tensor(name, tensor.shape)

    def layers(
        self, path: Path, shape: tuple[int, ...], advance: Callable = lambda: None
    ) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """(index, float32 values) of every layer of one array of ours, read one at a time; () of one without layers.

        Args:
          path, shape: of the array of `config.model`.
          advance: is called once for each tensor.
        """
        own = [tensor for tensor in self.tensors.values() if tensor.path == path]
        for tensor in own:
            yield tensor.index, tensor.to_ours(self.read(tensor.name), shape[len(tensor.index) :])
            advance()
        if not own:  # a residual of Llama
            for index in itertools.product(*map(range, shape[:2])):
                yield index, np.ones(shape[2:], np.float32)
