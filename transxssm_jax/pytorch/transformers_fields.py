"""The config.json of an export that the transformers library loads, and the settings of ours that it stands for.

As in the published format the settings of the run stand in it a second time, under the key `transxssm_jax`; where a field says
the same as a setting, the field counts.
"""

import dataclasses
import json

from transxssm_jax import cli
from transxssm_jax import config as config_lib
from transxssm_jax.config import Config, ConfigError, Data, Model
from transxssm_jax.layer_pattern import KINDS, write_pattern
from transxssm_jax.pytorch.fields import SETTINGS, ConvertError, saved_settings

MODEL_TYPE = 'transxssm_jax'
MODELING = 'modeling_transxssm'  # the file with the code, without its ending
SAME = {  # field of modeling_transxssm.py -> the setting of ours that means the same
    'vocab_size': 'vocab_size',
    'hidden_size': 'd_model',
    'intermediate_size': 'd_mlp',
    'num_hidden_layers': 'num_layers',
    'num_attention_heads': 'num_heads',
    'num_key_value_heads': 'num_kv_heads',
    'num_ssd_groups': 'num_ssd_groups',
    'state_size': 'd_state',
    'conv_width': 'conv_width',
    'mamba_expand': 'mamba_expand',
    'attention_encoding': 'attention_encoding',
    'ssd_encoding': 'ssd_encoding',
    'use_bias': 'use_bias',
    'use_dt_bias': 'use_dt_bias',
    'qk_norm': 'qk_norm',
    'bc_norm': 'bc_norm',
    'logit_soft_cap': 'logit_soft_cap',
    'rotary_base': 'rope_theta',
    'rotary_scaling': 'rope_scaling',
    'rotary_factor': 'rope_factor',
    'rotary_original_length': 'rope_original_length',
    'rms_norm_eps': 'norm_epsilon',
    'initializer_range': 'init_std',
    'tie_word_embeddings': 'tie_embeddings',
}
# A default of transformers 4, which does not save it; and what earlier exports have not.
LEFT_OUT = {'tie_word_embeddings': True, 'qk_norm': False, 'bc_norm': False, 'logit_soft_cap': 0.0}
PLACED = {'pattern', 'attention_period', 'attention_offset'}  # what layer_kinds says
# What a trained model does not depend on.
WITHOUT_EFFECT = {
    'dt_min', 'dt_max', 'a_min', 'a_max', 'dtype', 'remat', 'layer_loop', 'ssd_implementation', 'ssd_chunk_size',
    'attention_implementation', 'quantization',
}  # fmt: skip
LLAMA_SAME = {  # field of transformers' LlamaConfig -> ours
    'vocab_size': 'vocab_size',
    'hidden_size': 'd_model',
    'intermediate_size': 'd_mlp',
    'num_hidden_layers': 'num_layers',
    'num_attention_heads': 'num_heads',
    'num_key_value_heads': 'num_kv_heads',
    'rope_theta': 'rope_theta',
    'rms_norm_eps': 'norm_epsilon',
    'initializer_range': 'init_std',
    'tie_word_embeddings': 'tie_embeddings',
}
LLAMA_DEFAULTS = {
    'rope_theta': 10000.0,
    'rms_norm_eps': 1e-6,
    'initializer_range': 0.02,
    'tie_word_embeddings': False,
    'attention_bias': False,
    'mlp_bias': False,
    'hidden_act': 'silu',
    'max_position_embeddings': 2048,
}
LONGEST_ROW = 4096  # tokens of data.seq_len of an imported Llama that says nothing of its training


# ---- ours -> fields ----------------------------------------------------------


def fields_of(config: Config, dtype: str) -> dict:
    """config.json for modeling_transxssm.py.

    Raises:
      ConvertError: a setting has a value that the file does not compute, which is named.
    """
    model = config.model
    check_computed(model, {*SAME.values(), *PLACED}, f'{MODELING}.py')
    return {
        'model_type': MODEL_TYPE,
        'architectures': ['TransXSSMForCausalLM'],
        'auto_map': {
            'AutoConfig': f'{MODELING}.TransXSSMConfig',
            'AutoModelForCausalLM': f'{MODELING}.TransXSSMForCausalLM',
        },
        **{theirs: getattr(model, ours) for theirs, ours in SAME.items()},
        'layer_kinds': list(model.layer_pattern),
        **_common(config, dtype),
    }


def llama_fields_of(config: Config, dtype: str) -> dict:
    """config.json for transformers' LlamaForCausalLM.

    Raises:
      ConvertError: the model is no Llama, naming what it has besides.
    """
    model = config.model
    refuse = '; leave --layout=llama out'
    if set(model.layer_pattern) != {'attention'}:
        kind = next(kind for kind in model.layer_pattern if kind != 'attention')
        raise ConvertError(f'a layer of kind {kind!r} has no place in Llama, which is attention alone{refuse}')
    if model.attention_encoding != 'rope' or not model.d_mlp:
        name, value = ('attention_encoding', model.attention_encoding) if model.d_mlp else ('d_mlp', 0)
        raise ConvertError(f'model.{name}={value!r} has no place in Llama{refuse}')
    if model.rope_scaling == 'length':
        raise ConvertError(f"model.rope_scaling='length' has no place in Llama{refuse}, or set another")
    irrelevant = {'num_ssd_groups', 'd_state', 'conv_width', 'mamba_expand', 'ssd_encoding', 'use_dt_bias'}
    scaling = {'rope_scaling', 'rope_factor', 'rope_original_length', 'use_bias', 'attention_encoding'}
    check_computed(model, {*LLAMA_SAME.values(), *PLACED, *irrelevant, *scaling}, 'Llama')
    fields = {
        'model_type': 'llama',
        'architectures': ['LlamaForCausalLM'],
        'hidden_act': 'silu',
        'attention_bias': model.use_bias,
        'mlp_bias': model.use_bias,
        'head_dim': model.head_dim,
        'rope_scaling': None,
        **{theirs: getattr(model, ours) for theirs, ours in LLAMA_SAME.items()},
        **_common(config, dtype),
    }
    if model.rope_scaling != 'none':
        fields['rope_scaling'] = {'rope_type': model.rope_scaling, 'factor': model.rope_factor}
    if model.rope_scaling == 'dynamic':  # transformers stretches from there
        fields['max_position_embeddings'] = model.rope_original_length
        fields['rope_scaling']['original_max_position_embeddings'] = model.rope_original_length
    return fields


def _common(config: Config, dtype: str) -> dict:
    return {
        'max_position_embeddings': config.data.seq_len,
        'use_cache': True,
        'bos_token_id': None,
        'eos_token_id': None,
        'pad_token_id': None,
        'torch_dtype': dtype,  # transformers 4
        'dtype': dtype,  # transformers 5
        SETTINGS: saved_settings(config),
    }


def check_computed(model: Model, computed: set[str], where: str) -> None:
    """Raises ConvertError for a setting that is not at its default, has an effect, and is none of `computed`."""
    for field in dataclasses.fields(Model):
        value = getattr(model, field.name)
        if field.name not in computed | WITHOUT_EFFECT and value != field.default:
            raise ConvertError(
                f'model.{field.name}={value!r} has no place in {where}; this run cannot be exported in this layout'
            )


# ---- fields -> ours ----------------------------------------------------------


def model_of(fields: dict) -> Model:
    """The settings that the fields of modeling_transxssm.py stand for.

    Raises:
      ConfigError: one is missing or has a value that is not computed here.
    """
    fields = LEFT_OUT | fields
    missing = [name for name in (*SAME, 'layer_kinds') if name not in fields]
    if missing:
        raise ConfigError(f'{missing[0]} is missing')
    kinds = fields['layer_kinds']
    if not isinstance(kinds, list) or not kinds or not all(isinstance(kind, str) and kind in KINDS for kind in kinds):
        raise ConfigError(
            f'layer_kinds={cli.shorten(json.dumps(kinds))} must list kinds of layers, of {", ".join(KINDS)}'
        )
    return Model(**{ours: fields[theirs] for theirs, ours in SAME.items()}, pattern=write_pattern(tuple(kinds)))


def llama_model_of(fields: dict) -> Model:
    """The settings that the fields of a LlamaConfig stand for.

    Raises:
      ConfigError: one is missing or has a value that is not computed here.
    """
    fields = LLAMA_DEFAULTS | fields
    if 'rope_parameters' in fields:  # transformers 5
        fields['rope_scaling'] = fields['rope_parameters']
    scaling = fields.get('rope_scaling') or {}
    if not isinstance(scaling, dict):
        raise ConfigError(f'rope_scaling={cli.shorten(json.dumps(scaling))} must be an object or null')
    fields['rope_theta'] = scaling.get('rope_theta', fields['rope_theta'])
    kind = scaling.get('rope_type', scaling.get('type', 'default'))
    if kind not in ('default', 'linear', 'dynamic'):
        raise ConfigError(
            f'rope_scaling.rope_type={cli.shorten(json.dumps(kind))} is not computed here; only default, linear, dynamic are'
        )
    if fields.get('num_key_value_heads') is None:
        fields['num_key_value_heads'] = fields.get('num_attention_heads')
    missing = [name for name in LLAMA_SAME if fields.get(name) is None]
    if missing:
        raise ConfigError(f'{missing[0]} is missing')
    model = Model(
        **{ours: fields[theirs] for theirs, ours in LLAMA_SAME.items()},
        pattern='attention',
        num_ssd_groups=1,
        use_bias=fields['attention_bias'],
    )
    only = {'hidden_act': 'silu', 'mlp_bias': model.use_bias, 'head_dim': model.head_dim, 'pretraining_tp': 1}
    for name, value in only.items():
        if fields.get(name) not in (value, None):
            raise ConfigError(
                f'{name}={cli.shorten(json.dumps(fields[name]))} is not computed here; it must be {json.dumps(value)}'
            )
    if kind != 'default':
        if 'factor' not in scaling:
            raise ConfigError("rope_scaling lacks 'factor'")
        model.rope_scaling, model.rope_factor = kind, scaling['factor']
    if kind == 'dynamic':
        model.rope_original_length = fields['max_position_embeddings']
    return model


def config_of(fields: dict, model: Model, is_llama: bool) -> tuple[Config, list[str]]:
    """(the config that an import begins with, locked; a phrase where the saved settings are of no use).

    Args:
      fields: config.json.
      model: what `model_of` or `llama_model_of` made of it.

    Raises:
      ConfigError: the settings of the fields do not go together.
    """
    stated = {'rope_scaling'} | set((LLAMA_SAME if is_llama else SAME).values())
    if is_llama:
        stated |= {'use_bias', *(('rope_factor',) if model.rope_scaling != 'none' else ())}
        stated |= {'rope_original_length'} if model.rope_scaling == 'dynamic' else set()
    unused = []
    if SETTINGS in fields:
        try:
            saved = config_lib.from_json(json.dumps(fields[SETTINGS]))
            changes = {f'model.{name}': getattr(model, name) for name in stated} | {'data.path': ''}
            if saved.model.layer_pattern != model.layer_pattern:
                changes['model.pattern'] = model.pattern
            return config_lib.replace(saved, changes), []
        except ConfigError as error:
            unused = [f'{SETTINGS} ({error})']
    dtype = fields.get('dtype', fields.get('torch_dtype'))
    model.dtype = 'float32' if dtype in ('float32', None) else 'bfloat16'
    length = fields.get('max_position_embeddings')
    length = min(length, LONGEST_ROW) if type(length) is int and length > 0 else LONGEST_ROW
    return config_lib.resolve(Config(model=dataclasses.replace(model), data=Data(seq_len=length))), unused
