"""Samples text from a trained model: python -m transxssm_jax.generate --workdir=DIR --prompt='Once upon a time'.

Prompts are read from --prompt, from --prompts=FILE (a line each, or .jsonl with "prompt"), or, with --interactive, from
the terminal. The text streams to the terminal, or goes to --output=FILE.jsonl.

--config.a.b=value changes settings that the checkpoint is not bound to: --config.mesh.data=2 and --config.mesh.tensor=4
shard prompts over 2 devices and heads over 4; --config.model.rope_scaling=linear serves beyond the training length.

Exit codes: 0 done; 2 wrong input, with one line; 130 interrupted.

Shape legend: B rows, L length.
"""

from transxssm_jax import cli

if __name__ == '__main__':
    cli.start('transxssm_jax.generate')

import contextlib
import json
import logging
import math
import pathlib
import sys

import jax
import numpy as np

from transxssm_jax import config as config_lib
from transxssm_jax.cli import Flag
from transxssm_jax.config import Config, ConfigError
from transxssm_jax.data.manifest import DataError
from transxssm_jax.data.tokenizer import load_tokenizer
from transxssm_jax.inference.generator import Generator
from transxssm_jax.inference.sampling import InputError, Sampling
from transxssm_jax.parallel import mesh
from transxssm_jax.training import checkpoint

SAMPLING = (
    Flag('temperature', 0.8, 'Divides the logits; 0: the likeliest token.'),
    Flag('top_k', 0, 'Only the k likeliest tokens; 0: off.'),
    Flag('top_p', 1.0, 'Only the likeliest tokens whose probabilities add up to this; 1: off.'),
    Flag('min_p', 0.0, 'Only tokens at least this times as likely as the likeliest; 0: off.'),
    Flag('repetition_penalty', 1.0, 'Divides the logits of tokens that the text already holds; 1: off.'),
)
COMMAND = cli.Command(
    'transxssm_jax.generate',
    __doc__,
    [
        Flag('workdir', cli.REQUIRED, 'Directory of the training run.', example='runs/a', is_path=True),
        Flag('step', -1, 'Step of the checkpoint; -1: the newest.', minimum=-1),
        Flag('prompt', '', 'Text to continue.'),
        Flag('prompts', '', 'File of prompts, a line each, or .jsonl of objects with "prompt".', is_path=True),
        Flag('interactive', False, 'Whether to read prompts from the terminal.'),
        Flag(
            'output', '', 'JSONL file to write completions to, an object per line; empty: the terminal.', is_path=True
        ),
        Flag('max_tokens', 256, 'Most tokens of a completion.'),
        Flag('max_length', 0, 'Most tokens of prompt and completion; 0: data.seq_len of the run.', minimum=0),
        *SAMPLING,
        Flag('stop', (), 'Text that ends a completion; the flag may be given several times.', repeated=True),
        Flag('seed', 0, 'The same seed gives the same text.', minimum=0, maximum=(1 << 32) - 1),
        Flag('batch', 64, 'Prompts worked on at once.', minimum=1),
        Flag('tokenizer', '', 'byte, a JSON file or a prepared directory; empty: that of data.path.', is_path=True),
    ],
    settings=config_lib.describe,
    takes_file=False,
)


def main(argv: list[str] | None = None) -> int:
    """The command; see --help. Returns its exit code."""
    return cli.run(COMMAND, _generate, argv)


def _generate(flags) -> None:
    logging.basicConfig(level=logging.ERROR, format='%(levelname)s: %(message)s')
    if sum(given(flags, name) for name in ('prompt', 'prompts', 'interactive')) != 1:
        raise InputError('give one of --prompt=TEXT, --prompts=FILE and --interactive')
    if flags.interactive and flags.output:
        raise InputError('--output is for --prompt and --prompts, not for --interactive')
    output = pathlib.Path(flags.output)
    if flags.output and (output.exists() or not output.absolute().parent.is_dir()):
        raise InputError(f'--output={output} {"exists" if output.exists() else "is in no directory"}; name a new file')
    records = _read_prompts(flags)
    request = dict(
        max_tokens=flags.max_tokens,
        stop_strings=flags.stop,
        sampling=Sampling(**{flag.name: getattr(flags, flag.name) for flag in SAMPLING}),
    )
    saved = checkpoint.load_config(flags.workdir, flags.step)
    tokenizer = _tokenizer_of(saved, flags)
    config = _config_here(saved, flags.overrides)
    with _mesh_of(config):
        params, _ = checkpoint.load_trained(flags.workdir, flags.step)
        generator = Generator(
            params, config, tokenizer, max_length=flags.max_length, batch=min(flags.batch, len(records) or 1)
        )
        del params
        if flags.interactive:
            _converse(generator, request, flags.seed)
        elif flags.output:
            _write(generator, records, request, flags)
        else:
            for record in records:
                _print_stream(generator, record['prompt'], request, flags.seed)


def given(flags, name: str) -> bool:
    """Whether a flag is on the command line, and not merely has its default."""
    return name in flags.given


def _read_prompts(flags) -> list[dict]:
    """Objects with 'prompt'; empty with --interactive."""
    if not given(flags, 'prompts'):
        records = [{'prompt': flags.prompt}] if given(flags, 'prompt') else []
        name = '--prompt'
    else:
        name, records = f'--prompts={flags.prompts}', []
        for i, line in enumerate(_read_lines(name, flags.prompts), start=1):
            try:
                records.append(json.loads(line) if flags.prompts.endswith('.jsonl') else {'prompt': line})
                if not isinstance(records[-1]['prompt'], str):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                raise InputError(f'{name}, line {i}: it must be an object with a text "prompt"') from None
        if not records:
            raise InputError(f'{name} has no line; write a prompt a line')
    for i, record in enumerate(records, start=1):
        if not record['prompt']:
            raise InputError(
                f'{name}{f", line {i}" if flags.prompts else ""}: the prompt is empty; give some text to continue'
            )
    return records


def _read_lines(name: str, path: str) -> list[str]:
    """The lines of a text file; only a line feed ends one, for JSON may hold other separators within a string."""
    try:
        text = pathlib.Path(path).read_bytes().decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise InputError(f'{name} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv -t UTF-8') from None
    lines = [line.removesuffix('\r') for line in text.split('\n')]
    return lines[:-1] if lines[-1] == '' else lines


def _tokenizer_of(config: Config, flags):
    source = flags.tokenizer or config.data.path
    try:
        return load_tokenizer(source)
    except DataError as error:
        raise DataError(
            f'{error} (--tokenizer)'
            if flags.tokenizer
            else f'{error}: that is data.path of the run; give its tokenizer with --tokenizer'
        ) from error


def _config_here(saved: Config, overrides: dict[str, str]) -> Config:
    """The run's config with the overrides of this command: one device unless its mesh is set.

    Raises:
      ConfigError: an unknown setting, or one that the checkpoint is bound to.
    """
    alone = {'mesh.data': 1, 'mesh.fsdp': 1, 'mesh.context': 1, 'mesh.tensor': 1, 'mesh.slices': 1}
    # The batch of a training step is not ours; as many rows as devices divide by any mesh.
    batch = {'data.global_batch': max(jax.device_count(), 1), 'train.accumulation_steps': 1}
    config = config_lib.replace(saved, alone | overrides)
    unfit = config_lib.unfit_for_checkpoint(saved, config)
    if unfit:
        raise ConfigError(f'--config.{unfit[0].replace(" in this config", "")}; it cannot be changed after training')
    return config_lib.replace(config, batch)


def _mesh_of(config: Config):
    """The mesh of the settings, in use, or nothing for one device."""
    for name in ('fsdp', 'context', 'slices'):
        if getattr(config.mesh, name) != 1:
            raise InputError(f'mesh.{name}={getattr(config.mesh, name)} must be 1 here; use mesh.data and mesh.tensor')
    sizes = [getattr(config.mesh, name) for name in mesh.AXES]
    if -1 in sizes:
        return jax.set_mesh(mesh.build(config))
    if (count := math.prod(sizes)) == 1:
        return contextlib.nullcontext()
    if count > jax.device_count():
        shape = ' x '.join(f'mesh.{name}={size}' for name, size in zip(mesh.AXES, sizes))
        raise InputError(f'{shape} must be at most the {jax.device_count()} devices that are here')
    return jax.set_mesh(mesh.build(config, jax.devices()[:count]))


def _encode(generator: Generator, text: str) -> np.ndarray:
    return generator.tokenizer.encode_batch([text], special_tokens=True)[0]


def _print_stream(generator: Generator, text: str, request: dict, seed: int) -> None:
    pieces = generator.stream(_encode(generator, text), seed=seed, **request)
    print(text, end='', flush=True)
    for piece in pieces:
        print(piece, end='', flush=True)
    print()


def _converse(generator: Generator, request: dict, seed: int) -> None:
    """Each prompt is continued by itself, until the end of the input."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # Python may be built without it
            import readline  # noqa: F401  input() then edits lines and recalls them
        print('Type a text to continue. Ctrl-C stops a completion, Ctrl-D ends.')
    while True:
        try:
            text = input('> ' if sys.stdin.isatty() else '')
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        try:
            if text:
                _print_stream(generator, text, request, seed)
        except InputError as error:
            print(f'error: {error}', file=sys.stderr)
        except KeyboardInterrupt:
            print(' [stopped]')


def _write(generator: Generator, records: list[dict], request: dict, flags) -> None:
    completions = generator.generate(
        [_encode(generator, record['prompt']) for record in records], seeds=flags.seed, **request
    )
    with open(flags.output, 'x', encoding='utf-8') as file:
        for record, completion in zip(records, completions):
            values = record | {'completion': completion.text, 'finish': completion.finish}
            file.write(json.dumps(values, ensure_ascii=False) + '\n')
    print(f'{len(records)} completions in {flags.output}')
