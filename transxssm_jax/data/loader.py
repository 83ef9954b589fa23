"""Batches of packed rows from a prepared directory, by random access.

Step t of a run is the global rows [t * global_batch, (t + 1) * global_batch).
A row is a pure function of (prepared data, seed, row number), so a batch is
the same for any number of hosts, worker processes and threads, and any step is
reached at once. Reading runs ahead in grain's threads or processes.

grain's worker processes import the main module again: keep a main guard, and
call `close()` (or use `with`) to end them.

    python -m transxssm_jax.data.loader --path=DIR --split=train --seq_len=4096 --global_batch=64

measures the loading speed.
"""

from transxssm_jax import cli

if __name__ == '__main__':
    cli.start('transxssm_jax.data.loader')

import dataclasses
import os
import sys
import time
import weakref
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from absl import flags

from transxssm_jax.cli import Flag
from transxssm_jax.data.documents import Documents
from transxssm_jax.data.manifest import DataError, Manifest, finished_splits, read_manifest
from transxssm_jax.data.mixture import Mixture
from transxssm_jax.data.packing import pack_rows
from transxssm_jax.data.vocabulary import check_size
from transxssm_jax.data.workers import exit_with_parent

ENDLESS = 1 << 60  # steps of a run that repeats its data

COMMAND = cli.Command(
    'transxssm_jax.data.loader',
    __doc__,
    [
        Flag('path', cli.REQUIRED, 'Prepared directory.', example='DIR', is_path=True),
        Flag('split', 'train', 'Split to read.'),
        Flag('seq_len', 4096, 'Tokens per row.', minimum=1),
        Flag('global_batch', 64, 'Rows per step.', minimum=1, maximum=1 << 24),
        Flag('num_workers', 0, 'Loader processes; 0: threads in this process.', minimum=0, maximum=1 << 10),
        Flag('num_threads', 4, 'Threads that read ahead.', minimum=0, maximum=1 << 10),
        Flag('prefetch', 4, 'Batches read ahead.', minimum=1, maximum=1 << 16),
        Flag('seed', 0, 'Seed of the order of documents and of rows.', minimum=0, maximum=(1 << 32) - 1),
        Flag('seconds', 5.0, 'How long to measure.', minimum=0.0),
    ],
)


class WorkerLostError(cli.UserError, RuntimeError):
    """A worker process of the loader was killed; a new loader that starts at the same step goes on."""

    exit_code = cli.ExitCode.TERMINATED


class Loader:
    """Iterator over batches: dicts of int32 [len(rows), seq_len] `tokens`, `targets`, `segment_ids`, `positions`.

    Attributes:
      num_documents, num_tokens (eos included), num_targets (tokens that are learned), num_bytes (UTF-8 text of
        these, for bits per byte): of the split.
      vocab_size, eos_id, begin_id: of the tokenizer; begin_id is the input whose target is a document's first token.
      rows_per_epoch: rows that hold every document once (of all sources of a mixture).
      packing_efficiency: share of slots that have a target, without the padded rows of a last batch.
      fingerprint: digest of all that decides a batch of the split; a checkpoint that keeps it can tell that its data
        was replaced. The same for the same data in another place.
      num_steps: steps of one pass, counted from step 0; only where repeat is False, else 0.
      parts: what the batches are read of, one Part, or one for each of several sources.
      events: step -> sentence of what happens to the data before that step: a source that has given its last row.
    """

    def __init__(self, batches, *, num_workers: int, num_threads: int, prefetch: int):
        self._batches, self.parts, self.events = batches, batches.parts, batches.events
        manifests = [part.manifest for part in self.parts]
        self.num_documents = sum(manifest.num_documents for manifest in manifests)
        self.num_tokens = sum(manifest.num_tokens for manifest in manifests)
        self.num_targets = sum(manifest.num_targets for manifest in manifests)
        self.num_bytes = sum(manifest.num_bytes for manifest in manifests)
        tokenizer = manifests[0].tokenizer
        self.vocab_size, self.eos_id = tokenizer['vocab_size'], tokenizer['eos_id']
        self.begin_id = tokenizer['begin_id']
        self.fingerprint = batches.fingerprint
        self.rows_per_epoch = batches.rows_per_epoch
        self.packing_efficiency = batches.packing_efficiency
        self.num_steps = batches.num_steps
        data = grain.MapDataset.source(batches).to_iter_dataset(
            grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0)
        )
        if num_workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain asks absl for its flags; a program without absl never parses them
            data = data.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=num_workers, per_worker_buffer_size=max(prefetch // num_workers, 1)
                ),
                worker_init_fn=_start_worker,
            )
        self._iterators = [iter(data)]  # empty once closed
        self._from_workers = num_workers > 0
        # At exit too, while the modules that grain needs for it are still there.
        self._finalizer = weakref.finalize(self, _close, self._iterators)

    def __iter__(self) -> 'Loader':
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._iterators:
            raise ValueError('this loader is closed')
        try:
            batch = next(self._iterators[0])
        except RuntimeError as error:
            if self._from_workers and 'was terminated unexpectedly' in str(error):  # grain's words
                raise WorkerLostError(' '.join(str(error).partition('. ')[0].split())) from error
            raise
        if self._from_workers:
            # Out of the workers' shared memory (/dev/shm is small in containers), whatever the caller keeps.
            batch = {name: np.array(values, subok=False) for name, values in batch.items()}
        return batch

    def position(self, step: int) -> dict:
        """What tells that the batches before `step` were of this data: the fingerprint, or each source's with its rows."""
        return self._batches.position(step)

    def row_spans(self, step: int) -> list[tuple[int, list[tuple[int, int, int]]]]:
        """What the rows of a step hold: of each row that is read, the index of its part, and its spans.

        A span is (document of the part's split, first slot, past last slot), see packing.py; a padded row has none.
        """
        return self._batches.row_spans(step)

    def close(self) -> None:
        """Ends threads and worker processes; may be called again."""
        self._finalizer()

    def __enter__(self) -> 'Loader':
        return self

    def __exit__(self, *exception) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class Part:
    """Prepared data that batches are read of.

    Attributes:
      name: of the source; '' for data.path.
      share: of the rows of the first batch that is read.
      manifest, lengths: of the split; lengths is uint32 [documents], memory-mapped.
    """

    name: str
    share: float
    manifest: Manifest
    lengths: np.ndarray


def _close(iterators: list) -> None:
    while iterators:
        iterators.pop().close()


def make_loader(
    path,
    split: str,
    *,
    seq_len: int,
    global_batch: int,
    seed: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
    num_workers: int = 0,
    num_threads: int = 4,
    prefetch: int = 4,
    shuffle: bool = True,
    repeat: bool = True,
    verify: str = 'sizes',
) -> Loader:
    """Opens a split of a prepared directory.

    Args:
      path, split: what prepare.py wrote.
      seq_len: inputs of a row.
      global_batch: rows of a step over all hosts.
      seed: of the permutations of documents and of rows.
      start_step: step of the first batch.
      rows: indices within the global batch that this host loads; default all.
      num_workers: processes that read; 0 reads in threads of this one, which is enough unless
        this process is busy in Python.
      num_threads: threads that read, in each process.
      prefetch: batches kept ready.
      shuffle: new permutations of the documents and of the rows each epoch; False keeps their order.
      repeat: go on for ever, through a mixture's sources by weight. False: one pass over every
        document, whatever the weights; the last row and the last batch are padded with
        segment 0 and target -1.
      verify: 'sizes' checks the size of every shard now and each record's checksum when it is read;
        'full' reads every shard now and checks its sha256.

    Raises DataError for data that is missing, broken or too small.
    """
    check_sizes(seq_len, global_batch, start_step, num_workers, num_threads, prefetch)
    manifest = read_manifest(path, split)
    manifest.check_shards(verify)
    rows = checked_rows(rows, global_batch)
    batches = _Batches(manifest, seq_len, global_batch, seed, start_step, rows, shuffle, repeat)
    if repeat and batches.rows_per_epoch < global_batch:
        raise DataError(
            f'{path} has {batches.rows_per_epoch} rows of {seq_len} tokens in split {split!r}, less than one batch of '
            f'{global_batch}; lower the global batch to {batches.rows_per_epoch}, shorten the rows, or prepare more text'
        )
    return Loader(batches, num_workers=num_workers, num_threads=num_threads, prefetch=prefetch)


def check_sizes(seq_len, global_batch, start_step, num_workers, num_threads, prefetch) -> None:
    """Raises DataError where an argument of `make_loader` is too small."""
    for name, value, least in (
        ('seq_len', seq_len, 1),
        ('global_batch', global_batch, 1),
        ('start_step', start_step, 0),
        ('num_workers', num_workers, 0),
        ('num_threads', num_threads, 0),
        ('prefetch', prefetch, 1),
    ):
        if value < least:
            raise DataError(f'{name}={value} must be at least {least}')


def checked_rows(rows: Sequence[int] | None, global_batch: int) -> Sequence[int]:
    """The rows of `make_loader`. Raises DataError for those that no global batch has."""
    if rows is None:
        return range(global_batch)  # not a tuple: a batch that is refused later may be absurdly large
    rows = tuple(map(int, rows))
    if not rows or min(rows) < 0 or max(rows) >= global_batch:
        raise DataError(f'rows={rows} must be in 0 .. {global_batch - 1}, the rows of the global batch')
    return rows


def check_vocab(path, vocab_size: int) -> None:
    """Raises DataError where the data's tokenizer has ids that a model of `vocab_size` lacks."""
    need = read_manifest(path, finished_splits(path)[0]).tokenizer['vocab_size']  # one tokenizer for all splits
    check_size(
        f'the tokenizer of {path}',
        need,
        vocab_size,
        remedy=f'raise it to at least {need} ({-(-need // 128) * 128} is a multiple of 128)',
    )


def read_documents(path, split: str, *, at_least: int = 1) -> Iterator[np.ndarray]:
    """Yields the tokens of each document of a split, in order, without packing: int32 [tokens], eos included.

    Args:
      path, split: what prepare.py wrote.
      at_least: shorter documents are left out, and not read.

    Raises DataError for data that is missing or broken.
    """
    manifest = read_manifest(path, split)
    manifest.check_shards()
    lengths = manifest.lengths()
    documents = Documents(manifest, lengths)
    for document in np.flatnonzero(lengths >= at_least).tolist():
        [tokens] = documents.read([(document, 0, int(lengths[document]))])
        tokens = tokens[1:].astype(np.int32)  # without the begin token, which `read` puts first
        yield np.where(tokens < 0, ~tokens, tokens) if manifest.chat else tokens


def check_batch(path, split: str, seq_len: int, global_batch: int) -> None:
    """Raises DataError where a split has fewer rows than one batch, before anything of the batch's size is made."""
    manifest = read_manifest(path, split)
    most_rows = manifest.num_tokens // seq_len + len(manifest.sources)  # each source may end in a row that is not full
    if most_rows < global_batch:
        raise DataError(
            f'{path} has at most {most_rows} rows of {seq_len} tokens in split {split!r}, less than one batch of '
            f'{global_batch}; lower data.global_batch to at most {most_rows}, lower data.seq_len, or prepare more text'
        )


def _start_worker(worker: int, num_workers: int) -> None:
    del worker, num_workers
    exit_with_parent()
    # grain imports jax; a reader must never take the accelerator.
    os.environ['JAX_PLATFORMS'] = 'cpu'
    if 'jax' in sys.modules:
        sys.modules['jax'].config.update('jax_platforms', 'cpu')


class _Batches:
    """Random-access source of this host's rows of each step, for grain. Pickles to its settings."""

    def __init__(
        self,
        manifest: Manifest,
        seq_len: int,
        global_batch: int,
        seed: int,
        start_step: int,
        rows: Sequence[int],
        shuffle: bool,
        repeat: bool,
    ):
        self._settings = manifest, seq_len, global_batch, seed, start_step, rows, shuffle, repeat
        self._manifest, self._seq_len, self._global_batch = manifest, seq_len, global_batch
        self._start_step, self._rows, self._repeat = start_step, rows, repeat
        self._lengths = manifest.lengths()
        self._documents = Documents(manifest, self._lengths)
        self._mixture = make_mixture(manifest, self._lengths, seq_len, seed, shuffle=shuffle, weighted=repeat)
        self.rows_per_epoch = self._mixture.rows_per_epoch
        self.packing_efficiency = self._mixture.packing_efficiency
        self.num_steps = 0 if repeat else -(-self.rows_per_epoch // global_batch)
        self.parts, self.events = [Part('', 1.0, manifest, self._lengths)], {}
        self.fingerprint = manifest.fingerprint()

    def position(self, step: int) -> dict:
        del step
        return {'fingerprint': self.fingerprint}

    def __reduce__(self):
        return type(self), self._settings

    def __repr__(self) -> str:
        return f'Batches({self._manifest.directory}, {self._manifest.split})'  # in grain's messages

    def __len__(self) -> int:
        return ENDLESS if self._repeat else max(self.num_steps - self._start_step, 0)

    def row_spans(self, step: int) -> list[tuple[int, list[tuple[int, int, int]]]]:
        rows = [row + step * self._global_batch for row in self._rows]
        is_padding = [not self._repeat and row >= self.rows_per_epoch for row in rows]
        return [(0, [] if padded else self._mixture.spans(row)) for row, padded in zip(rows, is_padding, strict=True)]

    def __getitem__(self, item: int) -> dict[str, np.ndarray]:
        row_spans = [spans for _, spans in self.row_spans(self._start_step + int(item))]
        parts = iter(self._documents.read([span for spans in row_spans for span in spans]))
        return pack_rows([(spans, parts) for spans in row_spans], self._seq_len)


def make_mixture(
    manifest: Manifest, lengths: np.ndarray, seq_len: int, seed: int, *, shuffle=True, weighted=True, key=()
) -> Mixture:
    """The rows of a split; where it was prepared with weights and `weighted`, of a pool for each of its sources."""
    weights = manifest.mixture_weights() if weighted else []
    pools = [(source.first_document, source.documents) for source in manifest.sources]
    pools = pools if weights else [(0, manifest.num_documents)]
    return Mixture(lengths, pools, weights, seq_len=seq_len, seed=seed, shuffle=shuffle, key=key)


def main(argv: list[str] | None = None) -> int:
    """The command; see --help. Returns its exit code."""
    return cli.run(COMMAND, _measure, argv)


def _measure(flags) -> None:
    begin = time.monotonic()
    loader = make_loader(
        flags.path,
        flags.split,
        seq_len=flags.seq_len,
        global_batch=flags.global_batch,
        seed=flags.seed,
        num_workers=flags.num_workers,
        num_threads=flags.num_threads,
        prefetch=flags.prefetch,
    )
    with loader:
        next(loader)
        first = time.monotonic() - begin
        # What was read ahead before the clock starts is not counted.
        for _ in range(2 * flags.prefetch):
            next(loader)
        begin, steps = time.monotonic(), 0
        while (seconds := time.monotonic() - begin) < flags.seconds:
            next(loader)
            steps += 1
    rows = steps * flags.global_batch / seconds
    print(
        f'{rows * flags.seq_len:,.0f} tokens/s, {rows:,.0f} rows/s of {flags.seq_len}; '
        f'first batch after {first:.2f} s; packing efficiency {loader.packing_efficiency:.4f}; '
        f'{loader.rows_per_epoch:,} rows, {loader.num_tokens:,} tokens an epoch'
    )
