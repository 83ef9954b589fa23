"""The notebooks: executed from top to bottom at the size of a test, and kept without outputs."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import quick_compile

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
OWNER = re.compile(r'github(?:\.com)?/([A-Za-z0-9-]+)/transxssm_jax')
SIZES = "SIZE = 'gpu'  #"


def cells(path, kind):
    return [''.join(cell['source']) for cell in json.loads(path.read_text())['cells'] if cell['cell_type'] == kind]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip('nbclient', reason='needs pip install -e .[dev]')
    nbformat = pytest.importorskip('nbformat')
    pytest.importorskip('matplotlib', reason='needs pip install -e .[eval]')
    notebook = nbformat.read(path, as_version=4)
    [first] = [cell for cell in notebook.cells if cell.source.startswith(SIZES)]
    first.source = first.source.replace("'gpu'", "'test'", 1)
    # One CPU device, as a user has.
    for name, value in (('XLA_FLAGS', quick_compile.XLA_FLAGS), ('JAX_PLATFORMS', 'cpu'), ('PYTHONPATH', str(ROOT))):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(
        'JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'compiled')
    )  # a trainer that is reopened compiles nothing
    monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    monkeypatch.setenv('PATH', f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}')
    client = nbclient.NotebookClient(notebook, timeout=600, resources={'metadata': {'path': str(tmp_path)}})
    client.create_kernel_manager()
    client.km.kernel_cmd = [sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}']
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]
    assert sum('image/png' in output.get('data', {}) for output in outputs) >= 3
    assert not any(output.output_type == 'error' for output in outputs)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_cleared(path):
    for cell in json.loads(path.read_text())['cells']:
        if cell['cell_type'] == 'code':
            assert cell['outputs'] == [] and cell['execution_count'] is None, cell['source']


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_it_opens_in_colab_at_one_size(path):
    [first, *_] = cells(path, 'markdown')
    [owner] = set(OWNER.findall(path.read_text()))
    assert f'](https://colab.research.google.com/github/{owner}/transxssm_jax/blob/main/notebooks/{path.name})' in first
    assert sum(source.startswith(SIZES) for source in cells(path, 'code')) == 1
    for text in cells(path, 'markdown'):
        for link in re.findall(r'\]\(([^):#]+)\)', text):
            assert (path.parent / link).exists(), link


def test_one_command_names_the_owner(tmp_path):
    shutil.copytree(ROOT / 'notebooks', tmp_path / 'notebooks')
    shutil.copy(ROOT / 'Makefile', tmp_path)

    def make(*arguments):
        return subprocess.run(['make', 'owner', *arguments], cwd=tmp_path, capture_output=True, text=True)

    for owner in ('state-space-labs', 'another1'):  # a second time too
        assert make(f'OWNER={owner}').returncode == 0
        found = [OWNER.findall(path.read_text()) for path in sorted((tmp_path / 'notebooks').iterdir())]
        assert found == [[owner] * 2] * 2
    for wrong in ([], ['OWNER=a/b'], ['OWNER=$(HOME)']):
        result = make(*wrong)
        assert result.returncode == 2 and 'make owner needs OWNER=name' in result.stderr
    assert len(list((tmp_path / 'notebooks').iterdir())) == 2


def test_both_are_there():
    assert [path.stem for path in NOTEBOOKS] == ['long_context', 'quickstart']
