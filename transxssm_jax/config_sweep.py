"""What a sweep file is made of: a list of trials, each a dict of overrides, built with a few combinators.

A sweep file is Python with a function `get_sweep()` that returns such a list, or a `Search`, which chooses its trials by what
earlier ones reached:

    from transxssm_jax.config_sweep import product, vary

    def get_sweep():
        return product(
            vary('optimizer.learning_rate', [3e-4, 1e-3, 3e-3]),
            vary(('model.attention_period', 'model.attention_offset'), [(8, 7), (4, 3)]),
        )

Settings that belong together are one choice: a tuple of names, and tuples of values. This module imports no jax.
"""

import dataclasses
import itertools
import math
import pathlib
import random
from collections.abc import Sequence
from typing import Any

from transxssm_jax import settings
from transxssm_jax.settings import ConfigError

Trials = list[dict[str, Any]]
Names = str | tuple[str, ...]

DIGITS = 4  # of a drawn number that count; so that a trial's name holds its exact values


class SweepError(ConfigError):
    """A sweep that cannot be made; the message is one line."""


# ---- lists of trials -----------------------------------------------------------


def vary(names: Names, values: Sequence) -> Trials:
    """A trial for each value of a setting; or, of a tuple of settings, for each tuple of values."""
    if not values:
        raise SweepError(f'vary({names!r}) has no values')
    return [_assigned(names, value) for value in values]


def product(*parts: Trials) -> Trials:
    """Every combination of trials, one of each part; the last part varies fastest."""
    return [_merged(combination) for combination in itertools.product(*parts)]


def zipped(*parts: Trials) -> Trials:
    """The first trials of all parts together, the second ones, and so on; parts are of one length."""
    if len({len(part) for part in parts}) > 1:
        raise SweepError(
            f'zipped: parts have {", ".join(str(len(part)) for part in parts)} trials; they must be of one length'
        )
    return [_merged(combination) for combination in zip(*parts, strict=True)]


def chain(*parts: Trials) -> Trials:
    """The trials of all parts, one part after another."""
    return list(itertools.chain(*parts))


def sample(space: Trials | dict[Names, 'Distribution'], count: int, seed: int = 0) -> Trials:
    """`count` random trials: of a list, without repetition, or of distributions by setting. The same seed gives the same ones."""
    rng = random.Random(seed)
    if isinstance(space, dict):
        return [_merged([_assigned(names, d.draw(rng)) for names, d in space.items()]) for _ in range(count)]
    if count > len(space):
        raise SweepError(f'sample: count={count} is more than the {len(space)} trials to choose from')
    return rng.sample(space, count)


def _assigned(names: Names, value) -> dict[str, Any]:
    if isinstance(names, str):
        return {names: value}
    if not isinstance(value, tuple | list) or len(value) != len(names):
        raise SweepError(f'{", ".join(names)}: {value!r} must be a tuple of {len(names)} values')
    return dict(zip(names, value, strict=True))


def _merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for part in parts:
        if twice := merged.keys() & part.keys():
            raise SweepError(f'{min(twice)} is varied by two parts of one combination; vary it in one')
        merged |= part
    return merged


# ---- distributions -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Where a setting's values come from: a range of numbers, or one of `choices`.

    Attributes:
      low, high: of a range; both may be drawn.
      log: whether equal ratios are equally likely.
      whole: whether numbers are whole.
      choices: values, or tuples of values for a tuple of settings.
    """

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    choices: tuple = ()

    def __post_init__(self):
        if self.choices:
            return
        if self.whole and not all(isinstance(end, int) for end in (self.low, self.high)):
            raise SweepError(f'integers from {self.low!r} to {self.high!r}: both ends must be whole numbers')
        if not self.low < self.high or (self.log and self.low <= 0):
            raise SweepError(f'a range from {self.low} to {self.high} must rise{" and be above 0" * self.log}')

    def draw(self, rng: random.Random):
        """A value."""
        if self.choices:
            return rng.choice(self.choices)
        half = 0.5 if self.whole else 0.0  # so that the ends of whole numbers are as likely as what is between them
        low, high = self.low - half, self.high + half
        if self.log:
            return self.rounded(math.exp(rng.uniform(math.log(low), math.log(high))))
        return self.rounded(rng.uniform(low, high))

    def rounded(self, value: float):
        """The number that a trial gets: whole, or of few digits, and never outside the range."""
        number = round(value) if self.whole else float(f'{value:.{DIGITS}g}')
        return min(max(number, self.low), self.high)


def uniform(low: float, high: float) -> Distribution:
    """A number between low and high."""
    return Distribution(low, high)


def log_uniform(low: float, high: float) -> Distribution:
    """A positive number between low and high, its logarithm uniform: a learning rate."""
    return Distribution(low, high, log=True)


def integers(low: int, high: int, log: bool = False) -> Distribution:
    """A whole number from low to high."""
    return Distribution(low, high, log=log, whole=True)


def choice(*values) -> Distribution:
    """One of the values; of a tuple of settings, one of the tuples."""
    if not values:
        raise SweepError('choice() has no values')
    return Distribution(choices=values)


@dataclasses.dataclass(frozen=True)
class Search:
    """Trials that are chosen by what earlier ones reached, by Optuna.

    Attributes:
      space: distributions by setting, or by a tuple of settings.
      trials: how many.
      sampler: 'tpe' (a model of what was good), 'cmaes' (numbers only), 'qmc' (spread evenly) or 'random'.
      seed: of the sampler.
      first: trials to begin with, each with a value for every setting of the space and for no other.

    Raises:
      SweepError: one of these is not as described.
    """

    space: dict[Names, Distribution]
    trials: int
    sampler: str = 'tpe'
    seed: int = 0
    first: tuple[dict[str, Any], ...] = ()

    def __post_init__(self):
        if self.sampler not in ('tpe', 'cmaes', 'qmc', 'random'):
            raise SweepError(f"sampler={self.sampler!r} is not one of 'tpe', 'cmaes', 'qmc', 'random'")
        if not self.space or self.trials < 1:
            raise SweepError('a search needs a space of at least one setting, and at least one trial')
        _merged([dict.fromkeys(_several(names)) for names in self.space])
        for names, distribution in self.space.items():
            if not isinstance(distribution, Distribution):
                raise SweepError(
                    f'{_listed(names)}: {distribution!r} is no distribution; use uniform, log_uniform, integers or choice'
                )
            if not isinstance(names, str):
                if not distribution.choices:
                    raise SweepError(f'{_listed(names)}: settings that belong together need choice(), not a range')
                for value in distribution.choices:
                    _assigned(names, value)
        if not isinstance(self.first, tuple | list) or not all(isinstance(trial, dict) for trial in self.first):
            raise SweepError('first must be a tuple of trials, each a dict: first=({...},)')
        for trial in self.first:
            self.parameters_of(trial)

    def parameters_of(self, overrides: dict[str, Any]) -> dict[str, Any]:
        """What Optuna keeps of a trial: by setting a number, or the index of a choice.

        Args:
          overrides: with a value for every setting of the space.

        Raises:
          SweepError: a value is missing or not of the space, or there is one for another setting.
        """
        found: dict[str, Any] = {}
        known: set[str] = set()
        for names, distribution in self.space.items():
            several = _several(names)
            known.update(several)
            if missing := [name for name in several if name not in overrides]:
                raise SweepError(f'a trial to begin with has no value for {missing[0]}')
            value = overrides[names] if isinstance(names, str) else tuple(overrides[name] for name in names)
            if distribution.choices:
                choices = [tuple(c) if isinstance(c, list) else c for c in distribution.choices]
                if value not in choices:
                    raise SweepError(f'{_listed(names)}={value!r} of a trial to begin with is none of the choices')
                value = choices.index(value)
            elif not isinstance(value, int | float) or not distribution.low <= value <= distribution.high:
                raise SweepError(f'{names}={value!r} of a trial to begin with is out of its range')
            found[','.join(several)] = value
        if unknown := overrides.keys() - known:
            raise SweepError(f'a trial to begin with sets {min(unknown)}, which is not in the space')
        return found


def _several(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _listed(names: Names) -> str:
    return ', '.join(_several(names))


# ---- files ---------------------------------------------------------------------


def load(path: str) -> Trials | Search:
    """The sweep of a file, or of the name of one that comes with this project ('learning_rate').

    Raises:
      ConfigError: no such file, whatever the file raises, with the line, or what it returns is no sweep.
    """
    file = settings.find_file(path, '--sweep', 'sweeps')
    if file.is_dir():
        raise SweepError(f'--sweep={path} is a directory; name a sweep file')
    found = settings.call_in_file(str(file), 'get_sweep')
    if isinstance(found, Search):
        return found
    is_list = isinstance(found, list) and found and all(isinstance(trial, dict) for trial in found)
    if not is_list:
        raise SweepError(
            f'{pathlib.Path(path)}: must have a function get_sweep() that returns a list of trials, each a dict of '
            'overrides, or a Search'
        )
    return [{str(name): value for name, value in trial.items()} for trial in found]
