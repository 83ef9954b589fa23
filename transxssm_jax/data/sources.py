"""Batches of rows from several prepared directories, with weights that may change by step.

The rows of a source are those of its directory: packed, permuted by (seed, content
of the source, epoch), and read through one epoch after another. Which of its rows
a step holds follows from how many the steps before it held (schedule.py), so that
any step is reached at once, and the batch of a step is a pure function of (sources,
weights, seed, step). Within a step the sources are interleaved evenly.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from transxssm_jax.data import loader
from transxssm_jax.data.documents import Documents
from transxssm_jax.data.manifest import DataError, Manifest, read_manifest
from transxssm_jax.data.mixture import Mixture, assign_row
from transxssm_jax.data.packing import pack_rows
from transxssm_jax.data.schedule import Point, Schedule, parse_epochs, parse_weights
from transxssm_jax.data.vocabulary import is_same


def make_mixed_loader(
    directories: Mapping[str, str],
    split: str,
    *,
    weights: str = '',
    max_epochs: str = '',
    seq_len: int,
    global_batch: int,
    seed: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
    num_workers: int = 0,
    num_threads: int = 4,
    prefetch: int = 4,
    verify: str = 'sizes',
) -> loader.Loader:
    """Opens a split of several prepared directories, to be read for ever, or until every source has given its epochs.

    Args:
      directories: name of a source -> what prepare.py wrote.
      weights: see schedule.py; '': in proportion to the sources' tokens.
      max_epochs: of each source, in the order of the directories, with commas between; '' or 0: any number.
      The rest: as `loader.make_loader`.

    Raises DataError for data that is missing, broken or too small, a source whose tokenizer differs, or weights that
    are not written as they must be.
    """
    loader.check_sizes(seq_len, global_batch, start_step, num_workers, num_threads, prefetch)
    batches = open_batches(
        directories,
        split,
        weights=weights,
        max_epochs=max_epochs,
        seq_len=seq_len,
        global_batch=global_batch,
        seed=seed,
        start_step=start_step,
        rows=loader.checked_rows(rows, global_batch),
    )
    for part in batches.parts:
        part.manifest.check_shards(verify)
    return loader.Loader(batches, num_workers=num_workers, num_threads=num_threads, prefetch=prefetch)


def open_batches(directories: Mapping[str, str], split: str, *, weights: str, max_epochs: str, **settings) -> 'Batches':
    """The batches of `make_mixed_loader`, without a thread or process that reads them. Arguments and errors as there."""
    points, epochs = parse_weights(weights, len(directories)), parse_epochs(max_epochs, len(directories))
    manifests = [read_manifest(directory, split) for directory in directories.values()]
    for name, manifest in zip(directories, manifests):
        first = manifests[0]
        if not is_same(manifest.tokenizer, first.tokenizer):
            raise DataError(
                f'data.sources: {name} ({manifest.directory}) has another tokenizer than {next(iter(directories))} '
                f'({first.directory}); prepare it again with the same'
            )
    return Batches(Settings(tuple(directories), tuple(manifests), tuple(points), tuple(epochs), **settings))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the batches; grain's worker processes get it.

    Attributes:
      names, manifests, max_epochs: of each source; 0: any number of epochs.
      points: weights by step; none: in proportion to the tokens.
      rows: indices within the global batch that are read.
    """

    names: tuple[str, ...]
    manifests: tuple[Manifest, ...]
    points: tuple[Point, ...]
    max_epochs: tuple
    seq_len: int
    global_batch: int
    seed: int
    start_step: int
    rows: Sequence[int]


class Batches:
    """Random-access source of this host's rows of each step, for grain. Pickles to its settings.

    Attributes: see `loader.Loader`; and
      schedule: rows of each source by step.
    """

    num_steps = 0

    def __init__(self, settings: Settings):
        self._settings = settings
        lengths = [manifest.lengths() for manifest in settings.manifests]
        self._documents = [Documents(*own) for own in zip(settings.manifests, lengths)]
        self._mixtures: list[Mixture] = [
            loader.make_mixture(manifest, own, settings.seq_len, settings.seed, key=(_number(manifest.fingerprint()),))
            for manifest, own in zip(settings.manifests, lengths)
        ]
        rows = [mixture.rows_per_epoch for mixture in self._mixtures]
        most = [int(count * epochs) for count, epochs in zip(rows, settings.max_epochs)]
        for name, count, epochs, allowed in zip(settings.names, rows, settings.max_epochs, most):
            if epochs and not allowed:
                raise DataError(
                    f'data.max_epochs={float(epochs):g} of {name} is less than one of its {count} rows; leave it out of '
                    'data.sources'
                )
        points = settings.points or [Point(0, tuple(manifest.num_tokens for manifest in settings.manifests))]
        self.schedule = Schedule(list(points), settings.global_batch, most)
        shares = self.schedule.shares(settings.start_step)
        self.parts = [
            loader.Part(name, share, manifest, own)
            for name, share, manifest, own in zip(settings.names, shares, settings.manifests, lengths)
        ]
        self.events = {step: self._ended(step) for step, _ in self.schedule.ended}
        self.rows_per_epoch = sum(rows)
        self.packing_efficiency = float(
            np.average(
                [mixture.packing_efficiency for mixture in self._mixtures], weights=shares if any(shares) else None
            )
        )
        fingerprints = [manifest.fingerprint() for manifest in settings.manifests]
        self.fingerprint = hashlib.sha256('\n'.join(fingerprints).encode()).hexdigest()

    def _ended(self, step: int) -> str:
        names = [self._settings.names[source] for at, source in self.schedule.ended if at == step]
        has = 'have' if len(names) > 1 else 'has'
        rest = 'no source is left' if self.schedule.end_step == step else 'the others share its rows'
        return f'{" and ".join(names)} {has} given data.max_epochs by step {step:,}; {rest} from there on'

    def position(self, step: int) -> dict:
        """The rows that each source has given, by its fingerprint; none of a source that has given none."""
        counts, given = self.schedule.counts(step), {}
        for manifest, count in zip(self._settings.manifests, counts):
            if count:
                given[manifest.fingerprint()] = given.get(manifest.fingerprint(), 0) + count
        return {'rows': given}

    def __reduce__(self):
        return type(self), (self._settings,)

    def __repr__(self) -> str:
        return f'Batches({", ".join(self._settings.names)})'  # in grain's messages

    def __len__(self) -> int:
        end = self.schedule.end_step
        return loader.ENDLESS if end is None else max(end - self._settings.start_step, 0)

    def row_spans(self, step: int) -> list[tuple[int, list[tuple[int, int, int]]]]:
        before, after = self.schedule.counts(step), self.schedule.counts(step + 1)
        counts = [end - start for start, end in zip(before, after)]
        rows = []  # (source, spans) of each row
        for row in self._settings.rows:
            source, index = assign_row(row, counts)
            rows.append((source, self._mixtures[source].spans(before[source] + index)))
        return rows

    def __getitem__(self, item: int) -> dict[str, np.ndarray]:
        rows = self.row_spans(self._settings.start_step + int(item))

        @functools.cache
        def parts(source: int):
            spans = [span for own, spans in rows if own == source for span in spans]
            return iter(self._documents[source].read(spans))

        return pack_rows([(spans, parts(source)) for source, spans in rows], self._settings.seq_len)


def _number(fingerprint: str) -> int:
    """64 bits of a fingerprint, which tell the orders of sources apart wherever they stand in the list."""
    return int(fingerprint[:16], 16)
