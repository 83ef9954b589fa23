"""RUN@best and RUN@latest name a step in every command that takes a trained run."""

import contextlib
import importlib

import pytest
from small import small_config
from test_checkpoint import make_state

from transxssm_jax import config as config_lib
from transxssm_jax.training import checkpoint, digest, run_reference

COMMANDS = {
    'generate': ['--prompt=a'],
    'convert': ['export', '--output=new'],
    'replay': [],
    'evals.harness': ['--tasks=arc_easy'],
    'evals.needle': ['--haystack=book.txt'],
    'evals.perplexity': [],
}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A workdir with checkpoints of steps 3, 6 and 9, of which 6 has the lowest loss; there is nothing of a model in them."""
    workdir = tmp_path_factory.mktemp('run') / 'run'
    config = small_config(train_keep_last=9)
    checkpoints = checkpoint.Checkpoints(workdir, config)
    for step, loss in ((3, 2.0), (6, 1.0), (9, 3.0)):
        checkpoints.save(step, make_state(step), {'next_step': step}, loss)
    checkpoints.close()
    (workdir / 'config.json').write_text(config_lib.to_json(config))
    return workdir


class SeenError(Exception):
    pass


@pytest.mark.parametrize('word, step', [('best', 6), ('latest', 9), ('3', 3)])
@pytest.mark.parametrize('name', COMMANDS)
def test_the_step_is_found(name, word, step, run, monkeypatch, tmp_path, capsys):
    if name == 'evals.harness':
        pytest.importorskip('lm_eval')
    seen = []

    def read_digests(path):
        seen.append(int(path.name))
        raise SeenError

    def read_lines(workdir, first, last):
        seen.append(last)
        raise SeenError

    monkeypatch.setattr(checkpoint.files, 'read_digests', read_digests)
    monkeypatch.setattr(importlib.import_module('transxssm_jax.training.ledger'), 'read_lines', read_lines)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'book.txt').write_text('a text ' * 999)
    words = COMMANDS[name]
    reference = f'--workdir={run}@{word}'
    argv = [*words[:1], reference, *words[1:]] if name == 'convert' else [reference, *words]
    with contextlib.suppress(SeenError):
        importlib.import_module(f'transxssm_jax.{name}').main(argv)
    assert seen and seen[0] == step, (seen, capsys.readouterr())


def test_a_loss_that_is_no_number_is_never_the_best(run):
    path = run / 'checkpoints' / '9' / 'metrics.json'
    before = path.read_bytes()
    digest.write_json(path, {'eval_loss': float('nan')})
    assert run_reference.resolve(f'{run}@best') == (run, 6)
    path.write_bytes(before)
