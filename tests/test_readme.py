"""What the README shows runs as it stands there."""

import importlib
import os
import pathlib
import re
import shlex
import subprocess
import sys

import quick_compile

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()


def test_the_python_is_pasted_and_runs(tmp_path):
    (program,) = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
    expected = float(re.search(r'# ([\d.]+)$', program.strip())[1])
    # Pasted into an interactive Python, from the project's directory, on one CPU device.
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': quick_compile.XLA_FLAGS}
    run = subprocess.run(
        [sys.executable, '-i', '-q'],
        input=program + '\n',  # as typed: a loop ends with an empty line
        cwd=ROOT,
        env=environment | {'PYTHONPATH': str(ROOT), 'PYTHONSTARTUP': ''},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert 'Error' not in run.stderr and 'Traceback' not in run.stderr, run.stderr
    found = re.search(r'([\d.]+) nats per token after 20 steps', run.stdout)
    assert found, (run.stdout, run.stderr)
    assert abs(float(found[1]) - expected) < 0.02


def test_commands_of_the_readme_take_their_flags():
    """Every `python -m transxssm_jax...` line is parsed by its command; what it names need not exist."""
    lines = re.sub(r'\\\n\s*', ' ', README).splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith('python -m transxssm_jax')]
    assert len(commands) >= 5
    for words in commands:
        module = importlib.import_module(words[2])
        module.COMMAND.parse(words[3:])


def test_links_of_the_readme_exist():
    for link in re.findall(r'\]\(([^)#]+)\)', README):
        assert link.startswith('https://') or (ROOT / link).exists(), link
