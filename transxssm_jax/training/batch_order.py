"""Which batch of the data each step takes, where a run went back and left batches out.

Step t takes batch t - 1, batches being numbered from 0. Where the run went back from step s to its state after step r, the
batches up to that of step s are left out: step r + 1 takes the one after it, and so on. The order is a pure function of the
skips, which are part of a checkpoint (`data.json`) and, step by step, of the ledger.
"""

from collections.abc import Sequence


class BatchOrder:
    """The order of a run's batches.

    Args:
      skips: [step, offset] pairs, ascending: steps after `step` take batch t - 1 + offset.
    """

    def __init__(self, skips: Sequence[Sequence[int]] = ()):
        self.skips = [(int(step), int(offset)) for step, offset in skips]

    @classmethod
    def of(cls, position: dict | None) -> 'BatchOrder':
        """The order that a checkpoint's position tells of."""
        return cls((position or {}).get('skips', ()))

    def batch(self, step: int) -> int:
        """Number of the batch that a step, from 1, takes."""
        return step - 1 + next((offset for after, offset in reversed(self.skips) if step > after), 0)

    def batches_before(self, step: int) -> int:
        """How many batches are read or left out when `step` steps are taken; those left out right there do not count yet."""
        return self.batch(step) + 1 if step else 0

    def back(self, to: int, step: int) -> 'BatchOrder':
        """The order in which a run goes on that went back from a step to its state after step `to`, below it."""
        kept = [(after, offset) for after, offset in self.skips if after < to]
        return BatchOrder([*kept, (to, self.batch(step) + 1 - to)])

    def saved(self) -> dict:
        """What a checkpoint keeps of it; nothing where nothing was left out."""
        return {'skips': [list(skip) for skip in self.skips]} if self.skips else {}
