"""A run goes on over other devices, other axes and other numbers of processes, with the same tokens in the same steps."""

import json
import re

import jax
import pytest
from process_fixtures import start_all
from small import small_config
from train_fixtures import arguments, losses, prepare_bytes, train, write_config

from transxssm_jax import replay
from transxssm_jax.config import replace
from transxssm_jax.parallel import mesh
from transxssm_jax.training import compilation, elastic, ledger

# ---- microbatches ----------------------------------------------------------------


def keep(devices, position, accumulation=2, batch=48, before=None, **axes):
    config = small_config(train_accumulation_steps=accumulation, data_global_batch=batch, **axes)
    before = config if before is None else small_config(train_accumulation_steps=before, data_global_batch=batch)
    return elastic.keep_batch(config, mesh.build(config, jax.devices()[:devices]), before, position)


@pytest.mark.parametrize(
    'was, microbatches, now, expected',
    [(8, 2, 4, 4), (8, 2, 2, 8), (8, 2, 1, 16), (8, 1, 3, 4), (4, 4, 8, 2), (1, 12, 8, 2), (8, 2, 6, 4), (8, 6, 4, 12)],
)
def test_a_device_has_no_more_rows_of_a_microbatch_than_before(was, microbatches, now, expected):
    config, [line] = keep(now, {'data_shards': was, 'accumulation_steps': microbatches}, 1 if now in (3, 6) else 2)
    assert config.train.accumulation_steps == expected and config.data.global_batch == 48
    assert 48 // (now * expected) <= 48 // (was * microbatches) and 48 % (now * expected) == 0
    assert line.startswith(
        f'{was} data shards before, {now} now: the global batch stays 48 rows, in train.accumulation'
    )


def test_what_is_given_or_left_open_stays():
    position = {'data_shards': 8, 'accumulation_steps': 2}
    assert keep(8, position)[1] == []
    assert keep(4, {})[1] == [], 'a checkpoint of an earlier version does not tell'
    config, [line] = keep(4, position, accumulation=0)
    assert config.train.accumulation_steps == 0 and line.endswith('is chosen for the memory of the devices')
    config, [line] = keep(4, position, accumulation=3, before=2)
    assert config.train.accumulation_steps == 3 and line.endswith('train.accumulation_steps=3 as given')
    config, lines = keep(4, position, mesh_data=4)
    assert config.train.accumulation_steps == 2 and lines == []
    config, [line] = keep(4, position, mesh_fsdp=2)
    assert config.train.accumulation_steps == 4, 'rows are split over fsdp too'
    assert replace(config, {}) == config


# ---- runs ------------------------------------------------------------------------


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp('run')
    return write_config(directory, prepare_bytes(directory))


SETTINGS = dict(data__global_batch=16, train__eval_every_steps=0, train__checkpoint_every_steps=2, train__keep_last=3)


def batches(workdir, process=0):
    lines = map(json.loads, (workdir / 'ledger' / f'process-{process}.jsonl').read_text().splitlines())
    return {line['step']: (line['batch'], line['rows']) for line in lines}


@pytest.fixture(scope='module')
def eight(config, tmp_path_factory):
    """A run of eight devices to its end."""
    workdir = tmp_path_factory.mktemp('eight') / 'run'
    result = train(config, workdir, **SETTINGS, train__steps=12, train__accumulation_steps=1)
    assert result.code == 0, result
    return workdir


def on(devices, monkeypatch):
    everything = jax.devices()
    monkeypatch.setattr(jax, 'devices', lambda *args: everything[:devices])
    monkeypatch.setattr(jax, 'device_count', lambda *args: devices)


DATA = [(8, dict(mesh__data=-1)), (4, dict(mesh__data=-1)), (1, dict(mesh__data=-1))]
AXES = [
    (8, dict(mesh__data=1, mesh__fsdp=8)),
    (8, dict(mesh__data=4, mesh__tensor=2)),
    (4, dict(mesh__data=1, mesh__context=4)),
]


@pytest.mark.parametrize(
    'starts', [DATA, pytest.param([*DATA, *AXES], marks=pytest.mark.slow)], ids=['8 4 1', 'then fsdp tensor context']
)
def test_devices_and_axes_may_change_at_every_start(config, eight, tmp_path, monkeypatch, starts):
    workdir, said = tmp_path / 'run', []
    for number, (devices, axes) in enumerate(starts):
        with monkeypatch.context() as patch:
            on(devices, patch)
            steps = dict(train__steps=2 * number + 2, train__accumulation_steps=1)
            result = train(config, workdir, **SETTINGS, **steps, **axes)
        assert result.code == 0, result
        said += re.findall('(?m)^.*data shards before.*$', result.out)
    assert said == [
        '8 data shards before, 4 now: the global batch stays 16 rows, in train.accumulation_steps=2 instead of 1',
        '4 data shards before, 1 now: the global batch stays 16 rows, in train.accumulation_steps=8 instead of 1',
    ]
    taken, wanted = batches(workdir), batches(eight)
    assert taken == {step: wanted[step] for step in range(1, 2 * len(starts) + 1)}, 'token for token'
    assert losses(workdir) == pytest.approx({step: losses(eight)[step] for step in taken}, rel=2e-5)


def start_processes(config, workdir, processes, steps):
    words = arguments(config, workdir, **SETTINGS, train__steps=steps, train__accumulation_steps=1)[1:]
    ends = start_all(['-m', 'transxssm_jax.train', *words], processes, devices=1).finish()
    assert [end.code for end in ends] == [0] * processes, ends
    return ends[0].out


def check_ledger(workdir, processes_of_step):
    """Of every step there is a line of each process that the run then had; together they have read every row once."""
    lines = ledger.read_lines(workdir, 1, len(processes_of_step))
    assert [len(lines[step]) for step in lines] == processes_of_step
    for step, own in lines.items():
        rows = sorted(tuple(span) for line in own for span in line['rows'])
        assert rows[0][0] == 0 and rows[-1][1] == 16
        assert all(left[1] == right[0] for left, right in zip(rows, rows[1:]))
        assert len({line['loss'] for line in own}) == 1, step


@pytest.mark.slow
def test_processes_may_change(config, eight, tmp_path):
    """4 processes -> 2: each reads rows of its own, and together they are those of the run with one."""
    workdir = tmp_path / 'run'
    start_processes(config, workdir, 4, 4)
    out = start_processes(config, workdir, 2, 6)
    assert (
        '4 data shards before, 2 now: the global batch stays 16 rows, in train.accumulation_steps=2 instead of 1' in out
    )
    assert losses(workdir) == pytest.approx({step: loss for step, loss in losses(eight).items() if step <= 6}, rel=2e-5)
    check_ledger(workdir, [4, 4, 4, 4, 2, 2])
    for process in range(2, 4):
        assert batches(workdir, process)[4][1] == [[4 * process, 4 * process + 4]]


def test_a_ledger_of_two_processes_is_replayed_by_one(config, tmp_path, monkeypatch):
    workdir = tmp_path / 'run'
    start_processes(config, workdir, 2, 4)
    check_ledger(workdir, [2] * 4)
    replayed = [f'--workdir={workdir}', '--step=4', '--config.mesh.data=1', '--tolerance=1e-4']
    on(1, monkeypatch)
    made, compile_step = [], compilation.compile_train_step
    monkeypatch.setattr(
        compilation,
        'compile_train_step',
        lambda *args: made[0] if made else made.append(compile_step(*args)) or made[0],
    )
    assert replay.main(replayed) == 0
    path = workdir / 'ledger' / 'process-1.jsonl'
    kept = path.read_text().splitlines(keepends=True)
    path.write_text(''.join([*kept[:3], ledger.sealed(json.loads(kept[3]) | {'batch': '0' * 16})]))
    assert replay.main(replayed) == 4, 'the rows of every process are compared'
    path.write_text(''.join([*kept[:3], kept[3].replace('batch', 'bathc')]))
    assert replay.main(replayed) == 0, 'a damaged line is no line; that of the other process is compared'
