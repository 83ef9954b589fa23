"""The pages: commands that exist, with flags, settings and files that exist; Python that is Python; a site without a warning."""

import importlib
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from transxssm_jax import config as config_lib
from transxssm_jax import config_sweep, settings
from transxssm_jax.cli import UserError

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]


def commands(path):
    """Words of every `python -m transxssm_jax...` line of a page's code."""
    text = '\n'.join(re.findall(r'```[a-z]*\n(.*?)```', path.read_text(), re.DOTALL))
    for line in re.sub(r'\\\n\s*', ' ', text).splitlines():
        if line.startswith('python -m transxssm_jax'):
            # What stands for something: a page's `...`, and shell words that only bash reads.
            yield [word for word in shlex.split(line, comments=True) if not word.endswith('=...') and word != '...']


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.stem)
def test_every_command_of_the_pages_takes_its_flags(path):
    """Each is parsed by its command, and its config and settings are read; the data and runs that it names need not exist."""
    for words in commands(path):
        module = importlib.import_module(words[2])
        if words[2] == 'transxssm_jax.convert':
            command = {'import': module.IMPORT, 'export': module.EXPORT}[words[3]]
            command.parse(words[4:])
            continue
        try:
            flags = module.COMMAND.parse(words[3:])
        except UserError as error:
            assert 'is missing' in str(error) and '...' in path.read_text(), (words, error)
            continue
        if getattr(flags, 'config_file', '') and not flags.config_file.startswith('runs/'):
            try:
                config = config_lib.load(flags.config_file, flags.overrides)
            except config_lib.ConfigError as error:
                # extending.md adds a mixer and an optimizer before it calls them.
                assert path.stem == 'extending' and ('gated_linear' in str(error) or 'lion' in str(error)), error
            else:
                assert config.train.steps
        if words[2] == 'transxssm_jax.sweep' and flags.sweep != 'my_sweep.py':
            config_sweep.load(flags.sweep)


def test_there_are_commands():
    assert sum(len(list(commands(path))) for path in PAGES) >= 30


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.stem)
def test_launch_lines_are_taken_by_their_scripts(path):
    text = re.sub(r'\\\n\s*', ' ', path.read_text())
    for line in text.splitlines():
        if not re.match(r'launch/\w+\.sh .* -- ', line):
            continue
        words = shlex.split(line, comments=True)
        before, after = words[: words.index('--')], words[words.index('--') :]
        result = subprocess.run(
            [ROOT / before[0], *before[1:], '--dry-run', *after], capture_output=True, text=True, cwd=ROOT
        )
        assert result.returncode == 0, (line, result.stderr)


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.stem)
def test_python_of_the_pages_is_python(path):
    for program in re.findall(r'```python\n(.*?)```', path.read_text(), re.DOTALL):
        try:
            compile(program, str(path), 'exec')
        except SyntaxError as error:  # a piece of a program, with ... in it
            assert path.stem == 'extending', error


def test_the_sweeps_of_the_page_are_sweeps(tmp_path):
    for i, program in enumerate(
        re.findall(r'```python\n(.*?)```', (ROOT / 'docs' / 'sweeps.md').read_text(), re.DOTALL)
    ):
        (tmp_path / f'{i}.py').write_text(program)
        assert config_sweep.load(str(tmp_path / f'{i}.py'))


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.stem)
def test_files_that_the_pages_name_exist(path):
    text = path.read_text()
    for name in re.findall(r'\]\(([^):#]+)(?:#[^)]*)?\)', text):
        assert (path.parent / name).exists(), name
    for name in re.findall(r'`((?:configs|launch|docs|notebooks|tests|pallas_kernels)/[\w./]*\w\.\w+)`', text):
        if path.stem != 'extending':  # which writes files
            assert (ROOT / name).exists(), name


def test_the_readme_is_short():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 120


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip('material', reason='needs pip install -e .[docs]')
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', f'--site-dir={tmp_path}']
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert not [line for line in result.stderr.splitlines() if line.startswith('WARNING')]
    pages = {page.stem for page in (ROOT / 'docs').glob('*.md')}
    assert pages == set(re.findall(r': (\w+)\.md$', (ROOT / 'mkdocs.yml').read_text(), re.M)), 'not in the navigation'
    assert pages - {'index'} <= set(re.findall(r'\((\w+)\.md\)', (ROOT / 'docs/index.md').read_text())), (
        'not in index.md'
    )
    assert pages <= {page.stem for page in tmp_path.glob('*.html')}
    # Nothing is loaded from elsewhere.
    index = (tmp_path / 'index.html').read_text()
    assert not re.findall(r'<(?:script|link)[^>]+(?:src|href)="https?://(?!transxssm)', index)


def test_the_shipped_configs_are_where_the_pages_tell():
    assert settings.shipped() == ROOT / 'configs'
