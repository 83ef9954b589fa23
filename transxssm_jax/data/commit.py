"""Finished shards to a finished split: counts, manifest, and the metadata that TFDS reads, which comes last."""

import collections
import os
from pathlib import Path

import numpy as np

from transxssm_jax.data import manifest as manifest_lib
from transxssm_jax.data import shard_writer
from transxssm_jax.data.manifest import DATASET_NAME, DataError, Manifest, Shard, Source
from transxssm_jax.data.shard_writer import ShardTask, lengths_path, read_result, result_path, shard_path

NO_ERROR = ('empty', 'binary file')  # reasons for which a document is skipped that is not bad


def commit(
    output: Path,
    split: str,
    state: Path,
    tasks: list[ShardTask],
    sources: list[tuple[str, str]],
    same: dict,
    tokenizer,
    skip_bad: float,
    chat: dict | None = None,
) -> Manifest:
    """Moves the finished shards into place and names the split in dataset_info.json last.

    chat describes the template of conversations, or is None. May be repeated: a run that died in here is continued by the next.
    """
    counts = [read_result(state, task) for task in tasks]
    if damaged := [result_path(state, task) for task, count in zip(tasks, counts, strict=True) if count is None]:
        raise DataError(f'{damaged[0]} is damaged; run the same command again, which makes its shard anew')
    kept = [task for task in tasks if counts[task.number]['records']]
    totals = []
    for number, (spec, weight) in enumerate(sources):
        own = [counts[task.number] for task in tasks if task.source == number]
        total = {name: sum(count[name] for count in own) for name in ('documents', 'tokens', 'bytes', 'targets')}
        skipped = collections.Counter()
        for count in own:
            skipped.update(count['skipped'])
        skipped = dict(sorted(skipped.items()))
        if not total['documents']:
            raise DataError(f'--source={spec} has no text{reasons(skipped)}; leave it out or name another')
        first = sum(source.documents for source in totals)
        totals.append(Source(spec=spec, weight=weight, first_document=first, skipped=skipped, **total))
    first_bad = next((count['first_bad'] for count in counts if count['first_bad']), '')
    _check_share_of_bad(totals, skip_bad, first_bad)
    shards = []
    for i, task in enumerate(kept):
        path = output / f'{DATASET_NAME}-{split}.array_record-{i:05d}-of-{len(kept):05d}'
        count = counts[task.number]
        if shard_path(state, task).exists():
            os.replace(shard_path(state, task), path)
        elif not path.exists() or manifest_lib.file_digest(path) != count['sha256']:
            # Another command for the same split died in here too, and its shards took the place of ours.
            result_path(state, task).unlink()
            raise DataError(f'{path} was replaced by another run of prepare; run the same command again')
        shards.append(Shard(path.name, count['file_bytes'], count['records'], count['documents'], count['sha256']))
    lengths = np.concatenate([np.load(lengths_path(state, task)) for task in kept])
    manifest = Manifest(
        directory=output,
        split=split,
        arguments=same,
        tokenizer=tokenizer.describe(),
        token_dtype=tokenizer.dtype.name,
        record_tokens=shard_writer.RECORD_TOKENS,
        lengths_sha256=manifest_lib.write_lengths(output, split, lengths),
        sources=tuple(totals),
        shards=tuple(shards),
        chat=chat or {},
    )
    if manifest.tokenizer['kind'] == 'json':
        manifest_lib.write_file(output / 'tokenizer.json', tokenizer.content)
    manifest.write()
    manifest_lib.sync_directory(output)
    write_tfds_metadata(output, manifest, state)
    manifest_lib.sync_directory(output)
    return manifest


def _check_share_of_bad(sources, skip_bad: float, first_bad: str = '') -> None:
    bad = {}
    for source in sources:
        for reason, count in source.skipped.items():
            if reason not in NO_ERROR:
                bad[reason] = bad.get(reason, 0) + count
    count = sum(bad.values())
    documents = count + sum(source.documents for source in sources)
    if count > skip_bad * documents:
        raise DataError(
            f'{count:,} of {documents:,} documents are bad{reasons(bad)}, more than --skip_bad={skip_bad:g} allows; '
            f'mend the source, or run the same command with --skip_bad={_round_up(count / documents)}'
            + (f'; the first: {first_bad}' if first_bad else '')
        )


def _round_up(share: float) -> str:
    """A share of two digits that is no smaller."""
    return f'{share * 1.05:.1g}' if float(f'{share * 1.05:.1g}') >= share else f'{share * 1.05:.2g}'


def reasons(skipped: dict[str, int]) -> str:
    return f' ({", ".join(f"{count:,} {reason}" for reason, count in skipped.items())})' if skipped else ''


def write_tfds_metadata(output: Path, manifest: Manifest, state: Path) -> None:
    import tensorflow_datasets as tfds

    splits = [manifest_lib.read_manifest(output, split) for split in finished(output)] + [manifest]
    features = {
        'tokens': tfds.features.Tensor(shape=(None,), dtype=np.dtype(manifest.token_dtype), encoding='bytes'),
        'offset': tfds.features.Scalar(np.int64),
    }
    if manifest.chat:
        features['mask'] = tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding='bytes')
    # The builder is only asked for its name and version; tfds.folder_dataset.write_metadata does the same,
    # but writes in place and takes stray files of an unfinished split for data.
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=DATASET_NAME, version=tfds.core.Version('1.0.0'), data_dir=str(output), module_name=''
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=tfds.features.FeaturesDict(features),
        description=f'Documents as tokens, each ending with id {manifest.tokenizer["eos_id"]}; '
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
        manifest_lib.write_file(output / name, (scratch / name).read_bytes())


def finished(output: Path) -> list[str]:
    return manifest_lib.finished_splits(output) if (output / 'dataset_info.json').exists() else []
