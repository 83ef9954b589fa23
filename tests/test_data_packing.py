import collections
import itertools

import numpy as np
import pytest

from transxssm_jax.data.packing import Epochs, assign_row, pack_row, packing_efficiency, permutation


def test_pack_row_by_hand():
    # The end of one document, a whole one, and the first two tokens of a third, one of them only a target.
    row = pack_row(np.array([5, 6, 9, 7, 9, 8, 4], np.uint16), [3, 2, 2], 6)
    assert row['tokens'].tolist() == [5, 6, 9, 7, 9, 8]
    assert row['segment_ids'].tolist() == [1, 1, 1, 2, 2, 3]
    assert row['positions'].tolist() == [0, 1, 2, 0, 1, 0]
    assert row['targets'].tolist() == [6, 9, -1, 9, -1, 4]
    assert all(values.dtype == np.int32 for values in row.values())


def test_pack_row_target_of_last_input_in_next_document():
    row = pack_row(np.array([5, 9, 3], np.uint16), [2, 1], 2)
    assert row['tokens'].tolist() == [5, 9]
    assert row['targets'].tolist() == [9, -1]
    assert row['segment_ids'].tolist() == [1, 1]


@pytest.mark.parametrize('tokens, lengths', [([], []), ([3, 9], [2]), ([3, 9, 9], [2, 1])])
def test_pack_row_padding(tokens, lengths):
    row = pack_row(np.array(tokens, np.uint32), lengths, 4)
    n = len(tokens)
    assert row['tokens'].tolist() == tokens + [0] * (4 - n)
    assert (row['segment_ids'][:n] > 0).all() and not row['segment_ids'][n:].any() and not row['positions'][n:].any()
    assert (row['targets'][max(n - 1, 0) :] == -1).all()


def test_permutation():
    orders = [permutation(1000, *key).tolist() for key in itertools.product((0, 1, -5), (0, 1), (0, 1))]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert len(set(map(tuple, orders))) == len(orders)
    # Pinned: a checkpoint's data position means the same rows in every version.
    assert permutation(8, 1234, 0, 3).tolist() == PINNED
    order = permutation(100_000, 7)
    assert abs(np.corrcoef(np.arange(100_000), order)[0, 1]) < 0.01


PINNED = [7, 5, 6, 2, 0, 3, 1, 4]


@pytest.mark.parametrize('seq_len', [1, 7, 64, 1000])
@pytest.mark.parametrize('shuffle', [True, False])
def test_every_token_is_an_input_once_an_epoch(seq_len, shuffle):
    lengths = np.random.default_rng(0).integers(2, 50, 40).astype(np.uint32)
    epochs = Epochs(lengths, seq_len, key=(3, 0), shuffle=shuffle)
    orders = []
    for epoch in range(3):
        seen, rows = [np.zeros(n, int) for n in lengths], {}  # rows by their first token
        for row in range(epoch * epochs.rows, (epoch + 1) * epochs.rows):
            tokens = [(document, i) for document, start, stop in epochs.spans(row) for i in range(start, stop)]
            for document, i in tokens[:seq_len]:
                seen[document][i] += 1
            rows[tokens[0]] = tokens
        assert all((counts == 1).all() for counts in seen)
        # A row's extra token is the first of the row that follows it in packing order; one row ends the epoch.
        followers = [tokens[seq_len] for tokens in rows.values() if len(tokens) > seq_len]
        (begin,) = rows.keys() - set(followers)
        assert len(set(followers)) == epochs.rows - 1
        stream = []
        while begin in rows:
            tokens = rows.pop(begin)
            stream += tokens[:seq_len]
            begin = tokens[seq_len] if len(tokens) > seq_len else None
        documents = list(dict.fromkeys(document for document, _ in stream))
        assert stream == [(document, i) for document in documents for i in range(lengths[document])]
        orders.append(tuple(documents))
    assert (len(set(orders)) == 3) == shuffle
    if not shuffle:
        assert orders[0] == tuple(range(40))


def test_without_shuffling_rows_keep_their_order():
    epochs = Epochs(np.full(5, 100, np.uint32), 64, key=(0,), shuffle=False)
    starts = [epochs.spans(row)[0][:2] for row in range(epochs.rows)]
    assert starts == [(64 * row // 100, 64 * row % 100) for row in range(epochs.rows)]


def test_a_long_document_does_not_fill_a_batch():
    """A batch of one book costs 9% of the held-out loss of a model trained on books."""
    generator = np.random.default_rng(0)
    lengths = np.concatenate([np.full(40, 400_000), generator.integers(200, 2000, 15_000)]).astype(np.uint32)
    seq_len, global_batch = 4096, 64
    epochs = Epochs(lengths, seq_len, key=(0, 0), shuffle=True)
    shares = []
    for first in range(0, epochs.rows - global_batch + 1, global_batch):
        tokens = collections.Counter()
        for row in range(first, first + global_batch):
            for document, start, stop in epochs.spans(row):
                tokens[document] += stop - start
        shares.append(max(tokens.values()) / (global_batch * seq_len))
    assert np.median(shares) < 0.1 and max(shares) < 0.2


def test_rows_are_random_access():
    lengths = np.random.default_rng(1).integers(2, 300, 100).astype(np.uint32)
    forward = Epochs(lengths, 32, key=(0,), shuffle=True)
    backward = Epochs(lengths, 32, key=(0,), shuffle=True)
    rows = range(5 * forward.rows)
    expected = [forward.spans(row) for row in rows]
    assert [backward.spans(row) for row in reversed(rows)] == expected[::-1]


@pytest.mark.parametrize('weights', [[1], [1, 1], [7, 3], [1, 2, 3, 4], [10, 1, 1, 1, 5], [999, 1]])
def test_mixture_is_exact_and_even(weights):
    total = sum(weights)
    counts = [0] * len(weights)
    for row in range(3 * total):
        source, own_row = assign_row(row, weights)
        assert own_row == counts[source]  # every source's rows come in order, none is left out
        counts[source] += 1
        levels = (len(weights) - 1).bit_length()
        assert all(
            abs(count - (row + 1) * weight / total) <= max(levels, 1)
            for count, weight in zip(counts, weights, strict=True)
        )
    assert counts == [3 * weight for weight in weights]
    assert assign_row(10**15 * total, weights)[1] == 10**15 * weights[assign_row(0, weights)[0]]


def test_packing_efficiency():
    # Three documents of 4 tokens in rows of 5: 12 inputs in 15 slots, 9 of them with a target.
    assert packing_efficiency(3, 12, 3, 5) == 9 / 15
