"""What the evaluation commands found of a run, from the files that they wrote to its workdir."""

import json
import pathlib
import re
import statistics
from collections.abc import Callable, Sequence

from transxssm_jax.evals.run_records import RunRecords


def evaluations_of(run: RunRecords) -> dict[str, float]:
    """Quantity -> value, of the newest step that each evaluation command was made of.

    Of several results of that step all quantities count, and of one quantity the newest value. A file that cannot be read
    is passed over.
    """
    found: dict[str, float] = {}
    for kind, read in READERS.items():
        step = None
        for path in sorted((run.workdir / 'evals').glob(f'{kind}-step-*'), key=_age, reverse=True):
            if step not in (None, _age(path)[0]):
                break
            try:
                values = read(json.loads((path / 'results.json' if path.is_dir() else path).read_text()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue
            step = _age(path)[0]
            for name, value in values.items():
                found.setdefault(name, value)
    return found


def _age(path: pathlib.Path) -> tuple[int, str]:
    """Step, then time: names are KIND-step-STEP-TIME."""
    match = re.match(r'[a-z]+-step-(\d+)-(.*)', path.name)
    return (int(match[1]), match[2]) if match else (-1, path.name)


def _perplexity(record: dict) -> dict[str, float]:
    """Perplexity by position, as the model was trained."""
    found = {}
    for result in record['results']:
        if result['rope_scaling'] != 'none':
            continue
        found[f'perplexity, {result["length"]:,} tokens'] = result['perplexity']
        if len(result['buckets']) > 1:
            for part in result['buckets']:
                found[f'perplexity, {part["from"]:,} to {part["to"]:,} of {result["length"]:,}'] = part['perplexity']
    return found


def _needle(record: dict) -> dict[str, float]:
    """The mean over depths of the share of needles that were found, by length."""
    by_length: dict[int, list[float]] = {}
    for cell in record['cells']:
        by_length.setdefault(cell['context_length'], []).append(cell['chosen'])
    return {f'needle chosen, {length:,} tokens': statistics.fmean(of) for length, of in sorted(by_length.items())}


def _harness(record: dict) -> dict[str, float]:
    """Every metric of every task, without standard errors."""
    return {
        f'{task}, {metric.removesuffix(",none")}': value
        for task, metrics in record['results'].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and 'stderr' not in metric and ',' in metric
    }


READERS: dict[str, Callable[[dict], dict[str, float]]] = {
    'perplexity': _perplexity,
    'needle': _needle,
    'harness': _harness,
}


def table_of(runs: Sequence[RunRecords]) -> tuple[list[str], list[list[str]]]:
    """(headings, one row per quantity that any run has)."""
    found = [evaluations_of(run) for run in runs]
    names = dict.fromkeys(name for values in found for name in values)
    rows = [[name, *(f'{values[name]:.4g}' if name in values else '-' for values in found)] for name in names]
    return ['evaluation', *(run.name for run in runs)], rows
