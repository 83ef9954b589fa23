"""The README.md of an export: what the model is, how it is loaded, and what its run measured."""

import pathlib

from transxssm_jax import config as config_lib
from transxssm_jax.config import Config
from transxssm_jax.model import parameters
from transxssm_jax.training import run_directory

_LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained('{name}'{trust})
tokenizer = AutoTokenizer.from_pretrained('{name}')
inputs = tokenizer(tokenizer.bos_token + 'Once', return_tensors='pt', add_special_tokens=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))
```
"""


def write_card(
    workdir: pathlib.Path, name: str, config: Config, step: int, *, is_llama: bool, has_tokenizer: bool
) -> str:
    """The text of README.md.

    Args:
      workdir: of the run.
      name: of the model: of its directory.
      config: of the run.
      step: of the checkpoint that was exported.
    """
    model = config.model
    kinds = ' + '.join(f'{count} {kind}' for kind, count in _count(model.layer_pattern, model.num_periods).items())
    lines = [
        '---',
        'library_name: transformers',
        'pipeline_tag: text-generation',
        'tags: [transxssm_jax]',
        '---',
        '',
        f'# {name}',
        '',
        f'A language model of {parameters.count_params(model):,} parameters, {model.num_layers} layers ({kinds}), trained with '
        'transxssm_jax.',
        '',
    ]
    if has_tokenizer:
        lines += [_LOAD.format(name=name, trust='' if is_llama else ', trust_remote_code=True')]
    lines += [
        'Every document of the training data begins with the begin token (`bos_token_id`), so a prompt should too.',
        '',
        '## Training',
        '',
        '| | |',
        '| --- | --- |',
        f'| step | {step:,} of {config.train.steps:,} |',
        f'| tokens | {step * config.tokens_per_step:,} |',
        f'| tokens per step | {config.tokens_per_step:,}, rows of {config.data.seq_len:,} |',
        *(f'| {name} | {value} |' for name, value in measured(workdir, step)),
        '',
    ]
    if config.train.init_from:
        lines += ['The run began with the weights of another run, whose tokens are not counted here.', '']
    flat = config_lib.flatten(config)
    changed = config_lib.differences(config, Config())
    names = [name for name in flat if name.startswith('model.') or name in changed]
    shown = [name for name in names if name.partition('.')[0] != 'mesh' and name not in _PLACES]
    lines += ['## Settings', '', 'Those of the model, and of the others those that differ from the defaults.', '']
    lines += ['| setting | value |', '| --- | --- |', *(f'| `{name}` | `{flat[name]!r}` |' for name in shown)]
    return '\n'.join(lines) + '\n'


_PLACES = {
    'data.path',
    'data.sources',
    'data.weights',
    'data.max_epochs',
    'train.init_from',
    'optimizer.updates_before',
}


def measured(workdir: pathlib.Path, step: int) -> list[tuple[str, str]]:
    """(name, value with its step) of the newest losses that the run wrote up to a step, with all that it evaluated."""
    found: dict[str, tuple[float, int]] = {}
    for record in run_directory.read_metrics(workdir):
        if record['step'] <= step:
            for name, value in record.items():
                if name == 'loss' or name.startswith('eval'):
                    found[name] = value, record['step']
    return [(name, f'{value:.4g} (step {at:,})') for name, (value, at) in found.items()]


def _count(pattern: tuple[str, ...], periods: int) -> dict[str, int]:
    return {kind: pattern.count(kind) * periods for kind in dict.fromkeys(pattern)}
