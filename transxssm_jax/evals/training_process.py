"""One training that another command starts: its config, its command line, and what it has left in its workdir."""

import dataclasses
import functools
import pathlib
import sys

from transxssm_jax import config as config_lib
from transxssm_jax.config import Config
from transxssm_jax.data.manifest import DataError, read_manifest
from transxssm_jax.evals.run_records import RunError, RunRecords, data_fingerprint, is_without_effect, read_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """A training of a config file with overrides, in a workdir of its own.

    Attributes:
      name: how it is called beside others.
      file: config file.
      overrides: dotted setting -> value, on top of the file.
      config: of both.
      workdir: of the run.
    """

    name: str
    file: pathlib.Path
    overrides: dict
    config: Config
    workdir: pathlib.Path

    @property
    def title(self) -> str:
        """Its name in a legend."""
        return self.name

    def records(self) -> RunRecords | None:
        """What the run has left so far; None before its first record."""
        if not (self.workdir / 'metrics.jsonl').exists():
            return None
        try:
            return read_run(self.workdir, self.title)
        except RunError:
            return None  # it was stopped before its first record

    def check(self) -> None:
        """Raises RunError where its workdir holds a run of another config or other data, which would be taken for this one."""
        if not (self.workdir / 'metrics.jsonl').exists():
            return
        begun = config_lib.from_json((self.workdir / 'config.json').read_bytes())
        found = config_lib.differences(begun, self.config)
        # The steps come first, because other settings follow them.
        for name, (was, wanted) in sorted(found.items(), key=lambda item: item[0] != 'train.steps'):
            if name != 'data.path' and not is_without_effect(name):
                raise RunError(
                    f'{self.workdir} was begun with {name}={was!r}, not {wanted!r}; give the same command, or another directory'
                )
        if not self.config.data.path:
            return  # data.sources are among the settings
        try:
            data = _fingerprint(self.config.data.path, self.config.data.train_split)
        except DataError:
            return  # a training refuses it, in words of its own; a finished one needs it no more
        if (of_run := data_fingerprint(self.workdir)) and of_run != data:
            raise RunError(
                f'{self.workdir} was begun on other data than {self.config.data.path}; give the same, or another directory'
            )

    def is_finished(self) -> bool:
        """Whether it is trained to the end."""
        records = self.records()
        return records is not None and records.is_finished

    def arguments(self) -> list[str]:
        """The flags of transxssm_jax.train."""
        settings = [f'--config.{name}={value}' for name, value in self.overrides.items()]
        return [f'--config={self.file}', f'--workdir={self.workdir}', *settings]

    def command(self) -> list[str]:
        """The command that trains it, or goes on with it."""
        return [sys.executable, '-m', 'transxssm_jax.train', *self.arguments()]


@functools.cache
def _fingerprint(path: str, split: str) -> str:
    """That of prepared data, read once for all trainings of a sweep."""
    return read_manifest(path, split).fingerprint()
