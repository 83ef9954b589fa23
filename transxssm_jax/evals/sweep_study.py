"""Optuna beside a sweep: it chooses the trials of a search, and tells which trials are hopeless."""

import importlib
import math
import pathlib
import urllib.parse
import warnings
from collections.abc import Sequence
from typing import Any

from transxssm_jax import cli
from transxssm_jax.config_sweep import Distribution, Search, SweepError

STORAGE = 'optuna.db'
PRUNERS = ('none', 'median', 'percentile', 'halving', 'hyperband')
INDEX = 'trial'  # the one parameter of a study whose trials are given


class Study:
    """A study of Optuna in DIRECTORY/optuna.db, asked and told.

    Args:
      directory: of the sweep.
      search: what to choose from; None: the trials are given, and the study only prunes.
      pruner: one of PRUNERS.
      goal: 'min' or 'max'.
      metric: name of what trials are compared by.

    Raises:
      MissingPackageError: Optuna, or what the sampler needs, is not installed.
      SweepError: the study that is there has another goal or another metric, or choices of other values.
    """

    def __init__(self, directory: pathlib.Path, search: Search | None, pruner: str, goal: str, metric: str):
        try:
            import optuna
        except ImportError as error:
            raise cli.MissingPackageError(
                'a search and --pruner need Optuna; pip install optuna (or transxssm_jax[sweep])'
            ) from error
        self._optuna, self._search = optuna, search
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        directory.mkdir(parents=True, exist_ok=True)
        self._study = optuna.create_study(
            storage=f'sqlite:///{urllib.parse.quote(str(directory / STORAGE))}',  # a path may hold % and ?
            study_name='sweep',
            load_if_exists=True,
            direction='minimize' if goal == 'min' else 'maximize',
            sampler=self._sampler(),
            pruner=self._pruner(pruner),
        )
        was = {'--goal': self._study.direction.name.lower()[:3], **self._study.user_attrs}
        asked = {'--goal': goal, '--metric': metric}
        for names, distribution in search.space.items() if search else ():
            if distribution.choices:  # of which Optuna keeps indices
                key = names if isinstance(names, str) else ','.join(names)
                asked[f'choices of {key}'] = ' '.join(map(str, distribution.choices))
        for name, value in asked.items():
            if was.get(name, value) != value:
                raise SweepError(
                    f'{directory / STORAGE} was begun with {name} {was[name]}, not {value}; give that, or name another --output'
                )
            self._study.set_user_attr(name, value)
        # What a call that was killed has enqueued and not begun would be begun in place of the next trial.
        states = optuna.trial.TrialState
        while self._study.get_trials(deepcopy=False, states=(states.WAITING,)):
            self._study.tell(self._study.ask(), state=states.FAIL)
        self._trials: dict[int, Any] = {}  # by their number in the study: those under way

    def _sampler(self):
        samplers = self._optuna.samplers
        if self._search is None or self._search.sampler == 'random':
            return samplers.RandomSampler(seed=self._search.seed if self._search else 0)
        if self._search.sampler == 'tpe':
            # A trial under way counts as a bad one, so that trials side by side are not alike.
            return samplers.TPESampler(seed=self._search.seed, constant_liar=True)
        package = {'cmaes': 'cmaes', 'qmc': 'scipy'}[self._search.sampler]
        if importlib.util.find_spec(package) is None:
            raise cli.MissingPackageError(f'sampler={self._search.sampler!r} needs {package}; pip install {package}')
        make = {'cmaes': samplers.CmaEsSampler, 'qmc': samplers.QMCSampler}[self._search.sampler]
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # QMC is called experimental
            return make(seed=self._search.seed)

    def _pruner(self, name: str):
        pruners = self._optuna.pruners
        make = {
            'none': pruners.NopPruner,
            'median': lambda: pruners.MedianPruner(n_startup_trials=4),
            'percentile': lambda: pruners.PercentilePruner(25.0, n_startup_trials=4),
            'halving': pruners.SuccessiveHalvingPruner,
            'hyperband': pruners.HyperbandPruner,
        }
        return make[name]()

    @property
    def passed_over(self) -> int:
        """How many trials Optuna chose that were not trained, in all calls."""
        return self._study.user_attrs.get('passed over', 0)

    def pass_over(self, number: int, value: float | None) -> None:
        """Ends a trial that is not trained; value: that of the same trial, where it was trained before."""
        self.end(number, value)
        self._study.set_user_attr('passed over', self.passed_over + 1)

    def next(self, given: int | dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Begins a trial; returns its number in the study and, in a search, its overrides.

        Args:
          given: the index of a given trial; or, in a search, overrides that are to be tried (again); None: Optuna chooses.
        """
        if self._search is None:
            self._study.enqueue_trial({INDEX: given})
            trial = self._study.ask({INDEX: self._optuna.distributions.IntDistribution(0, max(1, given))})
            overrides = {}
        else:
            if given is not None:
                self._study.enqueue_trial(self._search.parameters_of(given))
            trial = self._study.ask()
            overrides = {}
            for names, distribution in self._search.space.items():
                overrides |= self._suggested(trial, names, distribution)
        self._trials[trial.number] = trial
        return trial.number, overrides

    def _suggested(self, trial, names, distribution: Distribution) -> dict[str, Any]:
        key = names if isinstance(names, str) else ','.join(names)
        if distribution.choices:
            # By index: Optuna keeps numbers and words, and a choice may be a tuple.
            value = distribution.choices[trial.suggest_categorical(key, list(range(len(distribution.choices))))]
        elif distribution.whole:
            value = trial.suggest_int(key, int(distribution.low), int(distribution.high), log=distribution.log)
        else:
            value = distribution.rounded(
                trial.suggest_float(key, distribution.low, distribution.high, log=distribution.log)
            )
        return {names: value} if isinstance(names, str) else dict(zip(names, value, strict=True))

    def is_hopeless(self, number: int, values: Sequence[tuple[int, float]]) -> bool:
        """Reports (step, value) pairs of a trial under way, in order; whether it should be stopped."""
        trial = self._trials[number]
        for step, value in values:
            if math.isfinite(value):
                trial.report(value, step)
        return trial.should_prune()

    def end(self, number: int, value: float | None, *, pruned: bool = False) -> None:
        """Tells how a trial ended: with a value; pruned; or, with None, failed or given up."""
        states = self._optuna.trial.TrialState
        self._trials.pop(number, None)
        if number not in {trial.number for trial in self._study.get_trials(deepcopy=False)}:
            return  # of a study that was deleted meanwhile
        if pruned:
            self._study.tell(number, state=states.PRUNED, skip_if_finished=True)
        elif value is None or not math.isfinite(value):
            self._study.tell(number, state=states.FAIL, skip_if_finished=True)
        else:
            self._study.tell(number, value, skip_if_finished=True)
