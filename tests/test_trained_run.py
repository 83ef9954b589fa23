"""The one way to open a run: what is read, and which tokenizers are refused."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from data_fixtures import run_prepare, train_tokenizer, write_jsonl
from eval_fixtures import save_run

from transxssm_jax.data.manifest import DataError
from transxssm_jax.inference.trained_run import config_digest, open_trained_run
from transxssm_jax.training import checkpoint


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """prepared/ (words), words.json, other.json (another vocabulary of the same size), large.json."""
    folder = tmp_path_factory.mktemp('data')
    texts = ['some text with a few words', 'more words in another text'] * 3
    for name, word in (('words', 'some'), ('other', 'other')):
        train_tokenizer(folder / f'{name}.json', ['<|endoftext|>', f'<|{word}|>'])
    assert (
        run_prepare(folder / 'prepared', write_jsonl(folder / 'text.jsonl', texts), tokenizer=folder / 'words.json')
        == 0
    )
    return folder


@pytest.fixture(scope='module')
def workdir(folder, tmp_path_factory):
    return save_run(tmp_path_factory.mktemp('run') / 'run', data_path=str(folder / 'prepared'), model_vocab_size=1024)


def test_a_run_is_read_with_what_identifies_it(workdir, folder, capsys):
    run = open_trained_run(workdir)
    params, config = checkpoint.load_trained(workdir)
    assert (run.workdir, run.step, run.config, run.mesh) == (str(workdir), 3, config, None)
    jax.tree.map(np.testing.assert_array_equal, run.params, params)
    assert run.tokenizer.describe()['sha256'] and run.config_digest == config_digest(config)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, norm_epsilon=1e-3))
    assert len(run.config_digest) == 64 and config_digest(other) != run.config_digest
    # The tokenizer of the training data by another path is the same one.
    open_trained_run(workdir, tokenizer=str(folder / 'words.json'))
    assert capsys.readouterr().err == ''


def test_parameters_are_read_in_shards_of_the_mesh(workdir):
    run = open_trained_run(workdir, overrides={'mesh.data': '2', 'mesh.tensor': '2'})
    assert dict(run.mesh.shape)['tensor'] == 2
    with run.on_devices():
        assert jax.sharding.get_mesh() == run.mesh
    assert len(run.params['embedding'].sharding.device_set) == 4


@pytest.mark.parametrize(
    'tokenizer, message',
    [
        (
            '{folder}/other.json',
            '--tokenizer={folder}/other.json has another tokenizer than the training data, data.pa',
        ),
        ('byte', '--tokenizer=byte has another tokenizer than the training data'),
        ('{folder}/none.json', 'none.json'),
    ],
)
def test_another_tokenizer_is_refused(workdir, folder, tokenizer, message):
    with pytest.raises(DataError, match=message.format(folder=folder)):
        open_trained_run(workdir, tokenizer=tokenizer.format(folder=folder))


def test_data_that_lies_elsewhere_now_is_named_by_its_setting(workdir, folder, tmp_path, capsys):
    moved = shutil.copytree(checkpoint.load_config(workdir).data.path, tmp_path / 'moved')
    run = open_trained_run(workdir, overrides={'data.path': str(moved)})
    assert run.tokenizer.describe() == open_trained_run(workdir).tokenizer.describe()
    assert capsys.readouterr().err == ''
    with pytest.raises(DataError, match=r'\(--config\.data\.path\)'):
        open_trained_run(workdir, overrides={'data.path': '/nowhere'})


def test_without_the_training_data_the_size_is_checked_and_the_rest_reported(workdir, folder, tmp_path, capsys):
    moved = save_run(tmp_path / 'moved', data_path=str(tmp_path / 'gone'))  # of 264 rows
    with pytest.raises(
        DataError, match=r'gone: .*; that is data.path of the run, whose .* give it with --tokenizer=PATH'
    ):
        open_trained_run(moved)
    elsewhere = save_run(tmp_path / 'elsewhere', data_path='../gone')  # relative to where the run was started
    with pytest.raises(DataError, match=r'PATH, or call this where the run was started, because that path is relative'):
        open_trained_run(elsewhere)
    assert open_trained_run(moved, tokenizer='byte').tokenizer.vocab_size == 257
    err = capsys.readouterr().err
    assert err.startswith('note: --tokenizer=byte has 257 ids, which fit model.vocab_size=264; its digest could not be')
    assert len(err.splitlines()) == 1 and str(tmp_path / 'gone') in err
    with pytest.raises(
        DataError, match=r'words.json has \d+ ids, more than model.vocab_size=264; give the tokenizer of'
    ):
        open_trained_run(moved, tokenizer=str(folder / 'words.json'))
    nameless = save_run(tmp_path / 'nameless')
    with pytest.raises(DataError, match='data.path is empty.; give --data=PATH'):
        open_trained_run(nameless, flag='--data')
