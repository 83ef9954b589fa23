"""Small texts and prepared directories for the tests of transxssm_jax.data."""

import hashlib
import json
import random
from pathlib import Path

import numpy as np

from transxssm_jax.data import prepare

ROOT = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / 'shared'


def texts(count: int, seed: int = 0, longest: int = 400) -> list[str]:
    """`count` different texts of 1 to `longest` characters, some of them of several bytes."""
    generator = random.Random(seed)
    alphabet = 'abcdefghijklmnopqrstuvwxyz     \n.é語🙂'
    return [
        f'{i}' + ''.join(generator.choices(alphabet, k=generator.randint(0, longest - len(str(i)))))
        for i in range(count)
    ]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in documents))
    return path


def run_prepare(output: Path, *sources, split: str = 'train', tokenizer='byte', **flags) -> int:
    """Exit code of prepare in this process; one worker unless told."""
    flags = {'num_workers': 1} | flags
    return prepare.main(
        [
            f'--output={output}',
            f'--split={split}',
            f'--tokenizer={tokenizer}',
            *(f'--source={s}' for s in sources),
            *(f'--{name}={value}' for name, value in flags.items()),
        ]
    )


def ids(text: str) -> np.ndarray:
    """Byte tokens of a document with its eos."""
    return np.array(list(text.encode()) + [256], np.int32)


def digests(directory: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def train_tokenizer(path: Path, specials: list[str]) -> Path:
    """A byte-level BPE tokenizer of 400 entries."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts(50),
        tokenizers.trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=specials,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(path))
    return path
