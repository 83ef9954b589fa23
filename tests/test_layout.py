"""The order of the modules: imports run one way, and no file grows beyond what one reads at a sitting."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# A wing imports only from the wings before it and from what all stand on; commands import wings, and nobody imports a command.
GROUND = {
    'config', 'config_optimizer', 'config_rules', 'config_sweep', 'config_watch', 'settings', 'layer_pattern', 'cli', 'children',
    'streams',
}  # fmt: skip
WINGS = ['parallel', 'model', 'data', 'training', 'inference', 'planning', 'pytorch', 'evals']
CALL_KERNELS = {'model', 'inference'}  # the mixers and their forms for decoding
NO_KERNELS = {'chips', 'device', 'hlo'}  # facts of devices and the reading of compiled programs
PACKAGE = sorted((ROOT / 'transxssm_jax').rglob('*.py'))
KERNELS = sorted((ROOT / 'pallas_kernels').rglob('*.py'))


def imports(path):
    """Dotted names that a file imports, anywhere in it; `from a import b` gives a.b as well as a."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module
            if path.stem.endswith('_transxssm') and node.level == 1:  # copied beside an export, outside of the package
                module = f'transxssm_jax.pytorch.{module}'
            else:
                assert node.level == 0, f'{path}:{node.lineno}: imports are absolute'
            names |= {module} | {f'{module}.{alias.name}' for alias in node.names}
    return names


def roots(path):
    return {name.partition('.')[0] for name in imports(path)}


def parts(path):
    """Modules and wings of the package that a file imports."""
    return {name.split('.')[1] for name in imports(path) if name.startswith('transxssm_jax.')}


def name_of(path):
    return path.relative_to(ROOT / 'transxssm_jax').parts[0].removesuffix('.py')


def test_the_walk_sees_imports(tmp_path):
    path = tmp_path / 'file.py'
    path.write_text(
        'import a.b as c\ndef f():\n    from transxssm_jax import model, data as d\n    from d.e import g\n'
    )
    assert imports(path) == {'a.b', 'transxssm_jax', 'transxssm_jax.model', 'transxssm_jax.data', 'd.e', 'd.e.g'}
    assert roots(path) == {'a', 'transxssm_jax', 'd'}
    assert parts(path) == {'model', 'data'}


def test_every_wing_is_there():
    folders = {path.parent.name for path in PACKAGE if path.parent.name != 'transxssm_jax'}
    assert folders == set(WINGS)
    assert len(KERNELS) > 5


@pytest.mark.parametrize('path', PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    own = name_of(path)
    if own == '__init__':
        assert roots(path) <= {'importlib', 'typing', 'transxssm_jax'}  # for type checkers; the next test has the rest
    elif own in GROUND:
        assert parts(path) <= GROUND
    elif own in WINGS:
        assert parts(path) <= GROUND | set(WINGS[: WINGS.index(own) + 1])
    else:
        assert parts(path) <= GROUND | set(WINGS) | {own}  # a command


def test_the_package_imports_nothing_of_its_own():
    program = (
        "import sys, transxssm_jax; print([n for n in sys.modules if n.startswith(('transxssm_jax.', 'jax', 'numpy'))])"
    )
    result = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout == '[]\n'


@pytest.mark.parametrize('path', sorted((ROOT / 'transxssm_jax' / 'data').glob('*.py')), ids=lambda path: path.stem)
def test_data_stands_alone(path):
    """Loader processes must not wait for JAX programs to be imported."""
    assert parts(path) <= GROUND | {'data'}


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
        assert {name.split('.')[1] for name in imports(path) if name.startswith('pallas_kernels.')} <= NO_KERNELS


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
