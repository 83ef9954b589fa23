"""The trainer as its user meets it: exit codes, messages, files, and that an interruption changes no number."""

import functools
import math
import re
import shutil
import signal

import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from train_fixtures import (
    arguments,
    before_saving,
    call,
    checkpoint_steps,
    finish,
    losses,
    prepare_bytes,
    records,
    send,
    start_process,
    train,
    write_config,
)

from transxssm_jax import config as config_lib
from transxssm_jax.data import prepare
from transxssm_jax.planning import fitting
from transxssm_jax.training import compilation, loop, stopping


@pytest.fixture(scope='module', autouse=True)
def compile_once():
    """Runs of the same model share their compiled functions; the schedule of the tests' config is constant."""
    made = {}

    def made_once(make, config, device_mesh):
        names = ('train.accumulation_steps', 'train.loss_chunk_tokens', 'data.global_batch', 'data.seq_len')
        key = [
            (name, value)
            for name, value in config_lib.flatten(config).items()
            if name.startswith(('model.', 'optimizer.', 'mesh.')) or name in names
        ]
        key = (make, *key) if config.optimizer.schedule == 'constant' else (make, *key, config.train.steps)
        if key not in made:
            made[key] = make(config, device_mesh)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        for name in ('compile_train_step', 'jit_eval_step'):
            patch.setattr(compilation, name, functools.partial(made_once, getattr(compilation, name)))
        yield


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp('run')
    return write_config(directory, prepare_bytes(directory))


@pytest.fixture(scope='module')
def finished(config, tmp_path_factory):
    """(workdir, Result) of a whole run with everything switched on; tests that change it take a copy."""
    workdir = tmp_path_factory.mktemp('finished') / 'workdir'
    result = train(
        config,
        workdir,
        train__tensorboard=True,
        train__sample_tokens=5,
        train__profile_start_step=2,
        train__profile_steps=2,
    )
    assert result.code == 0, result
    return workdir, result


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / 'copy')


def saved_state(workdir, step):
    import orbax.checkpoint as ocp

    path = workdir / 'checkpoints' / str(step)
    return {name: ocp.StandardCheckpointer().restore(path / name) for name in ('params', 'training')}


def numbers(workdir):
    """What must not depend on interruptions, of every record."""
    names = ('loss', 'grad_norm', 'update_norm', 'param_norm', 'learning_rate', 'eval_loss')
    return [(record['step'], [record.get(name) for name in names]) for record in records(workdir)]


# ---- interruptions ---------------------------------------------------------


def test_killed_twice_equals_never_killed(config, tmp_path):
    whole, killed = arguments(config, tmp_path / 'whole'), arguments(config, tmp_path / 'killed')
    result = finish(start_process(config, ['SIGTERM', 5, killed], ['SIGKILL', 10, killed]))
    assert result.code == -signal.SIGKILL, result
    assert 'stopped at step 5 and saved; the same command goes on from there\nexit code 75\n' in result.out
    assert 'resuming from step 5' in result.out
    assert losses(tmp_path / 'killed').keys() == set(range(1, 11)), (
        'steps beyond the newest checkpoint, to be taken again'
    )

    result = finish(start_process(config, killed, whole))
    assert result.out.count('exit code 0\n') == 2, result
    # The checkpoint of step 8 may or may not have been whole when the signal struck.
    assert re.search('resuming from step [568]\n', result.out), 'steps 5 and 8 are saved, and 6 for its evaluation'
    assert numbers(tmp_path / 'killed') == numbers(tmp_path / 'whole')
    for path, (left, right) in _leaves(saved_state(tmp_path / 'killed', 12), saved_state(tmp_path / 'whole', 12)):
        np.testing.assert_array_equal(left, right, err_msg=path)


def _leaves(left, right, path=''):
    assert (left.keys() if isinstance(left, dict) else None) == (right.keys() if isinstance(right, dict) else None)
    if not isinstance(left, dict):
        yield path, (np.asarray(left), np.asarray(right))
        return
    for name in left:
        yield from _leaves(left[name], right[name], f'{path}/{name}')


@pytest.mark.parametrize(
    'step, name, code',
    [(6, 'SIGINT', 130), (7, 'SIGUSR1', 75)],
    ids=['Ctrl-C where an evaluation is due', 'a signal of a scheduler elsewhere'],
)
def test_a_signal_saves_and_resuming_changes_nothing(config, finished, tmp_path, step, name, code):
    with before_saving(step, send(name)):
        result = train(config, tmp_path / 'workdir')
    assert result.code == code
    assert checkpoint_steps(tmp_path / 'workdir')[-1] == step
    assert train(config, tmp_path / 'workdir').code == 0
    assert numbers(tmp_path / 'workdir') == numbers(finished[0])


def test_a_second_ctrl_c_ends_at_once(config, tmp_path):
    def twice(run):
        send('SIGINT')(run)
        send('SIGINT')(run)

    with before_saving(3, twice):
        result = train(config, tmp_path / 'workdir')
    assert result.code == 130
    assert result.err.startswith('error: interrupted again') and 'Traceback' not in result.err
    assert checkpoint_steps(tmp_path / 'workdir') == []


def test_a_step_that_does_not_fit_ends_before_it_runs(config, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, 'usable_bytes', lambda device_mesh: 1000)
    result = train(config, tmp_path / 'workdir', model__remat='auto')
    assert result.code == 3 and 'GiB per device' in result.err and 'mesh.fsdp' in result.err, result
    assert result.err.count('error: ') == 1 and 'Traceback' not in result.err
    assert checkpoint_steps(tmp_path / 'workdir') == []


def test_nothing_is_saved_before_the_first_step(config, tmp_path):
    stop = stopping.StopRequest()
    stop.request(130)
    settings = {'model.d_mlp': 64}
    assert (
        loop.train(
            config_lib.load(config, settings),
            tmp_path / 'workdir',
            stop,
            sample=None,
            open_weights=None,
            fit=fitting.fit,
        )
        == 130
    )
    assert checkpoint_steps(tmp_path / 'workdir') == []
    result = train(config, tmp_path / 'workdir', train__steps=2, train__eval_every_steps=0)
    assert result.code == 0, 'the mistaken setting binds nobody'


def test_a_killed_loader_process_stops_the_run_and_saves(config, tmp_path, caplog):
    def kill_workers(run):
        workers = [child for child in psutil.Process().children() if 'spawn_main' in ' '.join(child.cmdline())]
        assert len(workers) == 2, workers
        for worker in workers:
            worker.kill()

    settings = dict(data__num_workers=2, train__eval_every_steps=0, train__checkpoint_every_steps=10_000)
    with before_saving(2, kill_workers):
        result = train(config, tmp_path / 'workdir', **settings, train__steps=10_000, train__log_every_steps=10_000)
    assert result.code == 75, result
    (step,) = checkpoint_steps(tmp_path / 'workdir')
    assert f'stopped at step {step} and saved' in result.out and 2 <= step < 10_000
    (message,) = [record.getMessage() for record in caplog.records if record.name == loop.__name__]
    assert 'a loader process (data.num_workers=2) was lost' in message and 'exit code 75' in message
    result = train(config, tmp_path / 'workdir', train__steps=step + 1, train__eval_every_steps=0)
    assert result.code == 0 and f'resuming from step {step}' in result.out


def test_every_evaluation_may_be_the_best(config, tmp_path, monkeypatch):
    """Evaluations and checkpoints never fall on the same step but the last; NaN is never the best."""
    losses_by_step = {3: 2.0, 6: math.nan, 9: 1.5, 12: 1.6, 15: 1.4, 18: math.inf, 20: 3.0}

    class Stub:
        def run(self, params):
            yield 'eval_loss', losses_by_step[step]
            yield 'eval_bits_per_byte', 0.0

    step, saved = 0, []

    def see(run):
        nonlocal step
        step = run.step

    monkeypatch.setattr(loop, 'make_evaluators', lambda run: [Stub()])
    monkeypatch.setattr(loop, 'after_step_callbacks', [see])
    save = loop.checkpoint.Checkpoints.save
    monkeypatch.setattr(
        loop.checkpoint.Checkpoints, 'save', lambda self, at, *rest: saved.append(at) or save(self, at, *rest)
    )
    settings = dict(train__steps=20, train__eval_every_steps=3, train__checkpoint_every_steps=7, train__keep_last=1)
    assert train(config, tmp_path / 'workdir', train__keep_best=2, **settings).code == 0
    assert saved == [3, 7, 9, 12, 14, 15, 20], 'of 6 and 18 none, because they are not finite'
    assert checkpoint_steps(tmp_path / 'workdir') == [9, 15, 20]
    saved.clear()
    assert train(config, tmp_path / 'none', train__keep_best=0, **settings).code == 0
    assert saved == [7, 14, 20]


def damage_records(path):
    content = path.read_bytes()
    path.write_bytes(content[:128] + bytes(len(content) - 256) + content[-128:])


@pytest.mark.parametrize('num_workers', [0, 1])
def test_data_that_cannot_be_read_in_the_midst_costs_no_step(config, tmp_path, num_workers):
    data = shutil.copytree(config.parent / 'prepared', tmp_path / 'data')
    (shard,) = data.glob('documents-train.array_record-*')
    whole, workdir = shard.read_bytes(), tmp_path / 'workdir'
    settings = dict(data__path=data, data__num_workers=num_workers, train__eval_every_steps=0)
    with before_saving(5, lambda run: damage_records(shard)):
        result = train(config, workdir, train__steps=10**6, train__checkpoint_every_steps=10**6, **settings)
    assert result.code == 2 and result.err.count('error: ') == 1, result
    (step,) = checkpoint_steps(workdir)
    assert step >= 5 and f'step {step} is saved, and the same command goes on from there' in result.err
    assert str(shard) in result.err and 'Traceback' not in result.err
    result = train(config, workdir, train__steps=step + 1, **settings)
    assert result.code == 2 and f'the newest checkpoint is of step {step}' in result.err, result
    shard.write_bytes(whole)
    result = train(config, workdir, train__steps=step + 1, **settings)
    assert result.code == 0 and f'resuming from step {step}' in result.out


def test_held_out_data_that_cannot_be_read_costs_no_step(config, tmp_path):
    data = shutil.copytree(config.parent / 'prepared', tmp_path / 'data')
    (shard,) = data.glob('documents-validation.array_record-*')
    with before_saving(6, lambda run: damage_records(shard)):
        result = train(config, tmp_path / 'workdir', data__path=data)
    assert result.code == 2 and str(shard) in result.err and 'step 6 is saved' in result.err, result
    assert checkpoint_steps(tmp_path / 'workdir') == [4, 6]


def test_where_a_state_cannot_be_saved_the_error_says_why(config, tmp_path):
    data, workdir = shutil.copytree(config.parent / 'prepared', tmp_path / 'data'), tmp_path / 'workdir'
    (shard,) = data.glob('documents-validation.array_record-*')

    def spoil(run):
        damage_records(shard)
        run.checkpoints.wait()
        (workdir / 'checkpoints').rename(workdir / 'moved')
        (workdir / 'checkpoints').write_text('in the way')

    with before_saving(6, spoil):
        result = train(config, workdir, data__path=data)
    assert result.code == 2 and result.err.count('error: ') == 1, result
    assert 'step 6 is not saved (a checkpoint could not be written to' in result.err and str(shard) in result.err


def test_a_workdir_that_becomes_unwritable_ends_the_run_in_one_line(config, tmp_path):
    workdir = tmp_path / 'workdir'

    def take_away(run):
        run.checkpoints.wait()
        (workdir / 'checkpoints').rename(workdir / 'moved')
        (workdir / 'checkpoints').write_text('in the way')

    with before_saving(5, take_away):
        result = train(config, workdir)
    assert result.code == 2 and result.err.count('error: ') == 1, result
    assert f'could not be written to {workdir / "checkpoints"}' in result.err and 'Traceback' not in result.err
    assert not (workdir / 'lease.json').exists()
    (workdir / 'checkpoints').unlink()
    (workdir / 'moved').rename(workdir / 'checkpoints')
    result = train(config, workdir)
    assert result.code == 0 and 'resuming from step 4' in result.out, result


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(config, finished, copy, caplog):
    for path in (copy / 'checkpoints' / '12' / 'params').rglob('*'):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    (copy / 'checkpoints' / '14.orbax-checkpoint-tmp-0').mkdir()
    result = train(config, copy)
    assert result.code == 0, result
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith('transxssm_jax')]
    assert any('skipping incomplete checkpoint' in line and '14.orbax' in line for line in warnings), warnings
    assert any('skipping unreadable checkpoint' in line and line.split(':')[0].endswith('12') for line in warnings), (
        warnings
    )
    assert 'resuming from step 8' in result.out
    assert numbers(copy) == numbers(finished[0])
    assert checkpoint_steps(copy) == [8, 12]
    for path, (left, right) in _leaves(saved_state(copy, 12), saved_state(finished[0], 12)):
        np.testing.assert_array_equal(left, right, err_msg=path)


def test_a_finished_run_says_so(config, finished, copy):
    before = (copy / 'metrics.jsonl').read_text()
    result = train(config, copy)
    assert result.code == 0
    assert 'already finished: step 12 of train.steps=12; raise it to go on' in result.out
    assert result.out.splitlines()[-1] == finished[1].out.splitlines()[-1]
    assert (copy / 'metrics.jsonl').read_text() == before


def test_a_resumed_run_may_change_its_mesh(config, finished, copy, tmp_path):
    same = shutil.copytree(copy, tmp_path / 'same')
    assert train(config, same, train__steps=16).code == 0
    result = train(config, copy, train__steps=16, mesh__data=1, mesh__fsdp=4, mesh__tensor=2)
    assert result.code == 0, result
    assert '  train.steps 12 -> 16' in result.out and '  mesh.fsdp 1 -> 4' in result.out
    assert 'resuming from step 12' in result.out and 'data 1 x fsdp 4 x context 1 x tensor 2' in result.out
    assert losses(copy).keys() == set(range(1, 17))
    for step, loss in losses(same).items():
        assert losses(copy)[step] == pytest.approx(loss, rel=1e-5), step


# ---- what a run leaves -----------------------------------------------------


def test_metrics_hold_every_step_once(finished):
    training = [record for record in records(finished[0]) if 'loss' in record]
    evaluations = [record for record in records(finished[0]) if 'eval_loss' in record]
    assert [record['step'] for record in training] == list(range(1, 13))
    assert [record['step'] for record in evaluations] == [6, 12]
    for record in training:
        assert all(math.isfinite(value) for value in record.values())
        assert record['perplexity'] == pytest.approx(math.exp(record['loss']))
        # One token per byte, and the eos of 60 documents: 3,435 tokens of 3,375 bytes.
        assert record['bits_per_byte'] == pytest.approx(record['loss'] / math.log(2) * 3435 / 3375)
        assert record['host_memory_gib'] > 0.05 and record['grad_norm'] > 0
    assert [record['tokens'] for record in training] == [256 * step for step in range(1, 13)]
    assert [record['seconds'] for record in training] == sorted(record['seconds'] for record in training)
    for record in training[1:]:
        assert record['tokens_per_second'] == pytest.approx(256 / record['step_seconds'])
        assert 0 <= record['input_fraction'] < 1 and record['model_tflops_per_second'] > 0
    assert 'tokens_per_second' not in training[0], 'the first step is compilation'
    assert [record['learning_rate'] for record in training[:4]] == pytest.approx([0, 5e-3, 1e-2, 1e-2])
    assert training[0]['loss'] == pytest.approx(math.log(264), abs=0.3)
    assert training[-1]['loss'] < training[0]['loss'] - 2
    assert abs(evaluations[-1]['eval_loss'] - training[-1]['loss']) < 0.3


def test_the_last_line_is_the_evaluation(finished):
    last = [record for record in records(finished[0]) if 'eval_loss' in record][-1]
    assert finished[1].out.splitlines()[-1] == (
        f'finished at step 12: evaluation loss {last["eval_loss"]:.4f} nats a token, '
        f'{last["eval_bits_per_byte"]:.4f} bits a byte'
    )
    assert 'step 6: evaluation loss' in finished[1].out
    assert finished[1].err == ''


def test_the_announcement_names_what_differs_from_the_defaults(config, finished):
    lines = finished[1].out.splitlines()
    assert '  optimizer.warmup_steps = 2 (default 1000)' in lines
    assert not any(line.startswith('  model.tie_embeddings') for line in lines)
    [first] = [i for i, line in enumerate(lines) if line.startswith('devices ')]
    assert lines[first] == 'devices     8 x cpu as data 8 x fsdp 1 x context 1 x tensor 1'
    [total] = [line.split()[-1] for line in lines if line.startswith('parameters ')]
    table = [line.split() for line in lines[first + 2 :] if line.startswith('  ') and line.endswith('%')]
    assert sum(int(words[-2].replace(',', '')) for words in table) == int(total.replace(',', ''))
    assert any(line.startswith('training    12 steps of 256 tokens (8 rows of 32): 3,072 tokens, ') for line in lines)
    assert f'workdir     {finished[0]}' in lines and any('a step needs 0.0 of ' in line for line in lines)
    saved = config_lib.from_json((finished[0] / 'config.json').read_text())
    assert config_lib.differences(saved, config_lib.load(config)).keys() == {
        'train.tensorboard',
        'train.sample_tokens',
        'train.profile_start_step',
        'train.profile_steps',
    }


def test_tensorboard_holds_the_same_numbers(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0] / 'tensorboard'), size_guidance={'tensors': 0})
    events.Reload()
    values = {}
    for name in ('train/loss', 'eval/validation/loss'):
        assert name in events.Tags()['tensors'] + events.Tags()['scalars']
        if name in events.Tags()['scalars']:
            values[name] = {event.step: event.value for event in events.Scalars(name)}
        else:
            values[name] = {event.step: event.tensor_proto.float_val[0] for event in events.Tensors(name)}
    assert values['train/loss'] == pytest.approx(losses(finished[0]), rel=1e-6)
    assert values['eval/validation/loss'].keys() == {6, 12}


def test_each_record_is_a_line_where_there_is_no_terminal(finished):
    lines = [line for line in finished[1].out.splitlines() if line.startswith('step ') and 'loss' in line]
    lines = [line for line in lines if 'evaluation' not in line]
    assert [line.split(':')[0] for line in lines] == [f'step {step} of 12' for step in range(1, 13)]
    assert 'tokens/s' in lines[1] and 'time left 0:00:00' in lines[-1]


def test_a_record_holds_the_mean_since_the_last_one(config, finished, tmp_path):
    result = train(config, tmp_path / 'workdir', train__log_every_steps=4, train__eval_every_steps=0)
    assert result.code == 0
    every, window = losses(finished[0]), losses(tmp_path / 'workdir')
    assert window.keys() == {4, 8, 12}
    for last, loss in window.items():
        # Rows have as many targets, but for the ends of documents.
        assert loss == pytest.approx(np.mean([every[step] for step in range(last - 3, last + 1)]), rel=0.02), last


def test_several_splits_are_evaluated(config, tmp_path):
    splits = 'validation, train'
    result = train(config, tmp_path / 'workdir', data__eval_splits=splits, train__eval_batches=0, train__steps=6)
    assert result.code == 0, result
    (record,) = [record for record in records(tmp_path / 'workdir') if 'eval_loss' in record]
    assert record['eval/validation/loss'] == record['eval_loss'] != record['eval/train/loss']
    assert math.isfinite(record['eval/train/bits_per_byte'])
    assert result.out.splitlines()[-1].startswith(f'finished at step 6: evaluation loss {record["eval_loss"]:.4f} nats')


def test_the_profiler_window_leaves_a_trace(finished):
    assert [path for path in (finished[0] / 'profile').rglob('*.xplane.pb') if path.stat().st_size]
    assert 'profile written to' in finished[1].out


def test_a_sample_is_printed_at_the_end(finished):
    lines = finished[1].out.splitlines()
    start = lines.index('--- a sampled continuation ---')
    assert '---' in lines[start + 1 :]


def test_accumulation(config, tmp_path):
    # That it changes no number is tested in test_step.py.
    result = train(
        config,
        tmp_path / 'workdir',
        data__global_batch=16,
        train__accumulation_steps=2,
        train__steps=8,
        train__eval_every_steps=0,
    )
    assert result.code == 0 and '8 steps of 512 tokens (16 rows of 32): 4,096 tokens' in result.out, result
    got = losses(tmp_path / 'workdir')
    assert got[1] == pytest.approx(math.log(264), abs=0.3) and got[8] < got[1] - 1
    last = records(tmp_path / 'workdir')[-1]
    assert last['tokens_per_second'] == pytest.approx(512 / last['step_seconds'])


# ---- what goes wrong -------------------------------------------------------


def test_a_step_that_blows_up_is_not_saved(config, tmp_path):
    # The schedule starts from 0, so that step 2 is the first to move; its loss is still finite.
    settings = dict(train__checkpoint_every_steps=1, train__eval_every_steps=0, train__steps=3)
    result = train(config, tmp_path / 'workdir', **settings, optimizer__learning_rate=1e30)
    assert result.code == 3, result
    assert result.err.startswith('error: step 2 is not finite: loss 5.') and result.err.count('\n') == 1
    assert 'update norm inf' in result.err and 'gradient norm' in result.err and 'parameter norm' in result.err
    assert checkpoint_steps(tmp_path / 'workdir') == [1]
    result = train(config, tmp_path / 'workdir', **settings)
    assert result.code == 0 and 'resuming from step 1' in result.out


def test_a_loss_that_is_not_finite_names_the_step_and_the_norms(config, tmp_path):
    def poison(run):
        weight = run.state['params']['layers']['ssd']['mlp']['in_proj']['up']['kernel']
        run.state['params']['layers']['ssd']['mlp']['in_proj']['up']['kernel'] = weight.at[0, 0, 3].set(jnp.nan)

    with before_saving(6, poison):
        result = train(config, tmp_path / 'workdir', train__eval_every_steps=0)
    assert result.code == 3, result
    assert result.err.startswith('error: step 7 is not finite: loss nan') and result.err.count('\n') == 1
    assert 'layers/ssd/mlp/in_proj/up/kernel[[0, 0]]' in result.err
    assert checkpoint_steps(tmp_path / 'workdir') == [4]


def refused(result, *parts):
    assert result.code == 2, result
    assert result.err.startswith('error: ') and result.err.count('\n') == 1, result.err
    for part in parts:
        assert str(part) in result.err, result.err


def settings_id(settings):
    return ','.join(f'{name.replace("__", ".")}={value}' for name, value in settings.items())


@pytest.mark.parametrize(
    'settings, parts',
    [
        (dict(data__path=''), ['data.path is empty', 'transxssm_jax.data.prepare']),
        (dict(data__path='/nowhere'), ['/nowhere', 'transxssm_jax.data.prepare']),
        (dict(data__global_batch=12), ['data.global_batch=12 must be divisible by 8 data shards; try 8 or 16']),
        (dict(data__global_batch=160), ['one batch of 160', 'data.global_batch']),
        (dict(data__global_batch=16_000_000), ['one batch of 16000000; lower data.global_batch to at most']),
        (dict(data__global_batch=1_000_000_000), ['data.global_batch=1000000000 must be at most']),
        (dict(model__vocab_size=128), ['257', 'vocab_size=128']),
        (dict(data__train_split='tain'), ["no split 'tain'", 'train']),
        (dict(data__eval_splits='test'), ["no split 'test'", 'validation']),
        (dict(model__d_modle=4), ['unknown setting model.d_modle; did you mean model.d_model?']),
        (dict(train__steps='many'), ["train.steps='many' must be int"]),
        (dict(optimizer__warmup_steps=50), ['optimizer.warmup_steps', 'train.steps=12']),
        (
            dict(model__ssd_implementation='fastest'),
            ['model.ssd_implementation', "implementation='fastest' is unknown", 'xla'],
        ),
        (dict(mesh__data=3), ['must multiply to the 8 devices']),
    ],
    ids=lambda value: settings_id(value) if isinstance(value, dict) else '',
)
def test_wrong_settings_are_refused_in_one_line(config, tmp_path, settings, parts):
    refused(train(config, tmp_path / 'workdir', **settings), *parts)


def test_a_setting_that_was_refused_does_not_bind_the_workdir(config, tmp_path):
    refused(train(config, tmp_path / 'workdir', data__train_split='tain'))
    assert train(config, tmp_path / 'workdir', train__steps=2, train__eval_every_steps=0).code == 0


def test_missing_arguments_are_refused(config, tmp_path):
    refused(call(['train', f'--workdir={tmp_path}']), '--config=PATH is missing')
    refused(call(['train', f'--config={config}']), '--workdir is missing, e.g. --workdir=runs/a')
    refused(call(arguments(config.parent / 'smal.py', tmp_path)), 'no such file; did you mean', 'small.py')
    refused(call([*arguments(config, tmp_path), 'train.steps=3']), 'unexpected argument train.steps=3')
    refused(
        call(['train', f'--config={config}', f'--wrkdir={tmp_path}']), 'unknown flag --wrkdir; did you mean --workdir?'
    )


def test_help_lists_every_setting():
    result = call(['train', '--help'])
    assert result.code == 0
    for name in config_lib.flatten(config_lib.Config()):
        assert f'--config.{name}=' in result.out


def test_an_empty_data_directory_is_refused(config, tmp_path):
    (tmp_path / 'empty').mkdir()
    refused(
        train(config, tmp_path / 'workdir', data__path=tmp_path / 'empty'), 'holds no prepared data', tmp_path / 'empty'
    )


@pytest.mark.parametrize('damage', ['cut', 'overwritten', 'gone'])
def test_a_corrupt_shard_is_named(config, tmp_path, damage):
    data = shutil.copytree(config.parent / 'prepared', tmp_path / 'data')
    (shard,) = data.glob('documents-train.array_record-*')
    content = shard.read_bytes()
    if damage == 'gone':
        shard.unlink()
    else:
        shard.write_bytes(content[:-100] if damage == 'cut' else bytes(len(content)))
    refused(train(config, tmp_path / 'workdir', data__path=data), shard, 'corrupt')


def test_a_workdir_of_another_config_is_refused(config, finished, copy):
    before = (copy / 'config.json').read_text()
    refused(train(config, copy, model__d_mlp=64), 'model.d_mlp is 32 in the checkpoint and 64 in this config', copy)
    refused(train(config, copy, data__seed=5, train__seed=1), 'data.seed is 0', '(and 1 more)')
    assert (copy / 'config.json').read_text() == before, 'a refused run leaves the workdir as it was'


def test_replaced_data_is_refused(config, copy, tmp_path):
    data = config.parent / 'prepared'
    shutil.move(data, tmp_path / 'kept')
    try:
        # The same text from another place is the same data.
        (tmp_path / 'again').mkdir()
        shutil.copytree(prepare_bytes(tmp_path / 'again'), data)
        assert train(config, copy, train__steps=13).code == 0
        shutil.rmtree(data)
        source = tmp_path / 'again/train.jsonl'
        source.write_text(source.read_text().replace('make', 'give'))
        for split in ('train', 'validation'):
            flags = [
                f'--output={data}',
                f'--split={split}',
                '--tokenizer=byte',
                f'--source={source}',
                '--num_workers=1',
            ]
            assert prepare.main(flags) == 0
        refused(train(config, copy, train__steps=14), f'data.path={data}', 'not what the run')
    finally:
        shutil.rmtree(data, ignore_errors=True)
        shutil.move(tmp_path / 'kept', data)


def test_a_workdir_that_cannot_be_made_is_refused(config, tmp_path):
    (tmp_path / 'file').write_text('')
    refused(train(config, tmp_path / 'file' / 'workdir'), tmp_path / 'file' / 'workdir', 'cannot be written')


def test_a_damaged_saved_config_is_named(config, copy):
    (copy / 'config.json').write_text('{"model": ')
    refused(train(config, copy), copy / 'config.json')


def test_a_process_ends_with_the_exit_code_and_without_a_traceback(config, tmp_path):
    result = finish(start_process(config, arguments(config, tmp_path / 'workdir', data__path='/nowhere')))
    refused(result._replace(err=result.err[result.err.index('error: ') :]), '/nowhere')
    assert 'Traceback' not in result.err


def test_a_full_disk_while_saving_leaves_the_last_checkpoint(config, copy):
    command = arguments(config, copy, train__steps=16, train__checkpoint_every_steps=2)
    # TensorStore puts as many arrays into a file as it happens to have at once: the embedding alone is larger than this.
    result = finish(start_process(config, ['file size', 24_000, command]))
    assert 'exit code 2\n' in result.out and result.code == 0, result
    errors = [line for line in result.err.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1 and str(copy / 'checkpoints') in errors[0], result.err
    assert 'could not be written' in errors[0] and 'stays usable' in errors[0]
    assert 'Traceback' not in result.err
    result = train(config, copy, train__steps=14)
    assert result.code == 0 and 'resuming from step 12' in result.out, result
