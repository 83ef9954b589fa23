"""The console commands of an installed project: `transxssm-train` is `python -m transxssm_jax.train`.

A name of pyproject.toml's [project.scripts] is the command's module, with __ for a dot: data__prepare.
"""

import functools
from collections.abc import Callable

from transxssm_jax import cli


def __getattr__(name: str) -> Callable[[], None]:
    if name.startswith('_'):
        raise AttributeError(name)
    return functools.partial(cli.start, f'transxssm_jax.{name.replace("__", ".")}')
