"""What a run reports: rates, losses of a window, and the files and lines it writes."""

import io
import json
import logging
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import small_config

from pallas_kernels import chips
from transxssm_jax import config as config_lib
from transxssm_jax.model import costs
from transxssm_jax.training import health, metrics


class Time:
    """Stands for time.perf_counter."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def now(monkeypatch):
    now = Time()
    monkeypatch.setattr(metrics.time, 'perf_counter', now)
    return now


def test_rates_use_the_analytic_work(now, monkeypatch):
    config, clock = small_config(), metrics.Clock()
    with clock.paused():
        now.now += 1.0
    with clock.input():
        now.now += 0.6
    now.now += 2.4
    rates = metrics.rates(config, steps=6, clock=clock, attended=5.0)  # three seconds of training
    assert rates['tokens_per_second'] == pytest.approx(6 * config.tokens_per_step / 3)
    assert rates['step_seconds'] == pytest.approx(0.5) and rates['input_fraction'] == pytest.approx(0.2)
    work = 6 * config.tokens_per_step * costs.train_flops_per_token(config.model, 5.0)
    assert rates['model_tflops_per_second'] == pytest.approx(work / 3 / jax.device_count() / 1e12)
    assert 'mfu' not in rates and 'mfu_packed_rows' not in rates, 'a CPU has no known peak'
    monkeypatch.setattr(chips, 'peak_flops', lambda kind: 1e12)
    known = metrics.rates(config, 6, clock, 5.0)
    assert known['mfu'] == pytest.approx(rates['model_tflops_per_second'])
    packed = costs.train_flops_per_token(config.model, costs.row_attended(config.data.seq_len))
    assert known['mfu_packed_rows'] / known['mfu'] == pytest.approx(
        packed / costs.train_flops_per_token(config.model, 5.0)
    )


def test_time_in_a_pause_does_not_count(now):
    clock = metrics.Clock()
    now.now += 2.0
    with clock.paused():
        now.now += 5.0
    now.now += 3.0
    assert clock.seconds == 5.0
    clock.restart()
    assert clock.seconds == 0.0


# ---- losses ----------------------------------------------------------------


def step_metrics(loss, tokens=10.0, **others):
    values = dict(loss=loss, tokens=tokens, grad_norm=1.0, update_norm=1.0, param_norm=1.0, learning_rate=0.1) | others
    return jax.tree.map(jnp.float32, values) | {'grad_norms': {'layers': {'kernel': jnp.ones((1, 2))}}}


def test_the_loss_of_a_record_is_the_mean_over_its_window():
    pending = metrics.PendingMetrics()
    pending.push(1, step_metrics(4.0))
    pending.push(2, step_metrics(2.0, tokens=30.0, grad_norm=5.0))
    record = pending.record()
    assert record['loss'] == pytest.approx((4.0 * 10 + 2.0 * 30) / 40) and record['grad_norm'] == 5.0
    assert 'tokens' not in record and 'grad_norms' not in record
    pending.push(3, step_metrics(1.0))
    pending.flush()
    assert pending.record()['loss'] == 1.0, 'a new window'


def test_a_step_is_checked_when_the_next_one_comes_and_at_a_flush():
    pending = metrics.PendingMetrics()
    bad = step_metrics(float('nan'))
    bad['grad_norms']['layers']['kernel'] = jnp.array([[1.0, jnp.inf]])
    pending.push(7, bad)
    with pytest.raises(health.NotFiniteError, match=r'step 7 is not finite: loss nan.*layers/kernel\[\[0, 1\]\]'):
        pending.push(8, step_metrics(1.0))
    pending.push(9, step_metrics(1.0, update_norm=float('inf')))
    with pytest.raises(
        health.NotFiniteError, match='step 9 is not finite: loss 1,.*update norm inf.*not finite .*: none'
    ):
        pending.flush()


class OnDevice:
    """A scalar whose copy to the host is noted in `calls`, as is when it is read."""

    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def copy_to_host_async(self):
        self.calls.append(('copied', self.name))

    def __array__(self, dtype=None, copy=None):
        self.calls.append(('read', self.name))
        return np.asarray(1.0, dtype)


def test_copies_to_the_host_are_asked_for_before_the_next_step_is_given_out():
    calls, pending = [], metrics.PendingMetrics()
    names = ('loss', 'tokens', 'grad_norm', 'update_norm', 'param_norm', 'learning_rate')
    pending.push(1, {name: OnDevice(name, calls) for name in (*names, 'grad_norms')})
    assert sorted(calls) == sorted(('copied', name) for name in names)
    pending.push(2, step_metrics(1.0))
    assert ('read', 'loss') in calls and ('read', 'grad_norms') not in calls


# ---- files -----------------------------------------------------------------


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_that_are_no_records_are_dropped_and_counted(tmp_path, caplog):
    path = tmp_path / 'metrics.jsonl'
    damaged = [
        b'\xff\xfe{"step": 1}',
        b'5',
        b'null',
        b'{}',
        b'[1]',
        b'"text"',
        b'{"step": "2"}',
        b'{"step": true}',
        b'{"ste',
    ]
    path.write_bytes(b'\n'.join([b'{"step": 1, "loss": 2.0}', *damaged[:5], b'{"step": 2, "loss": 1.0}', *damaged[5:]]))
    with caplog.at_level(logging.WARNING):
        records = metrics.JsonLines(path, first_step=2)
    records.write(3, {'loss': 0.5})
    records.close()
    assert [(record['step'], record['loss']) for record in read(path)] == [(1, 2.0), (2, 1.0), (3, 0.5)]
    assert caplog.messages == [f'{path}: dropped 9 lines that are not records']


@pytest.mark.parametrize('name', ['metrics.tmp', 'metrics.jsonl'])
def test_a_full_disk_is_reported_with_the_name_of_the_file(tmp_path, name):
    (tmp_path / name).symlink_to('/dev/full')
    if name == 'metrics.tmp':
        (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\n')
        with pytest.raises(OSError, match=f'^{tmp_path / name} cannot be written .No space left on device.; make room'):
            metrics.JsonLines(tmp_path / 'metrics.jsonl', first_step=2)
        return
    records = metrics.JsonLines(tmp_path / 'other.jsonl', first_step=0)
    records.close()
    records._path, records._file = tmp_path / name, (tmp_path / name).open('a')
    with pytest.raises(OSError, match=f'^{tmp_path / name} cannot be written .No space left on device.; make room'):
        records.write(1, {'loss': 1.0})


def test_the_seconds_of_earlier_starts_are_known(tmp_path):
    config = small_config(train_tensorboard=False)
    for first_step, expected in ((0, 0.0), (1, 2.5), (2, 4.0)):
        writers = metrics.Writers(tmp_path, config, first_step)
        assert writers.seconds_before == expected
        writers.write(first_step + 1, {'loss': 1.0, 'seconds': (2.5, 4.0, 9.0)[first_step]})
        writers.close()


def tensorboard(directory):
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator  # TensorBoard's own

    events = EventAccumulator(str(directory), size_guidance={})
    events.Reload()
    return events


def test_tensorboard_forgets_what_a_killed_run_wrote_beyond_its_checkpoint(tmp_path):
    def write(first_step, steps, value):
        writers = metrics.Writers(tmp_path, small_config(), first_step)
        for step in steps:
            writers.write(step, {'loss': value})
        writers.close()

    write(0, range(1, 10), 1.0)
    write(6, range(7, 9), 2.0)
    values = [
        (e.step, e.tensor_proto.float_val[0]) for e in tensorboard(tmp_path / 'tensorboard').Tensors('train/loss')
    ]
    assert values == [(step, 1.0) for step in range(1, 7)] + [(7, 2.0), (8, 2.0)]
    assert [(record['step'], record['loss']) for record in read(tmp_path / 'metrics.jsonl')] == values


def test_tensorboard_has_groups_the_config_and_its_hyperparameters(tmp_path):
    writers = metrics.Writers(tmp_path, small_config(optimizer_learning_rate=0.5), 0)
    writers.write(1, {'loss': 1.0, 'grad_norm': 2.0, 'mfu': 0.5, 'seconds': 1.0, 'new': 3.0})
    writers.write(1, {'eval_loss': 2.0, 'eval/validation/loss': 2.0})
    writers.close()
    events = tensorboard(tmp_path / 'tensorboard')
    tags = {'train/loss', 'optimizer/grad_norm', 'speed/mfu', 'run/seconds', 'other/new', 'eval/validation/loss'}
    assert tags < set(events.Tags()['tensors']) and 'eval_loss' not in events.Tags()['tensors']
    (text,) = events.Tensors('config')
    assert '"learning_rate": 0.5' in text.tensor_proto.string_val[0].decode()
    from tensorboard.plugins.hparams import metadata

    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    hparams = metadata.parse_session_start_info_plugin_data(content).hparams
    assert hparams['optimizer.learning_rate'].number_value == 0.5 and hparams['model.dtype'].string_value == 'float32'
    assert hparams.keys() == config_lib.flatten(config_lib.Config()).keys()


# ---- progress --------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


RECORD = {'loss': 3.21449, 'tokens_per_second': 75000.4, 'mfu': 0.6012, 'step_seconds': 0.5}


@pytest.mark.parametrize(
    'stderr, progress', [(io.StringIO, True), (Terminal, False)], ids=['no terminal', 'no progress']
)
def test_without_a_bar_each_record_is_a_line(monkeypatch, capsys, stderr, progress):
    monkeypatch.setattr(sys, 'stderr', stderr())
    shown = metrics.Progress(small_config(train_steps=260, train_progress=progress), first_step=0)
    for _ in range(20):
        shown.advance()
    shown.show(20, RECORD)
    shown.show(1, {'loss': 5.0})
    shown.close()
    assert sys.stderr.getvalue() == ''
    assert capsys.readouterr().out.splitlines() == [
        'step 20 of 260: loss 3.214, tokens/s 75,000, MFU 60.1%, time left 0:02:00',
        'step 1 of 260: loss 5.000',
    ]


def test_a_terminal_has_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'stderr', Terminal())
    shown = metrics.Progress(small_config(train_steps=260), first_step=0)
    shown.show(1, RECORD)
    shown.advance()
    shown.close()
    assert capsys.readouterr().out == ''
    assert '1/260' in sys.stderr.getvalue() and 'MFU=60.1%' in sys.stderr.getvalue()


@pytest.mark.parametrize(
    'platform, kind, line',
    [
        ('gpu', 'NVIDIA H200 NVL', ''),
        ('gpu', 'NVIDIA L40S', "no MFU: the peak of 'NVIDIA L40S' is not known"),
        ('cpu', 'cpu', ''),
    ],
)
def test_an_unknown_card_has_no_mfu_and_a_line_about_it(platform, kind, line):
    found = metrics.missing_mfu(types.SimpleNamespace(platform=platform, device_kind=kind))
    assert found.startswith(line) and bool(found) == bool(line)


def test_sources_count_by_their_weight():
    """Half of the rows are of documents of 10 tokens, whatever their share of the data."""
    sources = [
        types.SimpleNamespace(first_document=0, documents=100),
        types.SimpleNamespace(first_document=100, documents=1),
    ]
    manifest = types.SimpleNamespace(mixture_weights=lambda: [1, 1], sources=sources)
    lengths = np.array([10] * 100 + [10**6])
    short, long = costs.mean_attended(np.array([10]), 64), costs.mean_attended(np.array([10**6]), 64)
    assert metrics.mean_attended(manifest, lengths, 64) == pytest.approx((short + long) / 2)
    manifest.mixture_weights = list
    assert metrics.mean_attended(manifest, lengths, 64) == pytest.approx((1000 * short + 10**6 * long) / (1000 + 10**6))
