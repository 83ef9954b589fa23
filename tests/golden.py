"""The published tiny checkpoint as parameters of ours, for tests; convert.py will do this for users."""

import json
import pathlib

import jax
import numpy as np
from safetensors.numpy import load_file

from transxssm_jax import config as config_lib

DIRECTORY = pathlib.Path(__file__).parents[2] / 'shared' / 'golden' / 'transxssm_tiny'


def load_golden():
    """(Config, params as nested dict, expected arrays by name)."""
    published = json.loads((DIRECTORY / 'config.json').read_text())
    heads = published['num_attention_heads']
    model = config_lib.Model(
        vocab_size=published['vocab_size'], d_model=published['hidden_size'], num_layers=published['num_hidden_layers'],
        num_heads=heads, num_kv_heads=published['num_key_value_heads'], num_ssd_groups=heads,
        d_state=published['hidden_size'] // heads, d_mlp=published['intermediate_size'],
        attention_period=published['attn_layer_period'], attention_offset=published['attn_layer_offset'],
        rope_theta=published['rope_theta'], use_dt_bias=False, dtype='float32')
    config = config_lib.resolve(config_lib.Config(model=model, optimizer=config_lib.Optimizer(warmup_steps=0)))
    tensors = load_file(DIRECTORY / 'model.safetensors')
    P = model.head_dim

    def layer(i, kind):
        t = {name.removeprefix(f'model.layers.{i}.'): value for name, value in tensors.items()
             if name.startswith(f'model.layers.{i}.')}

        def into_heads(name):  # [H*P, D] -> [D, H, P]
            return t[name].T.reshape(model.d_model, -1, P)

        if kind == 'ssd':
            mixer = {name: {'kernel': into_heads(f'ssd.{name}.weight')} for name in ('x_proj', 'b_proj', 'c_proj')}
            mixer |= {'dt_proj': {'kernel': t['ssd.dt_proj.weight'].T}, 'a_log': np.log(-t['ssd.A'])}
            out = t['ssd.out_proj.weight']
        else:
            mixer = {name: {'kernel': into_heads(f'attn.{name}.weight')} for name in ('q_proj', 'k_proj', 'v_proj')}
            out = t['attn.o_proj.weight']
        mixer['out_proj'] = {'kernel': out.T.reshape(-1, P, model.d_model)}
        return {
            'mixer': mixer, 'mixer_norm': {'scale': t['pre_sequence_layernorm.weight']},
            'mixer_residual': {'weight': t['post_sequence_residual.weight']},
            'mlp_norm': {'scale': t['pre_state_layernorm.weight']},
            'mlp_residual': {'weight': t['post_state_residual.weight']},
            'mlp': {name: {'kernel': t[f'feed_forward.{name}.weight'].T} for name in ('gate_proj', 'up_proj', 'down_proj')}}

    kinds, num_modules = model.layer_kinds, model.num_layers // len(model.layer_kinds)
    layers = {}
    for kind in set(kinds):
        blocks = [layer(i, kind) for i in range(model.num_layers) if kinds[i % len(kinds)] == kind]
        layers[kind] = jax.tree.map(lambda *leaves: np.stack(leaves).reshape(num_modules, -1, *leaves[0].shape), *blocks)
    params = {'embedding': tensors['model.word_embed.weight'], 'layers': layers,
              'final_norm': {'scale': tensors['model.final_layernorm.weight']}}
    return config, params, dict(np.load(DIRECTORY / 'expected.npz'))
