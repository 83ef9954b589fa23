"""Batches of several prepared directories: pure functions of (sources, weights, seed, step), and runs on them."""

import itertools
import json

import numpy as np
import pytest
from data_fixtures import ids, run_prepare, texts, train_tokenizer, write_jsonl
from train_fixtures import before_saving, losses, records, send, train, write_config

from transxssm_jax import convert, generate
from transxssm_jax.data.loader import make_loader
from transxssm_jax.data.manifest import DataError
from transxssm_jax.data.sources import make_mixed_loader
from transxssm_jax.evals import perplexity

LENGTH, BATCH = 32, 8


@pytest.fixture(scope='module')
def directories(tmp_path_factory):
    """Three sources whose texts begin with their letter, of 30 to 60 rows of 32 tokens; 'a' and 'b' have a held-out split."""
    root = tmp_path_factory.mktemp('sources')
    made = {}
    for i, (name, count) in enumerate((('a', 20), ('b', 14), ('c', 10))):
        for split in ('train', 'validation') if name != 'c' else ('train',):
            documents = [f'{name} {split} {text}' for text in texts(count, seed=i, longest=150)]
            assert run_prepare(root / name, write_jsonl(root / f'{name}.{split}.jsonl', documents), split=split) == 0
        made[name] = str(root / name)
    return made


def open_mixed(directories, weights='', **settings):
    settings = dict(seq_len=LENGTH, global_batch=BATCH, seed=3, num_threads=0, prefetch=1) | settings
    return make_mixed_loader(directories, 'train', weights=weights, **settings)


def batches(directories, weights='', count=20, **settings):
    with open_mixed(directories, weights, **settings) as loader:
        return list(itertools.islice(loader, count))


def rows_of(batch):
    return [row.tobytes() for row in batch['targets']]


def rows_by_source(directories):
    """Source -> the rows of its first epochs, as the mixture reads them alone."""
    found = {}
    for name, directory in directories.items():
        with open_mixed({name: directory}) as loader:
            count = 2 * loader.rows_per_epoch // BATCH
            found[name] = [row for batch in itertools.islice(loader, count) for row in rows_of(batch)]
    return found


def same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


# ---- a pure function -------------------------------------------------------------


def test_each_source_gives_its_rows_in_its_own_order(directories):
    own = rows_by_source(directories)
    taken = dict.fromkeys(directories, 0)
    for batch in batches(directories, '0: 2, 1, 1; to 12: 1, 4, 0', count=15):
        for row in rows_of(batch):
            name = next(name for name in directories if row == own[name][taken[name]])
            taken[name] += 1
    assert sum(taken.values()) == 15 * BATCH and taken['b'] > taken['c'] > 0


def test_the_order_of_a_source_does_not_depend_on_its_place_or_name(directories):
    turned = {'z': directories['c'], 'y': directories['a'], 'x': directories['b']}
    left, right = rows_by_source(directories), rows_by_source(turned)
    assert (left['a'], left['b'], left['c']) == (right['y'], right['x'], right['z'])


def test_an_epoch_of_a_source_has_every_document_once(directories):
    with open_mixed(directories, '1, 1, 1') as loader:
        parts = {part.name: part.manifest for part in loader.parts}
    with open_mixed({'a': directories['a']}) as loader:
        rows = loader.rows_per_epoch
        targets = np.concatenate([batch['targets'] for batch in itertools.islice(loader, -(-rows // BATCH))])[:rows]
    assert (targets >= 0).sum() == parts['a'].num_tokens
    assert ((targets == 256).sum()) == parts['a'].num_documents


@pytest.mark.parametrize('weights', ['', '3, 1, 1', '0: 1, 0, 0; to 9: 0, 1, 2; 14: 1, 1, 1'])
def test_any_step_is_reached_at_once(directories, weights):
    whole = batches(directories, weights)
    for step in (1, 8, 9, 13, 17):
        same(whole[step:], batches(directories, weights, count=20 - step, start_step=step))


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(seq_len=0), 'seq_len=0 must be at least 1'),
        (dict(prefetch=0), 'prefetch=0 must be at least 1'),
        (dict(rows=[BATCH]), 'the rows of the global batch'),
        (dict(rows=[]), 'the rows of the global batch'),
    ],
)
def test_arguments_are_checked_as_of_one_directory(directories, settings, message):
    with pytest.raises(DataError, match=message):
        open_mixed(directories, **settings)


def test_hosts_and_workers_do_not_matter(directories):
    weights = '0: 1, 2, 0; to 6: 1, 0, 3'
    whole = batches(directories, weights, count=8)
    parts = [batches(directories, weights, count=8, rows=rows) for rows in (range(0, 3), (3, 7), (4, 5, 6))]
    for step, batch in enumerate(whole):
        for rows, part in zip((range(0, 3), (3, 7), (4, 5, 6)), parts):
            np.testing.assert_array_equal(batch['tokens'][list(rows)], part[step]['tokens'])
    same(whole, batches(directories, weights, count=8, num_workers=2, num_threads=2))


def test_another_weight_from_a_step_on_leaves_the_steps_before_as_they_were(directories):
    plain = batches(directories, '1, 2, 1')
    changed = batches(directories, '0: 1, 2, 1; 12: 5, 0, 1')
    same(plain[:12], changed[:12])
    assert any(rows_of(left) != rows_of(right) for left, right in zip(plain[12:], changed[12:]))
    # A source that comes later, at the end of the list.
    two = {name: directories[name] for name in 'ab'}
    same(batches(two, '1, 2', count=7), batches(directories, '0: 1, 2, 0; 7: 1, 2, 1', count=7))


def test_weights_are_by_tokens_where_none_are_given(directories):
    with open_mixed(directories) as loader:
        tokens = {part.name: part.manifest.num_tokens for part in loader.parts}
        for part in loader.parts:
            assert part.share == pytest.approx(tokens[part.name] / sum(tokens.values()), abs=1e-6)
        assert loader.num_tokens == sum(tokens.values())
        assert loader.num_documents == 44


def test_one_directory_stays_what_it_was(directories):
    """Batches of data.path as they were before there were sources: by hand, from documents and permutations."""
    from transxssm_jax.data.packing import permutation

    documents = [ids(f'a train {text}') for text in texts(20, seed=0, longest=150)]
    order, targets = permutation(20, 5, 0, 0), []
    for document in order:
        targets += documents[document].tolist()
    rows = -(-len(targets) // LENGTH)
    targets += [-1] * (rows * LENGTH - len(targets))
    expected = np.array(targets).reshape(rows, LENGTH)[permutation(rows, 5, 0, 0, 1)][: 2 * BATCH]
    with make_loader(directories['a'], 'train', seq_len=LENGTH, global_batch=BATCH, seed=5) as loader:
        found = np.concatenate([batch['targets'] for batch in itertools.islice(loader, 2)])
    np.testing.assert_array_equal(found, expected)


# ---- ends and refusals -------------------------------------------------------------


def test_a_source_ends_with_its_epochs_and_data_with_the_last(directories):
    with open_mixed(directories, '1, 1, 1', max_epochs='0, 1, 1.5') as loader:
        own = {part.name: part for part in loader.parts}
        assert len(loader.events) == 2
        first, second = loader.events
        assert 'has given data.max_epochs by step' in loader.events[first]
        assert 'the others share its rows from there on' in loader.events[second]
    rows = rows_by_source(directories)
    seen = [
        row for batch in batches(directories, '1, 1, 1', max_epochs='0, 1, 1.5', count=40) for row in rows_of(batch)
    ]
    of_b = sum(row in set(rows['b']) for row in seen)
    assert own['b'].manifest.num_tokens // LENGTH - BATCH <= of_b <= -(-own['b'].manifest.num_tokens // LENGTH)
    ended = batches(directories, '1, 1, 1', max_epochs='1, 1, 1', count=1000)
    total = sum(-(-part.manifest.num_tokens // LENGTH) for part in own.values())
    assert total - 3 * BATCH < len(ended) * BATCH <= total


def test_a_source_with_another_tokenizer_is_refused(directories, tmp_path):
    tokenizer = train_tokenizer(tmp_path / 'tokenizer.json', ['<|endoftext|>'])
    source = write_jsonl(tmp_path / 'd.jsonl', texts(10))
    assert run_prepare(tmp_path / 'd', source, tokenizer=tokenizer) == 0
    with pytest.raises(DataError, match='data.sources: d .* has another tokenizer than a ') as error:
        open_mixed(directories | {'d': str(tmp_path / 'd')})
    assert '\n' not in str(error.value)


def test_less_than_one_row_is_refused(directories):
    with pytest.raises(DataError, match='data.max_epochs=0.001 of b is less than one of its'):
        open_mixed(directories, max_epochs='0, 0.001, 0')


# ---- runs --------------------------------------------------------------------------


@pytest.fixture(scope='module')
def config(directories, tmp_path_factory):
    path = write_config(tmp_path_factory.mktemp('config'), '')
    path.write_text(
        path.read_text().replace("Data(path=''", f'Data(sources="{directories["a"]}, second={directories["b"]}"')
    )
    return path


def test_a_run_on_sources_resumes_exactly_and_has_a_curve_for_each_held_out_split(config, tmp_path):
    settings = dict(data__weights='0: 3, 1; to 8: 1, 3')
    whole = train(config, tmp_path / 'whole', **settings)
    assert whole.code == 0, whole.err
    assert '2 sources, of each the split' in whole.out and 'second: 0.25 of the rows' in whole.out
    evaluated = [record for record in records(tmp_path / 'whole') if 'eval_loss' in record]
    assert [record['step'] for record in evaluated] == [6, 12]
    for record in evaluated:
        assert record['eval_loss'] == record['eval/a/validation/loss'] != record['eval/second/validation/loss']
    with before_saving(5, send('SIGTERM')):
        assert train(config, tmp_path / 'cut', **settings).code == 75
    assert train(config, tmp_path / 'cut', **settings).code == 0
    assert losses(tmp_path / 'cut') == losses(tmp_path / 'whole')


def test_weights_may_change_from_where_a_run_stands_and_not_before(config, directories, tmp_path):
    settings = dict(train__steps=6, train__eval_every_steps=0, train__checkpoint_every_steps=6)
    assert train(config, tmp_path / 'run', data__weights='3, 1', **settings).code == 0
    settings['train__steps'] = 8
    refused = train(config, tmp_path / 'run', data__weights='0: 3, 1; 2: 1, 3', **settings)
    assert refused.code == 2 and refused.err.count('\n') == 1
    assert 'differ for steps before 6' in refused.err and 'from step 6 on only' in refused.err
    one = train(config, tmp_path / 'run', data__sources=f'second={directories["b"]}', **settings)
    assert one.code == 2 and 'not all that the run' in one.err
    goes_on = f'{directories["a"]}, b={directories["b"]}, {directories["c"]}'
    result = train(config, tmp_path / 'run', data__sources=goes_on, data__weights='0: 3, 1, 0; 6: 1, 3, 1', **settings)
    assert result.code == 0, result.err
    assert 'c: 0.2 of the rows' in result.out


def test_the_end_of_a_source_is_told_at_the_start_and_when_it_comes(config, tmp_path):
    settings = dict(data__weights='1, 1', data__max_epochs='0.5, 0', train__eval_every_steps=0)
    result = train(config, tmp_path / 'run', **settings)
    assert result.code == 0, result.err
    lines = [line for line in result.out.splitlines() if 'a has given data.max_epochs' in line]
    assert len(lines) == 2 and lines[1].startswith('step ')


def test_a_run_on_sources_is_used_as_any_other(config, tmp_path, capsys):
    workdir = tmp_path / 'run'
    assert train(config, workdir, train__steps=6).code == 0
    capsys.readouterr()
    assert generate.main([f'--workdir={workdir}@best', '--prompt=a', '--max_tokens=2']) == 0
    assert perplexity.main([f'--workdir={workdir}@latest', '--lengths=32', '--documents=joined', '--windows=4']) == 0
    assert 'perplexity' in capsys.readouterr().out
    assert convert.main(['export', f'--workdir={workdir}', f'--output={tmp_path / "out"}']) == 0
    assert 'sources' not in json.loads((tmp_path / 'out' / 'config.json').read_text())['transxssm_jax']['data']
    assert convert.main(['import', f'--source={tmp_path / "out"}', f'--workdir={tmp_path / "again"}']) == 0


@pytest.mark.parametrize(
    'settings, expected',
    [
        (dict(data__max_epochs='1, 1', train__steps=2000), 'every source with a weight has given its epochs by step'),
        (dict(data__weights='1, 1, 1'), 'has 3 weights for 2 data.sources'),
        (dict(data__path='somewhere'), 'both name the data; leave one of them empty'),
        (dict(data__sources='x/a,y/a'), 'data.sources has two sources of the name a'),
        (dict(data__sources='/a=b'), 'must be DIR or NAME=DIR'),
        (dict(data__eval_splits='third/validation'), 'is of no source; data.sources has a, second'),
        (dict(data__eval_splits='test'), "none of data.sources has a split 'test'"),
        (dict(data__global_batch=1 << 20), 'less than one batch'),
        (dict(data__sources='nowhere'), 'nowhere holds no prepared data'),
        (dict(data__sources='', data__weights='1, 1'), 'belongs to data.sources, which is empty'),
    ],
)
def test_wrong_sources_are_refused_before_the_workdir_is_made(config, tmp_path, settings, expected):
    result = train(config, tmp_path / 'run', **settings)
    assert result.code == 2 and expected in result.err and result.err.count('\n') == 1, result.err
    assert not (tmp_path / 'run').exists()
