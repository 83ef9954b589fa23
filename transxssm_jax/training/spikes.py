"""Spikes: steps whose loss, gradient norm or update norm is far above that of the steps before.

Of every value the natural logarithm is taken, because norms vary by factors. The limit of step t is

    exp(median + train.spike_threshold * max(1.4826 * MAD, SMALLEST_SPREADS))

over the train.spike_window steps before step t - 1, where MAD is the median absolute deviation, which estimates a normal
spread as 1.4826 * MAD. Step t - 1 takes no part, so that the limits are known without waiting for the devices, and are the
same whether or not metrics are read early for a record. Spikes stay in the window: a median bears up to a half of them,
and after a lasting change (another mixture of data) the limits follow within half a window. Only values above a limit
count. While there are fewer than half a window of steps, only a value that is not finite is a spike.

The limits are computed on the host from numbers that every process has, so all of them decide alike. The window is part of
a checkpoint (`data.json`), so that a resumed run decides as the uninterrupted one.

With train.spike_action='rollback' a step whose loss or gradient norm is above its limit, or that is not finite, raises
`RollBack` before anything after it is saved: the run goes back to its state after step s - train.rollback_steps, and the
batches from there to that of step s are left out (batch_order.py). Where the run is killed before it has saved again, it
meets the same step again and goes back once more, to the same.
"""

import logging
import math
import pathlib

import numpy as np

from transxssm_jax import cli
from transxssm_jax.config import Config
from transxssm_jax.parallel import processes
from transxssm_jax.training import metrics
from transxssm_jax.training.batch_order import BatchOrder

WATCHED = ('loss', 'grad_norm', 'update_norm')
SKIPPED_BY = 2  # of WATCHED, those by which a step is skipped; see step.train_step
# Of the logarithms. Near a plateau losses differ by less than batches of other data would. Norms have heavy tails: single
# steps of healthy runs at 20M and 30M had three times the median, at a spread of 0.05, without a trace in the loss.
SMALLEST_SPREADS = (0.02, 0.25, 0.25)
FILE = 'spikes.jsonl'
_DOCUMENTS_SHOWN = 6  # in a warning; the file has all

log = logging.getLogger(__name__)


class TooManySpikesError(cli.UserError, ArithmeticError):
    """There were more than train.max_spikes."""

    exit_code = cli.ExitCode.NOT_FINITE


class RollBack(BaseException):
    """The run is to go back: no error, but a way out of the loop, which nothing that catches errors may close.

    Attributes:
      step: the spike.
      to: the step after which the state was good.
      order: of the batches from there on.
      record: of `FILE`, to be written once later records are dropped.
      rollbacks: the spikes of all times that the run went back, this one included.
    """

    def __init__(self, step: int, to: int, order: BatchOrder, record: dict, rollbacks: list[int]):
        super().__init__(f'step {step} is a spike, and the run goes back to step {to}')
        self.step, self.to, self.order, self.record, self.rollbacks = step, to, order, record, rollbacks


class Spikes:
    """Watches the steps of a run, and says by what limits the next one is skipped.

    Args:
      config: of the run.
      workdir: where `FILE` is written, a record for every spike; records of steps after `step` are dropped.
      loader: of the training split; it tells which documents were in a batch.
      step: how many steps the run has taken.
      position: that the checkpoint holds (`saved` is a part of it), or None.
      back: where the run has just gone back.

    Attributes:
      order: of the batches.
    """

    def __init__(
        self,
        config: Config,
        workdir: pathlib.Path,
        loader,
        step: int,
        position: dict | None,
        back: RollBack | None = None,
    ):
        self._train, self._path, self._loader = config.train, workdir / FILE, loader
        saved = (position or {}).get('spikes', {})
        self._window = {int(at): values for at, values in saved.get('window', [])}  # step -> values of WATCHED
        self._recent = list(saved.get('recent', []))  # spikes among the last steps
        self._counts = {'spikes': 0, 'skipped_steps': 0} | saved.get('counts', {})
        self.order = back.order if back else BatchOrder.of(position)
        self._rollbacks = back.rollbacks if back else list(saved.get('rollbacks', []))
        if processes.is_coordinator() and self._path.exists():
            metrics.JsonLines(self._path, step, self._went_back).close()
        if back:
            self._write(back.step, back.record)

    def _went_back(self, record: dict) -> bool:
        """Whether a record is of a step that the run went back from, which stays though later steps are taken again."""
        return 'back_to' in record and record['step'] in self._rollbacks

    def limits(self, step: int) -> tuple[np.ndarray, ...]:
        """(float32 [2],) by which the compiled step decides, or () where train.spike_action skips nothing."""
        return (self._limits(step)[:SKIPPED_BY],) if self._train.spike_action == 'skip' else ()

    def _limits(self, step: int) -> np.ndarray:
        """The limits of WATCHED, float32 [3]; infinite while there are too few steps to compare with."""
        size = self._train.spike_window
        rows = [values for at, values in self._window.items() if step - 1 - size <= at <= step - 2]
        if len(rows) < size // 2:
            return np.full(len(WATCHED), np.inf, np.float32)
        logs = np.log(np.maximum(np.array(rows, np.float64), 1e-30))
        middle = np.median(logs, axis=0)
        spread = 1.4826 * np.median(np.abs(logs - middle), axis=0)
        with np.errstate(over='ignore'):
            limits = np.exp(middle + self._train.spike_threshold * np.maximum(spread, SMALLEST_SPREADS))
            return limits.astype(np.float32)

    def observe(self, step: int, scalars: dict[str, float]) -> None:
        """Takes up a step; to be called once for each, in order, by all processes.

        Args:
          step: its number, from 1.
          scalars: its metrics, see `step.train_step`.

        Raises:
          TooManySpikesError: with this one there are more than train.max_spikes among the last train.spike_window steps.
        """
        values, limits = [scalars[name] for name in WATCHED], self._limits(step)
        is_skipped = bool(scalars.get('skipped'))
        size = self._train.spike_window
        if all(map(math.isfinite, values)):
            self._window[step] = values
        self._window = {at: old for at, old in self._window.items() if at >= step - 1 - size}
        self._recent = [at for at in self._recent if at > step - size]
        is_above = [not value <= limit for value, limit in zip(values, limits.tolist(), strict=True)]
        goes_back = self.goes_back and (any(is_above[:SKIPPED_BY]) or not all(map(math.isfinite, values)))
        if is_skipped or any(is_above) or goes_back:
            self._recent.append(step)
            self._counts['spikes'] += 1
            self._counts['skipped_steps'] += is_skipped
            self._report(step, values, limits.tolist(), is_skipped, goes_back)

    @property
    def goes_back(self) -> bool:
        """Whether a spike, or a step that is not finite, makes the run go back."""
        return self._train.spike_action == 'rollback'

    def _report(self, step: int, values: list[float], limits: list[float], is_skipped: bool, goes_back: bool) -> None:
        documents = self._documents(step)
        back_to = max(step - self._train.rollback_steps, 0)
        shown = ', '.join(
            f'{name} {value:.4g} (limit {limit:.4g})'
            for name, value, limit in zip(WATCHED, values, limits, strict=True)
            if not value <= limit or not math.isfinite(value)
        )
        first = '; '.join(' '.join(map(str, document)).strip() for document in documents[:_DOCUMENTS_SHOWN])
        log.warning(
            'step %d is a spike%s: %s; its %d parts of documents (source, document, first and past last token) are in %s: '
            '%s%s',
            step,
            ' and was skipped' if is_skipped else f', and the run goes back to step {back_to}' if goes_back else '',
            shown,
            len(documents),
            self._path,
            first,
            ', ...' if len(documents) > _DOCUMENTS_SHOWN else '',
        )
        finite = [value if math.isfinite(value) else str(value) for value in [*values, *limits]]
        named = dict(zip([*WATCHED, *(f'{name}_limit' for name in WATCHED)], finite, strict=True))
        record = named | {'skipped': is_skipped, 'documents': documents}
        recent = len([at for at in self._rollbacks if at > step - self._train.spike_window]) + len(self._recent)
        too_many = 0 < self._train.max_spikes < recent
        if goes_back and not too_many:
            order, record = self.order.back(back_to, step), record | {'back_to': back_to}
            raise RollBack(step, back_to, order, record, [*self._rollbacks, step])
        self._write(step, record)
        if too_many:
            raise TooManySpikesError(
                f'step {step}: {recent} of the last {self._train.spike_window} steps were spikes, more than '
                f'train.max_spikes={self._train.max_spikes} ({shown}); {self._path} names the documents; lower '
                'optimizer.learning_rate, look at the data, or raise train.max_spikes or train.spike_threshold'
            )

    def _write(self, step: int, record: dict) -> None:
        if processes.is_coordinator():
            records = metrics.JsonLines(self._path, step - 1, self._went_back)
            records.write(step, record)
            records.close()

    def _documents(self, step: int) -> list[list]:
        """[source, document of its split, first token, past last token] of all that a step's batch held.

        Gathered from all processes, which read rows of their own; two that share a row tell of it once.
        """
        own = [
            [self._loader.parts[part].name, *span]
            for part, spans in self._loader.row_spans(self.order.batch(step))
            for span in spans
        ]
        gathered = [document for documents in processes.all_gather_json(own) for document in documents]
        return [list(document) for document in dict.fromkeys(map(tuple, gathered))]

    def counts(self) -> dict[str, float]:
        """'spikes', 'skipped_steps' and 'rollbacks' since step 0, for a record; empty where there was none."""
        counts = self._counts | {'rollbacks': len(self._rollbacks)}
        counts['spikes'] += len(self._rollbacks)  # which are no part of what was taken again
        return {name: float(count) for name, count in counts.items() if count}

    def saved(self) -> dict:
        """What a checkpoint keeps beside the position in the data, once the metrics of all steps are read."""
        window = [[step, values] for step, values in self._window.items()]
        rollbacks = {'rollbacks': self._rollbacks} if self._rollbacks else {}
        return self.order.saved() | {
            'spikes': {'window': window, 'recent': self._recent, 'counts': self._counts, **rollbacks}
        }
