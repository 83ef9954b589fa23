"""What is compiled is kept in the workdir (train.compilation_cache), so that a run that is started again starts sooner.

It is JAX's own cache: files by the digest of the program, the compiler and the devices, written by process 0 alone and
read by all. What cannot be read is compiled again.
"""

import contextlib
import pathlib

import jax
from jax.experimental.compilation_cache import compilation_cache

from transxssm_jax.config import Config

DIRECTORY = 'compiled'


@contextlib.contextmanager
def kept(config: Config, workdir: pathlib.Path):
    """A context in which JAX keeps what it compiles. Yields a line that tells where.

    A directory that JAX_COMPILATION_CACHE_DIR names is used in its place, and stays as it is.
    """
    named = jax.config.jax_compilation_cache_dir
    if named or not config.train.compilation_cache:
        yield f'compiled programs are kept in {named}' if named else 'compiled programs are not kept'
        return
    directory = workdir.absolute() / DIRECTORY
    _use(str(directory))
    try:
        yield f'compiled programs are kept in {directory}'
    finally:
        _use(named)


def _use(directory: str | None) -> None:
    jax.config.update('jax_compilation_cache_dir', directory)
    compilation_cache.reset_cache()  # JAX looks at the setting only when it opens the cache
