"""A saved run of an untrained byte model, for the commands that evaluate one."""

import pathlib

import jax
from small import small_config

from transxssm_jax.model import parameters
from transxssm_jax.training import checkpoint, run_directory

SMALLER = dict(model_num_layers=2, model_attention_period=2, model_attention_offset=1)


def random_params(config) -> dict:
    """Parameters of an untrained model whose distributions are not all but flat."""
    return jax.jit(lambda: jax.tree.map(lambda leaf: 2 * leaf, parameters.init_params(config.model, 0)))()


def save_run(workdir: pathlib.Path, **overrides) -> pathlib.Path:
    """A workdir with one checkpoint, of step 3; 264 tokens and rows of 320 if overrides do not say otherwise."""
    config = small_config(**{**SMALLER, **dict(model_vocab_size=264, data_seq_len=320), **overrides})
    params = random_params(config)
    run_directory.open_workdir(workdir, config)
    checkpoints = checkpoint.Checkpoints(workdir, config)
    checkpoints.save(3, {'step': 3, 'params': params, 'opt_state': {'mu': params, 'nu': params}}, {})
    checkpoints.wait()
    checkpoints.close()
    return workdir
