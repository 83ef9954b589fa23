"""Rows of several sources: which source a row comes from, and which of its rows it is."""

import math
from fractions import Fraction

import numpy as np

from transxssm_jax.data.packing import Epochs, packing_efficiency


def whole_number_weights(weights: list[str]) -> list[int]:
    """Whole numbers in the exact proportion of decimal `weights` ('0.3', '.7', '2')."""
    fractions = [Fraction(weight) for weight in weights]
    denominator = math.lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * denominator) for fraction in fractions]


def assign_row(row: int, weights: list[int]) -> tuple[int, int]:
    """(source, row in source) of global row `row` in a mixture with whole-number `weights`.

    Halves the sources again and again; the left half with share w gets
    floor(r * w) of the first r rows. So any sum(weights) rows that begin at a
    multiple of it hold each source exactly its weight, and any first r rows
    hold r times its share, within one row per halving.
    """
    low, high = 0, len(weights)
    while high - low > 1:
        middle = (low + high) // 2
        left, total = sum(weights[low:middle]), sum(weights[low:high])
        before = row * left // total
        if (row + 1) * left // total > before:
            row, high = before, middle
        else:
            row, low = row - before, middle
    return low, row


class Mixture:
    """Row layout of pools of documents; each pool goes through epochs of its own.

    Args:
      lengths: uint32 [documents], slots of each document.
      pools: (first document, number of documents) of each pool.
      weights: whole numbers, the share of rows that each pool gets; [] for a single pool.
      seq_len: slots of a row.
      seed: of the permutations of documents and of rows.
      shuffle: False keeps documents and rows in order.
      key: what the permutations depend on besides the seed, where several mixtures have one seed.

    Attributes:
      rows_per_epoch: rows that hold every document once.
      packing_efficiency: share of the slots that have a target, averaged over the pools by weight.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        pools: list[tuple[int, int]],
        weights: list[int],
        *,
        seq_len: int,
        seed: int,
        shuffle: bool,
        key: tuple[int, ...] = (),
    ):
        self._weights = weights
        self._first_document = [first for first, _ in pools]
        self._epochs = [
            Epochs(lengths[first : first + count], seq_len, key=(seed, *key, pool), shuffle=shuffle)
            for pool, (first, count) in enumerate(pools)
        ]
        self.rows_per_epoch = sum(epochs.rows for epochs in self._epochs)
        efficiencies = [packing_efficiency(epochs.tokens, epochs.rows, seq_len) for epochs in self._epochs]
        self.packing_efficiency = float(np.average(efficiencies, weights=weights or None))

    def spans(self, row: int) -> list[tuple[int, int, int]]:
        """(document, first slot, past last slot) of the documents in global row `row`, in order."""
        pool, row = assign_row(row, self._weights) if self._weights else (0, row)
        first = self._first_document[pool]
        return [(first + document, start, stop) for document, start, stop in self._epochs[pool].spans(row)]
