"""Multi-query associative recall: the rows, the patterns, the training and its command."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transxssm_jax import config as config_lib
from transxssm_jax.cli import ExitCode
from transxssm_jax.config import ConfigError
from transxssm_jax.evals import mqar
from transxssm_jax.model import parameters
from transxssm_jax.model.loss import IGNORED
from transxssm_jax.parallel import mesh
from transxssm_jax.training import step as step_lib

CONFIG = pathlib.Path(__file__).parents[1] / 'configs' / 'recall.py'
TASK = mqar.Task(vocab_size=64, length=32, pairs=4)
SMALL = {
    'data.seq_len': 32,
    'data.global_batch': 8,
    'model.vocab_size': 64,
    'model.d_model': 64,
    'model.num_layers': 2,
    'model.num_heads': 4,
    'model.num_kv_heads': 4,
    'model.num_ssd_groups': 4,
    'model.d_state': 32,
    'model.d_mlp': 64,
    'model.dtype': 'float32',
    'model.init_std': 0.08,
    'optimizer.warmup_steps': 2,
    'optimizer.learning_rate': 3e-3,
    'train.steps': 4,
    'train.eval_every_steps': 2,
    'train.eval_batches': 1,
    'train.progress': False,
}


def small_config(**more):
    return config_lib.load(CONFIG, SMALL | more)


# ---- rows ------------------------------------------------------------------


def test_looking_up_the_pairs_answers_every_query():
    batch = TASK.batch(50, seed=0, stream=mqar.TRAIN, step=1)
    for tokens, targets in zip(batch['tokens'], batch['targets']):
        shown = tokens[:8].reshape(4, 2)
        pairs = dict(shown.tolist())
        assert len(pairs) == 4 and all(1 <= key < 32 <= value < 64 for key, value in pairs.items())
        asked = np.flatnonzero(targets != IGNORED)
        assert sorted(tokens[asked].tolist()) == sorted(pairs) and asked.min() >= 8
        assert [pairs[key] for key in tokens[asked].tolist()] == targets[asked].tolist()
        assert (np.delete(tokens[8:], asked - 8) >= 32).all(), 'no noise looks like a key'
    assert {name: value.dtype.name for name, value in batch.items()} == dict.fromkeys(
        ('tokens', 'targets', 'segment_ids', 'positions'), 'int32'
    )
    assert (batch['positions'] == np.arange(32)).all() and (batch['segment_ids'] == 1).all()


def test_rows_are_a_function_of_seed_stream_and_step():
    def tokens(**changed):
        return TASK.batch(4, **{**dict(seed=3, stream=mqar.TRAIN, step=7), **changed})['tokens']

    assert (tokens() == tokens()).all()
    for changed in (dict(seed=4), dict(stream=mqar.EVAL), dict(step=8)):
        assert (tokens() != tokens(**changed)).any(axis=1).all()


def test_queries_come_early_in_any_order():
    task = mqar.Task(vocab_size=256, length=128, pairs=4)
    batch = task.batch(500, seed=0, stream=mqar.TRAIN, step=0)
    asked = np.nonzero(batch['targets'] != IGNORED)[1].reshape(500, 4)
    assert np.median(asked) < 8 + 120 / 3 and asked.max() > 100
    first = batch['tokens'][np.arange(500), asked[:, 0]]
    position = (batch['tokens'][:, 0:8:2] == first[:, None]).argmax(axis=1)
    assert (np.bincount(position, minlength=4) > 80).all()


@pytest.mark.parametrize(
    'size, message',
    [
        (dict(pairs=0), '--pairs=0 must be at least 1'),
        (dict(pairs=11), r'data.seq_len=32 is too short for --pairs=11, .* try data.seq_len=44 or --pairs=8'),
        (dict(length=512, pairs=40), 'model.vocab_size=64 has 31 keys, fewer than --pairs=40; try model.vocab_size=82'),
    ],
)
def test_a_task_refuses(size, message):
    with pytest.raises(ConfigError, match=message):
        mqar.Task(**{**dict(vocab_size=64, length=32, pairs=4), **size})


# ---- models ----------------------------------------------------------------


def test_patterns_change_only_the_mixers():
    config = small_config()
    changed = {pattern: mqar.with_pattern(config, pattern) for pattern in mqar.PATTERNS}
    assert [changed[pattern].model.layer_pattern for pattern in ('hybrid', 'attention', 'ssd')] == [
        ('ssd', 'attention'),
        ('attention',),
        ('ssd',),
    ]
    for pattern, other in changed.items():
        names = config_lib.differences(config, other)
        assert set(names) == ({'model.pattern'} if pattern != 'hybrid' else set())
    with pytest.raises(ConfigError, match='--pattern=mamba must be one of hybrid, attention, ssd, mamba2'):
        mqar.with_pattern(config, 'mamba')
    with pytest.raises(
        ConfigError, match='--pattern=hybrid needs two kinds of layers, but those of the config are ssd only'
    ):
        mqar.with_pattern(changed['ssd'], 'hybrid')


def test_accuracy_is_of_the_queries():
    config = small_config()
    params = parameters.init_params(config.model, 0)
    batch = TASK.batch(8, seed=0, stream=mqar.EVAL, step=0)
    graph, _ = parameters.split_model(config.model)
    likeliest = np.asarray(
        jax.jit(lambda tokens: jnp.argmax(nnx.merge(graph, params).logits(tokens), axis=-1))(batch['tokens'])
    )
    at = np.nonzero(batch['targets'] != IGNORED)[1].reshape(8, 4)
    # An untrained model predicts none of them: half of the targets are set to its predictions.
    for i in range(8):
        batch['targets'][i, at[i, :2]] = likeliest[i, at[i, :2]]
    expected = (np.take_along_axis(likeliest, at, 1) == np.take_along_axis(batch['targets'], at, 1)).mean()
    assert 0.5 <= expected < 1
    assert float(jax.jit(mqar.accuracy_step(config))(params, batch, at)) == expected
    for sizes in (dict(data=2, fsdp=2, tensor=2), dict(data=2, context=2, tensor=2)):
        changed = config_lib.replace(config, {'mesh.data': 1} | {f'mesh.{name}': size for name, size in sizes.items()})
        with jax.set_mesh(mesh.build(changed)):
            assert float(jax.jit(mqar.accuracy_step(changed))(params, batch, at)) == expected


# ---- the command -----------------------------------------------------------


def command(**settings):
    overrides = [f'--config.{name}={value}' for name, value in SMALL.items()]
    return [f'--config={CONFIG}', *overrides, *(f'--{name}={value}' for name, value in settings.items())]


def test_the_command_trains_and_writes_a_table(tmp_path, capsys):
    output = tmp_path / 'mqar.json'
    assert mqar.main(command(output=output)) == ExitCode.FINISHED
    out = capsys.readouterr().out
    assert '4 pairs in rows of 32 tokens' in out and 'one of the values shown 25.00%' in out
    written = json.loads(output.read_text())
    assert written['task'] == {'vocab_size': 64, 'length': 32, 'pairs': 4, 'alpha': TASK.alpha}
    ((name, result),) = written['results'].items()
    assert (name, result['layers'], result['rows']) == ('hybrid', 'ssd attention', 8)
    assert [point['step'] for point in result['curve']] == [2, 4] and result['steps'] == 4
    assert 0 <= result['accuracy'] < 0.5 and 3 < result['curve'][0]['loss'] < 6
    *_, line, last = out.splitlines()
    assert line.split()[0] == 'hybrid' and line.endswith(f'{result["accuracy"]:.2%}')
    assert last == f'results written to {output}' and len(written['config_digest']) == 64
    assert f'--output={output}' in written['command']
    assert mqar.main(command(output=output)) == ExitCode.WRONG_INPUT and 'exists' in capsys.readouterr().err


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(pattern='hybrid,mamba'), '--pattern=mamba is not one of the choices; did you mean mamba2?'),
        (dict(pairs=20), 'data.seq_len=32 is too short for --pairs=20'),
        (dict(output='/nowhere/mqar.json'), '--output=/nowhere/mqar.json: its directory does not exist'),
        (dict(patern='ssd'), 'unknown flag --patern; did you mean --pattern?'),
    ],
)
def test_wrong_input_is_reported_in_one_line(capsys, settings, message):
    assert mqar.main(command(**settings)) == ExitCode.WRONG_INPUT
    err = capsys.readouterr().err
    assert err.startswith('error: ') and message in err and len(err.splitlines()) == 1


def test_a_loss_that_is_not_finite_ends_the_run(monkeypatch, capsys):
    nan = {'loss': jnp.float32(jnp.nan), 'grad_norm': jnp.float32(1)}
    monkeypatch.setattr(step_lib, 'train_step', lambda config: lambda state, batch: (state, nan))
    assert mqar.main(command()) == ExitCode.NOT_FINITE
    assert capsys.readouterr().err.startswith('error: step 1: loss nan')


@pytest.mark.slow
def test_a_small_hybrid_learns_to_recall(tmp_path):
    # In a process of its own, on one device: the eight of the tests would take turns on the cores.
    more = {
        'data.global_batch': 32,
        'train.steps': 1500,
        'train.eval_every_steps': 250,
        'train.eval_batches': 8,
        'optimizer.warmup_steps': 100,
    }
    environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
    subprocess.run(
        [
            sys.executable,
            '-m',
            'transxssm_jax.evals.mqar',
            *command(output=tmp_path / 'mqar.json'),
            *(f'--config.{name}={value}' for name, value in more.items()),
        ],
        cwd=CONFIG.parents[1],
        env=environment,
        check=True,
    )
    result = json.loads((tmp_path / 'mqar.json').read_text())['results']['hybrid']
    assert result['accuracy'] > 0.99 and result['rows'] == 256
