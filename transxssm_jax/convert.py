"""Weights for PyTorch, to and from checkpoints.

    python -m transxssm_jax.convert import --source=DIR --workdir=DIR [--tokenizer=FILE] [--config.a.b=VALUE]
    python -m transxssm_jax.convert export --workdir=DIR --output=DIR [--layout=transformers|llama|published] [--step=N]
                                           [--tokenizer=FILE] [--max_shard_size=5GB] [--dtype=float32|bfloat16]

An export is a directory that AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True) of the transformers library
loads: every model of ours, with code in plain PyTorch beside the weights. --layout=llama writes a model of attention alone as a
LlamaForCausalLM, which needs no code; its learned residuals must be 1. --layout=published writes the published format, for what
has a place in it.

An import takes any of the three, any Llama, and Mamba-2 as it is published in
the format of mamba_ssm (state-spaces/mamba2-*), with safetensors or
pytorch_model.bin. There is no export to that format.

An imported workdir is a run at step 0: generate, the evaluations and train take
it. Its config.py is the config file to train on with; settings that a
checkpoint is bound to (data.seq_len, data.global_batch, ...) are given at the
import. Its published.json keeps what a checkpoint cannot hold, so that an
export gives the values back bit for bit.

An export holds the settings of its run in config.json under the key
transxssm_jax, which PyTorch's code ignores, so that an import of it is the same
model again, with its dtype, its groups and its biases.

One stacked array of ours is in memory at a time, and one tensor; no PyTorch.
Exit codes: 0 done; 2 wrong input or a failed write, with one line.
"""

from transxssm_jax import cli

if __name__ == '__main__':
    cli.start('transxssm_jax.convert')

import functools
import logging
import pathlib
import re

from transxssm_jax import config as config_lib
from transxssm_jax.cli import Flag
from transxssm_jax.model import parameters
from transxssm_jax.pytorch.conversion import export_pytorch, import_pytorch
from transxssm_jax.pytorch.fields import ConvertError
from transxssm_jax.pytorch.files import DTYPES
from transxssm_jax.pytorch.transformers_export import LAYOUTS, export_transformers
from transxssm_jax.training.checkpoint import WEIGHTS

IMPORT = cli.Command(
    'transxssm_jax.convert import',
    'Weights for PyTorch -> workdir.',
    [
        Flag('source', cli.REQUIRED, 'Directory with config.json and the weights.', example='DIR', is_path=True),
        Flag('workdir', cli.REQUIRED, 'Directory of the run to make.', example='runs/a', is_path=True),
        Flag(
            'tokenizer',
            '',
            'byte, a JSON file or a prepared directory; empty: tokenizer.json of --source.',
            is_path=True,
        ),
    ],
    settings=config_lib.describe,
    takes_file=False,
)
EXPORT = cli.Command(
    'transxssm_jax.convert export',
    'Workdir -> weights for PyTorch.',
    [
        Flag(
            'workdir',
            cli.REQUIRED,
            'Directory of the run, alone or with @STEP, @best or @latest.',
            example='runs/a',
            is_path=True,
            is_place=True,
        ),
        Flag('output', cli.REQUIRED, 'Directory to make.', example='DIR', is_path=True),
        Flag(
            'layout',
            LAYOUTS[0],
            'transformers: with code that AutoModelForCausalLM loads; llama: as LlamaForCausalLM; or the published format.',
            choices=(*LAYOUTS, 'published'),
        ),
        Flag('step', -1, 'Step of the checkpoint; -1: the newest.', minimum=-1),
        Flag('weights', 'trained', 'Which weights of it: the trained ones, or their average.', choices=WEIGHTS),
        Flag('tokenizer', '', 'A JSON file or a prepared directory; empty: that of the run.', is_path=True),
        Flag('max_shard_size', '5GB', 'Most bytes of a file, e.g. 500MB or 2GiB.'),
        Flag(
            'dtype',
            'float32',
            'Type of the matrices; all else is float32, but in the published format.',
            choices=tuple(DTYPES),
        ),
    ],
    settings=config_lib.describe,
    takes_file=False,
)


def main(argv: list[str] | None = None) -> int:
    """The command; see --help. Returns its exit code."""
    return cli.run_one_of(__doc__, {'import': (IMPORT, _import), 'export': (EXPORT, _export)}, argv)


def _import(flags) -> None:
    logging.getLogger('absl').setLevel(logging.ERROR)  # Orbax warns of what it leaves out beside LazyArrays
    source = import_pytorch(flags.source, flags.workdir, tokenizer=flags.tokenizer, overrides=flags.overrides)
    print(
        f'imported {len(source.tensors)} tensors, {parameters.count_params(source.config.model):,} parameters, into '
        f'{flags.workdir} as step 0'
    )
    for name in source.unused:
        print(f'not used: {name}')


def _export(flags) -> None:
    logging.getLogger('absl').setLevel(logging.ERROR)
    published = flags.layout == 'published'
    export = export_pytorch if published else functools.partial(export_transformers, layout=flags.layout)
    notes = export(
        flags.workdir,
        flags.output,
        step=flags.step,
        weights=flags.weights,
        dtype=flags.dtype,
        tokenizer=flags.tokenizer,
        overrides=flags.overrides,
        max_shard_bytes=_bytes(flags.max_shard_size),
    )
    for note in notes:
        print(f'note: {note}')
    names = sorted(path.name for path in pathlib.Path(flags.output).iterdir())
    print(f'exported to {flags.output}: {", ".join(names)}')


def _bytes(size: str) -> int:
    match = re.fullmatch(r'(\d+) ?([KMGT]?)(i?)B?', size, re.IGNORECASE)
    number = int(match[1]) * (1024 if match[3] else 1000) ** ' KMGT'.index(match[2].upper() or ' ') if match else 0
    if number < 1:
        raise ConvertError(f'--max_shard_size={size} must be a number of bytes, e.g. 5GB, 500MB or 2GiB')
    return number
