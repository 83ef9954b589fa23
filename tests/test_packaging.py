"""What is installed: a wheel that works without the checkout, its console commands and configs, and its types."""

import configparser
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest

from transxssm_jax import settings
from transxssm_jax.parallel import cluster

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """A directory with what the wheel holds."""
    pytest.importorskip('setuptools', reason='needs pip install -e .[dev]')
    directory = tmp_path_factory.mktemp('wheel')
    # A copy: setuptools leaves build/ and *.egg-info where it builds.
    source = directory / 'source'
    names = ('pyproject.toml', 'README.md', 'LICENSE', 'transxssm_jax', 'pallas_kernels', 'configs')
    source.mkdir()
    subprocess.run(['cp', '-r', *(str(ROOT / name) for name in names), str(source)], check=True)
    build = 'import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))'
    result = subprocess.run(
        [sys.executable, '-c', build, str(directory)], cwd=source, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(directory / result.stdout.splitlines()[-1]) as wheel:
        wheel.extractall(directory / 'site')
    return directory / 'site'


def python(installed, *words):
    """A Python elsewhere, which finds what the wheel holds and nothing of the checkout."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=installed.parent,
        env=os.environ | {'PYTHONPATH': str(installed), 'JAX_PLATFORMS': 'cpu'},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_wheel_holds_every_module_and_config(installed):
    for folder, there in (('transxssm_jax', ''), ('pallas_kernels', ''), ('configs', 'transxssm_jax/')):
        for path in (ROOT / folder).rglob('*.py'):
            assert (installed / there / path.relative_to(ROOT)).is_file(), path
    assert (installed / 'transxssm_jax' / 'py.typed').exists() and not (installed / 'tests').exists()


def test_configs_are_found_by_name_without_the_checkout(installed):
    program = (
        'import transxssm_jax as tx; print(tx.__file__); print(tx.load_config("pods/1p3b_v5e_256").mesh.fsdp); '
        'from transxssm_jax import config_sweep; print(len(config_sweep.load("learning_rate")))'
    )
    result = python(installed, '-c', program)
    assert result.stdout.splitlines() == [str(installed / 'transxssm_jax' / '__init__.py'), '16', '8'], result
    result = python(installed, '-m', 'transxssm_jax.train', '--config=1p3', '--workdir=w')
    assert result.returncode == 2 and 'no such file; did you mean 1p3b?' in result.stderr


def test_a_file_here_goes_before_a_shipped_config_and_a_directory_after(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = ROOT / 'configs'
    assert settings.find_file('tiny') == shipped / 'tiny.py'
    (tmp_path / 'tiny').mkdir()
    assert settings.find_file('tiny') == shipped / 'tiny.py'
    (tmp_path / 'mine').mkdir()
    assert settings.find_file('mine') == pathlib.Path('mine')
    (tmp_path / '30m').write_text('')
    assert settings.find_file('30m') == pathlib.Path('30m')
    assert settings.find_file('search', folder='sweeps') == shipped / 'sweeps' / 'search.py'
    # As the pages write it, from any working directory.
    assert settings.find_file('configs/tiny.py') == shipped / 'tiny.py'
    assert settings.find_file('./configs/paper/small') == shipped / 'paper' / 'small'
    assert settings.find_file('configs/sweeps/search.py', folder='sweeps') == shipped / 'sweeps' / 'search.py'
    (tmp_path / 'configs' / 'paper' / 'small').mkdir(parents=True)
    assert settings.find_file('configs/paper/small') == pathlib.Path('configs/paper/small')
    for name in ('../tiny', '/tiny', ''):
        with pytest.raises(settings.ConfigError, match='no such file'):
            settings.find_file(name)


def test_every_console_command_starts_its_module(installed):
    [entries] = installed.glob('*.dist-info/entry_points.txt')
    parser = configparser.ConfigParser()
    parser.read(entries)
    commands = dict(parser['console_scripts'])
    assert {'transxssm-train', 'transxssm-plan', 'transxssm-generate', 'transxssm-prepare', 'transxssm-sweep'} <= set(
        commands
    )
    for name, target in commands.items():
        module, _, function = target.partition(':')
        assert module == 'transxssm_jax.scripts'
        assert importlib.util.find_spec(f'transxssm_jax.{function.replace("__", ".")}'), name
    # As pip's script does it.
    program = 'import sys; from transxssm_jax.scripts import data__prepare; sys.exit(data__prepare())'
    result = python(installed, '-c', program, '--output=data')
    assert result.returncode == 2 and result.stderr == 'error: --tokenizer is missing, e.g. --tokenizer=byte\n'


def test_the_public_surface_is_typed():
    pytest.importorskip('mypy', reason='needs pip install -e .[dev]')
    result = subprocess.run([sys.executable, '-m', 'mypy'], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout


def test_the_citation_names_this_version():
    text = (ROOT / 'CITATION.cff').read_text()
    assert f'version: {PROJECT["project"]["version"]}\n' in text and 'arXiv:2506.09507' in text


# ---- JAX's internals -----------------------------------------------------------


def test_private_names_of_jax_stand_in_guarded_functions():
    allowed = {
        'transxssm_jax/parallel/cluster.py',
        'pallas_kernels/attention/cudnn.py',
        'pallas_kernels/attention/decode.py',
    }
    users = {
        str(path.relative_to(ROOT))
        for folder in ('transxssm_jax', 'pallas_kernels')
        for path in (ROOT / folder).rglob('*.py')
        if re.search(r'\bjax\._src\b', path.read_text())
    }
    assert users <= allowed


def test_a_jax_without_them_is_one_line(monkeypatch):
    assert cluster.distributed_state() is not None and cluster.has_tpu() in (True, False)
    monkeypatch.setitem(sys.modules, 'jax._src.distributed', None)
    with pytest.raises(
        cluster.ProcessesError, match=r'uses jax\._src\.distributed\.global_state, which jax .* install jax'
    ):
        cluster.distributed_state()
