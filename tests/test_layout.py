"""The order of the modules: imports run one way, and no file grows beyond what one reads at a sitting."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Reading order; a module imports only from what stands before it. data/ is a package of its own, with its own order.
ORDER = ['config', 'mesh', 'layers', 'rope', 'attention', 'ssd', 'mamba2', 'model', 'loss', 'optim', 'data', 'step',
         'flops', 'hlo', 'bounds', 'search', 'plan', 'hosts', 'checkpoint', 'metrics', 'sampling', 'completion', 'decode',
         'generate', 'evals', 'published', 'convert', 'train']
DATA_ORDER = ['index', 'source', 'tokenizer', 'workers', 'packing', 'shards', 'prepare', 'loader']
CALL_KERNELS = {'attention', 'ssd', 'mamba2', 'generate'}
NO_KERNELS = {'chips', 'tpu_traffic'}  # facts of devices and the reading of compiled programs, which planning shares
PACKAGE = sorted((ROOT / 'transxssm_jax').rglob('*.py'))
KERNELS = sorted((ROOT / 'pallas_kernels').rglob('*.py'))


def imports(path):
    """Dotted names that a file imports, anywhere in it; `from a import b` gives a.b as well as a."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}:{node.lineno}: imports are absolute'
            names |= {node.module} | {f'{node.module}.{alias.name}' for alias in node.names}
    return names


def roots(path):
    return {name.partition('.')[0] for name in imports(path)}


def modules(path, package, known):
    """Which of the known modules of a package a file imports."""
    parts = {tuple(name.split('.')) for name in imports(path) if name.startswith(package + '.')}
    depth = package.count('.') + 1
    return {part[depth] for part in parts if part[depth] in known}


def name_of(path):
    return path.relative_to(ROOT / 'transxssm_jax').parts[0].removesuffix('.py')


def test_the_walk_sees_imports(tmp_path):
    path = tmp_path / 'file.py'
    path.write_text('import a.b as c\ndef f():\n    from transxssm_jax import step, loss as l\n    from d.e import g\n')
    assert imports(path) == {'a.b', 'transxssm_jax', 'transxssm_jax.step', 'transxssm_jax.loss', 'd.e', 'd.e.g'}
    assert roots(path) == {'a', 'transxssm_jax', 'd'}
    assert modules(path, 'transxssm_jax', ORDER) == {'step', 'loss'}


def test_every_module_has_its_place():
    assert {name_of(path) for path in PACKAGE} - {'__init__'} <= set(ORDER)
    assert len(PACKAGE) > 15 and len(KERNELS) > 5


@pytest.mark.parametrize('path', PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_stands_above_it(path):
    own = name_of(path)
    if own == '__init__':
        assert not imports(path)
        return
    later = modules(path, 'transxssm_jax', ORDER) - set(ORDER[:ORDER.index(own)])
    assert later <= ({own} if path.parent.name != 'transxssm_jax' else set())


@pytest.mark.parametrize('path', sorted((ROOT / 'transxssm_jax' / 'data').glob('*.py')), ids=lambda path: path.stem)
def test_a_module_of_data_imports_only_what_stands_above_it(path):
    imported = modules(path, 'transxssm_jax.data', DATA_ORDER)
    assert modules(path, 'transxssm_jax', ORDER) <= {'data'}, 'data/ stands alone'
    if path.stem == '__init__':
        assert not imported
    else:
        # A module may name itself, for worker processes that must find it by its real name.
        assert imported <= set(DATA_ORDER[:DATA_ORDER.index(path.stem) + 1])


def test_config_imports_no_jax():
    assert roots(ROOT / 'transxssm_jax' / 'config.py').isdisjoint({'jax', 'jaxlib', 'flax', 'optax', 'numpy', 'orbax'})


@pytest.mark.parametrize('path', KERNELS, ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_stand_alone(path):
    import sys

    # bench.py and its kind are programs, which may use what a program needs.
    allowed = set(sys.stdlib_module_names) | {'jax', 'numpy', 'jaxtyping', 'pallas_kernels'}
    assert roots(path) <= allowed


@pytest.mark.parametrize('path', PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_mixers_and_decoding_call_kernels(path):
    if name_of(path) not in CALL_KERNELS:
        parts = {name.split('.')[1] for name in imports(path) if name.startswith('pallas_kernels.')}
        assert parts <= NO_KERNELS


@pytest.mark.parametrize('path', PACKAGE + KERNELS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_packages_never_import_configs_or_tests(path):
    assert roots(path).isdisjoint({'configs', 'tests', 'launch'})


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').rglob('*.py')), ids=lambda path: path.stem)
def test_configs_import_only_the_config(path):
    names = {name for name in imports(path) if not name.startswith('configs')}
    assert {name for name in names if not name.startswith('transxssm_jax.config')} == set()
    assert names, 'a config that builds no Config'


@pytest.mark.parametrize('path', PACKAGE + KERNELS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_longer_than_450_lines(path):
    assert len(path.read_text().splitlines()) <= 450


def test_no_module_of_odds_and_ends():
    names = {path.stem for path in PACKAGE + KERNELS}
    assert names.isdisjoint({'utils', 'util', 'helpers', 'common', 'misc', 'registry', 'base'})
