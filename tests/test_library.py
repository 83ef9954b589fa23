"""What a notebook calls: the page's program as it stands there, and that it is the command's training."""

import asyncio
import concurrent.futures
import pathlib
import re

import jax
import numpy as np
import pytest
import train_fixtures
from jax.experimental.compilation_cache import compilation_cache
from small import packed_batch, small_config

import transxssm_jax as tx
from transxssm_jax.training.checkpoint_files import CheckpointError

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope='module')
def compiled_once(tmp_path_factory):
    """Trainers of one config compile the same step."""
    values = {
        'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('compiled')),
        'jax_persistent_cache_min_compile_time_secs': 0,
        'jax_persistent_cache_min_entry_size_bytes': -1,
    }
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_the_page_runs_and_is_short(monkeypatch, capsys):
    matplotlib = pytest.importorskip('matplotlib', reason='needs pip install -e .[eval]')
    matplotlib.use('Agg')
    [program] = re.findall(r'```python\n(.*?)```', (ROOT / 'docs' / 'library.md').read_text(), re.DOTALL)
    code = [line for line in program.splitlines() if line and not line.startswith('#')]
    assert len(code) <= 30
    made = {}
    exec(compile(program, 'docs/library.md', 'exec'), made)
    assert len(made['losses']) == 20 and made['losses'][19] < made['losses'][0] - 0.5
    assert (made['trainer'].step, made['again'].step, made['mamba'].step) == (15, 20, 20)
    out = capsys.readouterr().out
    assert "'embedding': 36864" in out and "'bits_per_byte'" in out and '\ndef ' in out


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp('library')
    return train_fixtures.write_config(directory, train_fixtures.prepare_bytes(directory))


def losses(trainer, steps=0):
    return {metrics['step']: metrics['loss'] for metrics in trainer.train(steps)}


def test_it_is_the_commands_training_and_each_goes_on_with_the_other(config, tmp_path):
    by_command = tmp_path / 'command'
    assert train_fixtures.train(config, by_command).code == 0
    wanted = train_fixtures.losses(by_command)
    trainer = tx.Trainer(tx.load_config(config))
    assert losses(trainer, 4) == {step: wanted[step] for step in range(1, 5)}
    # Another one beside it, in the same process, changes nothing.
    assert losses(tx.Trainer(tx.load_config(config, {'train.seed': 1})), 1)[1] != wanted[1]
    held_out = trainer.evaluate()
    workdir = trainer.save(tmp_path / 'run')
    assert losses(trainer, 2) == {step: wanted[step] for step in (5, 6)}

    opened = tx.Trainer.open(workdir)
    assert opened.step == 4 and opened.evaluate() == held_out
    assert losses(opened, 2) == {step: wanted[step] for step in (5, 6)}
    assert opened.save(workdir) == workdir == opened.save(workdir)  # once more is no fault
    assert train_fixtures.train(config, workdir).code == 0
    assert train_fixtures.losses(workdir) == {step: wanted[step] for step in range(7, 13)}
    jax.tree.map(
        np.testing.assert_array_equal, *(jax.device_get(tx.Trainer.open(path).params) for path in (by_command, workdir))
    )


def test_batches_of_ones_own_and_a_loop_that_ends_early(tmp_path):
    config = small_config(train_steps=6)
    trainer = tx.Trainer(config, batches=(packed_batch(config, seed) for seed in range(4)))
    for metrics in trainer.train():
        if metrics['step'] == 2:
            break
    assert trainer.step == 2
    workdir = trainer.save(tmp_path / 'run')
    assert list(losses(trainer)) == [3, 4] and trainer.step == 4  # no batches are left
    opened = tx.Trainer.open(workdir, batches=[packed_batch(config, 2)])
    np.testing.assert_allclose(next(opened.train())['loss'], 4, atol=2)


def test_another_model_is_not_taken_for_one_that_is_saved(tmp_path):
    config = small_config(train_steps=6)
    first, other = (tx.Trainer(config, batches=[packed_batch(config, seed)] * 2) for seed in (0, 1))
    for trainer in (first, other):
        losses(trainer)
    workdir = first.save(tmp_path / 'run')
    assert first.save(workdir) == workdir
    with pytest.raises(CheckpointError, match='a checkpoint of step 2 with other parameters; name another workdir'):
        other.save(workdir)
    with pytest.raises(tx.ConfigError, match='steps=-1'):
        losses(first, -1)


def test_it_works_in_a_notebook_and_in_a_thread(tmp_path):
    """A notebook's cells run inside an event loop; its widgets call from threads."""
    config = small_config(train_steps=6)

    def save_and_open(name):
        trainer = tx.Trainer(config, batches=[packed_batch(config)])
        [loss] = losses(trainer).values()
        opened = tx.Trainer.open(trainer.save(tmp_path / name), batches=[])
        jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(t.params) for t in (trainer, opened)))
        return loss

    async def cell():
        return save_and_open('cell')

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert asyncio.run(cell()) == pool.submit(save_and_open, 'thread').result()


def test_a_held_out_loss_of_a_few_batches_is_not_that_of_a_checkpoint(config, tmp_path):
    trainer = tx.Trainer(tx.load_config(config))
    for name, given in (('few', {'batches': 1}), ('all', {})):
        trainer.evaluate(**given)
        workdir = trainer.save(tmp_path / name)
        assert (workdir / 'checkpoints' / '0' / 'metrics.json').exists() == (name == 'all')


def test_what_is_wrong_is_told_at_once(config, tmp_path):
    with pytest.raises(tx.ConfigError, match='data.path is empty'):
        tx.Trainer(small_config())
    with pytest.raises(tx.ConfigError, match='no such file; did you mean tiny'):
        tx.load_config('tinny')
    with pytest.raises(CheckpointError):
        tx.Trainer.open(tmp_path / 'nowhere')
    with pytest.raises(AttributeError, match='no attribute'):
        tx.nothing  # noqa: B018


def test_every_exported_name_is_there():
    assert sorted(tx.__all__) == list(tx.__all__) == sorted(tx._EXPORTS)
    for name in tx.__all__:
        assert getattr(tx, name).__doc__, name
    assert set(tx.__all__) <= set(dir(tx))


def test_parameter_tables_add_up():
    for name in ('tiny', 'jamba_320m', 'llama3_320m'):
        model = tx.load_config(name).model
        assert sum(tx.parameter_table(model).values()) == tx.count_params(model)
    assert list(tx.parameter_table(tx.load_config('tiny').model)) == [
        'embedding', '1 attention mixer', '1 attention mlp', '3 ssd mixers', '3 ssd mlps', 'final norm', 'residual weights',
    ]  # fmt: skip
