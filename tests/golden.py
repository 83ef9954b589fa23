"""The published tiny checkpoint as parameters of ours, for tests."""

import pathlib

import numpy as np

from transxssm_jax.pytorch.conversion import load_pytorch

DIRECTORY = pathlib.Path(__file__).parents[2] / 'shared' / 'golden' / 'transxssm_tiny'


def load_golden():
    """(Config, params as nested dict, expected arrays by name)."""
    params, config = load_pytorch(DIRECTORY)
    return config, params, dict(np.load(DIRECTORY / 'expected.npz'))
