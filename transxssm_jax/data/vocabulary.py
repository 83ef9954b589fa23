"""Whether a tokenizer is the one that a model or a data set was made for."""

from pathlib import Path

from transxssm_jax.data import object_store
from transxssm_jax.data.manifest import DataError, finished_splits, read_manifest
from transxssm_jax.data.tokenizer import load_tokenizer


def check_size(name: str, size: int, limit: int, *, remedy: str, limit_name: str = 'model.vocab_size') -> None:
    """Raises DataError if a tokenizer has ids that a model lacks.

    Args:
      name: what the error calls the tokenizer.
      size: largest id of the tokenizer plus one.
      limit: rows of the model's embedding.
      remedy: what the user can do, in the imperative.
      limit_name: the setting or flag that `limit` comes from.
    """
    if size > limit:
        raise DataError(f'{name} has {size} ids, more than {limit_name}={limit}; {remedy}')


def check_tokenizer(tokenizer, vocab_size: int, name: str = 'the tokenizer') -> None:
    """Raises DataError if a tokenizer has ids that a trained model of `vocab_size` lacks."""
    check_size(name, tokenizer.vocab_size, vocab_size, remedy='give the tokenizer of the training data')


def describe(path) -> dict:
    """What identifies a tokenizer: 'kind', 'sha256', 'vocab_size', 'eos_id' and more.

    Args:
      path: as `load_tokenizer` takes it; of a prepared directory, only the manifest is read.

    Raises DataError where there is none.
    """
    if object_store.is_url(path) or Path(path).is_dir():
        return read_manifest(path, finished_splits(path)[0]).tokenizer  # one tokenizer for all splits
    return load_tokenizer(path).describe()


def is_same(description: dict, other: dict) -> bool:
    """Whether two tokenizers, as their `describe()` and the manifest of prepared data describe them, make the same ids.

    Tokens that end and begin documents count too: prepare's --eos and --bos can choose others of one vocabulary.
    """
    return all(description[name] == other[name] for name in ('kind', 'sha256', 'eos_id', 'begin_id'))
