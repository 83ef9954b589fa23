"""Samples text from a trained model: python -m transxssm_jax.generate --workdir=DIR --prompt='Once upon a time'.

Prompts are read from --prompt, from --prompts=FILE (a line each, or .jsonl with "prompt"), or, with --interactive, from
the terminal. The text streams to the terminal, or goes to --output=FILE.jsonl: each line is written as soon as its
completion has ended, and at the end the lines are put in the order of the prompts. Ctrl-C ends a text of --interactive,
Ctrl-D the program. Every prompt begins with the tokenizer's begin token; an empty prompt is that token alone.

--chat talks to a model that was tuned on conversations (prepare --format=chat): a prompt is what the user writes, the
template of the training data goes around it, --system stands before it, and --interactive is one conversation. A
.jsonl file may hold "messages" (role, content) in place of "prompt".

--config.a.b=value changes settings that the checkpoint is not bound to: --config.mesh.data=2 and --config.mesh.tensor=4
shard prompts over 2 devices and heads over 4; --config.model.rope_scaling=linear serves beyond the training length.

Exit codes: 0 done; 2 wrong input, reported in one line; 130 interrupted.
"""

from transxssm_jax import cli

if __name__ == '__main__':
    cli.start('transxssm_jax.generate')

import contextlib
import itertools
import json
import logging
import pathlib
import sys

from transxssm_jax import config as config_lib
from transxssm_jax.cli import Flag
from transxssm_jax.data.manifest import write_file
from transxssm_jax.data.tokenizer import replace_surrogates
from transxssm_jax.inference.dialogue import Dialogue, open_chat
from transxssm_jax.inference.generator import Generator
from transxssm_jax.inference.prompt import encode_prompts
from transxssm_jax.inference.sampling import InputError, Sampling, fold_seed
from transxssm_jax.inference.trained_run import open_trained_run
from transxssm_jax.training.checkpoint import WEIGHTS

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
        Flag(
            'workdir',
            cli.REQUIRED,
            'Directory of the training run, alone or with @STEP, @best or @latest.',
            example='runs/a',
            is_path=True,
            is_place=True,
        ),
        Flag('step', -1, 'Step of the checkpoint; -1: the newest.', minimum=-1),
        Flag('weights', 'trained', 'Which weights of it: the trained ones, or their average.', choices=WEIGHTS),
        Flag('prompt', '', 'Text to continue.'),
        Flag('prompts', '', 'File of prompts, a line each, or .jsonl of objects with "prompt".', is_path=True),
        Flag('chat', False, 'Whether a prompt is a message of a conversation, and the text the answer to it.'),
        Flag('system', '', 'System message that conversations of --chat begin with.'),
        Flag('interactive', False, 'Whether to read prompts from the terminal.'),
        Flag(
            'output', '', 'JSONL file to write completions to, an object per line; empty: the terminal.', is_path=True
        ),
        Flag('max_tokens', 256, 'Most tokens of a completion.', minimum=1),
        Flag('max_length', 0, 'Most tokens of prompt and completion; 0: data.seq_len of the run.', minimum=0),
        *SAMPLING,
        Flag('stop', (), 'Text that ends a completion; the flag may be given several times.', repeated=True),
        Flag(
            'seed',
            0,
            'The same seed gives the same text for the same prompt at the same place.',
            minimum=0,
            maximum=(1 << 32) - 1,
        ),
        Flag('num_samples', 1, 'Completions of each prompt.', minimum=1),
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
    if '' in flags.stop:
        raise InputError('--stop is empty; give a text, or leave it out')
    output = pathlib.Path(flags.output)
    if flags.output and (output.exists() or not output.absolute().parent.is_dir()):
        raise InputError(f'--output={output} {"exists" if output.exists() else "is in no directory"}; name a new file')
    if flags.system and not flags.chat:
        raise InputError('--system is for --chat')
    records = _read_prompts(flags)
    request = dict(
        max_tokens=flags.max_tokens,
        stop_strings=flags.stop,
        sampling=Sampling(**{flag.name: getattr(flags, flag.name) for flag in SAMPLING}),
    )
    run = open_trained_run(flags.workdir, flags.step, flags.tokenizer, overrides=flags.overrides, weights=flags.weights)
    dialogue, write_prompt = None, lambda record: record['prompt']
    if flags.chat:
        dialogue = Dialogue(open_chat(run, flags.tokenizer), flags.system)
        write_prompt = dialogue.text_of
        request['stop_strings'] = (*flags.stop, *dialogue.stop_strings)
    texts = [write_prompt(record) for record in records]
    with run.on_devices():
        generator = Generator(
            run.params,
            run.config,
            run.tokenizer,
            max_length=flags.max_length,
            batch=min(flags.batch, len(records) * flags.num_samples or 1),
        )
        del run
        if flags.interactive:
            _converse(generator, request, flags, dialogue)
        elif flags.output:
            _write(generator, records, texts, request, flags)
        else:
            for i, text in enumerate(texts):
                _print_streams(generator, text, i, request, flags)


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
                is_conversation = flags.chat and isinstance(records[-1], dict) and 'messages' in records[-1]
                if not is_conversation and not isinstance(records[-1]['prompt'], str):
                    raise TypeError
            except (ValueError, KeyError, TypeError, RecursionError):
                what = 'a text "prompt" or "messages"' if flags.chat else 'a text "prompt"'
                raise InputError(f'{name}, line {i}: it must be an object with {what}') from None
        if not records:
            raise InputError(f'{name} has no line; write one prompt per line')
    return [
        record | {'prompt': replace_surrogates(record['prompt'])} if isinstance(record.get('prompt'), str) else record
        for record in records
    ]


def _read_lines(name: str, path: str) -> list[str]:
    """The lines of a text file; only a line feed ends one, for JSON may hold other separators within a string."""
    try:
        text = pathlib.Path(path).read_bytes().decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise InputError(f'{name} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv -t UTF-8') from None
    lines = [line.removesuffix('\r') for line in text.split('\n')]
    return lines[:-1] if lines[-1] == '' else lines


def _print_streams(generator: Generator, text: str, index: int, request: dict, flags) -> str:
    """Prints a prompt, unless it is a conversation, with each of its completions as it grows; returns the last of these.

    `index` is the prompt's among the prompts.
    """
    [tokens] = encode_prompts(generator.tokenizer, [text])
    completion = ''
    for sample in range(flags.num_samples):
        completion = ''
        pieces = generator.stream(tokens, seed=fold_seed(flags.seed, index, sample), **request)
        print('' if flags.chat else text, end='', flush=True)
        for piece in pieces:
            completion += piece
            print(piece, end='', flush=True)
        print()
    return completion


def _converse(generator: Generator, request: dict, flags, dialogue: Dialogue | None) -> None:
    """Continues each prompt by itself, or one conversation, until the end of the input."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # Python may be built without it
            import readline  # noqa: F401  input() then edits lines and recalls them
        print(f'Type a {"message" if dialogue else "text to continue"}. Ctrl-C stops a completion, Ctrl-D ends.')
    for index in itertools.count():
        try:
            text = replace_surrogates(input('> ' if sys.stdin.isatty() else ''))
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        try:
            if text and dialogue:
                dialogue.hear(text)
                dialogue.answer(_print_streams(generator, dialogue.text(), index, request, flags))
            elif text:
                _print_streams(generator, text, index, request, flags)
        except InputError as error:
            print(f'error: {error}', file=sys.stderr)
        except KeyboardInterrupt:
            print(' [stopped]')


def _write(generator: Generator, records: list[dict], texts: list[str], request: dict, flags) -> None:
    """Writes each completion as soon as it has ended, so that an error loses none; at the end, in the prompts' order."""
    samples = range(flags.num_samples)
    each = [
        (text, record | ({'sample': sample} if len(samples) > 1 else {}), fold_seed(flags.seed, i, sample))
        for i, (record, text) in enumerate(zip(records, texts))
        for sample in samples
    ]
    completions = generator.completions(
        encode_prompts(generator.tokenizer, [text for text, _, _ in each]),
        seeds=[seed for _, _, seed in each],
        **request,
    )
    lines = {}
    # In other fields of a record too JSON can spell what is no text; as it was spelled, it is written.
    encoding = dict(encoding='utf-8', errors='backslashreplace')
    with open(flags.output, 'x', **encoding) as file:
        for i, completion in completions:
            values = each[i][1] | {'completion': completion.text, 'finish_reason': completion.finish_reason}
            lines[i] = json.dumps(values, ensure_ascii=False) + '\n'
            file.write(lines[i])
            file.flush()
    if list(lines) != sorted(lines):
        ordered = ''.join(lines[i] for i in sorted(lines))
        write_file(pathlib.Path(flags.output), ordered.encode(**encoding))
    print(f'{len(lines)} completions in {flags.output}')
