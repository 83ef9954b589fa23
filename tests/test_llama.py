"""The pattern 'attention' is Llama: against its definition in float64, and against the transformers library.

pip install torch transformers && python -m pytest -m torch tests/test_llama.py
"""

import jax
import make_transformers_logits
import numpy as np
import pytest
from flax import nnx
from llama_oracle import EPSILON, LAYERS, THETA, TOKENS, D, F, G, H, K, logits, random_tensors
from small import small_config

from transxssm_jax.model import parameters


def config():
    return small_config(
        model_pattern='attention',
        model_num_layers=LAYERS,
        model_d_mlp=F,
        model_rope_theta=THETA,
        model_norm_epsilon=EPSILON,
        model_tie_embeddings=False,
    )


def to_ours(tensors):
    def stack(name, shape=None, turn=True):
        layers = [tensors[f'model.layers.{i}.{name}.weight'] for i in range(LAYERS)]
        return np.stack([(v.T if turn else v).reshape(shape or v.T.shape) for v in layers])[:, None]

    ones = np.ones((LAYERS, 1, D), np.float32)
    mixer = {
        'in_proj': {
            'norm': {'scale': stack('input_layernorm', turn=False)},
            'q': {'kernel': stack('self_attn.q_proj', (D, H, K))},
            'k': {'kernel': stack('self_attn.k_proj', (D, G, K))},
            'v': {'kernel': stack('self_attn.v_proj', (D, G, K))},
        },
        'out_proj': {'kernel': stack('self_attn.o_proj', (H, K, D))},
    }
    mlp = {
        'in_proj': {
            'norm': {'scale': stack('post_attention_layernorm', turn=False)},
            'gate': {'kernel': stack('mlp.gate_proj')},
            'up': {'kernel': stack('mlp.up_proj')},
        },
        'out_proj': {'kernel': stack('mlp.down_proj')},
    }
    layer = {'mixer': mixer, 'mixer_residual': {'weight': ones}, 'mlp': mlp, 'mlp_residual': {'weight': ones}}
    return {
        'embedding': tensors['model.embed_tokens.weight'],
        'head': tensors['lm_head.weight'],
        'final_norm': {'scale': tensors['model.norm.weight']},
        'layers': {'attention': layer},
    }


def ours(tensors):
    model, params = config().model, to_ours(tensors)
    graph, _ = parameters.split_model(model)
    shapes = jax.tree.map(np.shape, jax.eval_shape(lambda: parameters.init_params(model, 0)))
    assert jax.tree.map(np.shape, params) == shapes, 'nothing but these weights makes a Llama'
    return np.asarray(jax.jit(lambda params, tokens: nnx.merge(graph, params).logits(tokens))(params, TOKENS))


def test_logits_are_those_of_the_definition():
    tensors = random_tensors()
    found, wanted = ours(tensors), logits(tensors)
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_logits_are_those_that_transformers_gave():
    stored = np.load(make_transformers_logits.PATH)
    found = ours(random_tensors())
    assert np.linalg.norm(found - stored['llama']) < 1e-5 * np.linalg.norm(stored['llama'])


@pytest.mark.torch
def test_logits_are_those_of_transformers():
    pytest.importorskip('transformers', reason='pip install torch transformers')
    wanted = make_transformers_logits.llama(random_tensors())
    assert np.linalg.norm(ours(random_tensors()) - wanted) < 1e-5 * np.linalg.norm(wanted)
