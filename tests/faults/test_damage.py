"""Nothing silently wrong: whatever bit of whatever file is turned or cut off, what is read is what was written, or refused.

For each kind of file: a bit is turned at a random place, or the file is cut at one, and the reader reads. It may raise its
documented errors, or return what it returned before the damage; anything else fails. The suite tries each kind a dozen times,

    python -m pytest -m faults tests/faults/test_damage.py -s

1,800 times (`--fault_tries=N` another number), and prints a table.
"""

import collections
import functools
import json
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest
from data_fixtures import run_prepare, texts, train_tokenizer, write_jsonl
from small import small_config

from transxssm_jax import cli
from transxssm_jax import config as config_lib
from transxssm_jax.data.loader import make_loader, read_documents
from transxssm_jax.data.manifest import DataError, read_manifest
from transxssm_jax.data.tokenizer import load_tokenizer
from transxssm_jax.training import checkpoint, ledger, run_directory
from transxssm_jax.training.checkpoint import CheckpointError, Checkpoints
from transxssm_jax.training.local_checkpoint import LocalCheckpoints

IN_SUITE = 12


def make_state(step):
    """A state with arrays of some size, so that there are many bytes to damage."""
    rng = np.random.default_rng(step)
    params = {'embedding': rng.standard_normal((96, 64)), 'layers': {'ssd': {'scale': rng.standard_normal((4, 64))}}}
    params = jax.tree.map(lambda array: array.astype(np.float32), params)
    return jax.device_put(
        {'step': np.int32(step), 'params': params, 'opt_state': {'mu': params, 'count': np.int32(step)}}
    )


def abstract():
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), make_state(0)
    )


def plain(state):
    return jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), state)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A workdir with checkpoints of steps 3 and 6, and local ones of 2 and 4."""
    workdir = tmp_path_factory.mktemp('saved') / 'run'
    config = small_config(
        train_keep_last=9,
        train_checkpoint_local_dir=str(workdir.parent / 'local'),
        train_checkpoint_local_every_steps=2,
    )
    run_directory.open_workdir(workdir, config)
    checkpoints, local = Checkpoints(workdir, config), LocalCheckpoints(workdir, config)
    for step in (3, 6):
        checkpoints.save(step, make_state(step), {'next_step': step, 'skips': [[2, 1]]}, 1.0 / step)
        checkpoints.wait()
        local.save(step + 1, make_state(step + 1), {'next_step': step + 1})
        local.wait()
    checkpoints.close()
    return workdir, config


def restored(workdir, config):
    """What a start would go on from: one of the checkpoints, whole, or none where it is refused."""
    found = Checkpoints(workdir, config).restore(abstract())
    for path in (workdir / 'checkpoints').glob('*.unreadable'):
        path.rename(path.with_suffix(''))
    step, state, position = found
    assert position == {'next_step': step, 'skips': [[2, 1]]}
    assert plain(state) == plain(make_state(step))
    return step


def restored_locally(workdir, config):
    found = LocalCheckpoints(workdir, config).restore(abstract(), 0)
    if found is None:
        return 'none'
    step, state, position = found
    assert position == {'next_step': step} and plain(state) == plain(make_state(step))
    return step


def of_checkpoint(pattern):
    def make(directory, saved):
        workdir, config = copy(saved, directory)
        paths = [path for path in sorted((workdir / 'checkpoints' / '6').glob(pattern)) if path.is_file()]
        return paths, functools.partial(restored, workdir, config), 6

    return make


def of_local(name):
    def make(directory, saved):
        workdir, config = copy(saved, directory)
        [path] = (directory / 'local').glob(f'*/process-0/7/{name}')
        return [path], functools.partial(restored_locally, workdir, config), 7

    return make


def copy(saved, directory):
    workdir, config = saved
    shutil.copytree(workdir.parent, directory, dirs_exist_ok=True)
    return directory / 'run', config_lib.replace(config, {'train.checkpoint_local_dir': str(directory / 'local')})


def evaluation_loss(directory, saved):
    workdir, config = copy(saved, directory)

    def read():
        losses = Checkpoints(workdir, config)._eval_losses()
        assert losses in ({3: 1 / 3, 6: 1 / 6}, {3: 1 / 3})
        return len(losses)

    return [workdir / 'checkpoints' / '6' / 'metrics.json'], read, 2


def workdir_config(directory, saved):
    """It has no digest, is read by people, and decides nothing: what a run goes on from is a checkpoint's."""
    workdir, config = copy(saved, directory)

    def read():
        content = (workdir / 'config.json').read_bytes()
        assert run_directory.saved_config(workdir) == saved[1]
        try:
            run_directory.open_workdir(workdir, config)  # as a start does; it writes the file anew
            assert config_lib.from_json((workdir / 'config.json').read_text()) == config
        finally:
            (workdir / 'config.json').write_bytes(content)
        return 'read'

    return [workdir / 'config.json'], read, 'read'


def made_data(directory):
    data = directory / 'data'
    tokenizer = train_tokenizer(directory / 'tokenizer.json', ['<|endoftext|>'])
    for split in ('train', 'validation'):
        source = write_jsonl(directory / f'{split}.jsonl', texts(40))
        assert run_prepare(data, source, split=split, tokenizer=str(tokenizer), eos='<|endoftext|>') == 0
    return data


def of_data(pattern):
    def make(directory, saved):
        data = made_data(directory)

        def read():
            found = [tokens.tobytes() for tokens in read_documents(data, 'train')]
            with make_loader(data, 'train', seq_len=16, global_batch=4, seed=3, num_threads=0) as loader:
                for _ in range(4):
                    found += [values.tobytes() for values in next(loader).values()]
            tokenizer = load_tokenizer(data)
            found.append([tokenizer.encode_batch(['a text', 'é🙂'])[0].tobytes(), tokenizer.decode([3, 4, 5, 6])])
            return [found, read_manifest(data, 'train').fingerprint()]

        paths = [path for path in sorted(data.glob(pattern)) if path.is_file()]
        return paths, read, read()

    return make


def ledger_lines(directory, saved):
    path = directory / 'ledger' / 'process-0.jsonl'
    path.parent.mkdir()
    line = dict.fromkeys(ledger.NUMBERS, 1.25) | dict.fromkeys(ledger.TEXTS, 'ab') | {'rows': [[0, 8]]}
    lines = {step: {'step': step} | line | {'batch': f'{step:016x}', 'loss': 1.0 / step} for step in range(1, 9)}
    path.write_text(''.join(map(ledger.sealed, lines.values())))
    wanted = {step: json.loads(ledger.sealed(line)) for step, line in lines.items()}

    def read():
        found = 0
        for step in range(1, 9):
            try:
                [own] = ledger.read_lines(directory, step, step)[step]
            except ledger.LedgerError:
                continue  # that line is no more
            assert own == wanted[step]
            found += 1
        if found < 8:
            raise ledger.LedgerError('lines are missing')
        return found

    return [path], read, 8


def ledger_config(directory, saved):
    config = saved[1]
    name = ledger.digest.of_config(config)
    path = directory / 'ledger' / f'config-{name}.json'
    path.parent.mkdir()
    path.write_text(config_lib.to_json(config))
    return [path], lambda: ledger.read_config(directory, name) == config, True


KINDS = {
    'arrays of the parameters': of_checkpoint('params/ocdbt.process_0/d/*'),
    'arrays of the optimizer': of_checkpoint('training/ocdbt.process_0/d/*'),
    'indexes and metadata of arrays': of_checkpoint('*/*'),
    'config of a checkpoint': of_checkpoint('config.json'),
    'position of a checkpoint': of_checkpoint('data.json'),
    'digests of a checkpoint': of_checkpoint('digests.json'),
    'evaluation loss of a checkpoint': evaluation_loss,
    'local checkpoint, arrays': of_local('state.safetensors'),
    'local checkpoint, position': of_local('data.json'),
    'local checkpoint, digests': of_local('digests.json'),
    'config of the workdir': workdir_config,
    'ledger, lines': ledger_lines,
    'ledger, config': ledger_config,
    'ArrayRecord shard': of_data('documents-train*'),
    'manifest': of_data('train.manifest.json'),
    'lengths': of_data('train.lengths.npy'),
    'list of splits': of_data('dataset_info.json'),
    'tokenizer of the data': of_data('tokenizer.json'),
}
REFUSED = (CheckpointError, DataError, ledger.LedgerError, config_lib.ConfigError)


def damage(content: bytes, rng: random.Random) -> bytes:
    """One bit turned, or cut at a place."""
    at = rng.randrange(len(content))
    if rng.random() < 0.25:
        return content[:at]
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


def attack(name: str, directory: pathlib.Path, saved, tries: int) -> collections.Counter:
    paths, read, whole = KINDS[name](directory, saved)
    assert paths and read() == whole
    rng, counts = random.Random(name), collections.Counter()
    for _ in range(tries):
        path = rng.choice(paths)
        content = path.read_bytes()
        if not content:
            continue
        path.write_bytes(damage(content, rng))
        try:
            found = read()
        except REFUSED as error:
            code, line = cli.explain(error)
            assert code == cli.ExitCode.WRONG_INPUT and '\n' not in line
            counts['refused'] += 1
        else:
            # An older checkpoint is no wrong one; anything else must be what it was.
            assert found == whole or name.startswith(
                ('arrays', 'indexes', 'config of a', 'position', 'digests', 'local', 'eval')
            )
            counts['as it was' if found == whole else 'the one before'] += 1
        finally:
            if path.parent.exists():
                path.write_bytes(content)
            else:  # set aside with its checkpoint, and brought back by the reader only where it succeeded
                for aside in (directory / 'run' / 'checkpoints').glob('*.unreadable'):
                    aside.rename(aside.with_suffix(''))
                path.write_bytes(content)
    return counts


@pytest.mark.parametrize('name', KINDS)
def test_no_damage_is_taken_for_data(name, saved, tmp_path):
    assert sum(attack(name, tmp_path, saved, IN_SUITE).values()) == IN_SUITE


@pytest.mark.faults
@pytest.mark.timeout(7200)
@pytest.mark.parametrize('name', KINDS)
def test_no_damage_is_taken_for_data_in_many_tries(name, saved, tmp_path, request):
    counts = attack(name, tmp_path, saved, request.config.getoption('--fault_tries'))
    columns = ('refused', 'the one before', 'as it was')
    print(
        f'\n| {name} | {sum(counts.values()):,} | ' + ' | '.join(f'{counts[column]:,}' for column in columns) + ' | 0 |'
    )


def test_the_reader_sees_what_is_wrong(saved, tmp_path):
    """Without its digest a turned bit in an array is loaded: the harness would notice."""
    workdir, config = copy(saved, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.files.digest, 'check', lambda *args: None)
        paths, read, _ = KINDS['arrays of the parameters'](tmp_path / 'again', saved)
        seen = collections.Counter()
        rng = random.Random(1)
        for _ in range(60):
            path = rng.choice(paths)
            content = path.read_bytes()
            path.write_bytes(damage(content, rng))
            try:
                read()
            except AssertionError:
                seen['silent'] += 1
            except REFUSED:
                pass
            finally:
                for aside in (tmp_path / 'again' / 'run' / 'checkpoints').glob('*.unreadable'):
                    aside.rename(aside.with_suffix(''))
                path.write_bytes(content)
    assert seen['silent'] > 3
