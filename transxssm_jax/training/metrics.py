"""What a run reports: losses, rates, JSON lines, TensorBoard and progress."""

import contextlib
import datetime
import json
import logging
import math
import pathlib
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import psutil
from tqdm import tqdm

from pallas_kernels import chips
from transxssm_jax import config as config_lib
from transxssm_jax.config import Config
from transxssm_jax.data.manifest import Manifest
from transxssm_jax.model import costs
from transxssm_jax.training import health, splits, trackers

log = logging.getLogger(__name__)


class Clock:
    """Times the steps of a window: the time that passed, without what evaluation and checkpoints took."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self._start, self._paused_seconds, self.input_seconds = time.perf_counter(), 0.0, 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start - self._paused_seconds

    @contextlib.contextmanager
    def paused(self):
        """Time within does not count as training."""
        start = time.perf_counter()
        yield
        self._paused_seconds += time.perf_counter() - start

    @contextlib.contextmanager
    def input(self):
        """Time within is counted as waiting for data."""
        start = time.perf_counter()
        yield
        self.input_seconds += time.perf_counter() - start


def rates(config: Config, steps: int, clock: Clock, attended: float) -> dict[str, float]:
    """Speed over a window of steps.

    Args:
      config: settings.
      steps: in the window.
      clock: restarted when the window began.
      attended: mean tokens that a token attends to in the training split, see `mean_attended`.

    Returns:
      tokens_per_second (all devices); step_seconds; input_fraction (share of the window spent waiting for data);
      model_tflops_per_second (per device, the work of costs.py). Where the device's peak is known also mfu, which counts
      the attention that documents leave, and mfu_packed_rows, which counts it as if one document filled every row.
    """
    seconds = max(clock.seconds, 1e-9)
    tokens_per_second = steps * config.tokens_per_step / seconds
    per_device = tokens_per_second / jax.device_count()
    flops_per_second = per_device * costs.train_flops_per_token(config.model, attended)
    values = {
        'tokens_per_second': tokens_per_second,
        'step_seconds': seconds / steps,
        'input_fraction': clock.input_seconds / seconds,
        'model_tflops_per_second': flops_per_second / 1e12,
    }
    peak = chips.peak_flops(jax.devices()[0].device_kind)
    if peak:
        packed = costs.train_flops_per_token(config.model, costs.row_attended(config.data.seq_len))
        values['mfu'] = flops_per_second / peak
        values['mfu_packed_rows'] = per_device * packed / peak
    return values


def mean_attended(manifest: Manifest, lengths: np.ndarray, seq_len: int) -> float:
    """Mean tokens that a token attends to, itself included, in the packed rows of a split; sources count by weight."""
    weights = manifest.mixture_weights()
    if not weights:
        return costs.mean_attended(lengths, seq_len)
    means = [
        costs.mean_attended(lengths[source.first_document : source.first_document + source.documents], seq_len)
        for source in manifest.sources
    ]
    return sum(weight * mean for weight, mean in zip(weights, means, strict=True)) / sum(weights)


def missing_mfu(device: jax.Device) -> str:
    """The line that announces that there is no MFU for an accelerator, '' where there is one and for a CPU."""
    if device.platform == 'cpu' or chips.peak_flops(device.device_kind):
        return ''
    return f'no MFU: the peak of {device.device_kind!r} is not known; add it to CHIPS in pallas_kernels/chips.py'


def memory() -> dict[str, float]:
    """Peak device memory in GiB, or, where devices share the host's, the size of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and 'peak_bytes_in_use' in stats:
        return {'device_memory_gib': stats['peak_bytes_in_use'] / 2**30}
    return {'host_memory_gib': psutil.Process().memory_info().rss / 2**30}


def targets_per_byte(loader) -> float:
    """Predicted tokens per byte of text: of text every stored token, eos included, of conversations what is learned."""
    return loader.num_targets / loader.num_bytes


def of_loss(loss: float, targets_per_byte: float, prefix: str = '') -> dict[str, float]:
    """Cross-entropy in nats per token, also as perplexity and as bits per byte of text."""
    return {
        f'{prefix}loss': loss,
        f'{prefix}perplexity': math.exp(min(loss, 80.0)),
        f'{prefix}bits_per_byte': loss / math.log(2) * targets_per_byte,
    }


class PendingMetrics:
    """Metrics of the steps since the last record.

    Those of the newest step are read only when the devices have been given the
    next one, or on `flush`, so that reading does not keep the devices waiting.

    Args:
      spikes: a `spikes.Spikes`, told of every step that is read.

    Attributes:
      on_read: called with each step and its scalars when they are read, finite or not; None: nothing is.
      waited_seconds: for the devices, in all.
    """

    def __init__(self, spikes=None):
        self.spikes = spikes
        self.on_read: Callable[[int, dict[str, float]], None] | None = None
        self.waited_seconds = 0.0
        self._newest = None  # (step, metrics on the devices)
        self._nll = self._tokens = 0.0  # sums since the last record
        self._scalars = {}  # of the last step that was read

    def push(self, step: int, step_metrics: dict) -> None:
        """Takes over what `step.train_step` returned for a step and reads those of the step before it.

        Raises:
          health.NotFiniteError: the step before is not finite.
        """
        previous, self._newest = self._newest, (step, step_metrics)
        # On GPUs a copy waits for all that the device had been given when it was asked for: asked for now, it does not
        # wait for the next step.
        jax.copy_to_host_async({name: value for name, value in step_metrics.items() if name != 'grad_norms'})
        self._read(previous)

    def flush(self) -> None:
        """Waits for the newest step and reads its metrics. Raises NotFiniteError as `push`."""
        newest, self._newest = self._newest, None
        self._read(newest)

    def record(self) -> dict[str, float]:
        """The scalars of the last step, with 'loss' the mean per token over the steps since the last record.

        Raises NotFiniteError as `push`.
        """
        self.flush()
        scalars = {name: value for name, value in self._scalars.items() if name not in ('tokens', 'skipped')}
        scalars |= self.spikes.counts() if self.spikes else {}
        if not self._tokens:  # every step was skipped, and none was finite
            self._nll = math.nan
        loss, self._nll, self._tokens = self._nll / max(self._tokens, 1.0), 0.0, 0.0
        return {**scalars, 'loss': loss}

    def _read(self, pending) -> None:
        if pending is None:
            return
        step, values = pending
        began = time.perf_counter()
        scalars = jax.device_get({name: value for name, value in values.items() if name != 'grad_norms'})
        self.waited_seconds += time.perf_counter() - began
        self._scalars = {name: float(value) for name, value in scalars.items()}
        if self.on_read:
            self.on_read(step, self._scalars)
        goes_back = self.spikes is not None and self.spikes.goes_back
        if not self._scalars.get('skipped') and not goes_back:
            health.check_finite(step, self._scalars, values['grad_norms'])
        if self.spikes:
            self.spikes.observe(step, self._scalars)
        if math.isfinite(self._scalars['loss']):
            self._nll += self._scalars['loss'] * self._scalars['tokens']
            self._tokens += self._scalars['tokens']


# ---- writing ---------------------------------------------------------------


class Writers:
    """Progress, WORKDIR/metrics.jsonl, WORKDIR/tensorboard and train.trackers; silent on all but process 0.

    Records of steps after first_step, left by a run that died beyond its last
    checkpoint, are dropped, so that metrics.jsonl and TensorBoard hold each step once.

    Attributes:
      seconds_before: 'seconds' of the last record that was kept: the time that earlier starts of this run took.
    """

    def __init__(self, workdir: pathlib.Path, config: Config, first_step: int):
        self.seconds_before, self._evaluated = 0.0, set()
        self._writers, self._progress = [], None
        if jax.process_index() != 0:
            return
        records = JsonLines(workdir / 'metrics.jsonl', first_step)
        self._evaluated = {record['step'] for record in records.kept if 'eval_loss' in record}
        self.seconds_before = max(
            (r['seconds'] for r in records.kept if isinstance(r.get('seconds'), float)), default=0.0
        )
        self._writers.append(records)
        if config.train.tensorboard:
            self._writers.append(TensorBoard(workdir / 'tensorboard', config, first_step))
        self._writers += [Tracked(name, workdir, config) for name in config.train.tracker_names]
        self._progress = Progress(config, first_step)

    def has_evaluation(self, step: int) -> bool:
        """Whether an earlier start of this run recorded an evaluation at a step."""
        return step in self._evaluated

    def advance(self) -> None:
        """One more step was taken."""
        if self._progress:
            self._progress.advance()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one record of the finite numbers of a step; an evaluation repeated on resuming is not written again.

        Raises:
          OSError: naming the file that cannot be written.
        """
        if 'eval_loss' in values and step in self._evaluated:
            return
        values = {name: value for name, value in values.items() if math.isfinite(value)}  # a step that was skipped
        for writer in self._writers:
            writer.write(step, values)
        if self._progress and 'loss' in values:
            self._progress.show(step, values)

    def print(self, line: str) -> None:
        """Prints a line above the progress bar."""
        if self._progress:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """May be called again."""
        while self._writers:
            with contextlib.suppress(OSError):  # `write` has reported it
                self._writers.pop().close()
        if self._progress:
            self._progress.close()


class Progress:
    """A bar where stderr is a terminal and train.progress is on; elsewhere a line on stdout for each record."""

    def __init__(self, config: Config, first_step: int):
        self._steps = config.train.steps
        self._has_bar = config.train.progress and sys.stderr.isatty()
        self._bar = tqdm(
            total=self._steps,
            initial=first_step,
            unit='step',
            file=sys.stderr,
            dynamic_ncols=True,
            disable=not self._has_bar,
            mininterval=0.5,
        )

    def advance(self) -> None:
        self._bar.update()

    def show(self, step: int, values: dict[str, float]) -> None:
        """Shows a training record: loss and, where known, tokens/s, MFU and the time left."""
        shown = {'loss': f'{values["loss"]:.3f}'}
        if 'tokens_per_second' in values:
            shown['tokens/s'] = f'{values["tokens_per_second"]:,.0f}'
        if 'mfu' in values:
            shown['MFU'] = f'{values["mfu"]:.1%}'
        if self._has_bar:
            self._bar.set_postfix(shown, refresh=False)
            return
        if 'step_seconds' in values:
            left = datetime.timedelta(seconds=round((self._steps - step) * values['step_seconds']))
            shown['time left'] = str(left)
        print(
            f'step {step} of {self._steps}: ' + ', '.join(f'{name} {value}' for name, value in shown.items()),
            flush=True,
        )

    def close(self) -> None:
        self._bar.close()


class JsonLines:
    """A file with one JSON record per line.

    Args:
      path: of the file.
      first_step: records of later steps, left by an earlier start of the run, are dropped.
      stays: whether a record of a later step stays all the same.

    Attributes:
      kept: the records of earlier starts of the run.
    """

    def __init__(self, path: pathlib.Path, first_step: int, stays: Callable[[dict], bool] = lambda record: False):
        self._path = path
        self.kept, damaged = _read_records(path, first_step, stays)
        if damaged:
            log.warning('%s: dropped %d lines that are not records', path, damaged)
        partial = path.with_suffix('.tmp')
        with naming(partial):
            partial.write_text(''.join(json.dumps(record) + '\n' for record in self.kept))
            partial.replace(path)
        with naming(path):
            self._file = path.open('a')

    def write(self, step: int, values: dict[str, float]) -> None:
        with naming(self._path):
            self._file.write(json.dumps({'step': step, **values}) + '\n')
            self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files with the metrics in groups, the config as a text, and its settings as hyperparameters."""

    def __init__(self, directory: pathlib.Path, config: Config, first_step: int):
        # Imported here: it costs a second that a run without it need not pay.
        from tensorboard.summary import Writer

        self._directory = directory
        with naming(directory):
            _start_tensorboard(directory, config, first_step)
            self._writer = Writer(str(directory))

    def write(self, step: int, values: dict[str, float]) -> None:
        with naming(self._directory):
            for name, value in values.items():
                if tag := tensorboard_tag(name):
                    self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        self._writer.close()


class Tracked:
    """A service of train.trackers; it gets the metrics under TensorBoard's names."""

    def __init__(self, name: str, workdir: pathlib.Path, config: Config):
        self._tracker = trackers.InBackground(name, workdir, config)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._tracker.write(step, {tag: value for name, value in values.items() if (tag := tensorboard_tag(name))})

    def close(self) -> None:
        self._tracker.close()


GROUPS = {
    'train': ('loss', 'perplexity', 'bits_per_byte'),
    'optimizer': ('learning_rate', 'grad_norm', 'update_norm', 'param_norm'),
    'speed': ('tokens_per_second', 'step_seconds', 'input_fraction', 'model_tflops_per_second', 'mfu'),
    'memory': ('device_memory_gib', 'host_memory_gib'),
    'run': ('seconds', 'tokens', 'goodput'),
}


def tensorboard_tag(name: str) -> str:
    """A metric's name with its group in front; '' for a metric that is there under another name (eval_loss)."""
    if '/' in name:
        return name
    if name.startswith('eval_'):
        return ''
    return next((f'{group}/{name}' for group, names in GROUPS.items() if name in names), f'other/{name}')


def _start_tensorboard(directory: pathlib.Path, config: Config, step: int) -> None:
    """Writes an event file that makes TensorBoard forget what earlier ones hold beyond a step, and describes the run."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import summary_v2
    from tensorboard.plugins.text import metadata
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    losses = ['train/loss', *(f'eval/{split}/loss' for split in splits.eval_splits(config))]
    text = ''.join(f'    {line}\n' for line in config_lib.to_json(config).splitlines())  # a block of code in Markdown
    config_text = Summary.Value(
        tag='config', metadata=metadata.create_summary_metadata('config', ''), tensor=make_tensor_proto([text.encode()])
    )
    writer = EventFileWriter(str(directory))
    # A second mark of a start is what TensorBoard takes as a restart.
    writer.add_event(Event(step=step + 1, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START)))
    for summary in (
        Summary(value=[config_text]),
        summary_v2.hparams_config_pb([], [summary_v2.Metric(tag) for tag in losses]),
        summary_v2.hparams_pb(config_lib.flatten(config), trial_id=directory.parent.name),
    ):
        writer.add_event(Event(step=step, wall_time=time.time(), summary=summary))
    writer.close()


@contextlib.contextmanager
def naming(path: pathlib.Path):
    """Turns an OSError into one whose message is one line that names the file."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f'{path} cannot be written ({error.strerror or error}); make room, then run the same command'
        ) from error


def _read_records(path: pathlib.Path, last_step: int, stays=lambda record: False) -> tuple[list[dict], int]:
    """(records of steps up to last_step, and of later ones that stay; number of lines that are not records)."""
    kept, damaged = [], 0
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError):  # not UTF-8 or not JSON: the last line of a killed run may be cut
            record = None
        if not isinstance(record, dict) or type(record.get('step')) is not int:
            damaged += 1
        elif record['step'] <= last_step or stays(record):
            kept.append(record)
    return kept, damaged
