"""Tokenises text into a data set of documents that loader.py and plain TFDS read.

    python -m transxssm_jax.data.prepare --output=DIR --tokenizer=byte --split=train --source='src/**/*.py'
    python -m transxssm_jax.data.prepare --output=DIR --tokenizer=tokenizer.json --split=train \\
        --source=books.parquet@0.3 --source=tfds:c4/train@0.7

source.py describes what a source can be, manifest.py what DIR holds. Sources
without weights make one pool; with weights (every one or none), a row of
training comes from a source with that share, each source going through epochs
of its own. A weight is the decimal number behind the last @: a source whose
name itself ends in @NUMBER needs a weight too (wiki@2023@1).

With --format=chat a document is a conversation: --text_field (messages) holds a list of objects with role and content,
in jsonl or parquet. A chat template writes it as text, and a mask keeps which tokens the assistant wrote, which alone
are learned; chat.py describes both. With --format=ids documents are tokens of --tokenizer already; token_files.py tells
which files are read.

A bad document (a line that is not JSON or lacks the field, what cannot be
decompressed, a parquet file without its footer) ends the run. With
--skip_bad=SHARE, such documents are left out as long as they are at most that
share of all; the manifest counts them by reason. What cannot be decompressed or
read any further counts once, however much of its file is lost.

The work is cut into shards that depend on the sources alone. A finished shard
stays in DIR/.incomplete.SPLIT, so the same command continues an interrupted
run; the output is the same for any --num_workers and any interruption. Another
command does not touch the shards of the interrupted one; they are removed when
the split is finished. The split counts as finished once dataset_info.json names it, which is written last.

Exit codes: 0 done (or done before), 2 refused with one line that tells why,
130 interrupted.
"""

from transxssm_jax import cli

if __name__ == '__main__':
    cli.start('transxssm_jax.data.prepare')

import collections
import concurrent.futures.process
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import queue
import re
import shutil
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

# Processes do the work side by side; threads of the tokenizer on top would only fight over cores.
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

from tqdm import tqdm

from transxssm_jax.cli import Flag
from transxssm_jax.data import manifest as manifest_lib
from transxssm_jax.data.chat import LOSS_ON, Chat, load_chat
from transxssm_jax.data.commit import commit, finished, reasons
from transxssm_jax.data.formats import FIELDS, FORMATS, ChatFormat, IdsFormat
from transxssm_jax.data.manifest import DataError, Manifest
from transxssm_jax.data.mixture import whole_number_weights
from transxssm_jax.data.shard_writer import ShardTask, read_result, write_shard
from transxssm_jax.data.source import cut, list_files, parse_source
from transxssm_jax.data.tokenizer import load_tokenizer
from transxssm_jax.data.vocabulary import check_size
from transxssm_jax.data.workers import exit_with_parent

MIN_SHARD_BYTES = 4 << 20  # of text: seconds of work, what an interruption can lose
MAX_SHARDS = 512  # about; every one is an open file in the loader
REMINDER_SECONDS = 60.0  # between two lines of progress where there is no terminal


COMMAND = cli.Command(
    'transxssm_jax.data.prepare',
    __doc__,
    [
        Flag('output', cli.REQUIRED, 'Directory of the prepared data.', example='data/books', is_path=True),
        Flag('tokenizer', cli.REQUIRED, 'byte, or a tokenizers JSON file.', example='byte', is_path=True),
        Flag('split', cli.REQUIRED, 'train, validation, ...; added to what --output holds.', example='train'),
        Flag(
            'source',
            cli.REQUIRED,
            'What to read, with @WEIGHT for a mixture; the flag may be given several times.',
            repeated=True,
            example='books.parquet',
            is_path=True,
        ),
        Flag('text_field', '', 'Field, column or feature that holds a document; empty: text, messages or input_ids.'),
        Flag('format', 'text', 'What a document is: text, a conversation, or token ids.', choices=FORMATS),
        Flag(
            'chat_template',
            '',
            'File of Jinja, or chatml; empty: that of the tokenizer (tokenizer_config.json beside it), else ChatML.',
            is_path=True,
        ),
        Flag(
            'loss_on',
            LOSS_ON[0],
            'What is learned of a conversation: every turn of the assistant, or the last one, its completion.',
            choices=LOSS_ON,
        ),
        Flag('eos', '', 'Token or id that ends a document, where the tokenizer has several.'),
        Flag('bos', '', "Token or id that begins a document; empty: the tokenizer's bos, else eos."),
        Flag('vocab_size', 0, "Refuse a tokenizer with more ids than this (the model's); 0: any.", minimum=0),
        Flag(
            'skip_bad', 0.0, 'Leave bad documents out, up to this share of all; 0: refuse the first one.', minimum=0.0
        ),
        Flag('num_workers', os.cpu_count() or 1, 'Processes that tokenise; by default one per CPU.', minimum=1),
    ],
    if_interrupted='run the same command to continue',
)


def main(argv: list[str] | None = None) -> int:
    """The command; see --help. Returns its exit code."""
    return cli.run(COMMAND, prepare_split, argv)


def prepare_split(flags: types.SimpleNamespace) -> None:
    """Checks the flags of the command and prepares the split. Raises DataError, in one line."""
    flags.output = Path(flags.output)
    if not re.fullmatch(r'[A-Za-z]\w*', flags.split):
        raise DataError(f'--split={flags.split} must be a word such as train or validation')
    is_chat = flags.format == 'chat'
    if not is_chat and (extra := {'chat_template', 'loss_on'} & flags.given):
        raise DataError(f'--{min(extra)} is for --format=chat; leave it out')
    flags.text_field = flags.text_field or FIELDS[flags.format]
    if flags.skip_bad >= 1:
        raise DataError(f'--skip_bad={flags.skip_bad} must be a share of the documents, at least 0 and below 1')
    try:
        prepare(flags)
    except OSError as error:
        raise DataError(
            f'{error.filename or flags.output}: {error.strerror or error}; '
            'check free space and permissions there, then run the same command to continue'
        ) from error
    except concurrent.futures.process.BrokenProcessPool as error:
        raise DataError(
            'a worker process died (out of memory?); run the same command with fewer --num_workers to continue'
        ) from error


def prepare(arguments: types.SimpleNamespace) -> Manifest:
    """Prepares one split. Raises DataError, or OSError for a full disk and the like."""
    output, split = arguments.output, arguments.split
    tokenizer = load_tokenizer(arguments.tokenizer, arguments.eos, arguments.bos)
    if arguments.vocab_size:
        check_size(
            f'--tokenizer={arguments.tokenizer}',
            tokenizer.vocab_size,
            arguments.vocab_size,
            limit_name='--vocab_size',
            remedy=f'raise it to at least {tokenizer.vocab_size}',
        )
    sources = [parse_source(argument) for argument in arguments.source]
    if len({bool(weight) for _, weight in sources}) > 1:
        raise DataError('some sources have a weight and some have none; give every --source @WEIGHT, or none')
    for spec in sorted({spec for spec, _ in sources}):
        if (times := [other for other, _ in sources].count(spec)) > 1:
            _note(f'--source={spec} is given {times} times; its documents are stored as often')
    same = {
        'sources': [list(source) for source in sources],
        'text_field': arguments.text_field,
        'tokenizer': tokenizer.describe(),
    }
    form = _make_format(arguments, tokenizer)
    chat = form.chat if form else None
    if form:
        same['format'] = arguments.format
    if chat:
        same['chat'] = chat.describe()

    if os.path.isfile(output):
        raise DataError(f'--output={output} is a file; name a directory')
    if split in finished(output):
        manifest = manifest_lib.read_manifest(output, split)
        if manifest.arguments != same:
            name = next(
                name for name in {**same, **manifest.arguments} if manifest.arguments.get(name) != same.get(name)
            )
            raise DataError(
                f'{output} already holds split {split!r} with another {name} '
                f'({_shown(manifest.arguments.get(name))}); name another --output or another --split'
            )
        shutil.rmtree(output / f'.incomplete.{split}', ignore_errors=True)  # of a run killed after its last write
        print(f'{output} already holds split {split!r}: {_count(manifest)}; nothing to do')
        return manifest
    _check_same(output, tokenizer, chat)
    weights = [weight for _, weight in sources if weight]
    for (spec, weight), share in zip(sources, whole_number_weights(weights) if weights else []):
        total = sum(whole_number_weights(weights))
        _note(f'--source={spec} has weight {weight}: {share / total:.4g} of the rows')

    tasks = plan(sources, split, ids=arguments.format == 'ids', skip_bad=arguments.skip_bad > 0)
    incomplete = output / f'.incomplete.{split}'
    # Every command, and every version of its source files, keeps its finished shards in a directory of its own: a
    # mistyped flag neither costs them nor stands in the way of the corrected command.
    content = [same, [dataclasses.asdict(task) for task in tasks], _times(tasks)]
    state = incomplete / hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    state.mkdir(parents=True, exist_ok=True)
    with _locked(incomplete):
        begin = time.monotonic()
        tokens = tokenize(tasks, state, arguments, tokenizer, form)
        seconds = max(time.monotonic() - begin, 1e-9)
        with _alone_in(output):  # splits prepared side by side share the files that name them
            _check_same(output, tokenizer, chat)
            manifest = commit(
                output,
                split,
                state,
                tasks,
                sources,
                same,
                tokenizer,
                arguments.skip_bad,
                chat.describe() if chat else None,
            )
    shutil.rmtree(incomplete)
    new = f', {tokens / seconds:,.0f} tokens/s with {_many(arguments.num_workers, "worker")}' if tokens else ''
    print(f'{output} holds split {split!r}: {_count(manifest)}{new}')
    return manifest


def _note(text: str) -> None:
    print(f'note: {text}', file=sys.stderr)


def _times(tasks: list[ShardTask]) -> list[int]:
    """When each source file was last changed; 0 for what is no file."""
    paths = sorted({piece.path for task in tasks for piece in task.pieces})
    return [os.stat(path).st_mtime_ns if os.path.isfile(path) else 0 for path in paths]


def plan(sources: list[tuple[str, str]], split: str, *, ids: bool = False, skip_bad: bool = False) -> list[ShardTask]:
    """Cuts the sources into tasks; each becomes a shard. Depends on the files alone."""
    files = [list_files(spec, split, _note, ids=ids) for spec, _ in sources]
    size = max(MIN_SHARD_BYTES, sum(file.size for listed in files for file in listed) // MAX_SHARDS)
    tasks = []
    for source, listed in enumerate(files):
        pieces, pieces_size = [], 0
        for piece in (piece for file in listed for piece in cut(file, size, skip_bad=skip_bad)):
            if pieces and pieces_size + piece.size > size:
                tasks.append(ShardTask(len(tasks), source, tuple(pieces)))
                pieces, pieces_size = [], 0
            pieces.append(piece)
            pieces_size += piece.size
        if pieces:
            tasks.append(ShardTask(len(tasks), source, tuple(pieces)))
    return tasks


def tokenize(tasks: list[ShardTask], state: Path, arguments: types.SimpleNamespace, tokenizer, form=None) -> int:
    """Writes the shards that `state` lacks; returns the tokens in them."""
    pending = [task for task in tasks if read_result(state, task) is None]
    documents = tokens = 0
    with tqdm(
        total=len(tasks),
        initial=len(tasks) - len(pending),
        desc=arguments.split,
        unit='shard',
        dynamic_ncols=True,
        disable=None if pending else True,  # None: where stderr is no terminal
    ) as bar:
        if len(pending) < len(tasks) and pending:
            tqdm.write(f'{len(tasks) - len(pending)} of {len(tasks)} shards are finished; continuing', file=sys.stderr)
        begin = told = time.monotonic()

        def advance(new_documents: int, new_tokens: int):
            nonlocal documents, tokens, told
            documents += new_documents
            tokens += new_tokens
            speed = tokens / (time.monotonic() - begin + 1e-9)
            text = f'{documents:,} documents, {tokens:,} tokens, {speed:,.0f} tokens/s'
            bar.set_postfix_str(text, refresh=False)
            if bar.disable and time.monotonic() - told > REMINDER_SECONDS:
                told = time.monotonic()
                print(f'{arguments.split}: {text}', file=sys.stderr, flush=True)

        workers = min(arguments.num_workers, len(pending))
        if workers <= 1:
            for task in pending:
                write_shard(task, state, tokenizer, arguments.text_field, arguments.skip_bad > 0, advance, form)
                bar.update()
            return tokens

        context = multiprocessing.get_context('spawn')
        progress, stop = context.Queue(), context.Event()
        pool = concurrent.futures.ProcessPoolExecutor(
            workers,
            context,
            _start_worker,
            (arguments, state, progress, stop),
        )
        try:
            waiting = {pool.submit(_work, task) for task in pending}
            while waiting:
                done, waiting = concurrent.futures.wait(waiting, 0.2, concurrent.futures.FIRST_COMPLETED)
                with contextlib.suppress(queue.Empty):
                    while True:
                        advance(*progress.get_nowait())
                for future in done:
                    future.result()
                    bar.update()
        except BaseException:
            stop.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        with contextlib.suppress(queue.Empty):
            while True:
                advance(*progress.get(timeout=0.1))
    return tokens


_worker = {}  # what a worker process keeps between tasks: tokenizer, text_field, skip_bad, state, progress, stop


def _start_worker(arguments, state, progress, stop):
    exit_with_parent()
    tokenizer = load_tokenizer(arguments.tokenizer, arguments.eos, arguments.bos)
    _worker.update(
        tokenizer=tokenizer,
        form=_make_format(arguments, tokenizer),
        text_field=arguments.text_field,
        skip_bad=arguments.skip_bad > 0,
        state=state,
        progress=progress,
        stop=stop,
    )


def _work(task: ShardTask) -> None:
    def advance(documents: int, tokens: int):
        if _worker['stop'].is_set():
            raise DataError('stopped')
        _worker['progress'].put((documents, tokens))

    kept = [_worker[name] for name in ('state', 'tokenizer', 'text_field', 'skip_bad')]
    write_shard(task, *kept, advance, _worker['form'])


def _make_format(arguments: types.SimpleNamespace, tokenizer) -> ChatFormat | IdsFormat | None:
    if arguments.format == 'chat':
        chat = load_chat(tokenizer, arguments.tokenizer, arguments.chat_template, loss_on=arguments.loss_on)
        return ChatFormat(tokenizer, chat)
    return IdsFormat(tokenizer) if arguments.format == 'ids' else None


def _check_same(output: Path, tokenizer, chat: Chat | None) -> None:
    """Raises DataError where the directory holds splits of another tokenizer, or of text beside conversations."""
    for other in finished(output):
        manifest = manifest_lib.read_manifest(output, other)
        described = manifest.tokenizer
        if manifest.chat.get('template') != (chat.template if chat else None):
            kind = (
                'conversations of another template' if manifest.chat and chat else 'text' if chat else 'conversations'
            )
            raise DataError(f'{output} holds split {other!r} of {kind}; name another --output')
        if described != tokenizer.describe():
            raise DataError(
                f'{output} holds split {other!r} with another tokenizer ({_shown(described)}); '
                'use that one or name another --output'
            )


@contextlib.contextmanager
def _alone_in(output: Path) -> Iterator[None]:
    directory = os.open(output, os.O_RDONLY)
    try:
        _flock(directory, fcntl.LOCK_EX, output)  # waits: a commit takes a moment
        yield
    finally:
        os.close(directory)


@contextlib.contextmanager
def _locked(incomplete: Path) -> Iterator[None]:
    with open(incomplete / 'lock', 'w') as file:
        try:
            _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB, incomplete)
        except BlockingIOError:
            raise DataError(f'another prepare is at work in {incomplete}; wait for it or end it') from None
        yield


def _flock(file, operation: int, path: Path) -> None:
    """fcntl.flock, with a warning where the file system has no locks (Lustre without -o flock, some mounted buckets)."""
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL):
            raise
        _note(f'{path}: the file system has no locks ({error.strerror}); do not run two prepares there at once')


def _count(manifest: Manifest) -> str:
    skipped = collections.Counter()
    for source in manifest.sources:
        skipped.update(source.skipped)
    return (
        f'{_many(manifest.num_documents, "document")}, {manifest.num_tokens:,} tokens, {manifest.num_bytes:,} bytes of text, '
        f'{sum(skipped.values()):,} skipped{reasons(skipped)}, {_many(len(manifest.shards), "shard")}'
    )


def _shown(argument) -> str:
    """An argument of the manifest, in a few words."""
    if isinstance(argument, dict) and 'vocab_size' in argument:
        return f'{argument["kind"]}, {argument["vocab_size"]:,} ids, eos {argument["eos_id"]}'
    return cli.shorten(json.dumps(argument))


def _many(count: int, noun: str) -> str:
    return f'{count:,} {noun}' + 's' * (count != 1)
