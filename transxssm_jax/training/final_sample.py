"""The text that a run prints when it has ended: a document of its data, continued by the model."""

from collections.abc import Callable

import jax

from transxssm_jax.config import Config
from transxssm_jax.data.tokenizer import load_tokenizer
from transxssm_jax.training import splits

PROMPT_TOKENS = 128  # of the document that the sample continues


def print_sample(config: Config, device_mesh: jax.sharding.Mesh, params: dict, sample: Callable) -> None:
    """Continues the beginning of a split's first document by train.sample_tokens tokens.

    Args:
      sample: as `inference.generator.sample`.
    """
    tokenizer = load_tokenizer(config.data.tokenizer_path)
    split = next(iter(splits.eval_splits(config)), config.data.train_split)
    with splits.open_split(config, device_mesh, split, seed=0, shuffle=False, repeat=False) as loader:
        row = next(loader)
    prompt = tokenizer.decode(row['tokens'][0][row['segment_ids'][0] == 1][:PROMPT_TOKENS])
    text = sample(
        params, config, tokenizer, prompt=prompt, seed=config.train.seed, num_tokens=config.train.sample_tokens
    )
    print(f'--- from the {split} split ---\n{prompt}\n--- a sampled continuation ---\n{text[len(prompt) :]}\n---')
