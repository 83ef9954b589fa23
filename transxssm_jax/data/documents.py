"""The tokens of prepared documents, by random access to any part of any document."""

import collections
import threading

import numpy as np

from transxssm_jax.data.manifest import Manifest, broken_shard


class Documents:
    """Tokens of documents by random access; safe to use from several threads."""

    def __init__(self, manifest: Manifest, lengths: np.ndarray):
        from tensorflow_datasets.proto import tf_example_pb2

        self._example = tf_example_pb2.Example
        self._manifest = manifest
        self._dtype = np.dtype(manifest.token_dtype).newbyteorder('<')
        self._begin = np.array([manifest.tokenizer['begin_id']], self._dtype)
        self._lengths = lengths
        self._shard_ends = np.cumsum([shard.records for shard in manifest.shards])
        self._readers = {}
        self._lock = threading.Lock()
        # Without a document longer than a record, record and document numbers are the same.
        self._first_record = None
        if int(lengths.max()) > manifest.record_tokens:
            records = -(-lengths.astype(np.int64) // manifest.record_tokens)
            self._first_record = np.cumsum(records) - records

    def _reader(self, shard: int):
        if shard not in self._readers:
            # Not while others wait: from an object store it is fetched first, several shards at a time.
            self._manifest.shard_path(self._manifest.shards[shard])
        with self._lock:
            if shard not in self._readers:
                from array_record.python.array_record_module import ArrayRecordReader

                path = self._manifest.shard_path(self._manifest.shards[shard])
                try:
                    reader = ArrayRecordReader(
                        str(path), options='readahead_buffer_size:0,max_parallelism:0', file_reader_buffer_size=32768
                    )
                    records = reader.num_records()
                except Exception as error:  # the extension raises what its C++ status maps to
                    raise broken_shard(path, error) from None
                if records != self._manifest.shards[shard].records:
                    raise broken_shard(path, f'{records} records instead of {self._manifest.shards[shard].records}')
                self._readers[shard] = reader
            return self._readers[shard]

    def read(self, spans: list[tuple[int, int, int]]) -> list[np.ndarray]:
        """The tokens of each (document, first slot, past last slot); every record is read once.

        Of each span its slots' targets, stored tokens [start, stop), after the input of its first slot: the
        stored token before them, or begin_id where the span begins the document. A token t that is not learned as a
        target is ~t, which is negative.
        """
        size = self._manifest.record_tokens
        needed = []  # (first record of the document, first record to read, last record to read) of each span
        for document, start, stop in spans:
            first = document if self._first_record is None else int(self._first_record[document])
            needed.append((first, first + max(start - 1, 0) // size, first + (stop - 1) // size))
        records = self._read_records(
            {
                record: (document, record - first)
                for (document, _, _), (first, begin, end) in zip(spans, needed, strict=True)
                for record in range(begin, end + 1)
            }
        )
        parts = []
        for (_, start, stop), (first, begin, end) in zip(spans, needed, strict=True):
            joined = records[begin] if begin == end else np.concatenate([records[r] for r in range(begin, end + 1)])
            skip = (begin - first) * size
            if start:
                parts.append(joined[start - 1 - skip : stop - skip])
            else:
                parts.append(np.concatenate([self._begin, joined[:stop]]))
        return parts

    def _read_records(self, records: dict[int, tuple[int, int]]) -> dict[int, np.ndarray]:
        """Tokens of each record; records: the document that each is of, and which of its records it is."""
        by_shard = collections.defaultdict(list)
        ordered = np.array(sorted(records))
        for record, shard in zip(
            ordered.tolist(), np.searchsorted(self._shard_ends, ordered, side='right').tolist(), strict=True
        ):
            by_shard[shard].append(record)
        tokens = {}
        for shard, own in by_shard.items():
            path = f'{self._manifest.origin or self._manifest.directory}/{self._manifest.shards[shard].file}'
            first = int(self._shard_ends[shard]) - self._manifest.shards[shard].records
            reader = self._reader(shard)
            try:
                serialized = reader.read([record - first for record in own])
                for record, content in zip(own, serialized, strict=True):
                    feature = self._example.FromString(content).features.feature
                    (value,) = feature['tokens'].bytes_list.value
                    tokens[record] = np.frombuffer(value, self._dtype)
                    if self._manifest.chat:
                        (mask,) = feature['mask'].bytes_list.value
                        own_tokens = tokens[record].astype(np.int32)
                        tokens[record] = np.where(np.frombuffer(mask, np.uint8) > 0, own_tokens, ~own_tokens)
            except Exception as error:  # RuntimeError, DecodeError, ... by where it broke
                raise broken_shard(path, error) from None
            for record in own:
                document, number = records[record]
                size = self._manifest.record_tokens
                expected = min(int(self._lengths[document]) - number * size, size)
                if len(tokens[record]) != expected:
                    raise broken_shard(
                        path, f'document {document} has {len(tokens[record])} tokens instead of {expected}'
                    )
        return tokens
