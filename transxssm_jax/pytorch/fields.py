"""The config.json of the published PyTorch format, and the settings of ours that mean the same.

An export holds the settings of its run a second time, under the key `transxssm_jax`, because the published fields have
no place for some of them: PyTorch's code has B and C of every head where ours may share them in groups, a dt bias only
together with biases everywhere, and the dtype of the file where ours has that of the computation.
"""

import dataclasses
import json

from transxssm_jax import cli
from transxssm_jax import config as config_lib
from transxssm_jax.config import Config, ConfigError, Model


class ConvertError(cli.UserError, ValueError):
    """Weights that do not fit; the message is one line."""


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
SETTINGS = 'transxssm_jax'  # our own key
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
_ROPE_KINDS = {'default': 'none', 'linear': 'linear', 'dynamic': 'dynamic'}  # published -> ours


# ---- published -> ours -----------------------------------------------------


def model_of(published: dict, where: str) -> tuple[Model, list[str]]:
    """(our settings of the model, a phrase for each field that has no effect) of a published config.

    Raises:
      ConvertError: a field has a value that our model cannot compute, naming both.
    """

    def refuse(name, value, rule):
        raise ConvertError(f'{where}: {name}={cli.shorten(json.dumps(value))} {rule}')

    fields = PUBLISHED | published
    if str(fields.get('model_type', 'TransXSSM')).lower() != 'transxssm':
        refuse(
            'model_type',
            fields['model_type'],
            'is another model; only TransXSSM is read, and Mamba-2 with the config.json of mamba_ssm',
        )
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
    if not isinstance(kind, str) or kind not in _ROPE_KINDS:
        refuse('rope_scaling.rope_type', kind, f'is not computed here; only {", ".join(_ROPE_KINDS)} are')
    try:
        counts = 'num_hidden_layers', 'attn_layer_period', 'attn_layer_offset'
        for name in counts:
            if type(fields[name]) is not int:
                refuse(name, fields[name], 'must be a whole number')
        layers, period, offset = (fields[name] for name in counts)
        if period < 1:
            refuse('attn_layer_period', period, 'must be at least 1; one above num_hidden_layers means no attention')
        period = min(period, layers)  # a longer period is cut off after its first layers
        fields |= {'attn_layer_period': period}
        if offset >= period:  # no layer has it
            fields |= {'attn_layer_period': 0, 'attn_layer_offset': 0}
        elif layers % period:
            refuse('num_hidden_layers', layers, f'must be a multiple of attn_layer_period={period}')
        model = Model(**{ours: fields[theirs] for theirs, ours in SAME.items()})
        # The transformers library (4.48, of the published code) stretches from max_position_embeddings.
        model.rope_scaling, model.rope_original_length = _ROPE_KINDS[kind], fields['max_position_embeddings']
        if kind != 'default':
            model.rope_factor = scaling['factor']
        # B and C are per head and as wide as it; dt = softplus(u W + bias of dt_proj, where hidden_bias is set).
        model.num_ssd_groups, model.d_state = model.num_heads, model.d_model // model.num_heads
        model.use_dt_bias = False
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
    known = PUBLISHED.keys() | BOOKKEEPING | {'head_dim', 'partial_rotary_factor', 'rope_parameters', SETTINGS}
    unused += [f'{name}={json.dumps(value)}' for name, value in sorted(published.items()) if name not in known]
    return model, unused


def config_of(published: dict, model: Model) -> Config:
    """The config that an import begins with, locked.

    Args:
      published: config.json. Settings that an export put there are taken, but where a published field says the same,
        the field counts: another program may have changed it since.
      model: what `model_of` made of it.

    Raises:
      ConvertError: the settings are of another model, or are not those of this version; the message is one line.
    """
    if SETTINGS not in published:
        return config_lib.resolve(
            Config(model=dataclasses.replace(model), data=config_lib.Data(seq_len=model.rope_original_length))
        )
    try:
        saved = config_lib.from_json(json.dumps(published[SETTINGS]))
        expected = pytorch_model(saved.model)
        for name in ('num_heads', 'd_model', 'use_bias', 'num_layers', 'attention_period', 'attention_offset'):
            if getattr(model, name) != getattr(expected, name):
                raise ConvertError(
                    f'model.{name}={getattr(saved.model, name)} there is not that of the other fields, '
                    f'{getattr(model, name)}'
                )
        stated = {*SAME.values(), 'rope_scaling'} - {'use_bias'}
        if saved.model.pattern:  # which places the layers; it was compared above
            stated -= {'attention_period', 'attention_offset'}
        stated |= {'rope_factor'} if model.rope_scaling != 'none' else set()
        stated |= {'rope_original_length'} if model.rope_scaling == 'dynamic' else set()
        changes = {f'model.{name}': getattr(model, name) for name in stated}
        return config_lib.replace(saved, {**changes, 'data.path': ''})
    except ConfigError as error:
        raise ConvertError(str(error)) from error


# ---- ours -> published -----------------------------------------------------


def pytorch_model(model: Model) -> Model:
    """The model that computes the same and that PyTorch's code can hold: B and C for every head, the dt bias in dt_proj.

    Raises:
      ConvertError: there is none.
    """
    if model.d_state != model.head_dim:
        raise ConvertError(
            f'model.d_state={model.d_state} has no place in the published format, where the state is as wide '
            f'as a head; only model.d_state=model.d_model/model.num_heads={model.head_dim} can be exported'
        )
    for name, only in (('ssd_encoding', 'ssd'), ('attention_encoding', 'attention')):
        if getattr(model, name) != 'rope' and only in model.layer_pattern:
            raise ConvertError(
                f'model.{name}={getattr(model, name)!r} has no place in the published format, where both kinds of layers '
                'rotate; this run cannot be exported'
            )
    for name, kinds in (
        ('qk_norm', {'attention'}),
        ('bc_norm', {'ssd'}),
        ('logit_soft_cap', set(model.layer_pattern)),
    ):
        if getattr(model, name) and kinds & set(model.layer_pattern):
            raise ConvertError(
                f'model.{name}={getattr(model, name)} has no place in the published format; this run cannot be exported to it'
            )
    if not model.d_mlp:
        raise ConvertError('model.d_mlp=0 has no place in the published format, where every layer has an MLP')
    kinds = model.layer_pattern
    if kinds.count('attention') > 1 and set(kinds) != {'attention'}:
        raise ConvertError(
            f'model.pattern={model.pattern!r} has no place in the published format, which has one attention layer in a period'
        )
    if model.rope_scaling == 'length':
        raise ConvertError(
            "model.rope_scaling='length' has no place in the published format; add "
            '--config.model.rope_scaling=none, linear or dynamic'
        )
    placed = {}
    if model.pattern:  # the published fields place layers by period and offset
        period = 1 if set(kinds) == {'attention'} else len(kinds) if 'attention' in kinds else 0
        placed = dict(pattern='', attention_period=period, attention_offset=kinds.index('attention') if period else 0)
    return dataclasses.replace(
        model, num_ssd_groups=model.num_heads, use_bias=model.use_bias or model.use_dt_bias, use_dt_bias=False, **placed
    )


def fields_of(config: Config, memory: dict, dtype: str) -> dict:
    """config.json of an export.

    Args:
      config: of the run.
      memory: fields of the config.json that the run was imported with.
      dtype: 'float32' or 'bfloat16', of the tensors.

    Raises:
      ConvertError: see `pytorch_model`.
    """
    model = pytorch_model(config.model)
    fields = {
        'bos_token_id': None,
        'eos_token_id': None,
        'pad_token_id': None,
        'ssd_chunk_size': 256,
        'use_cache': True,
        'max_position_embeddings': config.data.seq_len,
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
    own = {'model_type': 'TransXSSM', 'architectures': ['TransXSSMForCausalLM'], 'torch_dtype': dtype}
    return fields | own | {SETTINGS: saved_settings(config)}


def saved_settings(config: Config) -> dict:
    """The settings of a run that go with its weights: without paths, the mesh, and what the optimizer had seen."""
    settings = json.loads(config_lib.to_json(config))
    del settings['mesh'], settings['train']['init_from']  # of a machine
    for name in ('path', 'sources', 'weights', 'max_epochs'):
        del settings['data'][name]
    del settings['optimizer']['updates_before']  # an export holds no optimizer state
    return settings
