"""An experiment: cells of models and seeds that are trained once, go on where they stood, and end in a table."""

import json
import pathlib
import shlex
import shutil
import subprocess

import pytest
import train_fixtures

from transxssm_jax import config as config_lib
from transxssm_jax import experiment
from transxssm_jax.data import prepare
from transxssm_jax.evals import experiment as lib
from transxssm_jax.model.parameters import count_params

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
PAPER = CONFIGS / 'paper'


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    return train_fixtures.prepare_bytes(tmp_path_factory.mktemp('data'))


@pytest.fixture
def in_this_process(monkeypatch):
    """Trains the first cell in this process, and gives its records to the others; returns what was called, and exit codes."""
    calls, codes, trained = [], {}, []

    def call(command):
        flags = dict(word[2:].split('=', 1) for word in command[3:])
        workdir = pathlib.Path(flags['workdir'])
        if command[2] != 'transxssm_jax.train':
            calls.append(f'{command[2]} {workdir.parent.name}/{workdir.name}')
            (workdir / 'evals').mkdir(exist_ok=True)
            number = len(list((workdir / 'evals').iterdir()))
            words = ['python', *command[1:3], *(word for word in command[3:] if 'workdir' not in word)]
            found = {
                'command': shlex.join([*words, f'--workdir={workdir}']),
                'results': [{'rope_scaling': 'none', 'length': 32, 'perplexity': 7.5, 'buckets': [{}]}],
            }
            (workdir / 'evals' / f'perplexity-step-4-2026-{number}').write_text(json.dumps(found))
            return 0
        calls.append(f'{workdir.parent.name}/{flags["config.train.seed"]}')
        if calls[-1] in codes:
            return codes.pop(calls[-1])
        if trained:
            changes = {
                name.removeprefix('config.'): value for name, value in flags.items() if name.startswith('config.')
            }
            (workdir / 'config.json').write_text(config_lib.to_json(config_lib.load(flags['config'], changes)))
            shutil.copytree(trained[0] / 'checkpoints', workdir / 'checkpoints')
            shutil.copy(trained[0] / 'metrics.jsonl', workdir)
            return 0
        trained.append(workdir)
        return train_fixtures.call(['train', *command[3:]]).code

    monkeypatch.setattr(lib, 'run', call)
    return calls, codes


def write_models(folder, data, names=('a', 'b')):
    folder.mkdir()
    for i, name in enumerate(names):
        text = train_fixtures.CONFIG.format(data=str(data)).replace('d_mlp=32', f'd_mlp={32 * (i + 1)}')
        (folder / f'{name}.py').write_text(text)
    return folder


def run(capsys, *arguments):
    code = experiment.main([str(argument) for argument in arguments])
    return (code, *capsys.readouterr())


def test_cells_are_trained_once_and_end_in_a_table(tmp_path, prepared, in_this_process, capsys):
    calls, codes = in_this_process
    configs = write_models(tmp_path / 'configs', prepared, ('a_1k', 'a_2k'))
    arguments = [f'--configs={configs}', f'--workdir={tmp_path / "runs"}', '--steps=4', '--seeds=0,1']
    # The second training is stopped by a signal: the command ends with its code.
    codes['a_2k/0'] = 75
    code, out, _ = run(capsys, *arguments)
    assert code == 75 and 'the same command goes on from there' in out and calls == ['a_1k/0', 'a_2k/0']
    # It goes on; a training that fails keeps none of the others from their turn.
    codes['a_1k/1'] = 3
    code, out, _ = run(capsys, *arguments)
    assert code == 3 and calls[2:] == ['a_2k/0', 'a_1k/1', 'a_2k/1'] and 'finished before' in out
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and calls[5:] == ['a_1k/1']
    # Evaluations are made once for each finished run, and stand on the page.
    for _ in range(2):
        assert run(capsys, *arguments, '--evaluate=perplexity --lengths=1x')[0] == 0
        made = [f'transxssm_jax.evals.perplexity a_{size}/seed-{seed}' for seed in (0, 1) for size in ('1k', '2k')]
        assert calls[6:] == made
    # With other flags it is another evaluation.
    both = ['--evaluate=perplexity --lengths=1x', '--evaluate=perplexity --lengths=2x']
    assert run(capsys, *arguments, *both)[0] == 0 and calls[10:] == made
    # A run of another length, with other settings or of other data is not taken for one of this experiment.
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'text.txt').write_text('Another text. ' * 200)
    words = [
        f'--output={tmp_path / "other" / "data"}',
        '--tokenizer=byte',
        f'--source={tmp_path / "other" / "text.txt"}',
    ]
    assert prepare.main([*words, '--split=train']) == prepare.main([*words, '--split=validation']) == 0
    for other, message in (
        ('--steps=5', 'was begun with train.steps=4, not 5'),
        (f'--data={tmp_path / "other" / "data"}', 'seed-0 was begun on other data than'),
        ('--config.model.d_mlp=48', 'model.d_mlp='),
    ):
        code, _, err = run(capsys, *arguments, other)
        assert code == 2 and message in err and len(err.splitlines()) == 1
    assert 'perplexity, 32 tokens' in (tmp_path / 'runs' / 'report.html').read_text()
    lines = out.splitlines()
    [small] = [line for line in lines if line.startswith('| a_1k |')]
    assert '| 0, 1 |' in small and '±' in small and '| 1,024 |' in small
    assert any(line.startswith('| a | ') for line in lines), 'the gain from a_1k to a_2k'
    results = json.loads((tmp_path / 'runs' / 'results.json').read_text())
    assert [result['seeds'] for result in results['results']] == [[0, 1], [0, 1]]
    losses = train_fixtures.records(tmp_path / 'runs' / 'a_1k' / 'seed-1')
    assert results['results'][0]['loss'][1] == [r for r in losses if 'eval_loss' in r][-1]['eval_loss']
    first = json.loads((tmp_path / 'runs' / 'a_1k' / 'seed-0' / 'config.json').read_text())
    assert (first['train']['seed'], first['train']['steps'], first['train']['log_every_steps']) == (0, 4, 1)
    made = {path.name for path in (tmp_path / 'runs').iterdir()}
    assert {'table.md', 'results.json', 'report.html', 'loss_by_tokens.png'} <= made


def test_a_cell_is_a_process_that_gets_signals(tmp_path, monkeypatch):
    config = config_lib.load(CONFIGS / 'tiny.py')
    cell = lib.Cell(
        name='a', seed=0, file=CONFIGS / 'tiny.py', overrides={'train.steps': 3}, config=config, workdir=tmp_path / 'a'
    )
    assert cell.command()[1:] == [
        '-m', 'transxssm_jax.train', f'--config={CONFIGS / "tiny.py"}', f'--workdir={tmp_path / "a"}', '--config.train.steps=3',
    ]  # fmt: skip
    script = 'trap "exit 75" TERM; kill -TERM $PPID; while :; do sleep 0.1; done'
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, 'Popen', lambda command, **kwargs: real(['bash', '-c', script], **kwargs))
    assert lib.run(cell.command()) == 75
    assert cell.evaluation("needle --depths='0, 50'")[1:] == [
        '-m', 'transxssm_jax.evals.needle', f'--workdir={tmp_path / "a"}', '--depths=0, 50',
    ]  # fmt: skip


def test_a_run_of_other_length_has_the_same_shape():
    file = PAPER / 'encodings' / 'hybrid_rope.py'
    [cell] = lib.make_cells([file], pathlib.Path('w'), [7], 100, {})
    train, optimizer = cell.config.train, cell.config.optimizer
    assert (train.steps, optimizer.warmup_steps, train.eval_every_steps, train.checkpoint_every_steps) == (
        100,
        10,
        25,
        25,
    )
    assert (train.seed, cell.config.data.seed) == (7, 7) and str(cell.workdir) == 'w/hybrid_rope/seed-7'
    [whole] = lib.make_cells([file], pathlib.Path('w'), [0], 0, {})
    assert whole.config == config_lib.load(file)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (('--configs=nowhere',), '--configs=nowhere: no such file'),
        (('--only=hybrid_rop',), '--only=hybrid_rop is no file of --configs; did you mean hybrid_rope?'),
        (('--seeds=1,1',), '--seeds=1,1 must be one or more seeds, each once'),
        (('--evaluate=perplexty',), "--evaluate='perplexty' must begin with an evaluation; did you mean perplexity?"),
        (("--evaluate=needle '",), 'No closing quotation'),
        ((), '--data=DIR is missing'),
        (('--config.model.pattern=7xmamba',), "unknown mixer 'mamba'; did you mean mamba2?"),
        (('--data=d', '--config.train.seed=3'), '--config.train.seed is given, and --seeds sets it'),
        (('--data=d', '--steps=9', '--config.train.steps=8'), '--config.train.steps is given, and --steps sets it'),
        ((f'--configs={PAPER / "encodings"},{PAPER / "encodings"}',), '--configs has two files'),
    ],
)
def test_wrong_input_is_one_line(tmp_path, capsys, arguments, message):
    code, out, err = run(capsys, f'--configs={PAPER / "encodings"}', f'--workdir={tmp_path / "runs"}', *arguments)
    assert code == 2 and message in err and len(err.splitlines()) == 1 and out == ''
    assert not (tmp_path / 'runs').exists()


# ---- the paper's experiments -------------------------------------------------


def load(folder):
    return {path.stem: config_lib.load(path) for path in sorted((PAPER / folder).glob('*.py'))}


def test_the_seven_cells_of_table_2():
    configs = load('encodings')
    assert sorted(configs) == [
        'attention_rope', 'hybrid_conv1d_d', 'hybrid_decay_only', 'hybrid_rope', 'ssd_conv1d_d', 'ssd_decay_only', 'ssd_rope',
    ]  # fmt: skip
    for name, config in configs.items():
        mixer, _, encoding = name.partition('_')
        wanted = {'attention': {'attention'}, 'ssd': {'ssd'}, 'hybrid': {'ssd', 'attention'}}[mixer]
        assert set(config.model.layer_pattern) == wanted
        assert (config.model.ssd_encoding, config.model.attention_encoding) == (encoding, 'rope')
        differing = config_lib.differences(config, configs['hybrid_rope'])
        assert set(differing) <= {'model.pattern', 'model.ssd_encoding'}
        assert (config.model.d_model, config.data.seq_len) == (256, 8192)


def test_the_four_models_at_two_sizes():
    configs = load('small')
    assert {name.rpartition('_')[0] for name in configs} == {'transxssm', 'llama3', 'mamba2', 'jamba'}
    for name, config in configs.items():
        model, _, size = name.rpartition('_')
        ours = configs[f'transxssm_{size}']
        assert count_params(config.model) == pytest.approx({'20m': 20e6, '60m': 60e6}[size], rel=0.01)
        assert set(config_lib.differences(config, ours)) <= {'model.pattern', 'model.d_mlp', 'model.attention_encoding'}
        assert (config.model.attention_encoding == 'none') == (model == 'jamba')
        assert config.tokens_per_step * config.train.steps == ours.tokens_per_step * ours.train.steps
