"""The decoding benchmark: its bytes are those that are there, what does not fit is said, and it runs."""

import json
import pathlib

import jax
import pytest
from train_fixtures import write_config

from transxssm_jax import config as config_lib
from transxssm_jax.evals import decode_speed
from transxssm_jax.evals.decode_speed import Sizes, rows_that_fit, transformer_of
from transxssm_jax.inference.decode import Decoder
from transxssm_jax.model import parameters


@pytest.fixture
def path(tmp_path):
    return write_config(tmp_path, pathlib.Path('nowhere'))


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_counted_bytes_are_those_that_are_held(path):
    config = config_lib.load(path, {'model.dtype': 'bfloat16'})
    for model_config in (config, transformer_of(config)):
        sizes = Sizes.of(model_config.model)
        decoder = Decoder(jax.jit(lambda model=model_config.model: parameters.init_params(model, 0))(), model_config)
        assert nbytes(decoder.empty(3, 64)['caches']) == 3 * (sizes.states + 64 * sizes.cache_per_token)
        assert 0.9 < sizes.weights / nbytes(decoder.weights) <= 1  # vectors are float32
    assert transformer_of(config).model.layer_pattern == ('attention',) and sizes.states == 0


def test_rows_are_as_many_as_fit_for_every_model():
    config = config_lib.load('configs/1p3b.py')
    models = [config.model, transformer_of(config).model]
    assert rows_that_fit(models, 64, 4096, 130e9) == 64
    rows = rows_that_fit(models, 64, 65536, 130e9)
    held = [Sizes.of(model).held(rows, 65536, model) for model in models]
    assert rows % 8 == 0 and 60e9 < max(held) < 130e9
    assert max(Sizes.of(model).held(rows + 8, 65536, model) for model in models) > 130e9
    assert rows_that_fit(models, 64, 65536, 1e9) == 0 and rows_that_fit(models, 3, 4096, 130e9) == 3


def test_both_models_are_measured_in_one_run(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decode_speed, 'bandwidth', lambda: 1e10)
    monkeypatch.setattr(decode_speed, 'memory_of_device', lambda: 1e6)
    arguments = [
        '',
        f'--config={path}',
        '--contexts=64',
        '--batches=4096',
        '--steps=4',
        '--repeats=2',
        f'--out={tmp_path / "lines.json"}',
    ]
    assert decode_speed.main(arguments) == 0
    out = capsys.readouterr().out
    lines = json.loads((tmp_path / 'lines.json').read_text())
    reduced = lines[0]['rows']
    assert '4096 rows of 64 tokens need' in out and f'measured with {reduced} rows' in out and 1 < reduced < 64
    assert [(line['model'], line['rows']) for line in lines] == [('config', reduced), ('transformer', reduced)]
    assert all(0 < line['least'] <= line['ms'] <= line['most'] for line in lines)
    assert f'64 tokens, {reduced} rows: {lines[1]["ms"] / lines[0]["ms"]:.2f}x the Transformer' in out


@pytest.mark.parametrize(
    'flag, message',
    [
        ('--contexts=4k', '--contexts=4k must be whole'),
        ('--batches=0', '--batches=0 must be whole'),
        ('--models=mamba', '--models=mamba is not one of config, transformer'),
        ('--context=64', 'context'),
        ('--contexts=64', 'must be above --steps=32'),
    ],
)
def test_wrong_input_gets_one_line_and_exit_code_2(path, monkeypatch, capsys, flag, message):
    monkeypatch.setattr(decode_speed, 'bandwidth', lambda: 1e10)
    assert decode_speed.main(['', f'--config={path}', flag]) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and err.count('\n') == 1 and message in err
