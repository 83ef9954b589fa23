"""Writes the checkpoint that tests keep of each format: python tests/make_checkpoint.py; once per format, then kept.

Its values are a formula of the path and the index, so that a test knows them without this file's run.
"""

import pathlib
import shutil
import tempfile
import zlib

import jax
import numpy as np
from small import small_config

from transxssm_jax.training import checkpoint, checkpoint_files, run_directory
from transxssm_jax.training import step as step_lib

KEPT = pathlib.Path(__file__).parent / 'data' / f'checkpoint_format_{checkpoint_files.FORMAT}'
STEP, POSITION = 7, {'next_step': 7}


def tiny_config():
    return small_config(
        model_vocab_size=64,
        model_d_model=32,
        model_num_heads=2,
        model_num_layers=2,
        model_attention_period=2,
        model_attention_offset=1,
        model_d_mlp=32,
    )


def value_of(path, leaf) -> np.ndarray:
    """The values of one array; the step is 7."""
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if name == 'step':
        return np.array(STEP, leaf.dtype)
    first = zlib.crc32(name.encode()) % 97
    return ((first + np.arange(leaf.size)) % 97 / 97).reshape(leaf.shape).astype(leaf.dtype)


def tiny_state() -> dict:
    shapes = jax.eval_shape(lambda: step_lib.init_state(tiny_config(), 0))
    return jax.tree_util.tree_map_with_path(value_of, shapes)


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as directory:
        run_directory.open_workdir(pathlib.Path(directory), tiny_config())
        checkpoints = checkpoint.Checkpoints(pathlib.Path(directory), tiny_config())
        checkpoints.save(STEP, jax.device_put(tiny_state()), POSITION, eval_loss=1.5)
        checkpoints.wait()
        shutil.rmtree(KEPT, ignore_errors=True)
        shutil.copytree(directory, KEPT)
