"""`python -m transxssm_jax.bench`: every mode is measured, and what is reported adds up."""

import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small import small_config
from transxssm_jax import bench
from transxssm_jax import config as config_lib
from transxssm_jax.cli import ExitCode
from transxssm_jax.evals import op_table, speed
from transxssm_jax.model import costs
from transxssm_jax.planning import fitting

TINY = [
    '--config=configs/tiny.py',
    '--config.model.num_layers=8',
    '--config.data.seq_len=64',
    '--config.data.global_batch=8',
]


@pytest.mark.parametrize('mode', speed.MODES)
def test_every_mode_is_measured(mode):
    config = small_config(data_seq_len=64)
    result = speed.measure(speed.Case('config', config, mode, 64, 8, documents=2), calls=2, repeats=3)
    assert result['least_ms'] <= result['ms'] <= result['most_ms']
    tokens = 8 if mode == 'decode' else 8 * 64
    assert result['tokens_per_second'] == pytest.approx(1e3 * tokens / result['ms'])
    if mode in ('train', 'forward'):
        per_token = costs.forward_flops_per_token(config.model, costs.row_attended(32))
        work = per_token * (3 if mode == 'train' else 1)
        assert result['model_tflops_per_second'] == pytest.approx(
            result['tokens_per_second'] * work / result['devices'] / 1e12
        )
        assert result['memory_gib'] > 0 and result['microbatches'] == 1


def test_a_step_that_may_be_skipped_is_measured():
    config = small_config(train_spike_action='skip', train_max_spikes=1)
    result = speed.measure(speed.Case('config', config, 'train', 48, 8), calls=1, repeats=1)
    assert result['ms'] > 0 and 'does_not_fit' not in result


def test_random_rows_hold_documents():
    batch = speed.random_batch(small_config(data_seq_len=50, data_global_batch=2), documents=4)
    assert {name: array.shape for name, array in batch.items()} == dict.fromkeys(batch, (2, 50))
    assert batch['segment_ids'].max() == 4 and (np.diff(batch['segment_ids']) >= 0).all()
    starts = np.diff(batch['segment_ids'], prepend=0) != 0
    assert (batch['positions'][starts] == 0).all() and (np.diff(batch['positions'])[~starts[:, 1:]] == 1).all()


def test_ids_of_random_rows_are_as_frequent_as_words_of_text():
    batch = speed.random_batch(small_config(data_seq_len=5000, data_global_batch=4, model_vocab_size=1024))
    share = np.bincount(batch['tokens'].ravel(), minlength=1024) / batch['tokens'].size
    assert 0.05 < share[0] < 0.08 and 0.0001 < share[512:].mean() < 0.0005


def test_what_does_not_fit_is_a_row_of_its_own(monkeypatch):
    monkeypatch.setattr(fitting, 'usable_bytes', lambda device_mesh: 1000)
    result = speed.measure(speed.Case('config', small_config(), 'train', 48, 8), calls=1, repeats=1)
    assert 'needs' in result['does_not_fit'] and 'ms' not in result
    measured = dict(result, model='attention', ms=1.0, tokens_per_second=10.0)
    del measured['does_not_fit']
    assert '| does not fit |' in speed.markdown_table([result, measured])
    assert speed.ratios([result, measured], 'config', 'attention') == []


def test_ratios_compare_equal_rows_and_devices():
    base = dict(mode='train', length=64, rows=8, devices=1)
    results = [
        dict(base, model='config', tokens_per_second=30.0),
        dict(base, model='attention', tokens_per_second=20.0),
        dict(base, model='config', rows=4, tokens_per_second=99.0),
        dict(base, model='pytorch', tokens_per_second=10.0),
        dict(base, model='config', devices=8, tokens_per_second=200.0),
    ]
    assert speed.ratios(results, 'config', 'attention') == [('train', 64, 1.5)]
    # Eight devices against the one of PyTorch would be no comparison.
    assert speed.ratios(results, 'config', 'pytorch') == [('train', 64, 3.0)]


def test_the_command_writes_its_results(tmp_path, capsys):
    arguments = [*TINY, '--against=attention', '--lengths=32,64', '--tokens=512', '--modes=forward', '--calls=1']
    assert bench.main([*arguments, '--repeats=1', f'--output={tmp_path}']) == ExitCode.FINISHED
    out = capsys.readouterr().out
    assert 'forward, 32 tokens per row: ' in out and 'times the speed of attention' in out
    results = json.loads((tmp_path / 'bench.json').read_text())
    assert results['device'] and results['date'] and 'transxssm_jax.bench' in results['command']
    assert [(r['model'], r['length'], r['rows']) for r in results['results']] == [
        ('config', 32, 16),
        ('attention', 32, 16),
        ('config', 64, 8),
        ('attention', 64, 8),
    ]
    assert speed.markdown_table(results['results']) in (tmp_path / 'bench.md').read_text()
    assert (tmp_path / 'bench.png').stat().st_size > 10_000


def test_the_profile_names_the_ops_of_a_step(tmp_path):
    arguments = [*TINY, '--modes=train,forward', '--calls=1', '--repeats=1', '--profile', f'--output={tmp_path}']
    assert bench.main(arguments) == ExitCode.FINISHED
    train, forward = json.loads((tmp_path / 'bench.json').read_text())['results']
    for result in (train, forward):
        rows = result['ops']
        assert [row['ms'] for row in rows] == sorted((row['ms'] for row in rows), reverse=True)
        assert all(row['ms'] > 0 and row['count'] > 0 for row in rows) and len(rows) == len({row['op'] for row in rows})
        page = (tmp_path / f'config-{result["mode"]}-{result["length"]}.md').read_text()
        assert f'| {rows[0]["op"]} | {rows[0]["kind"]} | ' in page
    counts = [sum(row['count'] for row in result['ops']) for result in (train, forward)]
    assert counts[0] > 2 * counts[1] > 0  # a backward pass has two products for each of the forward pass


@pytest.mark.parametrize(
    'name, kind',
    [
        ('nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNN', 'product'),
        ('dot', 'product'),
        ('loop_dot_product_fusion', 'other'),
        ('ncclDevKernel_AllGather_RING_LL', 'collective'),
        ('all-reduce-start', 'collective'),
        ('input_reduce_fusion', 'other'),
    ],
)
def test_kinds_of_ops(name, kind):
    assert op_table._kind(name) == kind


def test_the_ops_are_of_one_device():
    """On several devices of a CPU, whose ops are in one trace."""
    device_mesh = jax.make_mesh((2,), ('data',))
    x = jax.device_put(jnp.ones((2, 64)), jax.sharding.NamedSharding(device_mesh, jax.sharding.PartitionSpec('data')))
    total = jax.jit(lambda x: jnp.sum(jnp.sin(x)))
    total(x).block_until_ready()
    counts = {row['op']: row['count'] for row in op_table.measure(lambda: total(x), calls=2)}
    assert counts['all-reduce'] == 1


def profile_of(device, line, names):
    """A profile in which each op took 4 ms."""
    events = [types.SimpleNamespace(name=name, duration_ns=4e6) for name in names]
    line = types.SimpleNamespace(name=line, events=events)
    return types.SimpleNamespace(planes=[types.SimpleNamespace(name=device, lines=[line])])


def test_ops_of_other_numbers_are_one_row():
    names = ['loop_add_fusion_12', 'loop_add_fusion.3', 'nvjet_tst_128x256_64x4_h', 'nvjet_tst_64x256_64x4_h']
    rows = op_table._rows(profile_of('/device:GPU:0', 'Stream #13(Compute)', names), calls=2)
    assert {row['op']: (row['count'], row['ms']) for row in rows} == {
        'loop_add_fusion': (1, 4.0),
        'nvjet_tst_128x256_64x4_h': (0.5, 2.0),
        'nvjet_tst_64x256_64x4_h': (0.5, 2.0),
    }
    names = [
        '%fusion.1 = bf16[8,128] fusion(%p.2), kind=kLoop',
        '%while.3 = (s32[]) while(%t.1)',
        '%fusion.2 = f32[] fusion()',
    ]
    rows = op_table._rows(profile_of('/device:TPU:0', 'XLA Ops', names), calls=2)
    assert [(row['op'], row['count'], row['ms']) for row in rows] == [('fusion', 1, 4.0)]


def test_a_profile_is_called_after_its_model():
    names = ['config', 'llama3_1p3b', 'configs/tiny.py', './paper/tiny.py', '/home/me/tiny.py']
    cases = [speed.Case(name, small_config(), 'train', 64, 8) for name in names]
    assert [bench._profile_name(case) for case in cases] == [
        f'{name}-train-64.md' for name in ('config', 'llama3_1p3b', 'configs-tiny', 'paper-tiny', 'home-me-tiny')
    ]


def test_other_configs_beside_it(tmp_path):
    """--against takes configs, to which the settings of the command line apply too."""
    other = tmp_path / 'recurrent.py'
    other.write_text(
        'from transxssm_jax import config as c\n'
        'def get_config():\n'
        '    return c.replace(c.load("configs/tiny.py"), {"model.pattern": "mamba2"})\n'
    )
    flags = bench.COMMAND.parse([*TINY, f'--against={other},attention', '--lengths=32', '--tokens=512'])
    cases = bench.cases(config_lib.from_flags(flags), flags)
    assert [case.model for case in cases] == ['config', str(other), 'attention']
    assert [case.config.model.layer_pattern[0] for case in cases] == ['ssd', 'mamba2', 'attention']
    assert len({case.config.model.d_model for case in cases}) == 1 and {case.rows for case in cases} == {16}


def test_a_chart_places_lengths_by_their_logarithm():
    results = [
        {'model': model, 'mode': mode, 'length': length, 'tokens_per_second': 10.0 * length}
        for model in ('config', 'attention')
        for mode in ('train', 'forward')
        for length in (1024, 8192)
    ]
    chart = speed.chart([*results, {'model': 'config', 'mode': 'decode', 'length': 4096, 'does_not_fit': ''}], 'title')
    assert [(curve.name, curve.color, curve.dash) for curve in chart.curves] == [
        ('config, train', 0, 0),
        ('config, forward', 0, 1),
        ('attention, train', 1, 0),
        ('attention, forward', 1, 1),
    ]
    assert chart.curves[0].points == [(10.0, 10240.0), (13.0, 81920.0)]
    assert chart.x_ticks == ((10.0, '1,024'), (13.0, '8,192'))


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--tokens=100'], '--tokens=100 must be a multiple of --lengths=64'),
        (['--documents_per_row=65'], '--documents_per_row=65 must be at most --lengths=64'),
        (['--peers', '--documents_per_row=2'], '--documents_per_row=2 must be 1 with --peers'),
        (['--profile'], '--profile needs --output'),
        (
            ['--profile', '--output=out', '--modes=prefill,decode'],
            '--profile is of train and forward, not of --modes=prefill,decode',
        ),
        (['--modes=trian'], 'did you mean train?'),
        (['--against=llama3_1p3'], '--against=llama3_1p3: no such file; did you mean llama3_1p3b?'),
    ],
)
def test_wrong_input_is_one_line(flags, message, capsys):
    assert bench.main([*TINY, *flags]) == ExitCode.WRONG_INPUT
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1


# ---- peers in PyTorch --------------------------------------------------------


def test_a_peer_that_cannot_run_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(tmp_path), *sys.path]))
    (tmp_path / 'torch.py').write_text('raise ImportError("no torch here")\n')
    assert bench.main([*TINY, '--peers']) == ExitCode.WRONG_INPUT
    error = capsys.readouterr().err
    assert '--peers needs torch and transformers (no torch here): pip install' in error and error.count('\n') == 1
    (tmp_path / 'torch.py').write_text('')
    (tmp_path / 'transformers.py').write_text('')  # neither has what the model needs
    assert bench.main([*TINY, '--peers']) == ExitCode.WRONG_INPUT
    error = capsys.readouterr().err
    assert '--peers: PyTorch could not run the model (' in error and error.count('\n') == 1


@pytest.mark.torch
def test_the_model_is_measured_in_pytorch_too(tmp_path):
    arguments = [*TINY, '--peers', '--modes=train,forward', '--calls=1', '--repeats=1', f'--output={tmp_path}']
    # In a process of its own, which has one device, as PyTorch has: only equal numbers are compared.
    done = subprocess.run(
        [sys.executable, '-m', 'transxssm_jax.bench', *arguments],
        env=os.environ | {'XLA_FLAGS': ''},
        capture_output=True,
        text=True,
    )
    assert done.returncode == ExitCode.FINISHED, done.stderr
    assert 'times the speed of pytorch' in done.stdout
    results = json.loads((tmp_path / 'bench.json').read_text())['results']
    peers = [r for r in results if r['model'] == 'pytorch']
    assert [r['mode'] for r in peers] == ['train', 'forward'] and all(r['scan'] == 'plain' for r in peers)
    assert all(r['tokens_per_second'] > 0 and r['torch'] for r in peers)
