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

import argparse
import collections
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import numpy as np
from absl import flags

from transxssm_jax.data.manifest import DataError, SplitIndex, finished_splits, read_index
from transxssm_jax.data.packing import Epochs, assign_row, pack_row, packing_efficiency
from transxssm_jax.data.vocabulary import check_size
from transxssm_jax.data.workers import follow_parent

_ENDLESS = 1 << 60  # steps of a run that repeats its data


class Loader:
    """Iterator over batches: dicts of int32 [len(rows), seq_len] `tokens`, `targets`, `segment_ids`, `positions`.

    Attributes:
      num_documents, num_tokens (eos included), num_bytes (UTF-8 text, for bits per byte): of the split.
      vocab_size, eos_id: of the tokenizer.
      rows_per_epoch: rows that hold every document once (of all sources of a mixture).
      packing_efficiency: share of slots that have a target, padded rows of a last batch aside.
      fingerprint: changes with the prepared data; a checkpoint that keeps it can tell that its data was replaced.
      num_steps: steps of one pass, counted from step 0; only where repeat is False, else 0.
    """

    def __init__(self, batches: '_Batches', *, num_workers: int, num_threads: int, prefetch: int):
        index = batches.index
        self.num_documents, self.num_tokens, self.num_bytes = index.num_documents, index.num_tokens, index.num_bytes
        self.vocab_size, self.eos_id = index.tokenizer['vocab_size'], index.tokenizer['eos_id']
        self.fingerprint = index.fingerprint()
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
        batch = next(self._iterators[0])
        if self._from_workers:
            # Out of the workers' shared memory (/dev/shm is small in containers), whatever the caller keeps.
            batch = {name: np.array(values, subok=False) for name, values in batch.items()}
        return batch

    def close(self) -> None:
        """Ends threads and worker processes; may be called again."""
        self._finalizer()

    def __enter__(self) -> 'Loader':
        return self

    def __exit__(self, *exception) -> None:
        self.close()


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

    Raises DataError for data that is missing, broken or too small.
    """
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
    index = read_index(path, split)
    check_shards(index)
    rows = tuple(range(global_batch) if rows is None else map(int, rows))
    if not rows or min(rows) < 0 or max(rows) >= global_batch:
        raise DataError(f'rows={rows} must be of 0 .. {global_batch - 1}, the global batch')
    batches = _Batches(index, seq_len, global_batch, seed, start_step, rows, shuffle, repeat)
    if repeat and batches.rows_per_epoch < global_batch:
        raise DataError(
            f'{path} has {batches.rows_per_epoch} rows of {seq_len} tokens in split {split!r}, less than one batch of '
            f'{global_batch}; lower the global batch to {batches.rows_per_epoch}, shorten the rows, or prepare more text'
        )
    return Loader(batches, num_workers=num_workers, num_threads=num_threads, prefetch=prefetch)


def check_vocab(path, vocab_size: int) -> None:
    """Raises DataError where the data's tokenizer has ids that a model of `vocab_size` lacks."""
    need = read_index(path, finished_splits(path)[0]).tokenizer['vocab_size']  # one tokenizer for all splits
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
    index = read_index(path, split)
    check_shards(index)
    lengths = index.lengths()
    documents = _Documents(index, lengths)
    for document in np.flatnonzero(lengths >= at_least).tolist():
        [tokens] = documents.read([(document, 0, int(lengths[document]))])
        yield tokens.astype(np.int32)


def check_shards(index: SplitIndex) -> None:
    """Raises DataError naming a shard that is missing or not of its size."""
    for shard in index.shards:
        path = index.directory / shard.file
        try:
            size = os.path.getsize(path)
        except OSError as error:
            raise _broken(path, error.strerror) from None
        if size != shard.file_bytes:
            raise _broken(path, f'{size} bytes instead of {shard.file_bytes}')


def _broken(path: Path, reason) -> DataError:
    reason = str(reason).strip().splitlines()[0][:200] if str(reason).strip() else 'no reason given'
    return DataError(
        f'shard {path} is missing or corrupt ({reason}); restore it, or delete {path.parent} and run '
        'transxssm_jax.data.prepare again'
    )


def _start_worker(worker: int, num_workers: int) -> None:
    del worker, num_workers
    follow_parent()
    # grain imports jax; a reader must never take the accelerator.
    os.environ['JAX_PLATFORMS'] = 'cpu'
    if 'jax' in sys.modules:
        sys.modules['jax'].config.update('jax_platforms', 'cpu')


class _Documents:
    """Tokens of documents by random access; safe to use from several threads."""

    def __init__(self, index: SplitIndex, lengths: np.ndarray):
        from tensorflow_datasets.proto import tf_example_pb2

        self._example = tf_example_pb2.Example
        self._index = index
        self._dtype = np.dtype(index.token_dtype).newbyteorder('<')
        self._lengths = lengths
        self._shard_ends = np.cumsum([shard.records for shard in index.shards])
        self._readers = {}
        self._lock = threading.Lock()
        # Without a document longer than a record, record and document numbers are the same.
        self._first_record = None
        if int(lengths.max()) > index.record_tokens:
            records = -(-lengths.astype(np.int64) // index.record_tokens)
            self._first_record = np.cumsum(records) - records

    def _reader(self, shard: int):
        with self._lock:
            if shard not in self._readers:
                from array_record.python.array_record_module import ArrayRecordReader

                path = self._index.directory / self._index.shards[shard].file
                try:
                    reader = ArrayRecordReader(
                        str(path), options='readahead_buffer_size:0,max_parallelism:0', file_reader_buffer_size=32768
                    )
                    records = reader.num_records()
                except Exception as error:  # the extension raises what its C++ status maps to
                    raise _broken(path, error) from None
                if records != self._index.shards[shard].records:
                    raise _broken(path, f'{records} records instead of {self._index.shards[shard].records}')
                self._readers[shard] = reader
            return self._readers[shard]

    def read(self, spans: list[tuple[int, int, int]]) -> list[np.ndarray]:
        """Tokens [start:stop] of each (document, start, stop); every record is read once."""
        size = self._index.record_tokens
        needed = []
        for document, start, stop in spans:
            first = document if self._first_record is None else int(self._first_record[document])
            needed.append((first, first + start // size, first + (stop - 1) // size))
        records = self._read_records(
            {record for _, begin, end in needed for record in range(begin, end + 1)},
            {
                record: (document, record - first)
                for (document, _, _), (first, begin, end) in zip(spans, needed, strict=True)
                for record in range(begin, end + 1)
            },
        )
        parts = []
        for (_, start, stop), (first, begin, end) in zip(spans, needed, strict=True):
            joined = records[begin] if begin == end else np.concatenate([records[r] for r in range(begin, end + 1)])
            skip = (begin - first) * size
            parts.append(joined[start - skip : stop - skip])
        return parts

    def _read_records(self, records: set[int], places: dict[int, tuple[int, int]]) -> dict[int, np.ndarray]:
        by_shard = collections.defaultdict(list)
        ordered = np.array(sorted(records))
        for record, shard in zip(
            ordered.tolist(), np.searchsorted(self._shard_ends, ordered, side='right').tolist(), strict=True
        ):
            by_shard[shard].append(record)
        tokens = {}
        for shard, own in by_shard.items():
            path = self._index.directory / self._index.shards[shard].file
            first = int(self._shard_ends[shard]) - self._index.shards[shard].records
            reader = self._reader(shard)
            try:
                serialized = reader.read([record - first for record in own])
                for record, content in zip(own, serialized, strict=True):
                    (value,) = self._example.FromString(content).features.feature['tokens'].bytes_list.value
                    tokens[record] = np.frombuffer(value, self._dtype)
            except Exception as error:  # RuntimeError, DecodeError, ... by where it broke
                raise _broken(path, error) from None
            for record in own:
                document, part = places[record]
                expected = min(
                    int(self._lengths[document]) - part * self._index.record_tokens, self._index.record_tokens
                )
                if len(tokens[record]) != expected:
                    raise _broken(path, f'document {document} has {len(tokens[record])} tokens instead of {expected}')
        return tokens


class _Batches:
    """Random-access source of this host's part of each step, for grain. Pickles to its settings."""

    def __init__(
        self,
        index: SplitIndex,
        seq_len: int,
        global_batch: int,
        seed: int,
        start_step: int,
        rows: tuple[int, ...],
        shuffle: bool,
        repeat: bool,
    ):
        self._settings = index, seq_len, global_batch, seed, start_step, rows, shuffle, repeat
        self.index, self._seq_len, self._global_batch = index, seq_len, global_batch
        self._start_step, self._rows, self._repeat = start_step, rows, repeat
        lengths = index.lengths()
        self._documents = _Documents(index, lengths)
        self._weights = index.mixture_weights() if repeat else []
        if self._weights:
            bounds = [(source.first_document, source.first_document + source.documents) for source in index.sources]
        else:
            bounds = [(0, index.num_documents)]
        self._first_document = [first for first, _ in bounds]
        self._pools = [
            Epochs(lengths[first:last], seq_len, key=(seed, pool), shuffle=shuffle)
            for pool, (first, last) in enumerate(bounds)
        ]
        self.rows_per_epoch = sum(pool.rows for pool in self._pools)
        efficiencies = [
            packing_efficiency(last - first, pool.tokens, pool.rows, seq_len)
            for pool, (first, last) in zip(self._pools, bounds, strict=True)
        ]
        self.packing_efficiency = float(np.average(efficiencies, weights=self._weights or None))
        self.num_steps = 0 if repeat else -(-self.rows_per_epoch // global_batch)

    def __reduce__(self):
        return type(self), self._settings

    def __repr__(self) -> str:
        return f'Batches({self.index.directory}, {self.index.split})'  # in grain's messages

    def __len__(self) -> int:
        return _ENDLESS if self._repeat else max(self.num_steps - self._start_step, 0)

    def __getitem__(self, item: int) -> dict[str, np.ndarray]:
        step = self._start_step + int(item)
        row_spans = []
        for row in self._rows:
            row += step * self._global_batch
            if not self._repeat and row >= self.rows_per_epoch:
                row_spans.append([])
                continue
            pool, row = assign_row(row, self._weights) if self._weights else (0, row)
            first = self._first_document[pool]
            row_spans.append(
                [(first + document, start, stop) for document, start, stop in self._pools[pool].spans(row)]
            )
        parts = iter(self._documents.read([span for spans in row_spans for span in spans]))
        batch = {
            name: np.empty((len(self._rows), self._seq_len), np.int32)
            for name in ('tokens', 'targets', 'segment_ids', 'positions')
        }
        for i, spans in enumerate(row_spans):
            tokens = np.concatenate([next(parts) for _ in spans]) if spans else np.zeros(0, np.int32)
            for name, values in pack_row(tokens, [stop - start for _, start, stop in spans], self._seq_len).items():
                batch[name][i] = values
        return batch


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m transxssm_jax.data.loader',
        allow_abbrev=False,
        description='Measures the loading speed of a prepared directory.',
    )
    parser.add_argument('--path', required=True)
    parser.add_argument('--split', default='train')
    parser.add_argument('--seq_len', type=int, default=4096)
    parser.add_argument('--global_batch', type=int, default=64)
    parser.add_argument('--num_workers', type=int, default=0)
    parser.add_argument('--num_threads', type=int, default=4)
    parser.add_argument('--prefetch', type=int, default=4)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--seconds', type=float, default=5.0, help='how long to measure')
    arguments = parser.parse_args(argv)
    begin = time.monotonic()
    try:
        loader = make_loader(
            arguments.path,
            arguments.split,
            seq_len=arguments.seq_len,
            global_batch=arguments.global_batch,
            seed=arguments.seed,
            num_workers=arguments.num_workers,
            num_threads=arguments.num_threads,
            prefetch=arguments.prefetch,
        )
        with loader:
            next(loader)
            first = time.monotonic() - begin
            # What was read ahead before the clock starts is not counted.
            for _ in range(2 * arguments.prefetch):
                next(loader)
            begin, steps = time.monotonic(), 0
            while (seconds := time.monotonic() - begin) < arguments.seconds:
                next(loader)
                steps += 1
    except DataError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    rows = steps * arguments.global_batch / seconds
    print(
        f'{rows * arguments.seq_len:,.0f} tokens/s, {rows:,.0f} rows/s of {arguments.seq_len}; '
        f'first batch after {first:.2f} s; packing efficiency {loader.packing_efficiency:.4f}; '
        f'{loader.rows_per_epoch:,} rows, {loader.num_tokens:,} tokens an epoch'
    )
    return 0


if __name__ == '__main__':
    # By its real name, so that worker processes find the classes there.
    from transxssm_jax.data import loader as _loader

    sys.exit(_loader.main())
