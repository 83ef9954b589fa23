"""Weights in the published PyTorch format, to and from checkpoints.

    python -m transxssm_jax.convert import --source=DIR --workdir=DIR [--tokenizer=FILE] [--config.a.b=VALUE]
    python -m transxssm_jax.convert export --workdir=DIR --out=DIR [--step=N] [--tokenizer=FILE]
                                           [--max_shard_size=5GB] [--dtype=float32|bfloat16]

An imported workdir is a run at step 0: generate, the evaluations and train take
it. Its config.py is the config file to train on with; settings that a
checkpoint is bound to (data.seq_len, data.global_batch, ...) are given at the
import. Its published.json keeps what checkpoints have no place for, so that an
export gives the values back bit for bit.

One stacked array of ours is in memory at a time, and one tensor; no PyTorch.
Exit codes: 0 done; 2 wrong input or a failed write, said in one line.
"""

import argparse
import logging
import pathlib
import re
import sys

from transxssm_jax.config import ConfigError
from transxssm_jax.data.manifest import DataError
from transxssm_jax.model import parameters
from transxssm_jax.pytorch.checkpoint_format import (
    DTYPES,
    ConvertError,
)
from transxssm_jax.pytorch.conversion import export_published, import_published
from transxssm_jax.training import checkpoint

FINISHED, WRONG_INPUT = 0, 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m transxssm_jax.convert',
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest='command', required=True)
    to_ours = commands.add_parser('import', allow_abbrev=False, help='published format -> workdir')
    to_ours.add_argument('--source', required=True, help='directory with config.json and the weights')
    to_ours.add_argument('--workdir', required=True, help='directory of the run to make')
    to_ours.add_argument(
        '--tokenizer',
        default='',
        help='byte, a tokenizers json file or a prepared directory; default: tokenizer.json of the source',
    )
    export = commands.add_parser('export', allow_abbrev=False, help='workdir -> published format')
    export.add_argument('--workdir', required=True, help='directory of the run')
    export.add_argument('--out', required=True, help='directory to make')
    export.add_argument('--step', type=int, default=-1, help='which checkpoint; default: the newest')
    export.add_argument('--tokenizer', default='', help='a tokenizers json file, or a prepared directory')
    export.add_argument('--max_shard_size', default='5GB', help='most bytes of a file, e.g. 500MB or 2GiB')
    export.add_argument('--dtype', default='float32', choices=tuple(DTYPES))
    return parser


def _overrides(extra: list[str]) -> dict[str, str]:
    overrides = {}
    for argument in extra:
        match = re.fullmatch(r'--config\.([\w.]+)=(.*)', argument, re.DOTALL)
        if not match:
            raise ConvertError(f'unknown argument {argument}; settings are given as --config.name=value')
        overrides[match[1]] = match[2]
    return overrides


def _bytes(size: str) -> int:
    match = re.fullmatch(r'(\d+) ?([KMGT]?)(i?)B?', size, re.IGNORECASE)
    number = int(match[1]) * (1024 if match[3] else 1000) ** ' KMGT'.index(match[2].upper() or ' ') if match else 0
    if number < 1:
        raise ConvertError(f'--max_shard_size={size} must be a number of bytes, e.g. 5GB, 500MB or 2GiB')
    return number


def main(argv: list[str] | None = None) -> int:
    logging.getLogger('absl').setLevel(logging.ERROR)  # Orbax warns of what it leaves out beside _Lazy leaves
    arguments, extra = _parser().parse_known_args(argv)
    try:
        overrides = _overrides(extra)
        if arguments.command == 'import':
            source = import_published(
                arguments.source, arguments.workdir, tokenizer=arguments.tokenizer, overrides=overrides
            )
            print(
                f'imported {len(source.tensors)} tensors, {parameters.count_params(source.model):,} parameters, into '
                f'{arguments.workdir} as step 0'
            )
            for name in source.unused:
                print(f'not used: {name}')
        else:
            for note in export_published(
                arguments.workdir,
                arguments.out,
                step=arguments.step,
                dtype=arguments.dtype,
                tokenizer=arguments.tokenizer,
                overrides=overrides,
                max_shard_bytes=_bytes(arguments.max_shard_size),
            ):
                print(f'note: {note}')
            names = sorted(path.name for path in pathlib.Path(arguments.out).iterdir())
            print(f'exported to {arguments.out}: {", ".join(names)}')
    except (ConvertError, ConfigError, DataError, checkpoint.CheckpointError, OSError) as error:
        print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
        return WRONG_INPUT
    return FINISHED


if __name__ == '__main__':
    sys.exit(main())
