"""How many rows of each source the steps of a run hold: a pure function of (weights by step, epoch caps, rows per step).

The weights of the sources are given at steps, and hold from there on; a point that
begins with `to` is reached along a straight line from the point before:

    0.8, 0.2                                    always
    0: 0.8, 0.2; 9000: 0.5, 0.5                 another mixture from step 9000 on
    0: 0.8, 0.2; to 9000: 0.5, 0.5              ever less of the first source until step 9000

What counts is each source's share of a point's sum. A source that has given its
epochs gives no more rows, and the others share what it had.

Of the first t steps source 0 has floor(sum of its shares x rows), the others the
rest, of which source 1 has its share among them in the same way, and so on. The
sums are kept exactly, so that a share holds over any number of steps within one
row per source before it. They grow step by step, so that another weight from
step n on changes nothing before n; a new source at the end, with weight 0 until
then, changes nothing either. Within stretches of constant weights they have a
closed form, along a line they are one cumulative sum.
"""

import bisect
import dataclasses
import functools
import re
from fractions import Fraction

import numpy as np

from transxssm_jax import cli
from transxssm_jax.data.manifest import DataError
from transxssm_jax.settings import LARGEST_INT

_SHARE_BITS = 30  # of a share among all sources
_BITS = 24  # of a share among a source and those after it
_ONE = 1 << _BITS
_FAR = 1 << 40  # steps that no run takes
_MOST_ROWS_OF_A_LINE = 1 << 38  # so that sums fit 63 bits
_MOST_STEPS_OF_A_LINE = 1 << 22  # 32 MiB of sums per source
_DECIMAL = re.compile(r'(?=.{1,20}$)([0-9]+(\.[0-9]*)?|\.[0-9]+)')


@dataclasses.dataclass(frozen=True)
class Point:
    """Weights from a step on.

    Attributes:
      step: where they hold.
      weights: of each source; not all are 0.
      is_line: whether the weights before lead here along a straight line.
    """

    step: int
    weights: tuple[Fraction, ...]
    is_line: bool = False

    @functools.cached_property
    def shares(self) -> tuple[int, ...]:
        """Whole numbers of about 2**30 together."""
        total = sum(self.weights)
        return tuple(round((weight / total) * (1 << _SHARE_BITS)) for weight in self.weights)


def parse_weights(text: str, num_sources: int) -> list[Point]:
    """The points of data.weights, see the top of this file.

    Raises DataError where it is not written so, or has another number of weights than there are sources.
    """
    points = []
    for part in filter(None, (part.strip() for part in text.split(';'))):
        match = re.fullmatch(r'(?:(?P<to>to\s+)?(?P<step>[0-9]+(?:_[0-9]+)*)\s*:)?(?P<weights>[^:]*)', part)
        if not match or (match['step'] is None and (points or ';' in text.rstrip('; '))):
            raise DataError(
                f"data.weights: {part!r} must be 'STEP: WEIGHT, WEIGHT' or 'to STEP: WEIGHT, WEIGHT', e.g. "
                "'0: 0.8, 0.2; to 9000: 0.5, 0.5'"
            )
        words = [word.strip() for word in match['weights'].split(',')]
        if not all(map(_DECIMAL.fullmatch, words)):
            raise DataError(f'data.weights: {part!r} must hold decimal numbers of at least 0, with commas between')
        if len(words) != num_sources:
            raise DataError(
                f'data.weights: {part!r} has {len(words)} weights for {num_sources} data.sources; give one for each'
            )
        if len(match['step'] or '') > 12 or int(match['step'] or 0) > LARGEST_INT:
            raise DataError(f'data.weights: step {cli.shorten(match["step"], 40)} must be at most {LARGEST_INT}')
        point = Point(int(match['step'] or 0), tuple(map(Fraction, words)), bool(match['to']))
        if not any(point.weights):
            raise DataError(f'data.weights: {part!r} gives no source a weight; one must be above 0')
        if points and point.step <= points[-1].step:
            raise DataError(f'data.weights: step {point.step} must be after step {points[-1].step}; order the points')
        if point.is_line and not points:
            raise DataError(f"data.weights: {part!r} has no point before it; begin with '0: ...'")
        points.append(point)
    return points


def parse_epochs(text: str, num_sources: int) -> list[Fraction]:
    """The most epochs of each source, 0 for any number. Raises DataError."""
    words = [word.strip() for word in text.split(',')] if text.strip() else ['0'] * num_sources
    if not all(map(_DECIMAL.fullmatch, words)) or len(words) != num_sources:
        raise DataError(
            f'data.max_epochs={text!r} must be {num_sources} numbers of at least 0, one for each of data.sources, with '
            'commas between; 0: any number'
        )
    return list(map(Fraction, words))


class Schedule:
    """Rows of each source by step.

    Args:
      points: weights, at least one point; those of the first hold from step 0 on.
      rows: of a step.
      most_rows: of each source, in all; 0: any number.

    Attributes:
      ended: [(step, source)] of the sources that have given their most rows before that step, in order.
      end_step: the first step that no source is left for; None: there is none.

    Raises DataError where a line is so long that its sums do not fit.
    """

    def __init__(self, points: list[Point], rows: int, most_rows: list[int]):
        self.ended, self.end_step = [], None
        self._rows, self._most_rows, self._stretches = rows, most_rows, []
        counts, remainders = [0] * len(most_rows), [0] * (len(most_rows) - 1)
        for point, after in zip(points, [*points[1:], None]):
            start, stop = 0 if point is points[0] else point.step, after.step if after else _FAR
            goal = after.shares if after and after.is_line else point.shares
            step = start
            if goal != point.shares and (
                stop - start > _MOST_STEPS_OF_A_LINE or (stop - start) * rows >= _MOST_ROWS_OF_A_LINE
            ):
                raise DataError(
                    f'data.weights: a line of {stop - start:,} steps with {rows:,} rows each is too long; give points on '
                    'the way, without to'
                )
            while step < stop and self.end_step is None:
                done = {source for _, source in self.ended}
                shares = _shares(point.shares, goal, start, stop, step, done)
                stretch = _Stretch(step, rows, counts, remainders, shares)
                self._stretches.append(stretch)
                step, source = self._first_to_end(stretch, stop, done)
                if shares.ndim == 2 and (empty := np.flatnonzero(shares.sum(axis=1) == 0)).size:
                    step, source = min((step, source), (stretch.start + int(empty[0]), -1))
                elif shares.ndim == 1 and not shares.any():
                    step, source = stretch.start, -1
                counts, remainders = stretch.count(step)
                if source >= 0:
                    self.ended.append((step, source))
                elif step < stop:
                    self.end_step = step
        self._starts = [stretch.start for stretch in self._stretches]

    def counts(self, step: int) -> list[int]:
        """Rows of each source that the steps before `step` hold."""
        # Of stretches that begin at one step, because two sources ended there, the last counts.
        return self._stretches[bisect.bisect_right(self._starts, step) - 1].count(step)[0]

    def shares(self, step: int) -> list[float]:
        """The part of a step's rows that is each source's, over many steps of such weights."""
        stretch = self._stretches[bisect.bisect_right(self._starts, step) - 1]
        return stretch.shares_at(step)

    def _first_to_end(self, stretch: '_Stretch', stop: int, done: set[int]) -> tuple[int, int]:
        """(the first step of a stretch that would give a source more than its most rows, the source); or (stop, -1)."""
        found = (stop, -1)
        for source, most in enumerate(self._most_rows):
            if not most or source in done:
                continue
            steps = range(stretch.start, found[0])
            index = bisect.bisect_left(steps, True, key=lambda step: stretch.count(step + 1)[0][source] > most)
            if index < len(steps):
                found = steps[index], source
        return found


def _shares(shares, goal, start: int, stop: int, step: int, done: set[int]) -> np.ndarray:
    """Shares from `step` on, int64: [sources] where they are constant, else [steps, sources] of a line's rest."""
    here, there = (
        np.array([0 if source in done else share for source, share in enumerate(values)], np.int64)
        for values in (shares, goal)
    )
    if (here == there).all():
        return here
    walked = np.arange(step - start, stop - start)[:, None]
    return (here * (stop - start - walked) + there * walked) // (stop - start)


class _Stretch:
    """Steps from `start` on whose weights are constant or those of one line.

    Args:
      start: first step.
      rows: of a step.
      counts: of each source, before `start`.
      remainders: of each source but the last, the part of a row, in 2**-24, that it was due beyond its rows.
      shares: see `_shares`.
    """

    def __init__(self, start: int, rows: int, counts: list[int], remainders: list[int], shares: np.ndarray):
        self.start = start
        self._rows, self._counts, self._remainders, self._shares = rows, counts, remainders, shares
        after = np.cumsum(shares[..., ::-1], axis=-1)[..., ::-1]  # the shares of a source and of those after it
        # Rounded up, so that 15 rows of three equal sources are 5 of each, and not 4 of the first.
        fractions = ((shares << _BITS) + after - (after > 0)) // np.maximum(after, 1)
        self._fractions, self._sums = fractions.tolist() if shares.ndim == 1 else [], None
        if shares.ndim == 2:
            self._sums = self._sum(fractions[:, :-1])

    def _sum(self, fractions: np.ndarray) -> np.ndarray:
        """Rows of each source but the last since `start`, in 2**-24, before each step: int64 [steps + 1, sources - 1]."""
        sums = np.zeros((len(fractions) + 1, fractions.shape[1]), np.int64)
        left = np.full(len(fractions), self._rows, np.int64)  # rows of each step for this source and those after it
        for source in range(fractions.shape[1]):
            sums[1:, source] = np.cumsum(fractions[:, source] * left)
            sums[:, source] += self._remainders[source]
            left -= np.diff(sums[:, source] >> _BITS)
        return sums

    def count(self, step: int) -> tuple[list[int], list[int]]:
        """(counts, remainders) before `step`."""
        left = self._rows * (step - self.start)
        counts, remainders = list(self._counts), []
        for source, remainder in enumerate(self._remainders):
            if self._sums is None:
                due = remainder + self._fractions[source] * left
            else:
                due = int(self._sums[step - self.start, source])
            counts[source] += due >> _BITS
            remainders.append(due & (_ONE - 1))
            left -= due >> _BITS
        counts[-1] += left
        return counts, remainders

    def shares_at(self, step: int) -> list[float]:
        shares = self._shares if self._shares.ndim == 1 else self._shares[min(step - self.start, len(self._shares) - 1)]
        return (shares / max(int(shares.sum()), 1)).tolist()
