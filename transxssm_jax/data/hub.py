"""Data sets of a Hugging Face hub: `--source=hf:NAME[/CONFIG]:SPLIT`, read from the parquet files of the repository.

NAME is OWNER/NAME, or a single word. Where the README of the repository lists `configs`, they say which files are of a config
and a split; otherwise the files' names do, as the hub reads them (CONFIG/train-00000-of-00002.parquet,
data/CONFIG/test/0000.parquet). A repository without parquet files is read from the branch into which the hub converts them.

The hub is that of HF_ENDPOINT (a mirror, say), else huggingface.co. Files go into its cache (HF_HOME), which a later call
continues and reuses; all are of the commit that the branch has when it is looked up.
"""

import concurrent.futures
import functools
import os
import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from transxssm_jax import cli
from transxssm_jax.data.manifest import DataError, first_line
from transxssm_jax.data.source_files import SPLIT_WORDS, some

PREFIX = 'hf:'
CONVERTED = 'refs/convert/parquet'  # the branch
SECONDS = 30  # to wait for the list of files
CONNECTIONS = 8

Files = dict[str, dict[str, list[str]]]  # config -> split -> paths; '' where a name tells neither


def fetch(spec: str) -> list[str]:
    """Paths in the cache of the parquet files of a split, in sorted order of their names; downloads those that are not there.

    Raises:
      DataError: no such data set, config or split, or the hub does not give it, with its reason.
    """
    try:
        from huggingface_hub import HfApi, constants
    except ImportError:
        raise cli.MissingPackageError(
            f'--source={spec} needs huggingface_hub; install it (pip install huggingface_hub)'
        ) from None
    endpoint = os.environ.get('HF_ENDPOINT', '').rstrip('/') or constants.ENDPOINT
    hub = _Hub(HfApi(endpoint=endpoint), endpoint, spec)
    names, split = _parse(spec)
    for name, config in names:
        if (found := hub.find(name)) is None:
            continue
        revision, files = found
        paths = _choose(files, config, split, f'--source={spec}: {name}')
        with concurrent.futures.ThreadPoolExecutor(CONNECTIONS) as pool:
            return list(pool.map(functools.partial(hub.download, name, revision), paths))
    raise DataError(
        f'--source={spec}: {endpoint} has no data set {names[0][0]}, or none that may be read without a token; mend the name, or '
        'set HF_TOKEN'
    )


def _parse(spec: str) -> tuple[list[tuple[str, str]], str]:
    """([(name of a repository, config)] in the order to look for them, split)."""
    name, _, split = spec.removeprefix(PREFIX).rpartition(':')
    parts = name.split('/')
    if not re.fullmatch(r'\w[\w.-]*', split) or not all(re.fullmatch(r'\w[\w.-]*', part) for part in parts):
        raise DataError(f'--source={spec} must be hf:NAME:SPLIT or hf:NAME/CONFIG:SPLIT, e.g. hf:owner/books:train')
    if len(parts) == 1:
        return [(name, '')], split
    if len(parts) == 2:  # OWNER/NAME, or NAME/CONFIG of one of the hub's first data sets
        return [(name, ''), (parts[0], parts[1])], split
    return [('/'.join(parts[:2]), '/'.join(parts[2:]))], split


class _Hub:
    """The hub of an endpoint, whose errors become DataError."""

    def __init__(self, api, endpoint: str, spec: str):
        self._api, self._endpoint, self._spec = api, endpoint, spec

    def find(self, name: str) -> tuple[str, Files] | None:
        """(commit, its parquet files) of a data set; None: there is no such data set."""
        for branch in ('main', CONVERTED):
            listed = self._list(name, branch)
            if listed is None and branch == 'main':
                return None
            commit, paths = listed or ('', [])
            parquet = [path for path in paths if path.lower().endswith('.parquet')]
            if parquet:
                configs = self._configs(name, commit) if 'README.md' in paths else []
                return commit, files_of(parquet, configs)
        raise DataError(
            f'--source={self._spec}: {name} has no parquet files, on its main branch or on {CONVERTED}; fetch its files and name '
            'their directory'
        )

    def _list(self, name: str, branch: str) -> tuple[str, list[str]] | None:
        from huggingface_hub import errors

        try:
            info = self._api.dataset_info(name, revision=branch, timeout=SECONDS)
        except errors.GatedRepoError as error:
            raise self._refusal(f'{name} asks for an agreement and a token', error) from None
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            return None
        except Exception as error:  # of the HTTP library, of the hub's answers, of what is no hub
            raise self._refusal(f'{self._endpoint} cannot be asked for {name}', error) from None
        return info.sha or branch, sorted(file.rfilename for file in info.siblings or [])

    def _configs(self, name: str, commit: str) -> list:
        """What the README lists as configs."""
        from huggingface_hub import metadata_load

        path = self.download(name, commit, 'README.md')
        try:
            metadata = metadata_load(path)
        except Exception as error:  # of the YAML
            raise DataError(
                f'--source={self._spec}: the README of {name} has metadata that cannot be read ({first_line(error)})'
            ) from None
        configs = metadata.get('configs') if isinstance(metadata, dict) else []
        return configs if isinstance(configs, list) else []

    def download(self, name: str, commit: str, path: str) -> str:
        try:
            return self._api.hf_hub_download(name, path, repo_type='dataset', revision=commit)
        except OSError as error:
            if getattr(error, 'errno', None):  # of the disk
                raise
            raise self._refusal(f'{self._endpoint} does not give {path} of {name}', error) from None
        except Exception as error:
            raise self._refusal(f'{self._endpoint} does not give {path} of {name}', error) from None

    def _refusal(self, what: str, error: BaseException) -> DataError:
        while error.__cause__ is not None:  # the hub's own words hide why
            error = error.__cause__
        return DataError(
            f'--source={self._spec}: {what} ({first_line(error) or type(error).__name__}); check HF_ENDPOINT and HF_TOKEN, or '
            'run the same command again'
        )


# ---- which files are meant ------------------------------------------------------


def files_of(paths: list[str], configs: Iterable = ()) -> Files:
    """Parquet files of a repository by config and split.

    Args:
      paths: in sorted order.
      configs: what the README lists; a config without patterns that fit, and all where there are none, goes by the names.
    """
    listed: Files = {}
    for config in configs:
        if isinstance(config, dict) and isinstance(config.get('config_name'), str):
            splits = _splits(config, paths)
            if any(splits.values()):
                listed[config['config_name']] = splits
                if config.get('default') is True:
                    listed['default'] = splits
    if listed:
        return listed
    named: Files = {}
    for path in paths:
        config, split = _names_in(path)
        named.setdefault(config, {}).setdefault(split, []).append(path)
    return named


def _splits(config: dict, paths: list[str]) -> dict[str, list[str]]:
    given, splits = config.get('data_files'), {}
    if isinstance(given, str) or (isinstance(given, list) and all(isinstance(entry, str) for entry in given)):
        given = {'train': given}
    if isinstance(given, dict):
        given = [{'split': split, 'path': path} for split, path in given.items()]
    folder = config.get('data_dir')
    prefix = f'{folder.strip("/")}/' if isinstance(folder, str) else ''
    for entry in given if isinstance(given, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get('split'), str):
            patterns = entry.get('path')
            patterns = [patterns] if isinstance(patterns, str) else patterns if isinstance(patterns, list) else []
            fits = [_pattern(prefix + pattern) for pattern in patterns if isinstance(pattern, str)]
            splits[entry['split']] = [path for path in paths if any(re.fullmatch(fit, path) for fit in fits)]
    return splits


def _pattern(glob: str) -> str:
    """A regular expression: ** goes through directories, * and ? do not."""
    words = {'**/': '(?:.*/)?', '**': '.*', '*': '[^/]*', '?': '[^/]'}
    return ''.join(
        words.get(part, re.escape(part)) for part in re.split(r'(\*\*/|\*\*|\*|\?)', glob.removeprefix('./'))
    )


def _names_in(path: str) -> tuple[str, str]:
    """(config, split) that the name of a file tells; '' for what it does not."""
    folders, name = PurePosixPath(path).parts[:-1], PurePosixPath(path).name
    if match := re.match(r'([\w.]+)-\d{5}-of-\d{5}', name):
        split = match[1]
    elif folders and re.match(r'\d{4,5}\.parquet$', name):
        split = folders[-1].removeprefix('partial-')
    else:
        words = [word for word in re.split(r'[^a-z]+', path.lower()) if word in SPLIT_WORDS]
        split = words[-1] if words else ''
    config = '/'.join(folder for folder in folders if folder not in ('data', split, f'partial-{split}'))
    return config, split


def _choose(files: Files, config: str, split: str, where: str) -> list[str]:
    """The files of a config and a split. Raises DataError where there are none, or it cannot be told which."""
    if not config:
        config = next((name for name in ('', 'default') if name in files), '')
        if config not in files and len(files) > 1:
            raise DataError(
                f'{where} has several configs ({some(sorted(files), 20)}); name one, as in hf:NAME/{min(files)}:{split}'
            )
        config = config if config in files else next(iter(files))
    if config not in files:
        known = sorted(filter(None, files))
        raise DataError(f'{where} has no config {config!r}{cli.nearest(config, known) or f" ({some(known, 20)})"}')
    splits = files[config]
    wanted = SPLIT_WORDS.get(split, split)
    # The name as it is written, or another word for the same split; a file that names none is of train.
    same = [name for name in splits if name == split] or [
        name for name in splits if SPLIT_WORDS.get(name, name or 'train') == wanted
    ]
    paths = sorted(path for name in same for path in splits[name])
    if not paths:
        known = sorted(name or 'train' for name in splits)
        raise DataError(f'{where} has no parquet files of split {split!r}; it has {some(known, 20)}')
    return paths
