"""What a run reports: rates, JSON lines, TensorBoard and the progress bar."""

import contextlib
import json
import math
import pathlib
import sys
import time

import jax
import psutil
from tqdm import tqdm

from pallas_kernels import chips
from transxssm_jax.config import Config
from transxssm_jax.data.manifest import SplitIndex
from transxssm_jax.model import costs


class Clock:
    """Times the steps of a window: what passed, less what was spent on evaluation and checkpoints."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self._start, self._away_seconds, self.input_seconds = time.perf_counter(), 0.0, 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start - self._away_seconds

    @contextlib.contextmanager
    def away(self):
        """Time within does not count as training."""
        start = time.perf_counter()
        yield
        self._away_seconds += time.perf_counter() - start

    @contextlib.contextmanager
    def input(self):
        """Time within is time the devices' host waited for data."""
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


def mean_attended(index: SplitIndex, seq_len: int) -> float:
    """Mean tokens that a token attends to, itself included, in the packed rows of a split; sources count by weight."""
    lengths, weights = index.lengths(), index.mixture_weights()
    if not weights:
        return costs.mean_attended(lengths, seq_len)
    means = [
        costs.mean_attended(lengths[source.first_document : source.first_document + source.documents], seq_len)
        for source in index.sources
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
    """Predicted tokens per byte of text: every stored token, eos included, is a target."""
    return loader.num_tokens / loader.num_bytes


def of_loss(loss: float, targets_per_byte: float, prefix: str = '') -> dict[str, float]:
    """Cross-entropy in nats a token, also as perplexity and as bits a byte of text."""
    return {
        f'{prefix}loss': loss,
        f'{prefix}perplexity': math.exp(min(loss, 80.0)),
        f'{prefix}bits_per_byte': loss / math.log(2) * targets_per_byte,
    }


class Writers:
    """Progress bar, WORKDIR/metrics.jsonl and WORKDIR/tensorboard; silent on all but the first process.

    Records of steps after first_step, left by a run that died beyond its last
    checkpoint, are dropped, so that metrics.jsonl and TensorBoard hold each step once.
    """

    def __init__(self, workdir: pathlib.Path, config: Config, first_step: int):
        self._file = self._tensorboard = None
        self._evaluated = set()
        self._bar = tqdm(disable=True)
        if jax.process_index() != 0:
            return
        path = workdir / 'metrics.jsonl'
        kept = _records_up_to(path, first_step)
        self._evaluated = {record['step'] for record in kept if 'eval_loss' in record}
        partial = path.with_suffix('.tmp')
        partial.write_text(''.join(json.dumps(record) + '\n' for record in kept))
        partial.replace(path)
        self._file = path.open('a')
        if config.train.tensorboard:
            # Imported here: it costs a second that a run without it need not pay.
            from tensorboard.summary import Writer

            _drop_later_points(workdir / 'tensorboard', first_step)
            self._tensorboard = Writer(str(workdir / 'tensorboard'))
        self._bar = tqdm(
            total=config.train.steps,
            initial=first_step,
            unit='step',
            file=sys.stderr,
            dynamic_ncols=True,
            disable=not config.train.progress,
            mininterval=0.5,
        )

    def has_evaluation(self, step: int) -> bool:
        """Whether an earlier run of this workdir recorded an evaluation at a step."""
        return step in self._evaluated

    def advance(self, steps: int = 1) -> None:
        self._bar.update(steps)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one record of finite numbers for a step; an evaluation repeated on resuming is not written again."""
        if self._file is None or ('eval_loss' in values and step in self._evaluated):
            return
        try:
            self._file.write(json.dumps({'step': step, **values}) + '\n')
            self._file.flush()
        except OSError as error:
            raise OSError(
                f'{self._file.name} cannot be written ({error.strerror}); make room, then run the same command'
            ) from error
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if 'loss' in values:
            shown = {'loss': f'{values["loss"]:.3f}'}
            if 'tokens_per_second' in values:
                shown['tokens/s'] = f'{values["tokens_per_second"]:,.0f}'
            if 'mfu' in values:
                shown['MFU'] = f'{values["mfu"]:.1%}'
            self._bar.set_postfix(shown, refresh=False)

    def say(self, line: str) -> None:
        """Prints a line above the progress bar."""
        if jax.process_index() == 0:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()
        if self._file is not None:
            with contextlib.suppress(OSError):  # write has said it
                self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None  # it refuses to be closed twice


def _drop_later_points(directory: pathlib.Path, step: int) -> None:
    """Tells TensorBoard to forget what earlier files hold beyond a step, by a second and later mark of a start."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    restart = EventFileWriter(str(directory))
    restart.add_event(Event(step=step + 1, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START)))
    restart.close()


def _records_up_to(path: pathlib.Path, step: int) -> list[dict]:
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed run may be cut
            if (record := json.loads(line))['step'] <= step:
                kept.append(record)
    return kept
