"""TransXSSM in JAX: what a program or a notebook needs, imported when it is first used.

Config, ConfigError, load_config, replace, describe_settings: settings (config.py).
Trainer, prepare, shipped_configs: training, sampling and measuring (library.py).
open_trained_run, Generator, Sampling, encode_prompts: text from a checkpoint (inference/).
count_params, parameter_table: what a model is made of (model/parameters.py).
export_pytorch, import_pytorch: the published format (pytorch/).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transxssm_jax.config import Config, ConfigError, replace
    from transxssm_jax.config import describe as describe_settings
    from transxssm_jax.inference.generator import Generator
    from transxssm_jax.inference.prompt import encode_prompts
    from transxssm_jax.inference.sampling import Sampling
    from transxssm_jax.inference.trained_run import open_trained_run
    from transxssm_jax.library import Trainer, load_config, prepare, shipped_configs
    from transxssm_jax.model.parameters import count_params, parameter_table
    from transxssm_jax.pytorch.conversion import export_pytorch, import_pytorch

# Name -> module and the name there. Imported on first use: a command must not wait for what it does not need.
_EXPORTS = {
    'Config': ('config', 'Config'),
    'ConfigError': ('config', 'ConfigError'),
    'Generator': ('inference.generator', 'Generator'),
    'Sampling': ('inference.sampling', 'Sampling'),
    'Trainer': ('library', 'Trainer'),
    'count_params': ('model.parameters', 'count_params'),
    'describe_settings': ('config', 'describe'),
    'encode_prompts': ('inference.prompt', 'encode_prompts'),
    'export_pytorch': ('pytorch.conversion', 'export_pytorch'),
    'import_pytorch': ('pytorch.conversion', 'import_pytorch'),
    'load_config': ('library', 'load_config'),
    'open_trained_run': ('inference.trained_run', 'open_trained_run'),
    'parameter_table': ('model.parameters', 'parameter_table'),
    'prepare': ('library', 'prepare'),
    'replace': ('config', 'replace'),
    'shipped_configs': ('library', 'shipped_configs'),
}

__all__ = [
    'Config',
    'ConfigError',
    'Generator',
    'Sampling',
    'Trainer',
    'count_params',
    'describe_settings',
    'encode_prompts',
    'export_pytorch',
    'import_pytorch',
    'load_config',
    'open_trained_run',
    'parameter_table',
    'prepare',
    'replace',
    'shipped_configs',
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module, there = _EXPORTS[name]
    return getattr(importlib.import_module(f'{__name__}.{module}'), there)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
