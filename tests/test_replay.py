"""The ledger has a line for every step, and a step that is taken again is compared with it to the last bit."""

import functools
import json
import math
import re
import shutil

import jax
import numpy as np
import pytest
from train_fixtures import before_saving, checkpoint_steps, losses, prepare_bytes, train, write_config

from transxssm_jax import config as config_lib
from transxssm_jax import replay as command
from transxssm_jax.data import batch_documents, packing
from transxssm_jax.data.loader import make_loader
from transxssm_jax.data.sources import make_mixed_loader
from transxssm_jax.data.tokenizer import load_tokenizer
from transxssm_jax.parallel import mesh
from transxssm_jax.training import checkpoint, compilation, ledger
from transxssm_jax.training import checkpoint_files as files
from transxssm_jax.training import replay as replay_lib
from transxssm_jax.training import step as step_lib


@pytest.fixture(scope='module', autouse=True)
def compile_once():
    """Runs and replays of the same model share their compiled functions; the schedule of the tests' config is constant."""
    made, compile_step = {}, compilation.compile_train_step

    def made_once(config, device_mesh):
        names = ('train.accumulation_steps', 'train.loss_chunk_tokens', 'data.global_batch', 'data.seq_len')
        flat = config_lib.flatten(config)
        key = tuple(
            (name, flat[name]) for name in flat if name.startswith(('model.', 'optimizer.', 'mesh.')) or name in names
        )
        if key not in made:
            made[key] = compile_step(config, device_mesh)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation, 'compile_train_step', made_once)
        yield


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp('run')
    return write_config(directory, prepare_bytes(directory))


SETTINGS = dict(train__keep_last=3, train__keep_best=0, train__eval_every_steps=0, train__sample_tokens=0)


@pytest.fixture(scope='module')
def finished(config, tmp_path_factory):
    """A run of 12 steps with checkpoints of 4, 8 and 12; not to be changed."""
    workdir = tmp_path_factory.mktemp('finished') / 'run'
    result = train(config, workdir, **SETTINGS)
    assert result.code == 0, result.err
    return workdir


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / 'run')


@pytest.fixture
def replay(capsys):
    def call(workdir, step, *words):
        capsys.readouterr()
        code = command.main([f'--workdir={workdir}', f'--step={step}', *words])
        return code, *capsys.readouterr()

    return call


def lines(workdir, process=0):
    path = workdir / 'ledger' / f'process-{process}.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(workdir, content, process=0):
    path = workdir / 'ledger' / f'process-{process}.jsonl'
    path.write_text(''.join(map(ledger.sealed, content)))


def content(workdir):
    return {
        path.relative_to(workdir): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b'')
        for path in workdir.rglob('*')
    }


def differs_in(result, step, name):
    code, out, _ = result
    return code == 4 and f'\nstep {step}: the first difference is in {name}: ' in out


# ---- the ledger --------------------------------------------------------------


def test_every_step_has_a_line(finished, config):
    found = lines(finished)
    assert [line['step'] for line in found] == list(range(1, 13))
    assert {line['step']: line['loss'] for line in found} == losses(finished)
    assert len({line['batch'] for line in found}) == 12
    for line in found:
        assert line['rows'] == [[0, 8]] and line['code'] == ledger.code_version() and line['jax'] == jax.__version__
        assert all(math.isfinite(line[name]) and (line[name] > 0 or line['step'] == 1) for name in ledger.NUMBERS)
    [digest] = {line['config'] for line in found}
    used = ledger.read_config(finished, digest)
    assert used.train.accumulation_steps == 1  # what the config left open is chosen
    assert used.data == config_lib.load(config).data
    data = used.data
    with make_loader(data.path, 'train', seq_len=data.seq_len, global_batch=8, seed=data.seed) as loader:
        assert [ledger.batch_digest(next(loader)) for _ in range(12)] == [line['batch'] for line in found]


def test_the_digest_is_of_all_that_is_trained_on():
    batch = {name: np.arange(24, dtype=np.int32).reshape(4, 6) for name in (*ledger.HASHED, 'positions')}
    whole, digests = ledger.batch_digest(batch), set()
    for name in ledger.HASHED:
        changed = batch | {name: batch[name].copy()}
        changed[name][2, 3] += 1
        digests.add(ledger.batch_digest(changed))
        assert ledger.batch_digest(changed, [0, 1, 3]) == ledger.batch_digest(batch, [0, 1, 3])
    assert len(digests) == 3 and whole not in digests
    swapped = batch | {'tokens': batch['targets'], 'targets': batch['tokens'][[1, 0, 2, 3]]}
    assert ledger.batch_digest(swapped) != whole
    strided = {name: values.astype(np.int64)[:, ::-1][:, ::-1] for name, values in batch.items()}
    assert ledger.batch_digest(strided) == whole


def test_a_number_that_is_not_finite_is_null():
    scalars = dict.fromkeys(ledger.NUMBERS, 1.0) | {'loss': math.nan, 'grad_norm': math.inf}
    assert ledger.numbers(scalars) == dict.fromkeys(ledger.NUMBERS, 1.0) | {'loss': None, 'grad_norm': None}


def test_a_step_that_ends_the_run_has_its_line(config, tmp_path, replay):
    def spoil(run):
        run.state['params']['embedding'] = run.state['params']['embedding'] * math.nan

    with before_saving(5, spoil):
        result = train(config, tmp_path / 'run', **SETTINGS)
    assert result.code == 3
    last = lines(tmp_path / 'run')[-1]
    assert last['step'] == 6 and last['loss'] is None and last['learning_rate'] > 0
    # The ledger tells what was spoilt: the step before was sound, the parameters after it were not.
    assert replay(tmp_path / 'run', 5)[0] == 0
    assert differs_in(replay(tmp_path / 'run', 6), 6, 'param_norm')


def test_steps_that_are_taken_again_have_one_line(run, config, replay):
    shutil.rmtree(run / 'checkpoints' / '12')
    path = run / 'ledger' / 'process-0.jsonl'
    path.write_text(path.read_text() + '{"step": 13, "batch')  # of a killed run
    before = lines_of_text(path)
    other = [json.loads(ledger.sealed(line | {'rows': [[0, 4]]})) for line in before]
    write_lines(run, other, process=1)  # of a process that the run no longer has
    assert train(config, run, optimizer__learning_rate=5e-3, **SETTINGS).code == 0
    after = lines(run)
    assert [line['step'] for line in after] == list(range(1, 13))
    assert after[:8] == before[:8] and lines(run, process=1) == other[:8]
    assert [line['learning_rate'] for line in after[7:9]] == pytest.approx([1e-2, 5e-3])
    assert len({line['config'] for line in after}) == 2
    # Every step is taken with the config that it had, whatever the checkpoint before it was trained with.
    (run / 'ledger' / 'process-1.jsonl').unlink()
    assert replay(run, 10)[0] == 0
    shutil.rmtree(run / 'checkpoints' / '8')
    code, out, _ = replay(run, 10)
    assert code == 0 and 'from the checkpoint of step 4: steps 5 to 10' in out


def lines_of_text(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith('}')]


def test_what_is_no_line_is_passed_over(run):
    good = lines(run)[0]
    spoilt = [
        b'',
        b'[]',
        b'\xff',
        b'[' * 100_000,
        *(ledger.sealed(good | change).encode() for change in BAD_VALUES),
        *(
            ledger.sealed({name: value for name, value in good.items() if name != left}).encode()
            for left in good.keys() - {'sum'}
        ),
        ledger.sealed(good).replace('batch', 'bathc').encode(),
        json.dumps(good | {'sum': ''}).encode(),
    ]
    (run / 'ledger' / 'process-0.jsonl').write_bytes(b'\n'.join([*spoilt, ledger.sealed(good | {'step': 77}).encode()]))
    assert list(ledger.read_lines(run, 77, 77)) == [77]
    with pytest.raises(ledger.LedgerError, match='no line of step 1; it has lines of steps 77 to 77$'):
        ledger.read_lines(run, 1, 1)


BAD_VALUES = [
    {'step': True},
    {'step': '1'},
    {'rows': []},
    {'rows': [[4, 4]]},
    {'rows': [[-1, 4]]},
    {'rows': [[0, 1.5]]},
    {'rows': 3},
    {'config': '../../x'},
    {'loss': '1'},
    {'batch_number': -1},
    {'batch_number': '3'},
]


# ---- replay ------------------------------------------------------------------


def test_a_step_that_is_taken_again_is_the_same(run, replay):
    before = content(run)
    for step, start in ((5, 4), (7, 4), (8, 4), (12, 8)):
        code, out, err = replay(run, step)
        assert (code, err) == (0, '')
        assert out.splitlines() == [
            f'from the checkpoint of step {start}: steps {start + 1} to {step}',
            f'equal: batches, and bit for bit the learning rate, the loss and the norms, up to step {step}',
        ]
    assert content(run) == before


def test_another_order_of_the_data_is_named(run, replay, monkeypatch):
    monkeypatch.setattr(packing, 'permutation', lambda size, *key: np.arange(size)[::-1])
    assert differs_in(replay(run, 7), 5, 'batch')


def test_the_rows_of_every_process_are_compared(run, replay):
    config = ledger.read_config(run, lines(run)[0]['config'])
    data = config.data
    parts = [[], []]
    with make_loader(data.path, 'train', seq_len=data.seq_len, global_batch=8, seed=data.seed) as loader:
        for line in lines(run):
            batch = next(loader)
            for process, rows in enumerate(([0, 1, 4, 5], [2, 3, 6, 7])):
                digest = ledger.batch_digest(batch, rows)
                parts[process].append(line | {'batch': digest, 'rows': ledger.as_ranges(rows)})
    for process in range(2):
        write_lines(run, parts[process], process)
    assert parts[1][0]['rows'] == [[2, 4], [6, 8]]
    assert replay(run, 6)[0] == 0
    parts[1][5]['batch'] = '0' * 16
    write_lines(run, parts[1], 1)
    assert differs_in(replay(run, 6), 6, 'batch')
    parts[1][5]['rows'] = [[2, 1 << 60]]
    write_lines(run, parts[1], 1)
    assert differs_in(replay(run, 6), 6, 'batch')


def test_a_changed_setting_is_named(run, replay):
    result = replay(run, 7, '--config.optimizer.learning_rate=1.001e-2')
    assert differs_in(result, 5, 'learning_rate')
    assert '\nnote: optimizer.learning_rate is 0.01001 here and was 0.01 in the run\n' in result[1]
    assert differs_in(
        replay(run, 7, '--config.optimizer.learning_rate=1.001e-2', '--tolerance=1e-4'), 5, 'learning_rate'
    )
    code, out, _ = replay(run, 7, '--config.optimizer.learning_rate=1.001e-2', '--tolerance=0.01')
    assert code == 0 and 'within 0.01 the learning rate' in out
    assert differs_in(replay(run, 7, '--config.optimizer.clip_norm=0.01'), 5, 'update_norm')


def test_other_devices_are_equal_within_a_tolerance(run, replay):
    found = lines(run)
    write_lines(run, [line | {'device': '1 x TPU v9, processes: 1', 'code': '0.0.1+0'} for line in found])
    code, out, _ = replay(run, 7, '--config.mesh.data=2', '--config.mesh.fsdp=4', '--tolerance=1e-4')
    assert code == 0, out
    for note in ('mesh.fsdp is 4 here', 'was 1 x TPU v9, processes: 1 in the run', 'was 0.0.1+0 in the run'):
        assert note in out


@pytest.mark.parametrize(
    'change, name',
    [
        (lambda state: state['params'].update(embedding=state['params']['embedding'] * 1.01), 'param_norm'),
        (lambda state: state['params'].update(embedding=-state['params']['embedding']), 'loss'),
        (lambda state: state.update(opt_state=jax.tree.map(lambda leaf: leaf * 0, state['opt_state'])), 'update_norm'),
    ],
    ids=['scaled', 'turned', 'optimizer'],
)
def test_a_changed_weight_is_named(run, replay, change, name):
    config = ledger.read_config(run, lines(run)[0]['config'])
    path = run / 'checkpoints' / '4'
    abstract = step_lib.abstract_state(config, mesh.build(config))
    state, position, saved = checkpoint.read_whole(path, config, abstract)
    change(state)
    shutil.rmtree(path)
    assert files.Save(path.parent, 4, state, position, saved).result() == ''
    assert differs_in(replay(run, 7), 5, name)
    assert replay(run, 10)[0] == 0  # from another checkpoint


def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, replay):
    for path in (run / 'checkpoints' / '8' / 'params').rglob('*'):
        if path.is_file():
            path.write_bytes(b'')
    before = content(run)
    code, out, _ = replay(run, 9)
    assert code == 0 and 'from the checkpoint of step 4: steps 5 to 9' in out
    assert content(run) == before


def test_wrong_input_is_one_line(run, config, replay, tmp_path):
    def refused(step, *words, workdir=run):
        code, out, err = replay(workdir, step, *words)
        assert code == 2 and err.count('\n') == 1 and err.startswith('error: '), (out, err)
        return err

    assert 'has no line of step 13; it has lines of steps 1 to 12' in refused(13)
    assert 'has no line of step 1; it has none' in refused(1, workdir=tmp_path / 'nowhere')
    assert 'has no checkpoint before step 4 that can be read (it has 4, 8, 12)' in refused(4)
    assert 'data.seed is 0 in the checkpoint and 1 in this config' in refused(7, '--config.data.seed=1')
    assert 'unknown setting data.sead' in refused(7, '--config.data.sead=1')
    assert '--step=0 must be at least 1' in refused(0)
    (tmp_path / 'other').mkdir()
    other = prepare_bytes(tmp_path / 'other')
    text = (tmp_path / 'other' / 'train.jsonl').read_text()
    assert replay(run, 7, f'--config.data.path={other}')[0] == 0  # the same data in another place
    (tmp_path / 'changed').mkdir()
    (tmp_path / 'changed' / 'train.jsonl').write_text(text.replace('make', 'give'))
    changed = prepare(tmp_path / 'changed')
    assert 'is not what the run in' in refused(7, f'--config.data.path={changed}')
    [path] = (run / 'ledger').glob('config-*.json')
    path.write_text(path.read_text().replace('0.01', '0.02', 1))
    assert f'{path} is damaged' in refused(7)
    path.write_text('{')
    assert f'{path} is damaged' in refused(7)
    path.unlink()
    assert f'{path}, a config of the run, is missing' in refused(7)
    found = lines(run)
    write_lines(run, found[:5] + found[6:])
    assert 'has no line of step 6; it has lines of steps 1 to 12' in refused(7)


def prepare(directory):
    from transxssm_jax.data import prepare as prepare_lib

    words = ['--split=train', '--tokenizer=byte', f'--source={directory}/train.jsonl', '--num_workers=1']
    assert prepare_lib.main([f'--output={directory}/prepared', *words]) == 0
    return directory / 'prepared'


# ---- documents ---------------------------------------------------------------

LINE = re.compile(r"row (\d+): document (\d+) of (.*), slots (\d+) to (\d+) of (\d+): '(.*)'")


def test_the_documents_of_a_batch(run, config, replay):
    data = config_lib.load(config).data
    texts = [json.loads(line)['text'] for line in (config.parent / 'train.jsonl').read_text().splitlines()]
    code, out, _ = replay(run, 6, '--documents')
    assert code == 0
    found = [LINE.fullmatch(line).groups() for line in out.splitlines()[:-2]]
    with make_loader(data.path, 'train', seq_len=data.seq_len, global_batch=8, seed=data.seed, start_step=5) as loader:
        batch = next(loader)
    held = functools.reduce(lambda rows, line: rows | {line[0]: rows.get(line[0], 0) + 1}, found, {})
    assert held == {str(row): int(batch['segment_ids'][row].max()) for row in range(8)}
    seen = dict.fromkeys(held, 0)
    for row, document, source, start, stop, slots, words in found:
        text = texts[int(document)]
        seen[row] += 1
        assert source == str(config.parent / 'train.jsonl') and int(slots) == len(text) + 1
        assert words == ' '.join(text.split()[:8])
        targets = batch['targets'][int(row)][batch['segment_ids'][int(row)] == seen[row]]
        assert bytes(targets[targets < 256].tolist()).decode() == text[int(start) : int(stop)]


def test_the_documents_of_several_sources(config, tmp_path):
    (tmp_path / 'train.jsonl').write_text(json.dumps({'text': 'z ' * 450}) + '\n')
    directories = {'near': str(config.parent / 'prepared'), 'far': str(prepare(tmp_path))}
    options = dict(weights='0.5, 0.5', seq_len=32, global_batch=4, seed=0)
    tokenizer = load_tokenizer(directories['near'])
    with make_mixed_loader(directories, 'train', **options) as loader:
        for step in range(3):
            batch, described = next(loader), list(batch_documents.describe(loader, step, tokenizer))
            for row in range(4):
                own = [line for line in described if line.startswith(f'row {row}: ')]
                is_far = 'z' in tokenizer.decode(batch['tokens'][row])
                assert len(own) == batch['segment_ids'][row].max()
                assert all((f' of far ({tmp_path}/train.jsonl)' in line) == is_far for line in own)
                assert all(("'z z z z z z z z'" in line) == is_far for line in own)


def test_the_checkpoints_are_those_that_the_tests_speak_of(finished):
    assert checkpoint_steps(finished) == [4, 8, 12]


def test_a_step_that_was_skipped_is_skipped_again(config):
    """The limits of the compiled step: the run's own decision, for any of its numbers."""
    skips = config_lib.load(config, {'train.spike_action': 'skip', 'train.max_spikes': 1})
    [of_skipped], [of_taken] = (replay_lib._limits(skips, line) for line in ({'skipped': True}, {}))
    assert (of_skipped < -1e30).all() and (of_taken > 1e30).all() and of_taken.dtype == np.float32
    assert replay_lib._limits(config_lib.load(config), {}) == ()
