"""Samples text from a trained model: python -m transxssm_jax.generate --workdir=DIR --prompt='Once upon a time'.

Prompts are read from --prompt, from --prompts=FILE (a line each, or .jsonl with "prompt"), or, with --interactive, from
the terminal. The text streams to the terminal, or goes to --out=FILE.jsonl.

Exit codes: 0 done; 2 wrong input, said in one line; 130 interrupted.

Shape legend: B rows, L length.
"""

import argparse
import contextlib
import json
import logging
import pathlib
import sys

import jax
import numpy as np

from transxssm_jax import config as config_lib
from transxssm_jax.config import Config, ConfigError
from transxssm_jax.data.manifest import DataError
from transxssm_jax.data.tokenizer import load_tokenizer
from transxssm_jax.inference.generator import Generator
from transxssm_jax.inference.sampling import InputError, Sampling
from transxssm_jax.parallel import mesh
from transxssm_jax.training import checkpoint

FINISHED, WRONG_INPUT, INTERRUPTED = 0, 2, 130


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f'{message}; see --help')


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog='python -m transxssm_jax.generate',
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('--workdir', required=True, metavar='DIR', help='directory of the training run')
    add('--step', type=int, default=-1, help='which checkpoint; -1: the newest')
    add('--prompt', metavar='TEXT', help='text to continue')
    add('--prompts', metavar='FILE', help='prompts, a line each, or .jsonl of objects with "prompt"')
    add(
        '--interactive',
        action='store_true',
        help='read prompts from the terminal; Ctrl-C ends a text, Ctrl-D the program',
    )
    add('--out', metavar='FILE.jsonl', help='write completions here, an object a line')
    add('--max_tokens', type=int, default=256, help='most tokens of a completion')
    add('--max_length', type=int, default=0, help='most tokens of prompt and completion; 0: data.seq_len of the run')
    add('--temperature', type=float, default=0.8, help='0: the likeliest token')
    add('--top_k', type=int, default=0, help='0: off')
    add('--top_p', type=float, default=1.0, help='1: off')
    add('--min_p', type=float, default=0.0, help='0: off')
    add('--repetition_penalty', type=float, default=1.0, help='1: off')
    add('--stop', action='append', default=[], metavar='TEXT', help='text that ends a completion; may be given again')
    add('--seed', type=int, default=0, help='the same seed gives the same text')
    add('--batch', type=int, default=64, help='prompts worked on at once')
    add('--tokenizer', default='', metavar='byte|FILE.json|DIR', help='default: that of data.path of the run')
    add('--data', type=int, default=1, help='devices that split the prompts')
    add('--tensor', type=int, default=1, help='devices that split heads and the vocabulary')
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command; see --help. Returns its exit code."""
    logging.basicConfig(level=logging.ERROR, format='%(levelname)s: %(message)s')
    try:
        arguments = _parser().parse_args(argv)
        if sum([arguments.prompt is not None, arguments.prompts is not None, arguments.interactive]) != 1:
            raise InputError('give one of --prompt=TEXT, --prompts=FILE and --interactive')
        if arguments.interactive and arguments.out:
            raise InputError('--out is for --prompt and --prompts, not for --interactive')
        out = pathlib.Path(arguments.out or '')
        if arguments.out and (out.exists() or not out.absolute().parent.is_dir()):
            raise InputError(f'--out={out} {"exists" if out.exists() else "is in no directory"}; name a new file')
        records = _read_prompts(arguments)
        names = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')
        request = dict(
            max_tokens=arguments.max_tokens,
            stop_strings=arguments.stop,
            sampling=Sampling(**{name: getattr(arguments, name) for name in names}),
        )
        config = checkpoint.load_config(arguments.workdir, arguments.step)
        tokenizer = _tokenizer_of(config, arguments)
        with _devices(config, arguments):
            params, config = checkpoint.load_trained(arguments.workdir, arguments.step)
            generator = Generator(
                params,
                config,
                tokenizer,
                max_length=arguments.max_length,
                batch=min(arguments.batch, len(records) or 1),
            )
            del params
            if arguments.interactive:
                _converse(generator, request, arguments.seed)
            elif arguments.out:
                _write(generator, records, request, arguments)
            else:
                for record in records:
                    _print_stream(generator, record['prompt'], request, arguments.seed)
        return FINISHED
    except (InputError, ConfigError, DataError, checkpoint.CheckpointError, OSError) as error:
        print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print()
        return INTERRUPTED


def _read_prompts(arguments) -> list[dict]:
    """Objects with 'prompt'; empty with --interactive."""
    if arguments.prompts is None:
        records = [] if arguments.prompt is None else [{'prompt': arguments.prompt}]
        name = '--prompt'
    else:
        name, records = f'--prompts={arguments.prompts}', []
        for i, line in enumerate(pathlib.Path(arguments.prompts).read_text().splitlines(), start=1):
            try:
                records.append(json.loads(line) if arguments.prompts.endswith('.jsonl') else {'prompt': line})
                if not isinstance(records[-1]['prompt'], str):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                raise InputError(f'{name}, line {i}: it must be an object with a text "prompt"') from None
        if not records:
            raise InputError(f'{name} has no line; write a prompt a line')
    for i, record in enumerate(records, start=1):
        if not record['prompt']:
            raise InputError(
                f'{name}{f", line {i}" if arguments.prompts else ""}: the prompt is empty; give some text to continue'
            )
    return records


def _tokenizer_of(config: Config, arguments):
    source = arguments.tokenizer or config.data.path
    try:
        return load_tokenizer(source)
    except DataError as error:
        raise DataError(
            f'{error} (--tokenizer)'
            if arguments.tokenizer
            else f'{error}: that is data.path of the run; give its tokenizer with --tokenizer'
        ) from error


def _devices(config: Config, arguments):
    """The mesh of --data and --tensor, in use, or nothing for one device."""
    count = arguments.data * arguments.tensor
    if count == 1:
        return contextlib.nullcontext()
    if not 0 < count <= len(jax.devices()):
        raise InputError(
            f'--data={arguments.data} x --tensor={arguments.tensor} must be from 1 to the {len(jax.devices())} '
            'devices that are here'
        )
    settings = json.loads(config_lib.to_json(config))
    settings['mesh'] |= dict(data=arguments.data, fsdp=1, context=1, tensor=arguments.tensor, slices=1)
    settings['data']['global_batch'] = arguments.data
    settings['train']['accumulation_steps'] = 1
    return jax.set_mesh(mesh.build(config_lib.from_json(json.dumps(settings)), jax.devices()[:count]))


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


def _write(generator: Generator, records: list[dict], request: dict, arguments) -> None:
    completions = generator.generate(
        [_encode(generator, record['prompt']) for record in records], seeds=arguments.seed, **request
    )
    with open(arguments.out, 'x') as file:
        for record, completion in zip(records, completions):
            values = record | {'completion': completion.text, 'finish': completion.finish}
            file.write(json.dumps(values, ensure_ascii=False) + '\n')
    print(f'{len(records)} completions in {arguments.out}')


if __name__ == '__main__':
    sys.exit(main())
