"""What every command shares: its flags, its help, its errors in one line and its exit code.

A command is a module with a table of flags and a function that works:

    COMMAND = cli.Command('transxssm_jax.generate', __doc__, [
        cli.Flag('workdir', cli.REQUIRED, 'Directory of the run.', example='runs/a', is_path=True),
        cli.Flag('step', -1, 'Checkpoint; -1: the newest.', minimum=-1),
    ])

    def main(argv=None) -> int:
        return cli.run(COMMAND, generate, argv)       # generate(flags) -> exit code, or None

and, above its other imports, so that Ctrl-C during the slow ones is quiet too:

    if __name__ == '__main__':
        cli.start('transxssm_jax.generate')

A command line is `--name=value` or `--name value`, in any order; `--name` and `--noname` for a bool; commas between the
values of a list. Commands that take a config add `--config=PATH` and `--config.section.setting=value`.

This module imports neither jax nor anything else of this project.
"""

import dataclasses
import difflib
import enum
import importlib
import math
import os
import re
import signal
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

from pallas_kernels import chips
from transxssm_jax import children, streams


class ExitCode(enum.IntEnum):
    """How a command ended. After 69, 75 and 130 the same command goes on from where it was."""

    FINISHED = 0
    CRASHED = 1  # a fault of the program, with a traceback
    WRONG_INPUT = 2  # or a failed read or write
    NOT_FINITE = 3  # the loss or a gradient; or it spikes too often
    DOES_NOT_FIT = 3  # the memory of the device
    DIFFERS = 4  # a step, taken again, from what the ledger tells of it
    PEER_LOST = 69  # another process of the run is gone, or did not come
    TERMINATED = 75  # by SIGTERM, after saving
    INTERRUPTED = 130  # by Ctrl-C, after saving


class UserError(Exception):
    """What the user can mend. Its text is one line: the name, the value, the rule and the remedy."""

    exit_code = ExitCode.WRONG_INPUT


class UsageError(UserError):
    """A command line that the command does not take."""


class MissingPackageError(UserError, ModuleNotFoundError):
    """A package that only this command needs is not installed."""


# ---- values ------------------------------------------------------------------------------------

_BOOLS = {'true': True, 'yes': True, '1': True, 'false': False, 'no': False, '0': False}
_KINDS = {int: 'a whole number', float: 'a number', bool: 'true or false', str: 'text'}
_MOST_DIGITS = 400  # of a number; float64 ends at 309


def parse_value(name: str, text: str, kind: type, error: type[UserError] = UsageError):
    """The value of a word of the command line.

    Args:
      name: how the value is called in an error, e.g. '--step'.
      text: as typed. Numbers come in any usual spelling ('100000', '100_000', '1e5'); a whole number must be whole.
      kind: int, float, bool or str.
      error: the class to raise.
    """
    if kind is str:
        return text
    word = text.strip().lower()
    if kind is bool and word in _BOOLS:
        return _BOOLS[word]
    if kind in (int, float) and len(word) <= _MOST_DIGITS:
        try:
            return int(word) if kind is int else float(word)
        except ValueError:
            pass
        try:
            return as_whole(float(word))
        except ValueError:
            pass
    raise error(f'{name}={shorten(text)!r} must be {kind.__name__} ({_KINDS[kind]})')


def as_whole(value: float) -> int:
    """The whole number that a float is, e.g. 1e5.

    Raises:
      ValueError: it is not whole or not finite.
    """
    if not (math.isfinite(value) and value == int(value)):
        raise ValueError(f'{value} is no whole number')
    return int(value)


def shorten(text: str, most: int = 200) -> str:
    return text if len(text) <= most else text[:most] + '...'


def expand_path(name: str, path: str, error: type[UserError] = UsageError, is_place: bool = False) -> str:
    """The path with ~ expanded. Raises `error` for a URL, unless a place may be on an object store."""
    if re.match(r'\w+://', path) and not (is_place and path.startswith(('s3://', 'gs://'))):
        raise error(f'{name}={shorten(path)} must be a path; mount the bucket on every host, or fetch the file')
    return os.path.expanduser(path)


def nearest(name: str, known) -> str:
    """'; did you mean X?', or what is known where that is little, or ''."""
    bare = {word.removeprefix('--'): word for word in sorted(known)}  # two dashes make no flags alike
    near = difflib.get_close_matches(shorten(name).removeprefix('--'), bare, n=1, cutoff=0.6)
    if near:
        return f'; did you mean {bare[near[0]]}?'
    return f'; known: {", ".join(bare.values())}' if len(known) <= 16 else ''


def check_range(name: str, value, minimum=None, maximum=None, error: type[UserError] = UsageError) -> None:
    """Raises `error` unless value is finite and within the bounds (None: no bound)."""
    if isinstance(value, float) and not math.isfinite(value):
        raise error(f'{name}={value!r} must be a finite number')
    shown = shorten(repr(value), 40) if not isinstance(value, int) or abs(value) < 1 << 128 else 'a number that long'
    if minimum is not None and value < minimum:
        raise error(f'{name}={shown} must be at least {minimum}')
    if maximum is not None and value > maximum:
        raise error(f'{name}={shown} must be at most {maximum}')


# ---- flags -------------------------------------------------------------------------------------

REQUIRED = object()  # instead of a default


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of a command.

    Attributes:
      name: without dashes; words are joined by _.
      default: its type is the flag's type; a tuple is a list of values with commas; REQUIRED: it must be given.
      meaning: one sentence, with the unit, and with what a special value such as 0 or -1 stands for.
      kind: type of the value, or of a list's elements, where the default does not tell.
      is_list: several values: with commas or, if `repeated`, as the flag given again.
      choices: allowed values; empty: any.
      minimum, maximum: bounds of a number, or of each number of a list.
      is_path: a leading ~ is the home directory; with is_place it may be a URL of an object store.
      example: a value, for the error where a required flag is missing.
    """

    name: str
    default: Any
    meaning: str
    kind: Any = None
    is_list: bool = False
    repeated: bool = False
    choices: Sequence = ()
    minimum: float | None = None
    maximum: float | None = None
    is_path: bool = False
    is_place: bool = False
    example: str = 'VALUE'

    def __post_init__(self):
        if isinstance(self.default, tuple) or self.repeated:
            object.__setattr__(self, 'is_list', True)
        if self.kind is None:
            first = self.default[0] if isinstance(self.default, tuple) and self.default else self.default
            object.__setattr__(self, 'kind', str if first is REQUIRED or first == () else type(first))

    def shown(self) -> str:
        """'--name=default' for --help."""
        return f'--{self.name}={show(self.default) if self.default is not REQUIRED else f"{self.example} (required)"}'

    def parse(self, text: str):
        """The value of what was typed, checked."""
        if not self.is_list or self.repeated:
            return self._parse_one(text)
        if not text.strip() and isinstance(self.default, tuple) and self.default:
            raise UsageError(f'--{self.name} is empty; give a value, e.g. --{self.name}={show(self.default)}')
        return tuple(self._parse_one(part.strip()) for part in text.split(',')) if text.strip() else ()

    def _parse_one(self, text: str):
        name = f'--{self.name}'
        value = parse_value(name, text, self.kind)
        if self.choices and value not in self.choices:
            near = nearest(text, self.choices) if self.kind is str else f'; known: {show(tuple(self.choices))}'
            raise UsageError(f'{name}={shorten(text)} is not one of the choices{near}')
        if self.kind in (int, float):
            check_range(name, value, self.minimum, self.maximum)
        return expand_path(name, value, is_place=self.is_place) if self.is_path else value


def show(default) -> str:
    """A default as it would be typed."""
    if isinstance(default, tuple):
        return ','.join(map(show, default)) or "''"
    if isinstance(default, bool):
        return str(default).lower()
    return str(default) if default != '' else "''"


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: what it is called, what it does and which flags it takes.

    Attributes:
      module: its dotted name; 'transxssm_jax.convert import' where a word follows it.
      description: the module's docstring.
      flags: its flags, in the order of --help.
      settings: returns the lines that describe the settings of a config, for commands that take --config.a.b=value.
      takes_file: with settings, whether --config=PATH is taken too.
      if_interrupted: what to print when Ctrl-C ends the command.
      arguments: what words without dashes are called in --help, where the command takes them; '': it takes none.
    """

    module: str
    description: str
    flags: Sequence[Flag]
    settings: Callable[[], str] | None = None
    takes_file: bool = True
    if_interrupted: str = ''
    arguments: str = ''

    def help(self) -> str:
        lines = [self.description.strip(), '', 'Flags, with their defaults:']
        if self.settings and self.takes_file:
            lines.append('--config=PATH (required)  Config file; a Python file with get_config().')
        lines += [f'{flag.shown()}  {flag.meaning}' for flag in self.flags]
        if self.settings:
            lines += ['', 'Settings, with their defaults:', self.settings()]
        return '\n'.join(lines)

    def parse(self, argv: Sequence[str]) -> types.SimpleNamespace:
        """The flags by name, with their defaults.

        Also `argv` as given; `arguments`, the words without dashes; `given`, the names of those that were on the command
        line; and with settings `config_file` ('' if not given) and `overrides` (dotted name -> what was typed), of which
        config.from_flags makes a config.

        Raises:
          UsageError: an unknown, wrong or missing flag; the message is one line.
        """
        known = {flag.name: flag for flag in self.flags}
        values, overrides, arguments, config_file = dict[str, Any](), dict[str, str](), list[str](), ''
        words = iter(argv)
        for word in words:
            if word == '--':
                arguments += words
                break
            match = re.fullmatch(r'--?([A-Za-z][\w.\-]*)(?:=(.*))?', word, re.DOTALL)
            if not match:
                arguments.append(word)
                continue
            name, text = match.groups()
            name = name if name.startswith('config.') else name.replace('-', '_')
            if self.settings and name.startswith('config.'):
                overrides[name.removeprefix('config.')] = text if text is not None else _next(words, name)
            elif self.settings and name.startswith('noconfig.') and text is None:
                overrides[name.removeprefix('noconfig.')] = 'false'
            elif self.settings and self.takes_file and name == 'config':
                config_file = os.path.expanduser(text if text is not None else _next(words, name))
            elif name in known:
                flag = known[name]
                if text is None:
                    text = 'true' if flag.kind is bool else _next(words, name)
                value = flag.parse(text)
                values[name] = (*values.get(name, ()), value) if flag.repeated else value
            elif name.startswith('no') and text is None and name[2:] in known and known[name[2:]].kind is bool:
                values[name[2:]] = False
            else:
                near = nearest('--' + name, [f'--{flag}' for flag in known] + ['--config'] * bool(self.settings))
                bare = f'; {self.arguments} is given without a flag' if self.arguments else ''
                raise UsageError(f'unknown flag --{shorten(name)}{near or "; see --help"}{bare}')
        if arguments and not self.arguments:
            raise self._unexpected(arguments[0])
        for flag in self.flags:
            if values.get(flag.name, flag.default) in (REQUIRED, '', ()) and flag.default is REQUIRED:
                raise UsageError(f'--{flag.name} is missing, e.g. --{flag.name}={flag.example}')
        given, values = frozenset(values), {flag.name: flag.default for flag in self.flags} | values
        return types.SimpleNamespace(
            **values,
            argv=tuple(argv),
            arguments=tuple(map(os.path.expanduser, arguments)),
            given=given,
            config_file=config_file,
            overrides=overrides,
        )

    def _unexpected(self, word: str) -> UsageError:
        how = '; settings are given as --config.name=value' if self.settings else '; flags are given as --name=value'
        return UsageError(f'unexpected argument {shorten(word)}{how}')


def _next(words, name: str) -> str:
    word = next(words, None)
    if word is None or word.startswith('--'):
        raise UsageError(f'--{name} has no value; give it as --{name}=VALUE')
    return word


# ---- running -----------------------------------------------------------------------------------


def run(
    command: Command, work: Callable[[types.SimpleNamespace], int | None], argv: Sequence[str] | None = None
) -> int:
    """Runs a command and returns its exit code; an error that the user can mend is printed to stderr in one line.

    Args:
      command: how to read argv.
      work: takes the parsed flags; returns an exit code, or None for FINISHED.
      argv: the command line without the program; None: sys.argv.

    An error of the program itself (see `explain`) goes on as an exception.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if asks_for_help(argv):
            print(command.help())
            code = int(ExitCode.FINISHED)
        else:
            code = int(work(command.parse(argv)) or ExitCode.FINISHED)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        if command.if_interrupted:
            print_error(command.if_interrupted, prefix='interrupted; ')
        return ExitCode.INTERRUPTED
    except Exception as error:
        if streams.stdout_is_gone(error):
            return ExitCode.WRONG_INPUT
        explained = explain(error)
        if explained is None:
            raise
        print_error(explained[1])
        return explained[0]


def run_one_of(
    description: str, commands: dict[str, tuple[Command, Callable]], argv: Sequence[str] | None = None
) -> int:
    """Runs the command that the first word of argv names; see `run`.

    Args:
      description: docstring of the module.
      commands: word -> (command, work).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in commands:
        return run(*commands[argv[0]], argv[1:])
    if asks_for_help(argv):
        helps = [f'{word}:\n{command.help()}' for word, (command, _) in commands.items()]
        print('\n\n'.join([description.strip(), *helps]))
        return ExitCode.FINISHED
    words = ' or '.join(commands)
    print_error(f'the first word must be {words}, not {shorten(argv[0])}' if argv else f'give {words}; see --help')
    return ExitCode.WRONG_INPUT


def asks_for_help(argv: Sequence[str]) -> bool:
    before = list(argv[: list(argv).index('--')] if '--' in argv else argv)
    return bool({'--help', '-h', '-help'} & set(before))


def explain(error: BaseException) -> tuple[ExitCode, str] | None:
    """Exit code and line of an error that the user can mend; None: a fault of the program, which deserves its traceback."""
    if isinstance(error, UserError):
        return error.exit_code, one_line(error)
    if isinstance(error, OSError):
        files = ' -> '.join(
            os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)
        )
        return ExitCode.WRONG_INPUT, one_line(f'{shorten(files)}: {error.strerror or error}' if files else error)
    if _is_unsupported(error):
        return ExitCode.WRONG_INPUT, one_line(f'model.ssd_implementation or model.attention_implementation: {error}')
    if is_out_of_memory(error):
        return ExitCode.DOES_NOT_FIT, (
            f'the memory of the device is full: {shorten(str(error).splitlines()[0])}; take fewer rows at a time '
            '(train.accumulation_steps, --batch), shorter ones, or more devices'
        )
    return None


def _is_unsupported(error: BaseException) -> bool:
    """Whether the kernels refused: a named implementation does not exist, or cannot serve the device or the shape."""
    # The kernels import jax, this module does not. Where they were never imported, nothing of theirs was raised.
    dispatch = sys.modules.get('pallas_kernels.dispatch')
    return dispatch is not None and isinstance(error, dispatch.ImplementationError)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the compiler for it, has no room."""
    jax = sys.modules.get('jax')
    return jax is not None and isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' in str(error)


def one_line(error) -> str:
    return ' '.join(str(error).split()) or type(error).__name__


def print_error(message, prefix: str = 'error: ') -> None:
    """Prints one line to stderr; nobody may read it any more, which is no other error."""
    try:
        print(f'{prefix}{one_line(message)}', file=sys.stderr, flush=True)
    except OSError:
        pass
    except UnicodeEncodeError:
        print(ascii(f'{prefix}{one_line(message)}')[1:-1], file=sys.stderr, flush=True)


def start(module: str, takes_signals: bool = False) -> None:
    """Imports a command's module by its real name, runs its main() and ends the process with its exit code.

    To be called at the top of the module where it runs as __main__. During the imports (or until main takes_signals over) Ctrl-C
    and schedulers' signals end the process at once and quietly: nothing has begun. Under its real name, classes of the module can
    be pickled for worker processes. The environment that JAX reads when it is imported is set here, where it is not set yet.
    """
    os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', str(chips.GPU_MEMORY_SHARE))
    streams.prepare()
    children.stop_with_parent()
    # Raised in the middle of an extension module's import, KeyboardInterrupt could come out as another error.
    stops = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # what schedulers send
    ends: dict[int, ExitCode] = {signal.SIGINT: ExitCode.INTERRUPTED, **dict.fromkeys(stops, ExitCode.TERMINATED)}
    usual = (signal.default_int_handler, signal.SIG_DFL)  # a background job of a shell ignores Ctrl-C, and goes on to
    handlers = {number: handler for number in ends if (handler := signal.getsignal(number)) in usual}
    for number in handlers:
        signal.signal(number, lambda number, frame: os._exit(ends[number]))
    try:
        main = importlib.import_module(module).main
    except UserError as error:
        print_error(error)
        sys.exit(error.exit_code)
    for number, handler in () if takes_signals else handlers.items():
        signal.signal(number, handler)
    sys.exit(main(sys.argv[1:]))
