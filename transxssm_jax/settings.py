"""The machinery of the config: settings with a default, a meaning and bounds, in sections that check and lock themselves.

`config.py` holds the tree of settings; nothing here knows what a setting is for. This module imports no jax.
"""

import dataclasses
import functools
import json
import os
import pathlib
import runpy
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from transxssm_jax import cli

LARGEST_INT = (1 << 31) - 1  # of a setting that names no bound: steps, tokens and sizes are int32 on devices
LARGEST_SEED = (1 << 32) - 1


class ConfigError(cli.UserError, ValueError):
    """A setting is unknown, of the wrong type, or out of its range."""


def setting(
    default,
    meaning: str,
    *,
    choices=(),
    minimum=None,
    maximum=None,
    is_path=False,
    is_place=False,
    of_checkpoint=False,
    parse: Callable[[str], Any] | None = None,
):
    """One setting: its default, what it means, and which values are allowed.

    Args:
      default: the value when a config file does not set it; its type is the type.
      meaning: one sentence, with the unit.
      choices: the allowed words, empty for any.
      minimum: the least allowed number.
      maximum: the largest allowed number; None: LARGEST_INT for whole numbers, none for others.
      is_path: whether a leading ~ is the home directory.
      is_place: whether it may be a URL of an object store besides.
      of_checkpoint: whether a run can only be resumed with the same value.
      parse: reads a text that is not empty, and raises ConfigError where it cannot.
    """
    if maximum is None and type(default) is int:
        maximum = LARGEST_INT
    metadata = dict(
        meaning=meaning,
        choices=tuple(choices),
        minimum=minimum,
        maximum=maximum,
        is_path=is_path,
        is_place=is_place,
        of_checkpoint=of_checkpoint,
        parse=parse,
    )
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Section:
    """A group of settings, or of sections, that refuses unknown names, wrong types and, once locked, any change."""

    def __new__(cls, *args, **settings):
        for name in settings:  # the dataclass's own __init__ would raise TypeError
            cls._known(name)
        return super().__new__(cls)

    @classmethod
    def _known(cls, name) -> tuple[str, dataclasses.Field]:
        """(prefix of the dotted name, field) of a setting."""
        prefix, fields = _fields_of(cls)  # type: ignore[arg-type]  # mypy: a class is not Hashable
        if name not in fields:
            raise ConfigError(f'unknown setting {prefix}{cli.shorten(str(name))}{_nearest(str(name), fields)}')
        return prefix, fields[name]

    def __setattr__(self, name, value):
        prefix, field = self._known(name)
        if self.__dict__.get('_locked'):
            raise ConfigError(
                f'{prefix}{name}: the config is locked; make a new one with config.replace(config, '
                f'{{{prefix + name!r}: ...}})'
            )
        object.__setattr__(self, name, checked(prefix + name, field, value))


@functools.cache
def _fields_of(section: type) -> tuple[str, dict[str, dataclasses.Field]]:
    """(prefix of the dotted names, name -> field) of a section's settings; a config is copied for every choice of `fitting`."""
    fields = {field.name: field for field in dataclasses.fields(section)}
    is_root = any(dataclasses.is_dataclass(field.type) for field in fields.values())
    return '' if is_root else section.__name__.lower() + '.', fields


def checked(name: str, field: dataclasses.Field, value):
    """The value that a setting takes: a whole number may come as a float (1e5), a number as a whole one.

    Raises:
      ConfigError: wrong type, not one of the choices, or out of bounds.
    """
    kind = _kind(field)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        if kind is float and is_number:
            value = float(value)
        elif kind is int and isinstance(value, float):
            value = cli.as_whole(value)
    except (ValueError, OverflowError):
        pass  # refused below
    if type(value) is not kind:
        raise ConfigError(f'{name}={cli.shorten(_shown(value))} must be {kind.__name__}, not {type(value).__name__}')
    choices = field.metadata.get('choices')
    if choices and value not in choices:
        near = cli.nearest(value, choices) if isinstance(value, str) else f'; known: {choices}'
        raise ConfigError(f'{name}={cli.shorten(_shown(value))} is not one of the choices{near}')
    if is_number:
        cli.check_range(name, value, field.metadata.get('minimum'), field.metadata.get('maximum'), ConfigError)
    if isinstance(value, str) and '\0' in value:
        raise ConfigError(f'{name}={cli.shorten(_shown(value))} must not hold a null character')
    if value and (parse := field.metadata.get('parse')):
        parse(value)
    is_place = field.metadata.get('is_place', False)
    return cli.expand_path(name, str(value), ConfigError, is_place) if field.metadata.get('is_path') else value


def _kind(field: dataclasses.Field) -> type:
    return field.type  # type: ignore[return-value]  # no annotation of a section is a string


def named_paths(name: str, text: str) -> dict[str, str]:
    """Name -> path of a setting that holds PATH or NAME=PATH, with commas between; the name is by default the last part.

    Raises:
      ConfigError: a name is there twice, or is none.
    """
    named = {}
    for part in filter(None, (part.strip() for part in text.split(','))):
        key, equals, path = part.partition('=')
        if not equals:
            key, path = os.path.basename(part.rstrip('/')), part
        key, path = key.strip(), os.path.expanduser(path.strip())
        if not path or not key or '/' in key:
            raise ConfigError(f'{name}: {part!r} must be DIR or NAME=DIR, the name without a /')
        if key in named:
            raise ConfigError(f'{name} has two sources of the name {key}; write NAME={path} for one')
        named[key] = path
    return named


def words(name: str, text: str, choices: tuple[str, ...]) -> tuple[str, ...]:
    """The words of a setting that holds some of the choices, with commas between. ConfigError: another word."""
    given = tuple(dict.fromkeys(filter(None, (word.strip() for word in text.split(',')))))
    for word in given:
        if word not in choices:
            raise ConfigError(
                f'{name}={cli.shorten(repr(text))}: {word} is not one of the choices{cli.nearest(word, choices)}'
            )
    return given


def _shown(value) -> str:
    try:
        return repr(value)
    except (ValueError, RecursionError):  # a number of more digits than Python prints, a list in itself
        return f'<{type(value).__name__}>'


def _nearest(name: str, known) -> str:
    return cli.nearest(name, known) or '; transxssm_jax/config.py lists all'


def _nearest_path(name: str, known) -> str:
    # The last word decides first: data.d_model should find model.d_model.
    same_leaf = [path for path in known if path.rpartition('.')[2] == name.rpartition('.')[2]]
    return f'; did you mean {same_leaf[0]}?' if same_leaf else _nearest(name, known)


# ---- trees -------------------------------------------------------------------------------------


def walk(section: type[Section], prefix: str = '') -> Iterator[tuple[str, dataclasses.Field]]:
    """Yields (dotted name, field) of every setting, in the order of the tree."""
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(field.type):
            yield from walk(_kind(field), f'{prefix}{field.name}.')
        else:
            yield prefix + field.name, field


def flatten(root: Section) -> dict[str, Any]:
    """Every setting by dotted name."""
    return {name: functools.reduce(getattr, name.split('.'), root) for name, _ in walk(type(root))}


def change(root: Section, changes: dict[str, Any]) -> None:
    """Sets settings by dotted name, each to a value of its type or to text as it is typed on a command line.

    Raises:
      ConfigError: unknown name, wrong type, or out of bounds.
    """
    fields = dict(walk(type(root)))
    for name, value in changes.items():
        if name not in fields:
            raise ConfigError(f'unknown setting {cli.shorten(str(name))}{_nearest_path(str(name), fields)}')
        if isinstance(value, str):
            value = cli.parse_value(name, value, _kind(fields[name]), ConfigError)
        *sections, leaf = name.split('.')
        setattr(functools.reduce(getattr, sections, root), leaf, value)


def copy[S: Section](root: S) -> S:
    """The same settings, not locked."""
    return type(root)(
        **{
            field.name: copy(value) if isinstance(value := getattr(root, field.name), Section) else value
            for field in dataclasses.fields(root)
        }
    )


def lock(root: Section) -> None:
    """From here on an assignment is an error."""
    for field in dataclasses.fields(root):
        if isinstance(value := getattr(root, field.name), Section):
            lock(value)
    object.__setattr__(root, '_locked', True)


def from_tree[S: Section](root: type[S], tree: Any) -> S:
    """Sections from nested dicts; what they do not hold keeps its default.

    Raises:
      ConfigError: a section or setting that does not exist, or a value of the wrong type. Nothing but the
        settings of the tree is ever set, whatever the names are.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f'it must be an object of sections, not {type(tree).__name__}')
    made, fields = root(), {field.name: field for field in dataclasses.fields(root)}
    for name, value in tree.items():
        if name in fields and dataclasses.is_dataclass(fields[name].type):
            if not isinstance(value, dict):
                raise ConfigError(f'{name} must be an object of settings, not {type(value).__name__}')
            value = from_tree(_kind(fields[name]), value)
        setattr(made, name, value)  # which refuses what is no field
    return made


def from_json[S: Section](root: type[S], text: str | bytes) -> S:
    """Sections from JSON, see `from_tree`.

    Raises:
      ConfigError: also where the text is not UTF-8 or not JSON.
    """
    try:
        tree = json.loads(text.decode() if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise ConfigError(f'not a saved config: it is not UTF-8 (byte {error.start})') from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise ConfigError(f'not a saved config: {cli.shorten(cli.one_line(error))}') from None
    try:
        return from_tree(root, tree)
    except ConfigError as error:
        raise ConfigError(f'not a saved config: {error}') from None


def to_json(root: Section) -> str:
    return json.dumps(dataclasses.asdict(root), indent=2) + '\n'


def describe(root: type[Section]) -> str:
    """Every setting with its default and its meaning, one per line."""
    return '\n'.join(
        f'--config.{name}={cli.show(field.default)}  {field.metadata["meaning"]}' for name, field in walk(root)
    )


def shipped() -> pathlib.Path:
    """The directory of the config files that come with this project: inside the installed package, or the checkout's."""
    package = pathlib.Path(__file__).parent
    return next((folder for folder in (package / 'configs', package.parent / 'configs') if folder.is_dir()), package)


def find_file(path: str, flag: str = '--config', folder: str = '') -> pathlib.Path:
    """The file or directory of a path, or of the name of one that comes with this project: '1p3b', 'configs/1p3b.py'.

    Args:
      path: what was typed; a file that is here goes first, a directory after a shipped name, and before 'configs/NAME'.
      flag: how errors call it.
      folder: of the shipped configs, where the name is looked for.

    Raises:
      ConfigError: it is neither.
    """
    file = pathlib.Path(path).expanduser()
    shipped_folder = shipped() / folder
    try:
        if file.is_file():
            return file
        for candidate in (shipped_folder / f'{path}.py', shipped_folder / path):
            if path and not file.is_absolute() and '..' not in file.parts and candidate.exists():
                return candidate
        if path and file.exists():  # a directory
            return file
        # As the pages write it, where the checkout is not the working directory.
        prefix = pathlib.PurePath('configs') / folder
        if file.is_relative_to(prefix) and '..' not in file.parts:
            candidate = shipped_folder / file.relative_to(prefix)
            if candidate.exists():
                return candidate
    except OSError as error:
        raise ConfigError(f'{flag}={cli.shorten(path)}: {error.strerror}') from None
    near = [str(p) for place in {file.parent, pathlib.Path('configs')} for p in place.glob('*.py')]
    names = [str(p.relative_to(shipped_folder).with_suffix('')) for p in shipped_folder.rglob('*.py')]
    raise ConfigError(f'{flag}={path}: no such file{cli.nearest(path, near + names) if near + names else ""}')


def read_file[S: Section](section: type[S], path: str) -> S:
    """The settings that a Python file's get_config() returns: a `section`, or an ml_collections.ConfigDict of its settings.

    Raises:
      ConfigError: no such file, or whatever the file raises, with the line.
    """
    file = find_file(path)
    if file.is_dir():
        inside = ', '.join(sorted(str(p) for p in file.glob('*.py'))[:5])
        raise ConfigError(f'--config={path} is a directory; name a config file{f", such as {inside}" * bool(inside)}')
    path = str(file)
    try:
        config = call_in_file(path, 'get_config')
        if hasattr(config, 'to_dict'):
            config = from_tree(section, config.to_dict())
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith(path) else f'{path}: {error}') from error
    if not isinstance(config, section):
        raise ConfigError(
            f'{path}: must have a function get_config() that returns a {section.__module__}.{section.__name__}'
        )
    return config


def call_in_file(path: str, function: str):
    """What a function of a Python file returns; None where the file has no such function.

    Raises:
      ConfigError: whatever the file raises, with the line.
    """
    try:
        return runpy.run_path(path).get(function, lambda: None)()
    except (Exception, SystemExit) as error:  # whatever a file with a mistake raises
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        kind = '' if isinstance(error, ConfigError | SyntaxError) else f'{type(error).__name__}: '
        where = f'{path}, line {lines[-1]}' if lines else path
        raise ConfigError(f'{where}: {kind}{cli.one_line(error)}') from error
