"""Runs a test file as a program that compiles for TPUs that are not here."""

import os
import pathlib
import subprocess
import sys

from pallas_kernels.chips import COMPILE_ONLY

ROOT = pathlib.Path(__file__).parents[1]


def run_alone(file, argument):
    """Its output. In a process of its own, because libtpu reads its settings when it is loaded."""
    environment = (
        os.environ
        | COMPILE_ONLY
        | {'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path]), 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
    )
    done = subprocess.run(
        [sys.executable, file, argument], env=environment, text=True, capture_output=True, timeout=900, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
