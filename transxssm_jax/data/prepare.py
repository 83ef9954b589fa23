"""Tokenises text into a data set of documents that loader.py and plain TFDS read.

    python -m transxssm_jax.data.prepare --output=DIR --tokenizer=byte --split=train --source='src/**/*.py'
    python -m transxssm_jax.data.prepare --output=DIR --tokenizer=tokenizer.json --split=train \\
        --source=books.parquet@0.3 --source=tfds:c4/train@0.7

source.py says what a source can be, index.py what DIR holds. Sources without
weights make one pool; with weights (every one or none), a row of training
comes from a source with that share, each source going through epochs of its
own.

The work is cut into shards that depend on the sources alone. A finished shard
stays in DIR/.incomplete.SPLIT, so the same command continues an interrupted
run; the output is the same for any --num_workers and any interruption. The
split counts as finished once dataset_info.json names it, which is written last.

Exit codes: 0 done (or done before), 2 refused with one line that says why,
130 interrupted.
"""

import argparse
import concurrent.futures.process
import contextlib
import dataclasses
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
from collections.abc import Iterator
from pathlib import Path

# Processes do the work side by side; threads of the tokenizer on top would only fight over cores.
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

import numpy as np
from tqdm import tqdm

from transxssm_jax.data import manifest as index_lib
from transxssm_jax.data import shard_writer as shards_lib
from transxssm_jax.data.manifest import DATASET_NAME, DataError, Shard, Source, SplitIndex
from transxssm_jax.data.shard_writer import Unit, lengths_path, result_path, shard_path, tokenize_unit
from transxssm_jax.data.source import cut, list_files, parse_source
from transxssm_jax.data.tokenizer import load_tokenizer
from transxssm_jax.data.vocabulary import check_size
from transxssm_jax.data.workers import follow_parent

MIN_SHARD_BYTES = 4 << 20  # of text: seconds of work, what an interruption can lose
MAX_SHARDS = 512  # about; every one is an open file in the loader


def main(argv: list[str] | None = None) -> int:
    try:
        arguments = parse_arguments(argv)
        prepare(arguments)
    except DataError as error:
        return _refuse(error)
    except OSError as error:
        return _refuse(
            f'{error.filename or arguments.output}: {error.strerror or error}; '
            'check free space and permissions there, then run the same command to continue'
        )
    except concurrent.futures.process.BrokenProcessPool:
        return _refuse(
            'a worker process died (out of memory?); run the same command with fewer --num_workers to continue'
        )
    except KeyboardInterrupt:
        print('interrupted; run the same command to continue', file=sys.stderr)
        return 130
    return 0


def _refuse(error) -> int:
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise DataError(f'{message}; see --help')


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog='python -m transxssm_jax.data.prepare',
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--output', type=Path, required=True, metavar='DIR')
    parser.add_argument('--tokenizer', required=True, metavar='byte|FILE.json')
    parser.add_argument('--split', required=True, help='train, validation, ...; added to what DIR holds')
    parser.add_argument('--source', action='append', required=True, metavar='SPEC[@WEIGHT]', help='may be repeated')
    parser.add_argument('--text_field', default='text', help='field, column or feature that holds the text')
    parser.add_argument('--eos', default='', help='token or id that ends a document, where the tokenizer has several')
    parser.add_argument(
        '--vocab_size', type=int, default=0, help="refuse a tokenizer with more ids than this (the model's)"
    )
    parser.add_argument('--num_workers', type=int, default=os.cpu_count(), help='processes that tokenise')
    arguments = parser.parse_args(argv)
    if not re.fullmatch(r'[A-Za-z]\w*', arguments.split):
        raise DataError(f'--split={arguments.split} must be a word such as train or validation')
    if arguments.num_workers < 1:
        raise DataError(f'--num_workers={arguments.num_workers} must be at least 1')
    return arguments


def prepare(arguments: argparse.Namespace) -> SplitIndex:
    """Prepares one split. Raises DataError, or OSError for a full disk and the like."""
    output, split = arguments.output, arguments.split
    tokenizer = load_tokenizer(arguments.tokenizer, arguments.eos)
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
    same = {
        'sources': [list(source) for source in sources],
        'text_field': arguments.text_field,
        'tokenizer': tokenizer.describe(),
    }

    finished = _finished(output)
    if split in finished:
        index = index_lib.read_index(output, split)
        if index.arguments != same:
            name = next(name for name in same if index.arguments.get(name) != same[name])
            raise DataError(
                f'{output} already holds split {split!r} with another {name} '
                f'({json.dumps(index.arguments.get(name))}); name another --output or delete that one'
            )
        shutil.rmtree(output / f'.incomplete.{split}', ignore_errors=True)  # of a run killed after its last write
        print(f'{output} already holds split {split!r}: {_count(index)}; nothing to do')
        return index
    _check_tokenizer(output, tokenizer)

    units = plan(sources, split)
    state = output / f'.incomplete.{split}'
    state.mkdir(parents=True, exist_ok=True)
    with _locked(state):
        digest = hashlib.sha256(json.dumps([same, [dataclasses.asdict(unit) for unit in units]]).encode()).hexdigest()
        marker = state / 'plan.sha256'
        if marker.exists() and marker.read_text() != digest:
            raise DataError(
                f'{state} is left from a run with other arguments or other source files; '
                f'repeat that command, or delete it (rm -r {state})'
            )
        index_lib.write_file(marker, digest.encode())
        begin = time.monotonic()
        tokens = tokenize(units, state, arguments, tokenizer)
        seconds = max(time.monotonic() - begin, 1e-9)
        with _alone_in(output):  # splits prepared side by side share the files that name them
            _check_tokenizer(output, tokenizer)
            index = commit(output, split, state, units, sources, same, tokenizer)
    shutil.rmtree(state)
    new = f', {tokens / seconds:,.0f} tokens/s with {arguments.num_workers} workers' if tokens else ''
    print(f'{output} holds split {split!r}: {_count(index)}{new}')
    return index


def plan(sources: list[tuple[str, str]], split: str) -> list[Unit]:
    """Cuts the sources into units of work; each becomes a shard. Depends on the files alone."""
    files = [list_files(spec, split) for spec, _ in sources]
    size = max(MIN_SHARD_BYTES, sum(file.size for listed in files for file in listed) // MAX_SHARDS)
    units = []
    for source, listed in enumerate(files):
        pieces, pieces_size = [], 0
        for piece in (piece for file in listed for piece in cut(file, size)):
            if pieces and pieces_size + piece.size > size:
                units.append(Unit(len(units), source, tuple(pieces)))
                pieces, pieces_size = [], 0
            pieces.append(piece)
            pieces_size += piece.size
        if pieces:
            units.append(Unit(len(units), source, tuple(pieces)))
    return units


def tokenize(units: list[Unit], state: Path, arguments: argparse.Namespace, tokenizer) -> int:
    """Writes the shards that `state` lacks; returns the tokens in them."""
    pending = [unit for unit in units if not result_path(state, unit).exists()]
    documents = tokens = 0
    with tqdm(
        total=len(units),
        initial=len(units) - len(pending),
        desc=arguments.split,
        unit='shard',
        dynamic_ncols=True,
        disable=not pending,
    ) as bar:
        if len(pending) < len(units) and pending:
            tqdm.write(f'{len(units) - len(pending)} of {len(units)} shards are finished; continuing', file=sys.stderr)
        begin = time.monotonic()

        def advance(new_documents: int, new_tokens: int):
            nonlocal documents, tokens
            documents += new_documents
            tokens += new_tokens
            speed = tokens / (time.monotonic() - begin + 1e-9)
            bar.set_postfix_str(f'{documents:,} documents, {tokens:,} tokens, {speed:,.0f} tokens/s', refresh=False)

        workers = min(arguments.num_workers, len(pending))
        if workers <= 1:
            for unit in pending:
                tokenize_unit(unit, state, tokenizer, arguments.text_field, advance)
                bar.update()
            return tokens

        context = multiprocessing.get_context('spawn')
        progress, stop = context.Queue(), context.Event()
        pool = concurrent.futures.ProcessPoolExecutor(
            workers,
            context,
            _start_worker,
            (str(arguments.tokenizer), arguments.eos, arguments.text_field, state, progress, stop),
        )
        try:
            waiting = {pool.submit(_work, unit) for unit in pending}
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


_worker = {}  # what a worker process keeps between units: tokenizer, text_field, state, progress, stop


def _start_worker(tokenizer, eos, text_field, state, progress, stop):
    follow_parent()
    _worker.update(
        tokenizer=load_tokenizer(tokenizer, eos), text_field=text_field, state=state, progress=progress, stop=stop
    )


def _work(unit: Unit) -> None:
    def advance(documents: int, tokens: int):
        if _worker['stop'].is_set():
            raise DataError('stopped')
        _worker['progress'].put((documents, tokens))

    tokenize_unit(unit, _worker['state'], _worker['tokenizer'], _worker['text_field'], advance)


def commit(
    output: Path, split: str, state: Path, units: list[Unit], sources: list[tuple[str, str]], same: dict, tokenizer
) -> SplitIndex:
    """Moves the finished shards into place and names the split in dataset_info.json last.

    May be repeated: a run that died in here is continued by the next.
    """
    counts = [json.loads(result_path(state, unit).read_text()) for unit in units]
    kept = [unit for unit in units if counts[unit.number]['records']]
    if not kept:
        raise DataError(
            f'no text in {", ".join(spec for spec, _ in sources)} '
            f'({sum(c["skipped"] for c in counts)} empty documents); name another --source'
        )
    shards, totals = [], []
    for i, unit in enumerate(kept):
        path = output / f'{DATASET_NAME}-{split}.array_record-{i:05d}-of-{len(kept):05d}'
        if shard_path(state, unit).exists():
            os.replace(shard_path(state, unit), path)
        count = counts[unit.number]
        shards.append(Shard(path.name, count['file_bytes'], count['records'], count['documents']))
    for number, (spec, weight) in enumerate(sources):
        own = [counts[unit.number] for unit in units if unit.source == number]
        total = {name: sum(count[name] for count in own) for name in ('documents', 'tokens', 'bytes', 'skipped')}
        if not total['documents']:
            raise DataError(
                f'--source={spec} has no text ({total["skipped"]} empty documents); leave it out or name another'
            )
        totals.append(Source(spec=spec, weight=weight, first_document=sum(t.documents for t in totals), **total))
    index = SplitIndex(
        output,
        split,
        same,
        tokenizer.describe(),
        tokenizer.dtype.name,
        shards_lib.RECORD_TOKENS,
        tuple(totals),
        tuple(shards),
    )
    if index.tokenizer['kind'] == 'json':
        index_lib.write_file(output / 'tokenizer.json', tokenizer.content)
    index_lib.write_index(index, np.concatenate([np.load(lengths_path(state, unit)) for unit in kept]))
    index_lib.sync_directory(output)
    _write_tfds_metadata(output, index, state)
    index_lib.sync_directory(output)
    return index


def _write_tfds_metadata(output: Path, index: SplitIndex, state: Path) -> None:
    import tensorflow_datasets as tfds

    splits = [index_lib.read_index(output, split) for split in _finished(output)] + [index]
    features = tfds.features.FeaturesDict(
        {
            'tokens': tfds.features.Tensor(shape=(None,), dtype=np.dtype(index.token_dtype), encoding='bytes'),
            'offset': tfds.features.Scalar(np.int64),
        }
    )
    # The builder is only asked for its name and version; tfds.folder_dataset.write_metadata does the same,
    # but writes in place and takes stray files of an unfinished split for data.
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=DATASET_NAME, version=tfds.core.Version('1.0.0'), data_dir=str(output), module_name=''
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=features,
        description=f'Documents as tokens, each ending with id {index.tokenizer["eos_id"]}; '
        'a record of offset 0 begins a document. Written by transxssm_jax.data.prepare.',
    )
    info.set_file_format('array_record')
    info.set_splits(
        tfds.core.splits.SplitDict(
            [
                tfds.core.SplitInfo(
                    name=split.split,
                    shard_lengths=[shard.records for shard in split.shards],
                    num_bytes=sum(shard.file_bytes for shard in split.shards),
                    filename_template=tfds.core.ShardedFileTemplate(
                        data_dir=output, dataset_name=DATASET_NAME, split=split.split, filetype_suffix='array_record'
                    ),
                )
                for split in splits
            ]
        )
    )
    scratch = state / 'metadata'
    scratch.mkdir(exist_ok=True)
    info.write_to_directory(scratch)
    for name in ('features.json', 'dataset_info.json'):  # the order matters: dataset_info.json is the commit
        index_lib.write_file(output / name, (scratch / name).read_bytes())


def _finished(output: Path) -> list[str]:
    return index_lib.finished_splits(output) if (output / 'dataset_info.json').exists() else []


def _check_tokenizer(output: Path, tokenizer) -> None:
    for other in _finished(output):
        described = index_lib.read_index(output, other).tokenizer
        if described != tokenizer.describe():
            raise DataError(
                f'{output} holds split {other!r} with another tokenizer ({described}); '
                'use that one or name another --output'
            )


@contextlib.contextmanager
def _alone_in(output: Path) -> Iterator[None]:
    directory = os.open(output, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)  # waits: a commit takes a moment
        yield
    finally:
        os.close(directory)


@contextlib.contextmanager
def _locked(state: Path) -> Iterator[None]:
    with open(state / 'lock', 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f'another prepare is at work in {state}; wait for it or end it') from None
        yield


def _count(index: SplitIndex) -> str:
    skipped = sum(source.skipped for source in index.sources)
    return (
        f'{index.num_documents:,} documents, {index.num_tokens:,} tokens, {index.num_bytes:,} bytes of text, '
        f'{skipped:,} empty documents skipped, {len(index.shards)} shards'
    )


if __name__ == '__main__':
    sys.exit(main())
