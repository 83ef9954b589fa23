"""Tiny models of every kind, exported for the transformers library, and what PyTorch computes with the exports.

tests/data/export_logits.npz: of every model of VARIANTS the sha256 of its exported weights, and the logits and the greedy text
that transformers 5.24.0 with torch 2.14.1 made of the export.

    pip install torch transformers && JAX_PLATFORMS=cpu PYTHONPATH=.:tests python tests/exported_models.py
"""

import functools
import hashlib
import os
import pathlib
import tempfile

import numpy as np
from small import small_config
from test_convert import random_params, save_run

from transxssm_jax.pytorch.transformers_export import export_transformers

PATH = pathlib.Path(__file__).parent / 'data' / 'export_logits.npz'
TOKENS = np.random.default_rng(1).integers(0, 96, (1, 24))
NEW_TOKENS = 64
VARIANTS = {
    'wide state': dict(model_d_state=32, model_dtype='bfloat16', model_use_dt_bias=False),
    'convolution, biases, untied': dict(
        model_pattern='2xssd,2xattention',
        model_ssd_encoding='conv1d_d',
        model_use_bias=True,
        model_tie_embeddings=False,
    ),
    'decay only': dict(model_ssd_encoding='decay_only', model_attention_encoding='none', model_num_ssd_groups=4),
    'mamba2': dict(model_pattern='mamba2', model_d_mlp=0, model_num_ssd_groups=1),
    'jamba': dict(model_pattern='3xmamba2,attention', model_attention_encoding='none', model_conv_width=3),
    'attention': dict(model_pattern='attention', model_num_kv_heads=1),
    'dynamic': dict(model_d_state=32, model_rope_scaling='dynamic', model_rope_original_length=16),
    'linear': dict(model_attention_period=0, model_attention_offset=0, model_rope_scaling='linear'),
    'norms, capped logits': dict(
        model_pattern='ssd,mamba2,2xattention', model_qk_norm=True, model_bc_norm=True, model_logit_soft_cap=0.5
    ),
    'length': dict(model_rope_scaling='length', model_rope_original_length=16),
}


def config_of(name):
    return small_config(model_num_layers=4, train_seed=3, **VARIANTS[name])


def export(workdir, name, **arguments) -> pathlib.Path:
    """The directory of an export of a run with random parameters."""
    config = config_of(name)
    save_run(workdir / 'run', config, {5: random_params(config)})
    export_transformers(workdir / 'run', workdir / 'out', **arguments)
    return workdir / 'out'


def digest(directory) -> str:
    return hashlib.sha256((directory / 'model.safetensors').read_bytes()).hexdigest()


@functools.cache
def library():
    """The transformers library, which keeps the code of exports in a directory of this process."""
    os.environ |= {'HF_MODULES_CACHE': tempfile.mkdtemp(), 'HF_HUB_OFFLINE': '1'}
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def load(directory, **arguments):
    """(the model in PyTorch, what from_pretrained reports of the weights)"""
    return library().AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, output_loading_info=True, **arguments
    )


def logits(model, tokens, **arguments) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens), **arguments).logits.float().numpy()


def greedy(model, tokens, **arguments) -> np.ndarray:
    """The NEW_TOKENS tokens behind each row."""
    import torch

    rows = model.eval().generate(torch.from_numpy(tokens), max_new_tokens=NEW_TOKENS, do_sample=False, **arguments)
    return rows[:, tokens.shape[1] :].numpy()


if __name__ == '__main__':
    stored = {}
    for name in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            directory = export(pathlib.Path(folder), name)
            model, _ = load(directory)
            stored |= {
                f'{name}/sha256': np.array(digest(directory)),
                f'{name}/logits': logits(model, TOKENS),
                f'{name}/greedy': greedy(model, TOKENS),
            }
    np.savez_compressed(PATH, **stored)
    print(f'written to {PATH}')
