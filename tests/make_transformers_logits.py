"""Writes what PyTorch's libraries make, so that tests need none of them.

tests/data/transformers_logits.npz: logits of random Llama and Mamba-2 models, computed by transformers 4.44.2.
tests/data/torch_file.bin: a few tensors, saved by torch 1.13.1.

    pip install torch transformers numpy && python tests/make_transformers_logits.py

The weights are those of llama_oracle.py and mamba2_oracle.py, which need nothing but numpy.
"""

import pathlib

import llama_oracle
import mamba2_oracle
import numpy as np

PATH = pathlib.Path(__file__).parent / 'data' / 'transformers_logits.npz'
TORCH_FILE = PATH.with_name('torch_file.bin')
MAMBA2 = dict(vocab=48, d_model=32, layers=2, head_dim=16, groups=1, state=16)
MAMBA2_TOKENS = np.random.default_rng(1).integers(0, 43, (2, 21))


def mamba2_tensors():
    """Tensors of a published checkpoint, by name."""
    return mamba2_oracle.random_tensors(np.random.default_rng(0), **MAMBA2)


def llama(tensors) -> np.ndarray:
    """Logits of transformers' LlamaForCausalLM for llama_oracle.TOKENS."""
    import transformers

    o = llama_oracle
    config = transformers.LlamaConfig(
        vocab_size=o.V,
        hidden_size=o.D,
        intermediate_size=o.F,
        num_hidden_layers=o.LAYERS,
        num_attention_heads=o.H,
        num_key_value_heads=o.G,
        rope_theta=o.THETA,
        rms_norm_eps=o.EPSILON,
        tie_word_embeddings=False,
        attn_implementation='eager',
    )
    return _logits(transformers.LlamaForCausalLM(config), tensors, o.TOKENS)


def mamba2(tensors) -> np.ndarray:
    """Logits of transformers' Mamba2ForCausalLM for MAMBA2_TOKENS; its names differ in one letter."""
    import transformers

    config = transformers.Mamba2Config(
        vocab_size=MAMBA2['vocab'],
        hidden_size=MAMBA2['d_model'],
        num_hidden_layers=MAMBA2['layers'],
        head_dim=MAMBA2['head_dim'],
        num_heads=2 * MAMBA2['d_model'] // MAMBA2['head_dim'],
        n_groups=MAMBA2['groups'],
        state_size=MAMBA2['state'],
        expand=2,
        conv_kernel=mamba2_oracle.WIDTH,
        # All tokens in one chunk: in transformers 4.44.2 what PyTorch computes beyond the first chunk depends on its length.
        chunk_size=32,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    renamed = {name.replace('backbone.embedding.', 'backbone.embeddings.'): value for name, value in tensors.items()}
    renamed['lm_head.weight'] = tensors['backbone.embedding.weight']
    return _logits(transformers.Mamba2ForCausalLM(config), renamed, MAMBA2_TOKENS)


def _logits(model, tensors, tokens) -> np.ndarray:
    import torch

    model.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens), use_cache=False).logits.float().numpy()


def write_torch_file(path: pathlib.Path) -> None:
    """A file of torch.save: 'a' is 0 to 5 as [2, 3], the others are views and a copy of it."""
    import torch

    a = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    torch.save({'a': a, 'turned': a.T, 'part': a[1:], 'half': a.bfloat16()}, path)


if __name__ == '__main__':
    write_torch_file(TORCH_FILE)
    np.savez_compressed(PATH, llama=llama(llama_oracle.random_tensors()), mamba2=mamba2(mamba2_tensors()))
    print(f'written to {PATH} and {TORCH_FILE}')
