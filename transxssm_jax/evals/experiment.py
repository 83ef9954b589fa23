"""A comparison of models: cells, each a config and a seed with a workdir of its own, and the table of what they reached."""

import dataclasses
import json
import pathlib
import re
import shlex
import signal
import sys
from collections.abc import Sequence

from transxssm_jax import children, cli
from transxssm_jax import config as config_lib
from transxssm_jax.config import Config
from transxssm_jax.evals import run_report
from transxssm_jax.evals.run_evaluations import READERS
from transxssm_jax.evals.run_records import RunError, RunRecords
from transxssm_jax.evals.training_process import Training
from transxssm_jax.model import parameters

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell(Training):
    """One training of an experiment: a model, which its config file names, and a seed.

    Attributes:
      seed: of the initial parameters and of the order of the data.
    """

    seed: int

    @property
    def title(self) -> str:
        return f'{self.name}, seed {self.seed}'

    def evaluation(self, words: str) -> list[str]:
        """The command of an evaluation of it, e.g. 'perplexity --lengths=1x'; [] where that has been done with these flags."""
        kind, *flags = shlex.split(words)
        for path in (self.workdir / 'evals').glob(f'{kind}-step-{self.config.train.steps}-*'):
            if sorted(_flags_of(path)) == sorted(flags):
                return []
        return [sys.executable, '-m', f'transxssm_jax.evals.{kind}', f'--workdir={self.workdir}', *flags]


def _flags_of(path: pathlib.Path) -> list[str]:
    """The flags of the command that wrote a result of an evaluation, without --workdir; what cannot be read has ['']."""
    try:
        record = json.loads((path / 'results.json' if path.is_dir() else path).read_text())
        _, _, _, *flags = shlex.split(record['command'])  # python -m MODULE
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ['']
    return [flag for flag in flags if not flag.startswith('--workdir=')]


def make_cells(
    files: Sequence[pathlib.Path], workdir: pathlib.Path, seeds: Sequence[int], steps: int, overrides: dict
) -> list[Cell]:
    """The cells of an experiment, seed by seed, so that after a seed there is a whole table.

    Args:
      files: config files; a file's stem names its model.
      workdir: above the workdirs of the runs, MODEL/seed-SEED.
      steps: of each run; warmup and the cadence of evaluations keep their share. 0: those of the files.
      overrides: dotted setting -> what was typed, for all.

    Raises:
      ConfigError: a config that cannot work.
      RunError: an override of what the seeds or the steps set.
    """
    for name, flag in (('train.seed', 'seeds'), ('data.seed', 'seeds'), *([('train.steps', 'steps')] if steps else [])):
        if name in overrides:
            raise RunError(f'--config.{name} is given, and --{flag} sets it; leave it out')
    cells = []
    for seed in seeds:
        for file in files:
            changes = {**overrides, 'train.seed': seed, 'data.seed': seed}
            if steps:
                changes = {**_with_steps(config_lib.load(file), steps), **changes}
            config = config_lib.load(file, changes)
            run = workdir / file.stem / f'seed-{seed}'
            cells.append(Cell(name=file.stem, seed=seed, file=file, overrides=changes, config=config, workdir=run))
    return cells


def _with_steps(config: Config, steps: int) -> dict[str, int]:
    """Changes that make a run of another length of the same shape."""
    share = steps / config.train.steps
    scaled = {
        'optimizer.warmup_steps': config.optimizer.warmup_steps,
        'optimizer.decay_steps': config.optimizer.decay_steps,
        'train.eval_every_steps': config.train.eval_every_steps,
        'train.checkpoint_every_steps': config.train.checkpoint_every_steps,
    }
    changes = {name: max(1, round(value * share)) if value else 0 for name, value in scaled.items()}
    if steps < config.train.log_every_steps * 4:
        changes['train.log_every_steps'] = max(1, steps // 4)
    return {'train.steps': steps, **changes}


def check_evaluation(words: str) -> None:
    """Raises RunError unless the words begin with an evaluation whose results are read."""
    kind = next(iter(words.split()), '')
    if kind not in READERS:
        raise RunError(f'--evaluate={words!r} must begin with an evaluation{cli.nearest(kind, READERS)}')
    try:
        shlex.split(words)
    except ValueError as error:
        raise RunError(f'--evaluate={words!r}: {error}') from error


def run(command: list[str]) -> int:
    """Runs a command in a process of its own and returns the exit code.

    The process is no member of this one's group: a signal comes to it once, from here, so that it saves and stops.
    """
    process, early = None, []  # signals that come before there is a process

    def pass_on(number, frame):
        del frame
        early.append(number) if process is None else process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in STOPS}
    try:
        process = children.start(command)
        for number in early:
            process.send_signal(number)
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- results -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Result:
    """What a model of an experiment reached, over its seeds.

    Attributes:
      name: of the model.
      parameters: how many it has.
      tokens: of one run.
      seeds: seeds of the finished runs.
      perplexity, loss: held out, after the last step, one value per seed.
      steps_per_second: the median over a run, one value per seed.
    """

    name: str
    parameters: int
    tokens: int
    seeds: list[int]
    perplexity: list[float]
    loss: list[float]
    steps_per_second: list[float]


def results_of(cells: Sequence[Cell]) -> list[Result]:
    """Results of the finished cells, by model, in the order of the cells."""
    found: dict[str, list[tuple[Cell, RunRecords]]] = {}
    for cell in cells:
        records = cell.records()
        mine = found.setdefault(cell.name, [])
        if cell.is_finished() and records.last('eval_loss') is not None:
            mine.append((cell, records))
    results = []
    for name, runs in found.items():
        config = next(cell.config for cell in cells if cell.name == name)
        results.append(
            Result(
                name=name,
                parameters=parameters.count_params(config.model),
                tokens=config.train.steps * config.tokens_per_step,
                seeds=[cell.seed for cell, _ in runs],
                perplexity=[run.last('eval_perplexity') for _, run in runs],
                loss=[run.last('eval_loss') for _, run in runs],
                steps_per_second=[1 / run.usual('step_seconds') for _, run in runs if run.usual('step_seconds')],
            )
        )
    return results


def table(results: Sequence[Result]) -> str:
    """Markdown: a row per model, with the mean over seeds and half their range; then the gain from small to large models."""
    headings = ['model', 'parameters', 'tokens', 'seeds', 'held-out loss', 'perplexity', 'steps/s']
    rows = []
    for result in results:
        measured = [(result.loss, '.4f'), (result.perplexity, '.3f'), (result.steps_per_second, '.3g')]
        rows.append(
            [
                result.name,
                f'{result.parameters:,}',
                f'{result.tokens:,}',
                ', '.join(map(str, result.seeds)) or '-',
                *(run_report.spread(values, form) if values else '-' for values, form in measured),
            ]
        )
    lines = [run_report.markdown(headings, rows)]
    gains = gains_of(results)
    if gains:
        lines += ['', run_report.markdown(['from small to large', 'loss, less by', 'perplexity, less by'], gains)]
    return '\n'.join(lines)


def gains_of(results: Sequence[Result]) -> list[list[str]]:
    """Rows of what each model gains from its smaller to its larger size, where names end in sizes: llama3_20m, llama3_60m."""
    sizes: dict[str, list[Result]] = {}
    for result in results:
        match = re.fullmatch(r'(.+)_(\d+(?:\.\d+)?[kmb])', result.name)
        if match and result.loss:
            sizes.setdefault(match[1], []).append(result)
    rows = []
    for name, of_model in sizes.items():
        small, *_, large = sorted(of_model, key=lambda result: result.parameters) if len(of_model) > 1 else (None, None)
        if small is None:
            continue
        rows.append([name, _less(small.loss, large.loss, '.4f'), _less(small.perplexity, large.perplexity, '.3f')])
    return rows


def _less(small: list[float], large: list[float], form: str) -> str:
    """Mean difference; its spread is that of all pairs of seeds."""
    return run_report.spread([a - b for a in small for b in large], form)
