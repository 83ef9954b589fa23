"""What a run evaluates: each evaluator has `run(params)`, which yields (name, value) of the metrics it measured."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import jax

from transxssm_jax.data.loader import Loader
from transxssm_jax.training import metrics


class Evaluator(Protocol):
    """To add one, write a class with this method and put it into the list that `loop.make_evaluators` returns."""

    def run(self, params: dict) -> Iterable[tuple[str, float]]:
        """
        Args:
          params: the run's parameters, on its mesh.

        Returns:
          (name, value) of each metric; a name is 'eval/...'. Nothing where the run was told to stop meanwhile.
        """


class HeldOutLoss:
    """Mean cross-entropy of a split, in nats per token, with its perplexity and bits per byte.

    Args:
      open_split: opens a loader of the split's batches, the same ones at every call.
      eval_step: (params, batch) -> sums 'nll' (nats) and 'tokens', as `step.eval_step`.
      max_batches: batches of an evaluation; 0: all that the loader has.
      should_stop: asked before every batch.
      prefixes: what the names of the metrics begin with, e.g. 'eval/validation/'; each metric is yielded under each.
    """

    def __init__(
        self,
        open_split: Callable[[], Loader],
        eval_step: Callable,
        *,
        max_batches: int = 0,
        should_stop: Callable[[], bool] = lambda: False,
        prefixes: Iterable[str] = ('eval_',),
    ):
        self._open_split, self._eval_step, self._max_batches = open_split, eval_step, max_batches
        self._should_stop, self._prefixes = should_stop, tuple(prefixes)

    def run(self, params: dict) -> Iterator[tuple[str, float]]:
        nll, tokens, newest = 0.0, 0.0, {'nll': 0.0, 'tokens': 0.0}
        with self._open_split() as loader:
            for batch in itertools.islice(loader, self._max_batches or None):
                if self._should_stop():
                    return
                before, newest = newest, self._eval_step(params, batch)
                # As in `metrics.PendingMetrics`, sums are read when the devices have been given the next batch.
                jax.copy_to_host_async(newest)
                nll, tokens = nll + float(before['nll']), tokens + float(before['tokens'])
            nll, tokens = nll + float(newest['nll']), tokens + float(newest['tokens'])
            targets_per_byte = metrics.targets_per_byte(loader)
        for prefix in self._prefixes:
            yield from metrics.of_loss(nll / tokens, targets_per_byte, prefix).items()
