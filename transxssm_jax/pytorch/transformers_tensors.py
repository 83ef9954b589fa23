"""The tensors of an export that the transformers library loads: their names and shapes, and where our arrays hold their values.

Two layouts: that of modeling_transxssm.py, whose names are the paths of our arrays (`model.layers.3.mixer.in_proj.x.weight`), and
that of the library's LlamaForCausalLM.

Shape legend: W width of a convolution, C channels.
"""

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np

from transxssm_jax.config import Model
from transxssm_jax.pytorch.fields import ConvertError
from transxssm_jax.pytorch.tensors import Path, Tensor, shapes_of

HEAD, EMBEDDING = 'lm_head.weight', 'model.embed_tokens.weight'
_TOP = {('embedding',): EMBEDDING, ('head',): HEAD, ('final_norm', 'scale'): 'model.final_norm.weight'}
_EVERYWHERE = (
    r'(mixer|mlp)/in_proj/norm/scale|(mixer|mlp)_residual/weight|(mixer|mlp)/out_proj/(kernel|bias)|'
    r'mlp/in_proj/(gate|up)/(kernel|bias)'
)
_SCAN = r'mixer/(a_log|dt_bias|d_skip)|mixer/conv/(x|b|c)/(kernel|bias)|mixer/(b|c)_norm/scale'
# Kind of layer -> its arrays that modeling_transxssm.py computes with.
_COMPUTED = {
    'ssd': rf'{_EVERYWHERE}|{_SCAN}|mixer/in_proj/(x|b|c|dt)/(kernel|bias)',
    'mamba2': rf'{_EVERYWHERE}|{_SCAN}|mixer/in_proj/(z|x|b|c|dt)/(kernel|bias)|mixer/norm/scale',
    'attention': rf'{_EVERYWHERE}|mixer/in_proj/(q|k|v)/(kernel|bias)|mixer/(q|k)_norm/scale',
}
_LLAMA_TOP = _TOP | {('final_norm', 'scale'): 'model.norm.weight'}
_LLAMA = {  # ours within a layer, without the leaf -> LlamaForCausalLM's
    'mixer/in_proj/norm': 'input_layernorm',
    'mlp/in_proj/norm': 'post_attention_layernorm',
    'mixer/out_proj': 'self_attn.o_proj',
    'mlp/out_proj': 'mlp.down_proj',
    'mlp/in_proj/gate': 'mlp.gate_proj',
    'mlp/in_proj/up': 'mlp.up_proj',
} | {f'mixer/in_proj/{name}': f'self_attn.{name}_proj' for name in 'qkv'}
RESIDUALS = ('mixer_residual/weight', 'mlp_residual/weight')  # which Llama has not: 1
_LEAVES = {'kernel': 'weight', 'scale': 'weight'}


@dataclasses.dataclass(frozen=True)
class PlainTensor(Tensor):
    """A tensor that holds one layer of our array as it is: a matrix as [outputs, inputs], filters as [C, 1, W], all else flat."""

    def to_ours(self, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor as one layer of our array, float32 of `shape`."""
        return np.ascontiguousarray(self._turn(value), np.float32).reshape(shape)

    def from_ours(self, layer: np.ndarray) -> np.ndarray:
        """The tensor of one layer of our array, a view of it."""
        if len(self.shape) == 3:
            return layer.reshape(layer.shape[0], -1).T[:, None]
        return layer.reshape(self.shape[::-1]).T if self.path[-1] == 'kernel' else layer.reshape(self.shape)

    def _turn(self, value: np.ndarray) -> np.ndarray:
        if value.ndim == 3:
            return value[:, 0].T
        return value.T if self.path[-1] == 'kernel' else value


def own_tensors(model: Model) -> dict[str, PlainTensor]:
    """Every tensor by name, in the order of the layers, as modeling_transxssm.py calls them.

    Raises:
      ConvertError: that file does not compute with a parameter, which is named.
    """

    def name(path: Path) -> str:
        if path in _TOP:
            return _TOP[path]
        if path[0] != 'layers' or not re.fullmatch(_COMPUTED.get(path[1], ''), '/'.join(path[2:])):
            raise ConvertError(
                f'parameter {"/".join(path)} has no place in modeling_transxssm.py; this model cannot be exported'
            )
        return '.'.join((*path[2:-1], _LEAVES.get(path[-1], path[-1])))

    return _tensors(model, name)


def llama_tensors(model: Model) -> dict[str, PlainTensor]:
    """Every tensor by name, as transformers' LlamaForCausalLM calls them, of a model of attention alone."""

    def name(path: Path) -> str:
        if path in _LLAMA_TOP:
            return _LLAMA_TOP[path]
        rest = '/'.join(path[2:])
        return '' if rest in RESIDUALS else f'{_LLAMA["/".join(path[2:-1])]}.{_LEAVES.get(path[-1], path[-1])}'

    return _tensors(model, name)


def _tensors(model: Model, name_of: Callable[[Path], str]) -> dict[str, PlainTensor]:
    """name_of: the name of an array's tensors, of a layer's within the layer; '': it has none."""
    found, kinds = [], model.layer_pattern
    for path, shape in shapes_of(model).items():
        name = name_of(path)
        if path[0] != 'layers':
            order = -1 if path == ('embedding',) else model.num_layers
            found.append((order, PlainTensor(name, shape, path, ())))
            continue
        kind, rest, shape = path[1], path[2:], shape[2:]
        flat = (math.prod(shape),)
        if rest[-1] == 'kernel' and 'conv' in rest:
            flat = (math.prod(shape[1:]), 1, shape[0])
        elif rest[-1] == 'kernel':
            inputs = 2 if rest[:2] == ('mixer', 'out_proj') else 1
            flat = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
        layers = [i for i in range(model.num_layers) if kinds[i % len(kinds)] == kind]
        found += [
            (layer, PlainTensor(f'model.layers.{layer}.{name}', flat, path, divmod(n, kinds.count(kind))))
            for n, layer in enumerate(layers)
            if name
        ]
    return {tensor.name: tensor for _, tensor in sorted(found, key=lambda item: item[0])}
