"""The tensors of the published PyTorch format: their names and shapes, and where our arrays hold their values.

Shape legend: H heads, G groups of B and C, N state.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from flax import nnx

from transxssm_jax.config import Model
from transxssm_jax.model import parameters
from transxssm_jax.pytorch.fields import ConvertError

Path = tuple[str, ...]  # of an array in the tree of parameters

TOP = {  # ours -> published
    'embedding': 'model.word_embed.weight',
    'head': 'lm_head.weight',
    'final_norm/scale': 'model.final_layernorm.weight',
}
PLAIN = {  # ours -> published, within a layer of any kind
    'mixer/in_proj/norm/scale': 'pre_sequence_layernorm.weight',
    'mixer_residual/weight': 'post_sequence_residual.weight',
    'mlp/in_proj/norm/scale': 'pre_state_layernorm.weight',
    'mlp_residual/weight': 'post_state_residual.weight',
}
_MLP = ('feed_forward', {'gate': 'gate_proj', 'up': 'up_proj', 'out_proj': 'down_proj'})
_SSD = ('ssd', {'x': 'x_proj', 'b': 'b_proj', 'c': 'c_proj', 'dt': 'dt_proj', 'out_proj': 'out_proj'})
_ATTENTION = ('attn', {'q': 'q_proj', 'k': 'k_proj', 'v': 'v_proj', 'out_proj': 'o_proj'})
# (kind of layer, its block) -> (published block, linear map of ours -> published one).
BLOCKS = {
    ('ssd', 'mixer'): _SSD,
    ('ssd', 'mlp'): _MLP,
    ('attention', 'mixer'): _ATTENTION,
    ('attention', 'mlp'): _MLP,
}
OTHERS = {('ssd', 'mixer/a_log'): 'ssd.A'}  # (kind of layer, ours) -> published
LEAVES = {'kernel': 'weight', 'bias': 'bias'}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One published tensor: its name and shape, the path of our array that holds it, and where in the array it is.

    A published matrix is [outputs, inputs]; ours has the input axes first, each axis by itself.
    """

    name: str
    shape: tuple[int, ...]
    path: Path
    index: tuple[int, ...]  # (period, layer of its kind within the period), or () for an array that is not stacked

    def to_ours(self, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The published value as one layer of our array, float32 of `shape`; only log(-A) is rounded."""
        if self.path[-1] == 'a_log':
            value = np.log(-value.astype(np.float64))
        if self.path[-1] == 'kernel':
            value = value.T
        return np.ascontiguousarray(value, np.float32).reshape(shape)

    def from_ours(self, layer: np.ndarray) -> np.ndarray:
        """The published value of one layer of our array, a view of it; A is float64 and new."""
        if self.path[-1] == 'kernel':
            return layer.reshape(self.shape[::-1]).T
        if self.path[-1] == 'a_log':
            return -np.exp(layer.astype(np.float64))
        return layer.reshape(self.shape)


def shapes_of(model: Model) -> dict[Path, tuple[int, ...]]:
    """Path -> shape of every array of ours."""
    _, abstract = parameters.split_model(model)
    return {path: leaf.shape for path, leaf in nnx.traversals.flatten_mapping(nnx.to_pure_dict(abstract)).items()}


def check_exportable(model: Model) -> None:
    """Raises ConvertError, naming it, where the model has a kind of layer or a parameter that the format has not."""
    known = list(dict.fromkeys(kind for kind, _ in BLOCKS))
    for kind in model.layer_pattern:
        if kind not in known:
            raise ConvertError(
                f'a layer of kind {kind!r} has no place in the published PyTorch format, which has '
                f'{" and ".join(map(repr, known))} layers only; this run cannot be exported'
            )


def tensors_of(model: Model) -> dict[str, Tensor]:
    """Every published tensor by name, layer by layer, of a model as `fields.pytorch_model` makes it.

    Raises:
      ConvertError: the published format has no place for a kind of layer or for a parameter, which is named.
    """
    check_exportable(model)
    tensors, kinds = [], model.layer_pattern
    for path, shape in shapes_of(model).items():
        name = _published_name(path)
        if path[0] != 'layers':
            order = -1 if path == ('embedding',) else model.num_layers
            tensors.append((order, Tensor(name, shape, path, ())))
            continue
        kind, rest, shape = path[1], path[2:], shape[2:]
        inputs = (2 if rest[:2] == ('mixer', 'out_proj') else 1) if rest[-1] == 'kernel' else 0
        flat = (math.prod(shape[inputs:]), math.prod(shape[:inputs])) if inputs else (math.prod(shape),)
        layers = [i for i in range(model.num_layers) if kinds[i % len(kinds)] == kind]
        tensors += [
            (layer, Tensor(f'model.layers.{layer}.{name}', flat, path, divmod(n, kinds.count(kind))))
            for n, layer in enumerate(layers)
        ]
    return {tensor.name: tensor for _, tensor in sorted(tensors, key=lambda item: item[0])}


def _published_name(path: Path) -> str:
    """Published name of our array; for one of a layer, within the layer."""
    try:
        if path[0] != 'layers':
            return TOP['/'.join(path)]
        kind, rest = path[1], '/'.join(path[2:])
        if rest in PLAIN:
            return PLAIN[rest]
        if (kind, rest) in OTHERS:
            return OTHERS[kind, rest]
        block, linears = BLOCKS[kind, path[2]]
        return f'{block}.{linears[path[-2]]}.{LEAVES[path[-1]]}'
    except KeyError:
        raise ConvertError(
            f'parameter {"/".join(path)} has no place in the published PyTorch format; this model cannot be exported'
        ) from None


# ---- what PyTorch's code spells out ----------------------------------------

_DT_BIAS, _DT_PROJ_BIAS = ('mixer', 'dt_bias'), ('mixer', 'in_proj', 'dt', 'bias')


def is_grouped(path: Path) -> bool:
    """Whether the array belongs to B or C, [..., G, N]."""
    return path[-2:-1] in (('b',), ('c',))


def spell_out(path: Path, shape: tuple[int, ...], ours: Model, read: Callable[[Path], np.ndarray]) -> np.ndarray:
    """An array of `fields.pytorch_model(ours)`, float32.

    Args:
      path, shape: of the array.
      ours: the model of the run.
      read: gives an array of the run by its path.
    """
    if path[-1] == 'bias' and not ours.use_bias:
        array = np.zeros(shape, np.float32)
    else:
        array = read(path)
    if path[2:] == _DT_PROJ_BIAS and ours.use_dt_bias:
        array = array + read((*path[:2], *_DT_BIAS))
    if is_grouped(path):
        array = np.repeat(array, shape[-2] // array.shape[-2], axis=-2)
    return array


def spelled_out_path(path: Path, ours: Model) -> Path | None:
    """The path in `fields.pytorch_model(ours)` of what an array of `ours` is read from; None: it is zeros."""
    if path[2:] == _DT_BIAS:
        return (*path[:2], *_DT_PROJ_BIAS)
    if path[2:] == _DT_PROJ_BIAS and ours.use_dt_bias:
        return None  # their sum was exported, and dt_bias holds it
    return path


def fold(path: Path, layer: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `spell_out` for one layer of an array: of B and C the first head of every group."""
    return layer[..., :: layer.shape[-2] // shape[-2], :] if is_grouped(path) else layer.reshape(shape)
