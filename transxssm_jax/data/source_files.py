"""Which files of a directory or pattern are a source."""

import os
import re
from collections.abc import Callable

from transxssm_jax.data.manifest import DataError

SPLIT_WORDS = {  # as the Hugging Face hub reads file names
    'train': 'train',
    'training': 'train',
    'validation': 'validation',
    'valid': 'validation',
    'val': 'validation',
    'dev': 'validation',
    'test': 'test',
    'testing': 'test',
    'eval': 'test',
    'evaluation': 'test',
}


def below(directory: str) -> tuple[list[str], list[str]]:
    """(files, what is passed over) below a directory, without hidden names and Python's caches.

    Passed over is what is neither file nor directory, and directories that prepare (or TFDS) wrote: an --output below its
    --source would be read as text when the next split is prepared.
    """

    def refuse(error: OSError):
        raise DataError(f'--source={directory}: {error.filename} cannot be listed ({error.strerror})')

    paths, prepared = [], []
    if is_prepared(directory):
        raise DataError(f'--source={directory} holds prepared data, not text; name what it was prepared from')
    for root, directories, files in os.walk(directory, onerror=refuse):
        prepared += [path for name in directories if is_prepared(path := os.path.join(root, name))]
        directories[:] = [name for name in directories if os.path.join(root, name) not in prepared]
        directories[:] = [name for name in directories if not name.startswith('.') and name != '__pycache__']
        paths += [os.path.join(root, name) for name in files if not name.startswith('.')]
    paths.sort()
    others = [path for path in paths if not os.path.isfile(path)]
    return [path for path in paths if os.path.isfile(path)], others + sorted(prepared)


def is_prepared(directory: str) -> bool:
    """Whether prepare (or TFDS) wrote a directory."""
    return all(os.path.isfile(os.path.join(directory, name)) for name in ('dataset_info.json', 'features.json'))


def of_split(paths: list[str], directory: str, split: str, note: Callable[[str], None]) -> list[str]:
    """The paths of one split where every path names one, otherwise all."""
    splits = {}
    for path in paths:
        words = re.split(r'[^a-z]+', os.path.relpath(path, directory).lower())
        # The last word that names a split counts: test/train-0.parquet is of train.
        found = [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS]
        splits.setdefault(found[-1] if found else '', []).append(path)
    wanted = SPLIT_WORDS.get(split, split)
    named = sorted(filter(None, splits))
    if set(splits) <= {'', wanted}:
        return paths
    if '' in splits:  # train on a held-out file, or lose files for a word in their names: neither without a word
        other = next(name for name in named if name != wanted)
        raise DataError(
            f'--source={directory}: {some(splits[other], 1)} seems to be of split {other!r} but '
            f'{some(splits[""], 1)} names no split; name the files that are meant with a quoted pattern, '
            f"for example --source='{directory}/*'"
        )
    if wanted not in splits:
        raise DataError(
            f'--source={directory} has files of {", ".join(named)} but none of --split={split}; '
            f'name the files, for example --source={directory}/{named[0]}*'
        )
    others = sorted(set(paths) - set(splits[wanted]))
    if others:
        note(f'--source={directory}: {len(others):,} files of other splits are passed over: {some(others)}')
    return splits[wanted]


def some(paths: list[str], count: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    more = f' and {len(paths) - count:,} more' if len(paths) > count and count > 1 else ''
    return ', '.join(paths[:count]) + more
