"""Documents to rows: which tokens row r holds, as a pure function of (lengths, seed, r).

A document stored as t0 .. t(n-2), eos fills n slots of (input, target):
(begin, t0), (t0, t1), ..., (t(n-2), eos), where begin is the tokenizer's
`begin_id`. So every stored token is the target of one slot, the first token of
a document is learnt too, and eos is never an input (unless it is the begin
token).

An epoch is a permutation of the documents, their slots laid end to end and cut
every `seq_len` slots; only the last row of an epoch is padded. A row needs no
token that another row predicts: its inputs and targets are those of its slots.

The rows are then permuted. In packing order the rows of a long document follow
one another, so that a batch would hold one book: the same model on books ends
9% higher in held-out loss.

An epoch's permutations are made once per process, when its first row is asked
for: 1.4 s of one core and 25 bytes per document at 10 million documents, 15 s
and 2.4 GB at 100 million, which is the intended limit (2**32 the hard one), and
as much again per row. Two epochs are kept, of 12 bytes per document and 4 per
row each.
"""

import collections
import threading
from collections.abc import Iterator

import numpy as np

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_OF_ROWS = 1  # ends the key of an epoch's permutation of rows


def _mix(z: np.ndarray) -> np.ndarray:
    # The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of uint64.
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of range(size), size < 2**32, uint32, that depends on `key` (integers) alone.

    Sorts SplitMix64 outputs rather than asking numpy.random, whose streams may
    change between versions. The low bits of an output give way to the index
    itself: sorting whole words is several times faster than argsort, and no
    two are equal, so any sort agrees.
    """
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mix(state * np.uint64(_GAMMA) + np.uint64(part & _MASK) + np.uint64(1))
    index_bits = np.uint64((1 << max(size - 1, 0).bit_length()) - 1)
    words = np.empty(size, np.uint64)
    for start in range(0, size, 1 << 20):  # in blocks that stay in cache
        index = np.arange(start, min(start + (1 << 20), size), dtype=np.uint64)
        words[start : start + (1 << 20)] = _mix(index * np.uint64(_GAMMA) + state) & ~index_bits | index
    words.sort()
    return (words & index_bits).astype(np.uint32)


class Epochs:
    """Row layout of one pool of documents through its epochs.

    Args:
      lengths: uint32 [documents], slots of each document: its tokens, eos included.
      seq_len: slots of a row.
      key: integers that the permutations depend on, besides the epoch.
      shuffle: False keeps documents and rows in order.

    Attributes:
      tokens: slots of an epoch that have a target.
      rows: rows of an epoch.
    """

    def __init__(self, lengths: np.ndarray, seq_len: int, *, key: tuple[int, ...], shuffle: bool):
        self._lengths, self._seq_len, self._key, self._shuffle = lengths, seq_len, key, shuffle
        self.tokens = int(np.sum(lengths, dtype=np.int64))
        self.rows = -(-self.tokens // seq_len)
        self._epochs = collections.OrderedDict()
        self._lock = threading.Lock()

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | range]:
        """(documents in order, slot at which each ends, rows in order)."""
        if not self._shuffle:
            epoch = 0
        with self._lock:  # threads that need a new epoch wait for the one that makes it
            if epoch not in self._epochs:
                if self._shuffle:
                    order = permutation(len(self._lengths), *self._key, epoch)
                    rows = permutation(self.rows, *self._key, epoch, _OF_ROWS)
                else:
                    order, rows = np.arange(len(self._lengths)), range(self.rows)
                self._epochs[epoch] = order, np.cumsum(self._lengths[order], dtype=np.int64), rows
                if len(self._epochs) > 2:  # prefetch straddles two at most
                    self._epochs.popitem(last=False)
            return self._epochs[epoch]

    def spans(self, row: int) -> list[tuple[int, int, int]]:
        """(document, first slot, past last slot) of the documents in `row`, in order; their slots sum to seq_len.

        The row that ends an epoch has fewer slots. Row numbers go on through the epochs.
        """
        epoch, row = divmod(row, self.rows)
        order, ends, rows = self._epoch(epoch)
        start = int(rows[row]) * self._seq_len
        stop = min(start + self._seq_len, self.tokens)
        first = int(np.searchsorted(ends, start, side='right'))
        last = int(np.searchsorted(ends, stop, side='left'))
        spans = []
        for document, end in zip(order[first : last + 1].tolist(), ends[first : last + 1].tolist(), strict=True):
            begin = end - int(self._lengths[document])
            spans.append((document, max(start - begin, 0), min(stop, end) - begin))
        return spans


def pack_row(tokens: np.ndarray, span_slots: list[int], seq_len: int) -> dict[str, np.ndarray]:
    """One row from the tokens of its spans.

    Args:
      tokens: integer [slots + spans], the spans of the row joined: of each span the input of its first slot,
        then the targets of its slots (all but the last of them are the inputs of its other slots). A negative one
        is ~token of a token that is not learned.
      span_slots: slots of each span, at most seq_len together.
      seq_len: slots of the row.

    Returns int32 [seq_len] arrays:
      tokens: inputs, 0 where padded.
      targets: the next token of the same document, -1 where padded and where it is not learned.
      segment_ids: 1 for the row's first document, 2 for its second ...; 0 where padded.
      positions: 0, 1, ... from each document's first slot in this row; 0 where padded.
    """
    slots = np.array(span_slots, np.int64)
    stops = np.cumsum(slots)
    n = int(stops[-1]) if len(stops) else 0
    segments = np.repeat(np.arange(len(slots)), slots)
    row = {name: np.zeros(seq_len, np.int32) for name in ('tokens', 'segment_ids', 'positions')}
    row['targets'] = np.full(seq_len, -1, np.int32)
    inputs = np.arange(n) + segments  # where the input of each slot lies: every earlier span has one token more
    targets = tokens[inputs + 1]
    if tokens.dtype.kind == 'i' and (is_masked := tokens < 0).any():
        tokens = np.where(is_masked, ~tokens, tokens)
        targets = np.maximum(targets, -1)
    row['tokens'][:n] = tokens[inputs]
    row['targets'][:n] = targets
    row['segment_ids'][:n] = segments + 1
    row['positions'][:n] = np.arange(n) - np.repeat(stops - slots, slots)
    return row


def pack_rows(rows: list[tuple[list, Iterator[np.ndarray]]], seq_len: int) -> dict[str, np.ndarray]:
    """A batch.

    Args:
      rows: of each row, the spans that fill it, and an iterator whose next items are their tokens (Documents.read).
      seq_len: slots of a row.
    """
    names = ('tokens', 'targets', 'segment_ids', 'positions')
    batch = {name: np.empty((len(rows), seq_len), np.int32) for name in names}
    for i, (spans, parts) in enumerate(rows):
        tokens = np.concatenate([next(parts) for _ in spans]) if spans else np.zeros(0, np.int32)
        for name, values in pack_row(tokens, [stop - start for _, start, stop in spans], seq_len).items():
            batch[name][i] = values
    return batch


def packing_efficiency(tokens: int, rows: int, seq_len: int) -> float:
    """Share of an epoch's slots that have a target: all but the padding of its last row."""
    return tokens / (rows * seq_len)
