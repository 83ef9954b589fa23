"""What is compiled is kept in the workdir: a second start compiles nothing again, and the process is as it was after it."""

import pathlib

import jax
import pytest
from small import small_config

from transxssm_jax.training import compilation_cache


@pytest.fixture(autouse=True)
def everything_is_kept():
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    yield
    jax.config.update('jax_persistent_cache_min_compile_time_secs', seconds)


def program(x):
    return jax.numpy.cumsum(x * 7) - 3


def files(directory: pathlib.Path) -> set[str]:
    return {path.name for path in directory.rglob('*-cache')}


def test_a_second_start_reads_what_the_first_compiled(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
    counts = []
    for _ in range(2):
        hits.clear()
        jax.clear_caches()
        with compilation_cache.kept(small_config(), tmp_path) as line:
            assert line == f'compiled programs are kept in {tmp_path / "compiled"}'
            jax.jit(program)(jax.numpy.ones(5)).block_until_ready()
        counts.append(hits.count('/jax/compilation_cache/cache_hits'))
    assert files(tmp_path / 'compiled') and counts[0] == 0 < counts[1]
    assert jax.config.jax_compilation_cache_dir == before


def test_it_can_be_left_out(tmp_path):
    with compilation_cache.kept(small_config(train_compilation_cache=False), tmp_path) as line:
        assert line == 'compiled programs are not kept'
        jax.jit(program)(jax.numpy.ones(6))
    assert not (tmp_path / 'compiled').exists()


def test_a_directory_that_the_environment_names_is_used(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'own'))
    try:
        with compilation_cache.kept(small_config(), tmp_path) as line:
            assert line == f'compiled programs are kept in {tmp_path / "own"}'
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'own')
    finally:
        jax.config.update('jax_compilation_cache_dir', before)
    assert not (tmp_path / 'compiled').exists()


def test_a_damaged_file_is_compiled_again(tmp_path):
    for _ in range(2):
        jax.clear_caches()
        with compilation_cache.kept(small_config(), tmp_path), pytest.MonkeyPatch.context():
            assert float(jax.jit(program)(jax.numpy.ones(7))[-1]) == 46
        for name in (tmp_path / 'compiled').rglob('*-cache'):
            name.write_bytes(b'damaged')
