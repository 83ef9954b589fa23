"""Samples text from a trained model: python -m transxssm_jax.generate --workdir=DIR --prompt='Once upon a time'.

Prompts are read from --prompt, from --prompts=FILE (a line each, or .jsonl with "prompt"), or, with --interactive, from
the terminal. The text streams to the terminal, or goes to --out=FILE.jsonl.
Each line is written as soon as its completion has ended; at the end the lines are put in the order of the prompts.

Exit codes: 0 done; 2 wrong input, said in one line; 130 interrupted.
"""

import argparse
import itertools
import json
import logging
import os
import pathlib
import sys

from transxssm_jax.config import ConfigError
from transxssm_jax.data.manifest import DataError
from transxssm_jax.inference.generator import Generator
from transxssm_jax.inference.prompt import clean_text, encode_prompts
from transxssm_jax.inference.sampling import InputError, Sampling, fold_seed
from transxssm_jax.inference.trained_run import open_run
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
    add('--seed', type=int, default=0, help='the same seed gives the same text for the same prompt at the same place')
    add('--num_samples', type=int, default=1, help='completions of each prompt')
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
        if arguments.num_samples < 1:
            raise InputError(f'--num_samples={arguments.num_samples} must be at least 1')
        records = _read_prompts(arguments)
        names = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')
        request = dict(
            max_tokens=arguments.max_tokens,
            stop_strings=arguments.stop,
            sampling=Sampling(**{name: getattr(arguments, name) for name in names}),
        )
        run = open_run(
            arguments.workdir, arguments.step, arguments.tokenizer, data=arguments.data, tensor=arguments.tensor
        )
        with run.on_devices():
            generator = Generator(
                run.params,
                run.config,
                run.tokenizer,
                max_length=arguments.max_length,
                batch=min(arguments.batch, len(records) * arguments.num_samples or 1),
            )
            del run
            if arguments.interactive:
                _converse(generator, request, arguments)
            elif arguments.out:
                _write(generator, records, request, arguments)
            else:
                for i, record in enumerate(records):
                    _print_streams(generator, record['prompt'], i, request, arguments)
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
        lines = pathlib.Path(arguments.prompts).read_text(encoding='utf-8', errors='replace').split('\n')
        for i, line in enumerate(lines[: len(lines) - (lines[-1] == '')], start=1):
            try:
                records.append(json.loads(line) if arguments.prompts.endswith('.jsonl') else {'prompt': line})
                if not isinstance(records[-1]['prompt'], str):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                raise InputError(f'{name}, line {i}: it must be an object with a text "prompt"') from None
        if not records:
            raise InputError(f'{name} has no line; write one prompt per line')
    return [record | {'prompt': clean_text(record['prompt'])} for record in records]


def _print_streams(generator: Generator, text: str, index: int, request: dict, arguments) -> None:
    """Prints a prompt with each of its completions as it grows; `index` is the prompt's among the prompts."""
    [tokens] = encode_prompts(generator.tokenizer, [text])
    for sample in range(arguments.num_samples):
        pieces = generator.stream(tokens, seed=fold_seed(arguments.seed, index, sample), **request)
        print(text, end='', flush=True)
        for piece in pieces:
            print(piece, end='', flush=True)
        print()


def _converse(generator: Generator, request: dict, arguments) -> None:
    """Continues each prompt by itself, until the end of the input."""
    for index in itertools.count():
        try:
            text = clean_text(input('> ' if sys.stdin.isatty() else ''))
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        try:
            if text:
                _print_streams(generator, text, index, request, arguments)
        except InputError as error:
            print(f'error: {error}', file=sys.stderr)
        except KeyboardInterrupt:
            print(' [stopped]')


def _write(generator: Generator, records: list[dict], request: dict, arguments) -> None:
    """Writes each completion as soon as it has ended, so that an error loses none; at the end, in the prompts' order."""
    samples = range(arguments.num_samples)
    texts = [
        (record | ({'sample': sample} if len(samples) > 1 else {}), fold_seed(arguments.seed, i, sample))
        for i, record in enumerate(records)
        for sample in samples
    ]
    completions = generator.completions(
        encode_prompts(generator.tokenizer, [record['prompt'] for record, _ in texts]),
        seeds=[seed for _, seed in texts],
        **request,
    )
    lines = {}
    # In other fields of a record too JSON can spell what is no text; as it was spelled, it is written.
    encoding = dict(encoding='utf-8', errors='backslashreplace')
    with open(arguments.out, 'x', **encoding) as file:
        for i, completion in completions:
            values = texts[i][0] | {'completion': completion.text, 'finish_reason': completion.finish_reason}
            lines[i] = json.dumps(values, ensure_ascii=False) + '\n'
            file.write(lines[i])
            file.flush()
    if list(lines) != sorted(lines):
        ordered = pathlib.Path(f'{arguments.out}.tmp')
        ordered.write_text(''.join(lines[i] for i in sorted(lines)), **encoding)
        os.replace(ordered, arguments.out)
    print(f'{len(lines)} completions in {arguments.out}')


if __name__ == '__main__':
    sys.exit(main())
