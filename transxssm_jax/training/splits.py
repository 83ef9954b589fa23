"""The prepared data that a run reads: data.path, or data.sources with their weights."""

from collections.abc import Callable

import jax

from transxssm_jax.config import Config, ConfigError
from transxssm_jax.data.loader import Loader, check_batch, check_vocab, make_loader
from transxssm_jax.data.manifest import DataError, finished_splits, read_manifest
from transxssm_jax.data.sources import make_mixed_loader, open_batches
from transxssm_jax.parallel import mesh
from transxssm_jax.training.batch_order import BatchOrder
from transxssm_jax.training.checkpoint_files import CheckpointError

# ---- what is there -----------------------------------------------------------


def check_data(config: Config) -> None:
    """Raises ConfigError or DataError for what can be known of the data before the workdir is touched."""
    data = config.data
    if not data.tokenizer_path:
        raise ConfigError(
            'data.path is empty; prepare data with python -m transxssm_jax.data.prepare and give --config.data.path=DIR'
        )
    for directory in data.directories.values() or [data.path]:
        check_vocab(directory, config.model.vocab_size)
    if not data.directories:
        check_batch(data.path, data.train_split, data.seq_len, data.global_batch)
        return
    _check_mixture(config)
    eval_splits(config)


def _check_mixture(config: Config) -> None:
    data = config.data
    manifests = [read_manifest(directory, data.train_split) for directory in data.directories.values()]
    rows = sum(manifest.num_tokens // data.seq_len + len(manifest.sources) for manifest in manifests)
    if rows < data.global_batch:
        raise DataError(
            f'data.sources have at most {rows} rows of {data.seq_len} tokens in split {data.train_split!r}, less than one '
            f'batch of {data.global_batch}; lower data.global_batch or data.seq_len, or prepare more text'
        )
    end = open_batches(
        data.directories, data.train_split, **_mixture(config), start_step=0, rows=(0,)
    ).schedule.end_step
    if end is not None and end < config.train.steps:
        raise ConfigError(
            f'data.max_epochs={data.max_epochs}: every source with a weight has given its epochs by step {end:,} of '
            f'train.steps={config.train.steps}; raise them, or lower train.steps to {end}'
        )


def _mixture(config: Config) -> dict:
    data = config.data
    names = ('weights', 'max_epochs', 'seq_len', 'global_batch', 'seed')
    return {name: getattr(data, name) for name in names}


def locate(config: Config, label: str) -> tuple[str, str]:
    """(directory, split) of SPLIT or NAME/SPLIT; SPLIT is that of data.path or of the first source."""
    data = config.data
    name, _, split = label.rpartition('/')
    if not name:
        return data.tokenizer_path, split
    if name not in data.directories:
        raise ConfigError(
            f'data.eval_splits: {label} is of no source; data.sources has {", ".join(data.directories) or "none"}'
        )
    return data.directories[name], split


def is_evaluated(config: Config) -> bool:
    return bool(config.train.eval_every_steps and config.data.eval_split_names)


def eval_splits(config: Config) -> tuple[str, ...]:
    """Labels of the splits to evaluate on, for `locate`; each has a curve of its own.

    Raises:
      ConfigError, DataError: there is no such source, or none that has the split.
    """
    data = config.data
    if not is_evaluated(config):
        return ()
    if not data.directories:
        return data.eval_split_names
    labels = []
    for given in data.eval_split_names:
        if '/' in given:
            locate(config, given)
            labels.append(given)
            continue
        found = [
            f'{name}/{given}' for name, directory in data.directories.items() if given in finished_splits(directory)
        ]
        if not found:
            raise DataError(
                f'data.eval_splits: none of data.sources has a split {given!r}; prepare one, or name others'
            )
        labels += found
    return tuple(dict.fromkeys(labels))


# ---- loaders -----------------------------------------------------------------


def open_train_split(config: Config, device_mesh: jax.sharding.Mesh, batch: int, **options) -> Loader:
    """Batches of the train split from a number on; that of the first step is 0."""
    data = config.data
    options = dict(num_workers=data.num_workers, prefetch=data.prefetch_batches, start_step=batch) | options
    if data.path:
        return open_split(config, device_mesh, data.train_split, seed=data.seed, **options)
    rows = mesh.rows_of_this_process(device_mesh, data.global_batch)
    return make_mixed_loader(
        data.directories, data.train_split, **_mixture(config), rows=rows, verify=data.verify, **options
    )


def open_eval_split(config: Config, device_mesh: jax.sharding.Mesh, split: str) -> Loader:
    """The batches that an evaluation reads: one pass over the split, the same one every time.

    With train.eval_batches it is shuffled, because the first batches of a split in order may be of one source or book.
    The seed is 0, so that runs with another data.seed are compared on the same sample.
    """
    return open_split(config, device_mesh, split, seed=0, shuffle=config.train.eval_batches > 0, repeat=False)


def open_split(config: Config, device_mesh: jax.sharding.Mesh, split: str, **options) -> Loader:
    """The rows of a split that this process's devices hold a part of.

    Args:
      split: see `locate`.
      options: and errors, as `make_loader`.
    """
    data = config.data
    rows = mesh.rows_of_this_process(device_mesh, data.global_batch)
    directory, split = locate(config, split)
    return make_loader(
        directory, split, seq_len=data.seq_len, global_batch=data.global_batch, rows=rows, verify=data.verify, **options
    )


def describe(config: Config, loader: Loader) -> list[str]:
    """Lines that tell what a run trains on."""
    data = config.data
    if data.path:
        return [f'{loader.num_documents:,} documents, {loader.num_tokens:,} tokens in {data.path} ({data.train_split})']
    lines = [f'{len(loader.parts)} sources, of each the split {data.train_split!r}:']
    lines += [
        f'  {part.name}: {part.share:.4g} of the rows; {part.manifest.num_documents:,} documents, '
        f'{part.manifest.num_tokens:,} tokens in {part.manifest.directory}'
        for part in loader.parts
    ]
    return lines + [f'  {word}' for step, word in loader.events.items() if step < config.train.steps]


def mean_over_parts(loader: Loader, value: Callable) -> float:
    """value(manifest, lengths) of every part of the data, averaged by its share of the rows."""
    return sum(part.share * value(part.manifest, part.lengths) for part in loader.parts)


# ---- where a run stands ------------------------------------------------------


def data_position(config: Config, loader: Loader, step: int, order: BatchOrder) -> dict:
    """What a checkpoint keeps of the data: from where a run goes on, and in what."""
    return {'next_step': step, 'split': config.data.train_split, **loader.position(order.batches_before(step))}


def check_position(config: Config, loader: Loader, step: int, saved: dict, workdir) -> None:
    """Raises CheckpointError where the data before a step is not what a checkpoint of that step was trained on."""
    found = data_position(config, loader, step, BatchOrder.of(saved))
    if {name: saved.get(name) for name in found} == found:  # beside it others may keep theirs
        return
    remedy = 'point it to the same data or use another --workdir'
    if config.data.path:
        raise CheckpointError(f'data.path={config.data.path} is not what the run in {workdir} was trained on; {remedy}')
    if 'rows' in saved and saved['rows'].keys() <= {part.manifest.fingerprint() for part in loader.parts}:
        rows = ', '.join(f'{part.name} {saved["rows"].get(part.manifest.fingerprint(), 0):,}' for part in loader.parts)
        raise CheckpointError(
            f'data.weights or data.max_epochs differ for steps before {step}, until which the run in {workdir} has read '
            f'rows of {rows}; change them from step {step} on only'
        )
    raise CheckpointError(
        f'data.sources={config.data.sources}: not all that the run in {workdir} was trained on; {remedy}'
    )
