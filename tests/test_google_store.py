"""gs:// as s3:// is tested elsewhere: what the project does with files on a store, data there, and a run that goes on there."""

import os
import shutil

import numpy as np
import pytest
from store_fixtures import start_google_store, start_store
from train_fixtures import checkpoint_steps, losses, prepare_bytes, train, write_config

from transxssm_jax.data import object_store
from transxssm_jax.data.loader import make_loader
from transxssm_jax.training import remote_workdir, store_lease


@pytest.fixture(scope='module')
def google():
    with start_google_store('runs') as files:
        yield files


@pytest.mark.parametrize('scheme, start', [('s3', start_store), ('gs', start_google_store)])
def test_both_kinds_of_store_do_the_same(scheme, start, tmp_path):
    with start('files'):
        files = object_store.Files(f'{scheme}://files/some/place')
        assert files.names() == []
        files.write('a/small', b'abc')
        files.write('empty', b'')
        large = os.urandom(6 << 20)
        (tmp_path / 'large').write_bytes(large)
        files.put(tmp_path / 'large', 'a/large')
        assert files.names() == ['a/large', 'a/small', 'empty']
        assert files.size('a/large') == len(large) and files.size('empty') == 0
        assert files.fetch('a/large', tmp_path / 'copies' / 'large').read_bytes() == large
        files.write('a/small', b'others')
        assert files.read('a/small') == b'others' and files.read('empty') == b''
        files.remove(['a/small', 'no such file'])
        assert files.names() == ['a/large', 'empty']
        for action in (files.size, files.read, lambda name: files.fetch(name, tmp_path / 'nothing')):
            with pytest.raises(FileNotFoundError):
                action('a/small')
        assert sorted(os.listdir(tmp_path)) == ['copies', 'large'] and os.listdir(tmp_path / 'copies') == ['large']


def test_a_run_on_google_cloud_storage_goes_on_on_another_machine(google, tmp_path, monkeypatch):
    monkeypatch.setenv('TRANSXSSM_JAX_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(remote_workdir, 'SCAN_SECONDS', 0.05)
    prepared = prepare_bytes(tmp_path)
    google.put(f'{prepared}/', 'gs://runs/data', recursive=True)
    with (
        make_loader('gs://runs/data', 'train', seq_len=32, global_batch=8, seed=0) as there,
        make_loader(prepared, 'train', seq_len=32, global_batch=8, seed=0) as here,
    ):
        for ours, theirs in zip((next(there) for _ in range(3)), (next(here) for _ in range(3)), strict=True):
            np.testing.assert_array_equal(ours['tokens'], theirs['tokens'])
    config, url = write_config(tmp_path, prepared), 'gs://runs/run'
    settings = dict(data__path='gs://runs/data', train__checkpoint_every_steps=2, train__eval_every_steps=0)
    assert train(config, tmp_path / 'whole', train__steps=4, **settings).code == 0
    first = train(config, url, train__steps=2, **settings)
    assert first.code == 0, first
    shutil.rmtree(tmp_path / 'cache')
    second = train(config, url, train__steps=4, **settings)
    assert second.code == 0 and 'resuming from step 2' in second.out, second
    names = object_store.Files(url).names()
    assert remote_workdir.complete_steps(names) == checkpoint_steps(tmp_path / 'whole')
    assert store_lease.NAME not in names
    object_store.Files(url).fetch('metrics.jsonl', tmp_path / 'there' / 'metrics.jsonl')
    assert losses(tmp_path / 'there') == losses(tmp_path / 'whole')
