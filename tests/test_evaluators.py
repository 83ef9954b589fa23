"""Evaluation: a fixed sample of the whole split, the same at every evaluation and for every data.seed."""

import json

import numpy as np
import pytest
from small import small_config

from transxssm_jax.data import prepare
from transxssm_jax.parallel import mesh
from transxssm_jax.training import evaluators, splits


@pytest.fixture(scope='module')
def two_halves(tmp_path_factory):
    """A prepared split whose first documents are all 'a' and whose last are all 'b'."""
    directory = tmp_path_factory.mktemp('halves')
    source = directory / 'source.jsonl'
    source.write_text(''.join(json.dumps({'text': letter * 200}) + '\n' for letter in 'ab' for _ in range(60)))
    arguments = ['--split=validation', '--tokenizer=byte', f'--source={source}', '--num_workers=1']
    assert prepare.main([f'--output={directory / "data"}', *arguments]) == 0
    return directory / 'data'


def share_of_a(params, batch):
    """Stands for the model: a target costs 1 nat where it is an 'a'. Only batches decide what the loss is."""
    counted = batch['targets'] >= 0
    return {'nll': np.sum(counted & (batch['targets'] == ord('a'))), 'tokens': counted.sum()}


def evaluate(path, eval_batches, seed=0, **options):
    config = small_config(data_path=str(path), data_seq_len=32, data_seed=seed, train_eval_batches=eval_batches)
    device_mesh = mesh.build(config)

    def open_split():
        return splits.open_eval_split(config, device_mesh, 'validation')

    return evaluators.HeldOutLoss(open_split, share_of_a, max_batches=eval_batches, **options)


def test_a_sample_is_of_the_whole_split(two_halves):
    whole = dict(evaluate(two_halves, 0).run({}))
    assert whole['eval_loss'] == pytest.approx(0.5, abs=0.02), 'every document once'
    sample = dict(evaluate(two_halves, 32).run({}))
    assert sample['eval_loss'] == pytest.approx(whole['eval_loss'], abs=0.1), 'not its first batches, which are all a'
    assert sample['eval_loss'] != whole['eval_loss']


def test_the_sample_is_always_the_same(two_halves):
    first = evaluate(two_halves, 4)
    expected = list(first.run({}))
    assert list(first.run({})) == expected
    assert list(evaluate(two_halves, 4, seed=5).run({})) == expected
    (loss,) = [value for name, value in expected if name == 'eval_loss']
    assert 0.2 < loss < 0.8


def test_every_metric_comes_under_each_prefix(two_halves):
    values = dict(evaluate(two_halves, 1, prefixes=['eval_', 'eval/validation/']).run({}))
    names = ('loss', 'perplexity', 'bits_per_byte')
    assert list(values) == [f'{prefix}{name}' for prefix in ('eval_', 'eval/validation/') for name in names]
    assert values['eval/validation/loss'] == values['eval_loss']


def test_an_evaluation_that_is_told_to_stop_has_no_metrics(two_halves):
    answers = iter([False, True])
    assert list(evaluate(two_halves, 4, should_stop=lambda: next(answers)).run({})) == []
