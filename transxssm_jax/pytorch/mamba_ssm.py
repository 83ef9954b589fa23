"""Published Mamba-2 checkpoints (state-spaces/mamba2-*), in the names and shapes of mamba_ssm's MambaLMHeadModel.

Their config.json has `d_model`, `n_layer`, `vocab_size` and `ssm_cfg`. Our layers are theirs with a learned residual of 1. A
published matrix is [outputs, inputs], with z, x, B, C and dt below one another; ours are maps of their own.

Shape legend: D model, H heads, P head width, G groups, N state, W width of the convolution.
"""

import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from transxssm_jax import cli
from transxssm_jax import config as config_lib
from transxssm_jax.config import Config, ConfigError, Data, Model
from transxssm_jax.pytorch.fields import ConvertError
from transxssm_jax.pytorch.files import TensorFiles
from transxssm_jax.pytorch.tensors import Path, shapes_of

MARK = 'ssm_cfg'  # the field by which such a config.json is known
TRAINING_LENGTH = 2048  # tokens, of the published checkpoints; config.json does not say

TOP = {
    ('embedding',): 'backbone.embedding.weight',
    ('final_norm', 'scale'): 'backbone.norm_f.weight',
    ('head',): 'lm_head.weight',
}
# Ours within a layer -> (published within a layer, which part of its first axis); part None: the whole.
LAYER = (
    {
        'mixer/in_proj/norm/scale': ('norm.weight', None),
        'mixer/a_log': ('mixer.A_log', None),
        'mixer/dt_bias': ('mixer.dt_bias', None),
        'mixer/d_skip': ('mixer.D', None),
        'mixer/norm/scale': ('mixer.norm.weight', None),
        'mixer/out_proj/kernel': ('mixer.out_proj.weight', None),
        'mlp/in_proj/norm/scale': ('norm2.weight', None),
        'mlp/in_proj/up/kernel': ('mlp.fc1.weight', 0),
        'mlp/in_proj/gate/kernel': ('mlp.fc1.weight', 1),
        'mlp/out_proj/kernel': ('mlp.fc2.weight', None),
    }
    | {f'mixer/in_proj/{name}/kernel': ('mixer.in_proj.weight', i) for i, name in enumerate(('z', 'x', 'b', 'c', 'dt'))}
    | {f'mixer/conv/{name}/kernel': ('mixer.conv1d.weight', i) for i, name in enumerate(('x', 'b', 'c'))}
    | {f'mixer/conv/{name}/bias': ('mixer.conv1d.bias', i) for i, name in enumerate(('x', 'b', 'c'))}
)
RESIDUALS = ('mixer_residual/weight', 'mlp_residual/weight')  # 1: the published layers have none

# ssm_cfg's fields with the defaults of the reference module. Ours is the setting that means the same.
SSM_DEFAULTS = {
    'layer': 'Mamba1',
    'd_state': 128,
    'd_conv': 4,
    'expand': 2,
    'headdim': 64,
    'ngroups': 1,
    'dt_min': 0.001,
    'dt_max': 0.1,
    'A_init_range': [1, 16],
}
ONLY = {  # fields of which one value is computed here
    'D_has_hdim': False,
    'rmsnorm': True,
    'norm_before_gate': False,
    'bias': False,
    'conv_bias': True,
    'd_ssm': None,
}
WITHOUT_EFFECT = {'dt_init_floor', 'chunk_size', 'use_mem_eff_path', 'conv_init', 'dt_limit'}
TOP_FIELDS = {
    'd_model', 'd_intermediate', 'n_layer', 'vocab_size', MARK, 'attn_layer_idx', 'attn_cfg', 'rms_norm',
    'residual_in_fp32', 'fused_add_norm', 'pad_vocab_size_multiple', 'tie_embeddings',
}  # fmt: skip


def model_of(published: dict, where: str) -> tuple[Model, list[str]]:
    """(settings of the model, a phrase for each field that has no effect) of a config of mamba_ssm.

    Raises:
      ConvertError: a field has a value that our model cannot compute, naming both.
    """

    def refuse(name, value, rule):
        raise ConfigError(f'{name}={cli.shorten(json.dumps(value))} {rule}')

    try:
        ssm = published[MARK] or {}
        if not isinstance(ssm, dict):
            refuse(MARK, ssm, 'must be an object')
        fields = SSM_DEFAULTS | ssm
        if fields['layer'] != 'Mamba2':
            refuse('ssm_cfg.layer', fields['layer'], 'is another mixer; only Mamba2 is read')
        for name, only in ONLY.items():
            if fields.get(name, only) != only:
                refuse(f'ssm_cfg.{name}', fields[name], f'is not computed here; it must be {json.dumps(only)}')
        if list(fields.get('dt_limit', [0, math.inf])) != [0, math.inf]:
            refuse('ssm_cfg.dt_limit', fields['dt_limit'], 'is not computed here; it must be [0, Infinity]')
        if published.get('attn_layer_idx'):
            refuse('attn_layer_idx', published['attn_layer_idx'], 'places attention, which is not read; it must be []')
        if not published.get('rms_norm', True):
            refuse('rms_norm', published['rms_norm'], 'is not computed here; it must be true')
        for name in ('d_model', 'n_layer', 'vocab_size'):
            if type(published.get(name)) is not int or published[name] < 1:
                refuse(name, published.get(name), 'must be a whole number above 0')
        multiple, head_dim = published.get('pad_vocab_size_multiple', 8), fields['headdim']
        if type(head_dim) is not int or head_dim < 1 or published['d_model'] % head_dim:
            refuse('ssm_cfg.headdim', head_dim, f'must divide d_model={published["d_model"]}')
        num_heads = published['d_model'] // head_dim
        low, high = fields['A_init_range']
        model = Model(
            vocab_size=-(-published['vocab_size'] // multiple) * multiple,
            d_model=published['d_model'],
            num_layers=published['n_layer'],
            num_heads=num_heads,
            num_kv_heads=num_heads,
            num_ssd_groups=fields['ngroups'],
            d_state=fields['d_state'],
            # The reference module rounds the width of its MLP up.
            d_mlp=-(-published.get('d_intermediate', 0) // 128) * 128,
            pattern='mamba2',
            mamba_expand=fields['expand'],
            conv_width=fields['d_conv'],
            tie_embeddings=published.get('tie_embeddings', True),
            norm_epsilon=1e-5,
            dt_min=fields['dt_min'],
            dt_max=fields['dt_max'],
            a_min=low,
            a_max=high,
            dtype='float32',
        )
    except (ConfigError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConvertError(f'{where}: {error}') from error
    known = SSM_DEFAULTS.keys() | ONLY.keys() | WITHOUT_EFFECT
    unused = [f'ssm_cfg.{name}={json.dumps(value)}' for name, value in sorted(ssm.items()) if name not in known]
    unused += [f'{name}={json.dumps(value)}' for name, value in sorted(published.items()) if name not in TOP_FIELDS]
    return model, unused


class MambaCheckpoint(TensorFiles):
    """A published Mamba-2 checkpoint whose names and shapes have been checked.

    Attributes:
      fields: its config.json.
      config: the config that an import begins with, float32 as the published logits are.
      tensors: name -> shape.
      unused: a phrase for each field and tensor that has no effect.
      rates: empty; A is stored as the logarithm that ours is.

    Raises:
      ConvertError: something is missing, unexpected, of another shape, or cannot be held.
    """

    rates: dict = {}

    def __init__(self, directory: pathlib.Path | str):
        super().__init__(directory)
        self.fields = self.read_json('config.json')
        where = str(self.directory / 'config.json')
        model, self.unused = model_of(self.fields, where)
        try:
            self.config = config_lib.resolve(Config(model=model, data=Data(seq_len=TRAINING_LENGTH)))
        except ConfigError as error:
            raise ConvertError(f'{where}: {error}') from error
        self._shapes = shapes_of(self.config.model)
        self.tensors = self._published_shapes()
        self._files = self._find_tensors()
        self._check_names('lm_head.weight', 'backbone.embedding.weight', 'tie_embeddings', model.tie_embeddings)
        for name, shape in self.tensors.items():
            self._check_tensor(name, shape)

    def _published_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for path, shape in self._shapes.items():
            if path in TOP:
                shapes[TOP[path]] = shape
            elif (name := '/'.join(path[2:])) not in RESIDUALS:
                published, part = LAYER[name]
                if part in (None, 0):
                    flat = self._flat(published, path[2:], shape[2:])
                    shapes |= {f'backbone.layers.{i}.{published}': flat for i in range(self.config.model.num_layers)}
        return shapes

    def _flat(self, published: str, path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the published tensor that the array at path [within a layer] is of, or a part of."""
        rows = sum(self._rows(published)) if LAYER['/'.join(path)][1] is not None else math.prod(shape)
        if path[-1] != 'kernel':
            return (rows,)
        if path[1] == 'conv':
            return (rows, 1, shape[0])
        if path[1] == 'out_proj':
            return (shape[-1], math.prod(shape[:-1]))
        return (rows, shape[0])

    def _rows(self, published: str) -> list[int]:
        """Rows of each part of a published tensor."""
        model = self.config.model
        inner, groups = model.num_mamba_heads * model.head_dim, model.num_ssd_groups * model.d_state
        if published == 'mlp.fc1.weight':
            return [model.d_mlp, model.d_mlp]
        convolved = [inner, groups, groups]
        return [inner, *convolved, model.num_mamba_heads] if published == 'mixer.in_proj.weight' else convolved

    def layers(
        self, path: Path, shape: tuple[int, ...], advance: Callable = lambda: None
    ) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """(index, float32 values) of every layer of one array of ours, read one at a time; () of one without layers.

        Args:
          path, shape: of the array of `config.model`.
          advance: is called once for each published tensor.
        """
        if path in TOP:
            yield (), self.read(TOP[path]).astype(np.float32)
            advance()
            return
        for i, index in enumerate(itertools.product(*map(range, shape[:2]))):
            if '/'.join(path[2:]) in RESIDUALS:
                yield index, np.ones(shape[2:], np.float32)
                continue
            published, part = LAYER['/'.join(path[2:])]
            value = self.read(f'backbone.layers.{i}.{published}').astype(np.float32)
            if part is not None:
                start = sum(self._rows(published)[:part])
                value = value[start : start + self._rows(published)[part]]
            if path[-1] == 'kernel':
                value = value.reshape(value.shape[0], -1).T
            yield index, np.ascontiguousarray(value).reshape(shape[2:])
            if part in (None, 0):
                advance()
