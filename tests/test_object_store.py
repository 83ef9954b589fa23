"""Prepared data on an S3-compatible store that the test starts: the same batches as from the directory, without a mount."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from store_fixtures import start_store
from train_fixtures import losses, prepare_bytes, train, write_config

from transxssm_jax import config as config_lib
from transxssm_jax.data import object_store
from transxssm_jax.data.loader import make_loader
from transxssm_jax.data.manifest import DataError, read_manifest
from transxssm_jax.data.tokenizer import load_tokenizer
from transxssm_jax.data.vocabulary import describe

URL = 's3://texts/some/books'


@pytest.fixture(scope='module')
def store():
    with start_store('texts') as files:
        yield files


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
    return prepare_bytes(tmp_path_factory.mktemp('data'))


@pytest.fixture
def uploaded(store, directory, tmp_path, monkeypatch):
    """The prepared directory on the store, and an empty cache."""
    monkeypatch.setenv('TRANSXSSM_JAX_CACHE', str(tmp_path / 'cache'))
    if store.exists(URL):
        store.rm(URL, recursive=True)
    store.put(f'{directory}/', URL, recursive=True)
    return store


def batches(path, count=3, **settings):
    options = dict(seq_len=32, global_batch=8, seed=0) | settings
    with make_loader(path, 'train', **options) as loader:
        return [next(loader) for _ in range(count)]


@pytest.mark.parametrize('num_workers', [0, 2])
def test_batches_are_those_of_the_directory(uploaded, directory, num_workers):
    for ours, theirs in zip(batches(URL, num_workers=num_workers), batches(directory), strict=True):
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])
    assert read_manifest(URL, 'train').fingerprint() == read_manifest(directory, 'train').fingerprint()
    assert describe(URL) == describe(directory)
    assert load_tokenizer(URL).vocab_size == load_tokenizer(directory).vocab_size


def test_a_shard_is_fetched_once_and_again_where_it_is_another(uploaded, directory, tmp_path, monkeypatch):
    fetched = []
    fetch = object_store.fetch
    monkeypatch.setattr(object_store, 'fetch', lambda url, name, copy: fetched.append(name) or fetch(url, name, copy))
    batches(URL)
    shards = {shard.file for shard in read_manifest(URL, 'train').shards}
    assert shards <= set(fetched)
    fetched.clear()
    batches(URL)
    assert not shards & set(fetched) and 'train.lengths.npy' not in fetched, 'they are in the cache'
    assert 'train.manifest.json' in fetched, 'which may have changed'
    copy = read_manifest(URL, 'train').shard_path(read_manifest(URL, 'train').shards[0])
    copy.write_bytes(copy.read_bytes()[:-1])  # a cut copy is not used
    for ours, theirs in zip(batches(URL), batches(directory), strict=True):
        np.testing.assert_array_equal(ours['tokens'], theirs['tokens'])
    assert not list(pathlib.Path(os.environ['TRANSXSSM_JAX_CACHE']).rglob('*.tmp'))


def test_a_run_trains_from_the_store(uploaded, directory, tmp_path):
    config = write_config(tmp_path, directory)
    assert train(config, tmp_path / 'here', train__steps=3).code == 0
    result = train(config, tmp_path / 'there', train__steps=3, data__path=URL)
    assert result.code == 0, result
    assert losses(tmp_path / 'here') == losses(tmp_path / 'there')
    assert json.loads((tmp_path / 'there' / 'config.json').read_text())['data']['path'] == URL


def test_what_is_damaged_or_missing_there_is_named(uploaded, directory):
    shard = read_manifest(directory, 'train').shards[0]
    with uploaded.open(f'{URL}/{shard.file}', 'wb') as file:
        file.write(b'short')
    with pytest.raises(DataError, match=f'shard {URL}/{shard.file} is missing or corrupt .5 bytes instead of'):
        batches(URL)
    uploaded.rm(f'{URL}/{shard.file}')
    with pytest.raises(DataError, match=f'shard {URL}/{shard.file} is missing or corrupt'):
        batches(URL)
    with pytest.raises(DataError, match="has no split 'test', only train, validation"):
        read_manifest(URL, 'test')


@pytest.mark.parametrize('path', ['s3://texts/nothing', 's3://no-such-bucket/data'])
def test_an_empty_place_is_refused_in_one_line(uploaded, directory, tmp_path, path):
    result = train(write_config(tmp_path, directory), tmp_path / 'run', data__path=path)
    assert result.code == 2 and path in result.err and result.err.count('\n') == 1, result
    assert not (tmp_path / 'run').exists()


def test_a_store_that_refuses_is_named_with_its_reason(uploaded, directory, tmp_path, monkeypatch):
    def refuse(url):
        raise PermissionError(13, 'Forbidden')

    monkeypatch.setattr(object_store, '_filesystem', refuse)
    result = train(write_config(tmp_path, directory), tmp_path / 'run', data__path=URL)
    assert result.code == 2 and f'{URL} cannot be read' in result.err and 'Forbidden' in result.err, result
    assert result.err.count('\n') == 1


# ---- without a store -----------------------------------------------------------


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    import fsspec

    def missing(scheme, **options):
        raise ImportError('Install s3fs to access S3')

    monkeypatch.setattr(fsspec, 'filesystem', missing)
    monkeypatch.setenv('TRANSXSSM_JAX_CACHE', str(tmp_path))
    with pytest.raises(object_store.StoreError, match='s3://a/b needs the package s3fs.*pip install s3fs'):
        read_manifest('s3://a/b', 'train')


def test_places_are_for_data_alone(tmp_path):
    config = config_lib.load('configs/tiny.py', {'data.path': 'gs://bucket/data'})
    assert object_store.is_url(config.data.path)
    with pytest.raises(config_lib.ConfigError, match='must be a path; mount the bucket'):
        config_lib.load('configs/tiny.py', {'data.path': 'http://host/data'})
    with pytest.raises(config_lib.ConfigError, match='must be a path; mount the bucket'):
        config_lib.load('configs/tiny.py', {'train.init_from': 'gs://bucket/run'})


def test_caches_of_two_places_are_apart(monkeypatch, tmp_path):
    monkeypatch.setenv('TRANSXSSM_JAX_CACHE', str(tmp_path))
    assert object_store.cache_of('s3://a/b') == object_store.cache_of('s3://a/b/')
    assert object_store.cache_of('s3://a/b') != object_store.cache_of('s3://a/c')
    assert object_store.cache_of('s3://a/b') != object_store.cache_of('gs://a/b')
    shutil.rmtree(tmp_path)
    (tmp_path).write_text('a file')
    with pytest.raises(object_store.StoreError, match='TRANSXSSM_JAX_CACHE'):
        object_store.cache_of('s3://a/b')
