"""The ledger of a run: a line for every step that was taken, so that any of them can be explained and taken again.

WORKDIR/ledger/ holds

- `process-N.jsonl`: the lines of process N, one JSON object per step;
- `config-DIGEST.json`: every config that steps were taken with, with nothing left open.

A line has
  step: number of the step, from 1;
  batch: XXH3-64 of the rows that this process read, see `batch_digest`; rows: which of the global batch they are, as
    [first, past last] ranges. Processes do not wait for each other to combine them;
  skipped: true where the update was left out (train.spike_action='skip');
  batch_number: which batch of the data it was, from 0; where it is missing, the number is step - 1 (batch_order.py);
  learning_rate, loss (nats per token), grad_norm, update_norm, param_norm (before the step): of the whole run, in every
    process the same; null where not finite;
  config, code, jax, device: digest of the config, version and digest of the code, version of jax, and the devices;
  sum: XXH3-64 of the line before it, so that a damaged line is no line.

A line is written when the metrics of its step are read, which the devices do not wait for. A run that goes on from a
checkpoint drops the lines of later steps: they are taken again.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import pathlib
import re
from collections.abc import Sequence

import jax
import numpy as np
import xxhash

import pallas_kernels
import transxssm_jax
from transxssm_jax import cli
from transxssm_jax import config as config_lib
from transxssm_jax.config import Config
from transxssm_jax.data.manifest import write_file
from transxssm_jax.parallel import mesh, processes
from transxssm_jax.settings import LARGEST_INT
from transxssm_jax.training import digest
from transxssm_jax.training.metrics import naming

DIRECTORY = 'ledger'
HASHED = ('tokens', 'targets', 'segment_ids')  # positions follow from the segments
NUMBERS = ('learning_rate', 'param_norm', 'loss', 'grad_norm', 'update_norm')
_LINE = re.compile(rb'\{"step": (\d{1,18}), .*\}\n')
TEXTS = ('batch', 'config', 'code', 'jax', 'device')


class LedgerError(cli.UserError, ValueError):
    """The ledger lacks what is asked of it; the message is one line."""


# ---- what a line tells -------------------------------------------------------


def batch_digest(batch: dict[str, np.ndarray], index=slice(None)) -> str:
    """XXH3-64, in hexadecimal digits, of the rows of a batch that `index` selects.

    Args:
      batch: integers [rows, L] by name; HASHED are read, as little-endian int32.
      index: of numpy, along the rows; default all.
    """
    hasher = xxhash.xxh3_64()
    for name in HASHED:
        hasher.update(np.ascontiguousarray(batch[name][index], '<i4'))
    return hasher.hexdigest()


def as_ranges(rows: Sequence[int]) -> list[list[int]]:
    """Ascending numbers as [first, past last] ranges."""
    ranges = []
    for row in map(int, rows):
        if ranges and ranges[-1][1] == row:
            ranges[-1][1] += 1
        else:
            ranges.append([row, row + 1])
    return ranges


def numbers(scalars: dict[str, float]) -> dict[str, float | None]:
    """The NUMBERS of a line; None where not finite, which JSON has no word for."""
    values = {name: float(scalars[name]) for name in NUMBERS}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def circumstances(config: Config) -> dict[str, str]:
    """What numbers may depend on besides the state and the batch: 'config', 'code', 'jax' and 'device' of a line."""
    return {
        'config': digest.of_config(config),
        'code': code_version(),
        'jax': jax.__version__,
        'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}, processes: {jax.process_count()}',
    }


def sealed(line: dict) -> str:
    """A line as it is written, with the digest of what is before it at its end."""
    text = json.dumps({name: value for name, value in line.items() if name != 'sum'})
    return f'{text[:-1]}, "sum": "{xxhash.xxh3_64_hexdigest(text.encode())}"}}\n'


@functools.cache
def code_version() -> str:
    """Version of the package, and a digest of its Python files, which changes with any of them."""
    hasher = hashlib.sha256()
    for package in (transxssm_jax, pallas_kernels):
        root = pathlib.Path(package.__file__).parent
        for path in sorted(root.rglob('*.py')):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            hasher.update(f'{package.__name__}/{path.relative_to(root).as_posix()} {content}\n'.encode())
    try:
        version = importlib.metadata.version('transxssm_jax')
    except importlib.metadata.PackageNotFoundError:
        version = 'unknown'
    return f'{version}+{hasher.hexdigest()[:12]}'


# ---- writing -----------------------------------------------------------------


class Ledger:
    """Writes the lines of this process.

    Args:
      workdir: of the run.
      config: that steps are taken with; it leaves nothing open.
      device_mesh: decides which rows this process reads.
      first_step: after which steps are taken; lines of later ones are dropped.

    Raises:
      OSError: naming the file that cannot be written.
    """

    def __init__(self, workdir: pathlib.Path, config: Config, device_mesh: jax.sharding.Mesh, first_step: int):
        directory = workdir / DIRECTORY
        path = directory / f'process-{jax.process_index()}.jsonl'
        rows = mesh.rows_of_this_process(device_mesh, config.data.global_batch)
        self._always = circumstances(config) | {'rows': as_ranges(rows)}
        self._batches = {}  # step -> what its line tells of its batch, until its metrics are read
        self._path = path
        with naming(directory):
            directory.mkdir(exist_ok=True)
        _drop_after(path, first_step)
        if processes.is_coordinator():
            for other in directory.glob('process-*.jsonl'):  # of processes that the run no longer has
                if _process(other) >= jax.process_count():
                    _drop_after(other, first_step)
            config_path = _config_path(workdir, self._always['config'])
            with naming(config_path):
                write_file(config_path, config_lib.to_json(config).encode())
        with naming(path):
            self._file = path.open('a', encoding='ascii')

    def read_batch(self, step: int, number: int, batch: dict[str, np.ndarray]) -> None:
        """Notes the rows that this process read for a step. number: of the batch in the data."""
        self._batches[step] = {'batch': batch_digest(batch)} | ({'batch_number': number} if number != step - 1 else {})

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes the line of a step, of which `step.train_step` returned the scalars. Raises OSError naming the file."""
        line = {'step': step, **self._batches.pop(step), **numbers(scalars), **self._always}
        if scalars.get('skipped'):
            line['skipped'] = True
        with naming(self._path):
            self._file.write(sealed(line))
            self._file.flush()

    def close(self) -> None:
        """May be called again."""
        with contextlib.suppress(OSError):  # `write` has reported it
            self._file.close()


def _drop_after(path: pathlib.Path, last_step: int) -> None:
    """Leaves the lines of steps up to last_step, and none that a killed run has cut."""
    if not path.exists():
        return
    partial = path.with_suffix('.tmp')
    with naming(partial):
        with path.open('rb') as old, partial.open('wb') as new:
            new.writelines(raw for raw in old if 0 <= _step(raw) <= last_step)
        partial.replace(path)


# ---- reading -----------------------------------------------------------------


def read_lines(workdir: pathlib.Path, first: int, last: int) -> dict[int, list[dict]]:
    """The lines of steps first .. last, ascending, of each step one for each process of the run.

    Raises:
      LedgerError: a step has no line.
      OSError: a file cannot be read.
    """
    found = {}
    paths = sorted((workdir / DIRECTORY).glob('process-*.jsonl'), key=_process)
    for path in paths:
        for step, line in _read(path, first, last).items():
            found.setdefault(step, []).append(line)
    # From the end, for that is the step that was asked for.
    missing = next((step for step in range(last, first - 1, -1) if step not in found), None)
    if missing is not None:
        steps = [step for path in paths for step in _read(path)]
        has = f'has lines of steps {min(steps)} to {max(steps)}' if steps else 'has none'
        raise LedgerError(f'{workdir / DIRECTORY} has no line of step {missing}; it {has}')
    return {step: found[step] for step in range(first, last + 1)}


def read_config(workdir: pathlib.Path, wanted: str) -> Config:
    """The config with a digest.

    Raises:
      LedgerError: it is not there, or is not what was written.
      config.ConfigError: it holds a setting that this version lacks.
    """
    path = _config_path(workdir, wanted)
    try:
        text = path.read_text(encoding='utf-8')
        genuine = digest.of_config_text(text) == wanted
    except FileNotFoundError as error:
        raise LedgerError(f'{path}, a config of the run, is missing; restore it from a copy') from error
    except (ValueError, RecursionError):  # neither UTF-8 nor JSON
        genuine = False
    if not genuine:
        raise LedgerError(f'{path} is damaged: its content does not have its digest; restore it from a copy')
    return config_lib.from_json(text)


def batch_number(line: dict) -> int:
    """Which batch of the data the step of a line took, from 0."""
    return line.get('batch_number', line['step'] - 1)


def _config_path(workdir: pathlib.Path, config_digest: str) -> pathlib.Path:
    return workdir / DIRECTORY / f'config-{config_digest}.json'


def _process(path: pathlib.Path) -> int:
    """The number in the name of a file of lines; -1 where it is none."""
    number = path.stem.removeprefix('process-')
    return int(number) if number.isascii() and number.isdigit() and len(number) < 10 else -1


def _read(path: pathlib.Path, first: int = 1, last: int = LARGEST_INT) -> dict[int, dict]:
    """The lines of steps first .. last by step."""
    with path.open('rb') as file:
        lines = [_parse(raw) for raw in file if first <= _step(raw) <= last]
    return {line['step']: line for line in lines if line is not None}


def _step(raw: bytes) -> int:
    """The step of a line, without a look at the rest; -1 where it does not begin and end as one."""
    match = _LINE.fullmatch(raw)
    return int(match[1]) if match else -1


def _parse(raw: bytes) -> dict | None:
    """A line, or None where it is not one: the last of a killed run may be cut."""
    text, seal, rest = raw.rpartition(b', "sum": "')
    if not seal or xxhash.xxh3_64_hexdigest(text + b'}').encode() + b'"}\n' != rest:
        return None
    try:
        line = json.loads(raw)
        ranges = [(first, stop) for first, stop in line['rows'] if 0 <= first < stop]
        valid = (
            type(line['step']) is int
            and len(ranges) == len(line['rows']) > 0
            and all(type(bound) is int for bounds in ranges for bound in bounds)
            and all(type(line[name]) is str for name in TEXTS)
            and set(line['config']) <= set('0123456789abcdef')
            and type(line.get('batch_number', 0)) is int
            and 0 <= line.get('batch_number', 0) <= LARGEST_INT
            and all(line[name] is None or type(line[name]) is float for name in NUMBERS)
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return line if valid else None
