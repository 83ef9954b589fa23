"""Whatever a file, a setting or a command line holds, it is read or refused by a documented error: no other error comes.

Every reader gets a good file and a damaged one: bytes changed, cut, put in and repeated, JSON with other values, names and
depths. What is read nevertheless must be sound, as each reader's function checks. The suite takes few examples of each;

    python -m pytest -m fuzz tests/test_fuzz.py

takes 10,000 (`--fuzz_examples=N` another number). A failure prints the smallest damage that hypothesis found.
"""

import functools
import gzip
import json
import pathlib
import shutil
import types

import numpy as np
import pytest
from data_fixtures import run_prepare, texts, train_tokenizer, write_jsonl
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from small import small_config

from transxssm_jax import cli, generate
from transxssm_jax import config as config_lib
from transxssm_jax import settings as config_settings
from transxssm_jax.config import ConfigError
from transxssm_jax.data import loader, manifest, source, tokenizer
from transxssm_jax.data.manifest import DataError
from transxssm_jax.evals import sweep_trials
from transxssm_jax.inference.sampling import InputError
from transxssm_jax.pytorch import conversion, files
from transxssm_jax.pytorch.fields import ConvertError
from transxssm_jax.training import checkpoint, digest, lease, metrics, run_directory
from transxssm_jax.training.checkpoint_files import CheckpointError, read_config, read_digests

IN_SUITE = 40
KEPT = pathlib.Path(__file__).parent / 'data' / 'checkpoint_format_2'

# ---- damage ------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**63, -(2**63), 10**400, 1e308, float('nan'), float('inf'), -0.0]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(['', '\ud800', '\0', '../x', 'byte', '9' * 30, 'true', '__class__', 'a\nb', '\u2028']),
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
DEEP = st.sampled_from([b'[' * 20_000, b'{"a":' * 20_000, b'[' * 200 + b']' * 200, b'9' * 5000, b'\xef\xbb\xbf', b'\0'])
EDIT = st.tuples(
    st.sampled_from(['set', 'cut', 'insert', 'repeat', 'end', 'blank']),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 64),
    st.binary(min_size=1, max_size=8) | DEEP,
)


def damaged_bytes(content: bytes):
    """Strategy: the content after one to four edits, or something else altogether."""

    def edited(edits):
        made = bytearray(content)
        for kind, where, size, new in edits:
            at = int(where * (len(made) + 1))
            if kind == 'set':
                made[at : at + len(new)] = new
            elif kind == 'blank':
                made[at : at + size] = bytes(len(made[at : at + size]))
            elif kind == 'cut':
                del made[at : at + size]
            elif kind == 'insert':
                made[at:at] = new
            elif kind == 'repeat':
                made[at:at] = made[at : at + size]
            else:
                del made[at:]
        return bytes(made)

    return st.lists(EDIT, min_size=1, max_size=4).map(edited) | st.binary(max_size=64) | DEEP


def paths_of(tree, prefix=()):
    yield prefix
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield from paths_of(tree[key], (*prefix, key))


def damaged_json(content: bytes):
    """Strategy: JSON with another value, another name or without one at up to two places."""
    tree = json.loads(content)
    places = list(paths_of(tree))

    def changed(changes):
        made = json.loads(content)
        for path, kind, value, name in changes:
            if not path:
                made = value if kind == 'value' else made
                continue
            try:
                parent = functools.reduce(lambda node, key: node[key], path[:-1], made)
                if kind == 'value':
                    parent[path[-1]] = value
                elif kind == 'gone':
                    del parent[path[-1]]
                elif isinstance(parent, dict):
                    parent[name] = parent.pop(path[-1])
            except (KeyError, IndexError, TypeError):
                pass  # the change before took the place away
        return json.dumps(made).encode()

    change = st.tuples(st.sampled_from(places), st.sampled_from(['value', 'gone', 'name']), JSON, st.text(max_size=8))
    return st.lists(change, min_size=1, max_size=2).map(changed) | damaged_bytes(content)


# ---- readers: each makes good files once, and returns a strategy and what to do with an example ----------------------


def documents_of(path):
    """All documents of a file, each way of reading it: with errors, and with bad documents left out."""
    (file,) = source.list_files(str(path), 'train')
    for skip_bad in (True, False):
        for piece in source.cut(file, 100, skip_bad=skip_bad):
            if skip_bad:
                items = list(source.read_items(piece, 'text'))
                assert all(isinstance(item, str | source.Skipped) for item in items)
                for item in items:
                    (item if isinstance(item, str) else item.error).encode()
            else:
                assert all(isinstance(text, str) for text in source.read_documents(piece, 'text'))


def of_source(name, content, change=damaged_bytes):
    def make(directory):
        def read(damaged):
            (directory / name).write_bytes(damaged)
            documents_of(directory / name)

        return change(content), read, (DataError,)

    return make


LINES = ''.join(json.dumps({'text': text, 'n': i}) + '\n' for i, text in enumerate(texts(12))).encode()


def zst(content: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(content, 'zstd', asbytes=True)


def jsonl_lines(content):
    """Lines that are JSON, of any kind."""
    lines = st.lists(
        JSON.map(lambda value: json.dumps({'text': value}).encode()) | JSON.map(json.dumps).map(str.encode)
    )
    return damaged_bytes(content) | lines.map(b'\n'.join)


def parquet(directory):
    import pyarrow
    import pyarrow.parquet

    path, good = directory / 'd.parquet', texts(30)
    columns = {'text': pyarrow.array(good).dictionary_encode(), 'n': list(range(30))}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=8)

    def read(damaged):
        path.write_bytes(damaged)
        documents_of(path)

    return damaged_bytes(path.read_bytes()), read, (DataError,)


def prepared(directory, name_of, change, check_equal=True):
    """A prepared directory of which one file is damaged: refused, or the same documents as ever."""
    data = directory / 'data'
    for split in ('train', 'validation'):
        assert run_prepare(data, write_jsonl(directory / f'{split}.jsonl', texts(20)), split=split) == 0
    path = next(data.glob(name_of))
    good = path.read_bytes()
    expected = [tokens.tolist() for tokens in loader.read_documents(data, 'train')]

    def read(damaged):
        path.write_bytes(damaged)
        for split in manifest.finished_splits(data):
            if split == 'train':
                assert [tokens.tolist() for tokens in loader.read_documents(data, split)] == expected
            else:
                list(loader.read_documents(data, split))
        loader.make_loader(data, 'train', seq_len=16, global_batch=2, seed=0).close()

    return change(good), read, (DataError,)


def same_size(content):
    """Damage that the check of sizes at opening cannot see."""
    return damaged_bytes(content).map(lambda made: (made + bytes(len(content)))[: len(content)])


def tokenizer_file(directory):
    path = train_tokenizer(directory / 'tokenizer.json', ['<|endoftext|>'])

    def read(damaged):
        path.write_bytes(damaged)
        loaded = tokenizer.load_tokenizer(path)
        for ids in loaded.encode_batch(['a text', '', '<|endoftext|>', 'é🙂\0']):
            assert ids.dtype == loaded.dtype and all(0 <= i < loaded.vocab_size for i in ids.tolist())
            assert isinstance(loaded.decode(ids), str)

    return damaged_json(path.read_bytes()), read, (DataError,)


def pytorch_files(directory, name, change):
    from test_convert import write

    write(directory / 'published', num_hidden_layers=2, hidden_size=32, num_attention_heads=2, vocab_size=24, files=2)
    path = directory / 'published' / name
    if name == 'model.safetensors':
        shutil.rmtree(directory / 'published')
        write(directory / 'published', num_hidden_layers=2, hidden_size=32, num_attention_heads=2, vocab_size=24)

    def read(damaged):
        path.write_bytes(damaged)
        checkpoint = files.PytorchCheckpoint(directory / 'published')
        for name in checkpoint.tensors:
            checkpoint.read(name)

    return change(path.read_bytes()), read, (ConvertError,)


def export_config(directory, layout):
    from test_convert import random_params, save_run

    from transxssm_jax.pytorch.transformers_export import export_transformers

    config = small_config(model_num_layers=1, model_pattern='attention' if layout == 'llama' else 'mamba2')
    params = random_params(config)
    for kind in params['layers'].values():
        for name in ('mixer_residual', 'mlp_residual'):
            kind[name]['weight'] = np.ones_like(kind[name]['weight'])
    save_run(directory / 'run', config, {1: params})
    export_transformers(directory / 'run', directory / 'out', layout=layout)
    path = directory / 'out' / 'config.json'

    def read(damaged):
        path.write_bytes(damaged)
        checkpoint = conversion.open_checkpoint(directory / 'out')
        for name in checkpoint.tensors:
            checkpoint.read(name)

    return damaged_json(path.read_bytes()), read, (ConvertError,)


def memory_of_an_import(directory):
    path, tensor = directory / conversion.MEMORY, types.SimpleNamespace(name='a.A', index=(), from_ours=np.exp)
    array = np.zeros(3, np.float32)

    def read(damaged):
        path.write_bytes(damaged)
        memory = conversion._read_memory(directory)
        with np.errstate(all='ignore'):
            assert conversion._with_memory(tensor, array, memory['A']).shape == (3,)
        json.dumps(memory['config'])

    return (
        damaged_json(json.dumps({'config': {'b': 1}, 'A': {'a.A': [-1.0, -2.0, -3.0]}}).encode()),
        read,
        (ConvertError,),
    )


def safetensors_header(content):
    """Damage of the header alone, whose length is kept right."""
    size = int.from_bytes(content[:8], 'little')
    whole = damaged_json(content[8 : 8 + size]).map(
        lambda head: len(head).to_bytes(8, 'little') + head + content[8 + size :]
    )
    return whole | damaged_bytes(content)


def of_checkpoint(name, change=damaged_bytes):
    """A file of a kept checkpoint: damage is named, or what is read is what was saved."""

    def make(directory):
        workdir = shutil.copytree(KEPT, directory / 'workdir')
        step = workdir / 'checkpoints' / '7'
        path, good = step / name, (step / name).read_bytes()
        config, position = checkpoint.load_config(workdir), json.loads((step / 'data.json').read_bytes())

        def read(damaged):
            path.write_bytes(damaged)
            checkpoints = checkpoint.Checkpoints(workdir, config)
            assert checkpoints._eval_losses() in ({}, {7: 1.5})
            digests = read_digests(step)
            assert read_config(step, digests) == config
            assert json.loads(digest.read_checked(step, 'data.json', digests)) == position
            assert checkpoint.load_config(workdir) == config

        return change(good), read, (CheckpointError, digest.DamagedError)

    return make


def saved_config(directory):
    workdir = shutil.copytree(KEPT, directory / 'workdir')
    config = checkpoint.load_config(workdir)

    def read(damaged):
        (workdir / 'config.json').write_bytes(damaged)
        run_directory.open_workdir(workdir, config)

    return damaged_json((KEPT / 'config.json').read_bytes()), read, (CheckpointError,)


def metric_records(directory):
    path = directory / 'metrics.jsonl'
    lines = ''.join(json.dumps({'step': i, 'loss': 1.0 / i, 'seconds': 2.0 * i}) + '\n' for i in range(1, 6))

    def read(damaged):
        path.write_bytes(damaged)
        kept, count = metrics._read_records(path, 3)
        assert all(record['step'] <= 3 for record in kept) and count >= 0
        writer = metrics.JsonLines(path, 3)
        writer.close()
        assert metrics._read_records(path, 3)[1] == 0, 'what is written again is whole'

    return jsonl_lines(lines.encode()), read, ()


def lease_file(directory):
    path = directory / lease.NAME
    good = {'host': 'a', 'process': 1, 'process_start': '1', 'host_identity': 'x', 'since': 1.0, 'token': 'ab'}

    def read(damaged):
        path.write_bytes(damaged)
        held = lease.Lease(directory, sleep=lambda seconds: None)
        held.release()
        assert not path.exists()

    content = json.dumps(good | {'host_identity': lease._host_identity(), 'renewals': '0'}).encode()
    return damaged_json(content), read, (lease.LeaseError,)


def prompts(directory, suffix):
    path = directory / f'prompts{suffix}'
    good = ''.join(json.dumps({'prompt': text}) + '\n' for text in texts(4)).encode()

    def read(damaged):
        path.write_bytes(damaged)
        flags = types.SimpleNamespace(given={'prompts'}, prompts=str(path), chat=False)
        for record in generate._read_prompts(flags):
            record['prompt'].encode()

    return (jsonl_lines(good) if suffix == '.jsonl' else damaged_bytes(good)), read, (InputError,)


CONFIG = b"""from transxssm_jax.config import Config, Model


def get_config():
    config = Config(model=Model(d_model=64, num_heads=4, num_kv_heads=2, num_ssd_groups=2, num_layers=8))
    config.optimizer.warmup_steps = 1 + 2 * 3
    return config
"""


def config_file(directory):
    path = directory / 'config.py'

    def read(damaged):
        path.write_bytes(damaged)
        config = config_lib.load(path)
        assert config_lib.from_json(config_lib.to_json(config)) == config

    return damaged_bytes(CONFIG), read, (ConfigError,)


def overrides(directory):
    path = directory / 'config.py'
    path.write_bytes(CONFIG)
    base = config_lib.load(path)
    names = (
        st.sampled_from(list(config_lib.flatten(base))) | st.text(max_size=12) | st.just('__class__.tokens_per_step')
    )

    def read(changes):
        config = config_lib.replace(base, changes)
        assert config_lib.from_json(config_lib.to_json(config)) == config

    return st.dictionaries(names, JSON | JSON.map(str), min_size=1, max_size=3), read, (ConfigError,)


def saved_json(directory):
    text = config_lib.to_json(config_lib.resolve(config_lib.Config())).encode()

    def read(damaged):
        config = config_lib.from_json(damaged)
        assert config_lib.from_json(config_lib.to_json(config)) == config

    return damaged_json(text), read, (ConfigError,)


def command_lines(directory):
    from test_cli import COMMANDS, load

    commands = [load(name)[1] for name in COMMANDS if name != 'evals.harness']
    flags = sorted({flag.name for command in commands for flag in command.flags})
    word = st.one_of(
        st.text(max_size=8),
        st.sampled_from(['--', '-', '--config', '--config.model.d_model', '--noconfig.train.tensorboard', '--config.']),
        st.builds('--{}={}'.format, st.sampled_from(flags) | st.text(max_size=4), SCALARS),
        st.sampled_from(flags).map('--{}'.format),
        st.sampled_from(flags).map('--no{}'.format),
    )
    value = st.tuples(st.sampled_from(commands), st.lists(word, max_size=6))

    def read(example):
        command, argv = example
        parsed = command.parse(argv)
        assert {flag.name for flag in command.flags} <= vars(parsed).keys()

    return value, read, (cli.UsageError,)


def source_names(directory):
    (directory / 'x').mkdir()
    (directory / 'x' / 'a.txt').write_text('text')
    (directory / 'wiki@2').write_text('text')
    parts = st.sampled_from(
        ['x', '/', 'a.txt', '*', '**', '[', '@', '2', '0', '.5', 'wiki@2', 'tfds:', '\0', '\udcff', '?']
    )
    names = st.lists(parts | st.text(max_size=3), max_size=6).map(''.join)

    def read(name):
        # Below the directory, so that no pattern lists the whole machine.
        spec, weight = source.parse_source(f'{directory}/x{name}'.replace('..', '.'))
        for piece in source.list_files(spec, 'train'):
            list(source.read_items(piece, 'text'))

    return names, read, (DataError,)


def sweep_state(directory):
    state = sweep_trials.State(directory, {'config': 'tiny', 'overrides': {'train.steps': '3'}})
    file = config_settings.find_file('tiny')
    for number in range(2):
        state.add(sweep_trials.make_trial(file, directory, {}, {'data.seed': number}, number))
    state.save()
    path = directory / sweep_trials.STATE_FILE

    def read(damaged):
        path.write_bytes(damaged)
        saved = sweep_trials.read_state(directory)
        sweep_trials.with_fates(state, saved)
        for number, record in enumerate(saved['trials']):
            name = record['name']
            trial = sweep_trials.make_trial(
                file, directory, saved['settings']['overrides'], record['varied'], number, name
            )
            assert trial.workdir.parent == directory

    return damaged_json(path.read_bytes()), read, (ConfigError,)


READERS = {
    'text': of_source('d.txt', ' '.join(texts(3)).encode()),
    'text, gzip': of_source('d.txt.gz', gzip.compress(' '.join(texts(3)).encode(), mtime=0)),
    'jsonl': of_source('d.jsonl', LINES, jsonl_lines),
    'jsonl, gzip': of_source('d.jsonl.gz', gzip.compress(LINES, mtime=0)),
    'jsonl, zstd': of_source('d.jsonl.zst', zst(LINES)),
    'parquet': parquet,
    'ArrayRecord shard': functools.partial(prepared, name_of='documents-train*', change=same_size),
    'manifest': functools.partial(prepared, name_of='train.manifest.json', change=damaged_json),
    'list of splits': functools.partial(prepared, name_of='dataset_info.json', change=damaged_json),
    'lengths': functools.partial(prepared, name_of='train.lengths.npy', change=damaged_bytes),
    'tokenizer': tokenizer_file,
    'published config': functools.partial(pytorch_files, name='config.json', change=damaged_json),
    'published index': functools.partial(pytorch_files, name='model.safetensors.index.json', change=damaged_json),
    'safetensors': functools.partial(pytorch_files, name='model.safetensors', change=safetensors_header),
    'config of an export': functools.partial(export_config, layout='transformers'),
    'config of a Llama': functools.partial(export_config, layout='llama'),
    'memory of an import': memory_of_an_import,
    'digests of a checkpoint': of_checkpoint('digests.json', damaged_json),
    'config of a checkpoint': of_checkpoint('config.json', damaged_json),
    'position of a checkpoint': of_checkpoint('data.json', damaged_json),
    'metrics of a checkpoint': of_checkpoint('metrics.json', damaged_json),
    'config of a workdir': saved_config,
    'metrics of a workdir': metric_records,
    'lease': lease_file,
    'prompts, text': functools.partial(prompts, suffix='.txt'),
    'prompts, jsonl': functools.partial(prompts, suffix='.jsonl'),
    'config file': config_file,
    'overrides': overrides,
    'saved config': saved_json,
    'command line': command_lines,
    'names of sources': source_names,
    'state of a sweep': sweep_state,
}


def check(name, directory, examples):
    """Runs a reader on examples; each ends well or by one of its documented errors."""
    strategy, read, documented = READERS[name](directory)
    counts = {'read': 0, 'refused': 0}

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(strategy)
    def run(example):
        try:
            read(example)
            counts['read'] += 1
        except documented as error:
            code, line = cli.explain(error)
            assert code == cli.ExitCode.WRONG_INPUT and '\n' not in line and 0 < len(line) < 2000
            counts['refused'] += 1

    run()
    return counts


@pytest.mark.parametrize('name', READERS)
def test_only_documented_errors(name, tmp_path):
    check(name, tmp_path, IN_SUITE)


@pytest.mark.fuzz
@pytest.mark.parametrize('name', READERS)
def test_only_documented_errors_in_many_examples(name, tmp_path, request):
    counts = check(name, tmp_path, request.config.getoption('--fuzz_examples'))
    print(f'{name}: {counts["read"]:,} read, {counts["refused"]:,} refused')
