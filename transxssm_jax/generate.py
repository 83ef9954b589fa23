"""Sampling text from a trained model.

Shape legend: L length, D model, V vocabulary.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transxssm_jax import mesh
from transxssm_jax.config import Config
from transxssm_jax.step import split_model


def sample(params: dict, config: Config, tokenizer, *, prompt: str, num_tokens: int, temperature: float = 0.8,
           seed: int = 0) -> str:
    """Continues a prompt; the text ends early at the tokenizer's end-of-document token.

    The whole sequence is run again for every token, so that the cost grows with
    its square: meant for a glance at a run, not for serving.

    Args:
      params: parameters as in the state of step.py.
      tokenizer: of the training data.
      prompt: not empty: training never predicts a document's first token.
      num_tokens: most tokens to sample.
      temperature: > 0; lower is less varied.
      seed: the same seed gives the same text.

    Raises:
      ValueError: an empty prompt, num_tokens < 1 or temperature <= 0.
    """
    if num_tokens < 1 or temperature <= 0:
        raise ValueError(f'num_tokens={num_tokens} must be at least 1 and temperature={temperature} above 0')
    prompt_ids = tokenizer.encode_batch([prompt])[0].astype(np.int32)
    if not len(prompt_ids):
        raise ValueError('prompt is empty; give at least one token to continue')
    start = len(prompt_ids)
    buffer_L = np.zeros(start + num_tokens, np.int32)
    buffer_L[:start] = prompt_ids
    ids = np.asarray(_continue(config, tokenizer.vocab_size)(params, buffer_L, start, temperature, jax.random.key(seed)))
    continuation = ids[start:]
    ends = np.flatnonzero(continuation == tokenizer.eos_id)
    return prompt + tokenizer.decode(continuation[:ends[0]] if len(ends) else continuation)


def _continue(config: Config, vocab_size: int):
    graph, _ = split_model(config.model)
    # Under a mesh every shard of the batch needs a row: all sample the same.
    axes = dict(jax.sharding.get_abstract_mesh().shape)
    num_rows = math.prod(axes.get(axis, 1) for axis in mesh.RULES['batch'])

    @jax.jit
    def run(params, buffer_L, start, temperature, key):
        model = nnx.merge(graph, params)
        head_VD = model.head_VD[:vocab_size]  # rows that only pad the vocabulary are never sampled

        def one(i, buffer_L):
            hidden_D = model(jnp.broadcast_to(buffer_L, (num_rows, *buffer_L.shape)))[0, i - 1]
            logits_V = head_VD @ hidden_D.astype(jnp.float32)
            token = jax.random.categorical(jax.random.fold_in(key, i), logits_V / temperature)
            return buffer_L.at[i].set(token.astype(jnp.int32))

        return jax.lax.fori_loop(start, buffer_L.shape[0], one, buffer_L)

    return run
