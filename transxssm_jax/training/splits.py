"""The splits of prepared data that a run reads."""

import jax

from transxssm_jax.config import Config
from transxssm_jax.data.loader import Loader, make_loader
from transxssm_jax.parallel import mesh


def eval_splits(config: Config) -> tuple[str, ...]:
    return config.data.eval_split_names if config.train.eval_every_steps else ()


def open_train_split(config: Config, device_mesh: jax.sharding.Mesh, step: int, **options) -> Loader:
    """Batches of the train split from a step on."""
    data = config.data
    options = dict(num_workers=data.num_workers, prefetch=data.prefetch_batches) | options
    return open_split(config, device_mesh, data.train_split, seed=data.seed, start_step=step, **options)


def open_eval_split(config: Config, device_mesh: jax.sharding.Mesh, split: str) -> Loader:
    """The batches that an evaluation reads: one pass over the split, the same one every time.

    With train.eval_batches it is shuffled, because the first batches of a split in order may be of one source or book.
    The seed is 0, so that runs with another data.seed are compared on the same sample.
    """
    return open_split(config, device_mesh, split, seed=0, shuffle=config.train.eval_batches > 0, repeat=False)


def open_split(config: Config, device_mesh: jax.sharding.Mesh, split: str, **options) -> Loader:
    """The rows of a split that this process's devices hold a part of. Options and errors as `make_loader`."""
    data = config.data
    rows = mesh.rows_of_this_process(device_mesh, data.global_batch)
    return make_loader(
        data.path, split, seq_len=data.seq_len, global_batch=data.global_batch, rows=rows, verify=data.verify, **options
    )


def data_position(config: Config, loader: Loader, step: int) -> dict:
    """What a checkpoint keeps of the data: from where a run goes on, and in what."""
    return {'next_step': step, 'split': config.data.train_split, 'fingerprint': loader.fingerprint}
