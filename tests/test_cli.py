"""The commands' common part: flags, help, one line per error, exit codes; and that every command goes through it."""

import ast
import importlib
import inspect
import os
import pathlib
import pkgutil
import re
import signal
import subprocess
import sys

import jax.numpy as jnp
import pytest

import transxssm_jax
from transxssm_jax import cli
from transxssm_jax import config as config_lib
from transxssm_jax.cli import Command, ExitCode, Flag, UsageError, UserError

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = sorted((ROOT / 'transxssm_jax').rglob('*.py'))

COMMANDS = {
    'train': ('train', 'COMMAND'),
    'generate': ('generate', 'COMMAND'),
    'plan': ('plan', 'COMMAND'),
    'convert import': ('convert', 'IMPORT'),
    'convert export': ('convert', 'EXPORT'),
    'data.prepare': ('data.prepare', 'COMMAND'),
    'data.loader': ('data.loader', 'COMMAND'),
    'bench': ('bench', 'COMMAND'),
    'report': ('report', 'COMMAND'),
    'experiment': ('experiment', 'COMMAND'),
    'sweep': ('sweep', 'COMMAND'),
    'replay': ('replay', 'COMMAND'),
    'evals.needle': ('evals.needle', 'COMMAND'),
    'evals.mqar': ('evals.mqar', 'COMMAND'),
    'evals.harness': ('evals.harness', 'COMMAND'),
    'evals.perplexity': ('evals.perplexity', 'COMMAND'),
    'evals.decode_speed': ('evals.decode_speed', 'COMMAND'),
}


def load(name):
    """(main, Command, the words before its flags) of one of COMMANDS."""
    if name == 'evals.harness':
        pytest.importorskip('lm_eval', reason='needs pip install -e .[eval]')
    module, command = COMMANDS[name]
    imported = importlib.import_module(f'transxssm_jax.{module}')
    return imported.main, getattr(imported, command), name.split()[1:]


def required(command):
    return [f'--{flag.name}={flag.example}' for flag in command.flags if flag.default is cli.REQUIRED]


# ---- every command ---------------------------------------------------------


def test_every_command_is_known_here():
    starts = {
        '.'.join(path.relative_to(ROOT / 'transxssm_jax').with_suffix('').parts)
        for path in PACKAGE
        if 'cli.start(' in path.read_text() and path.name != 'cli.py'
    }
    assert starts == {module for module, _ in COMMANDS.values()}
    for name in starts:  # by the name that it has, above whatever is slow to import
        text = (ROOT / 'transxssm_jax' / f'{name.replace(".", "/")}.py').read_text()
        before, after = re.split(
            rf"if __name__ == '__main__':\n    cli.start\('transxssm_jax.{re.escape(name)}'.*\)\n", text
        )
        assert [line for line in before.splitlines() if line.startswith(('import ', 'from '))] == [
            'from transxssm_jax import cli'
        ]
        assert '__main__' not in after


@pytest.mark.parametrize('name', COMMANDS)
def test_help_names_every_flag_with_its_default_and_meaning(name, capsys):
    main, command, words = load(name)
    for argv in ([*words, '--help'], [*words, '-h'], [*words, '--nonsense', '--help']):
        assert main(argv) == ExitCode.FINISHED
        out, err = capsys.readouterr()
        assert err == ''
    lines = out.rpartition('\nFlags, with their defaults:\n')[2].splitlines()
    for flag in command.flags:
        shown = 'required' if flag.default is cli.REQUIRED else f'--{flag.name}={cli.show(flag.default)}  '
        [line] = [line for line in lines if line.startswith(f'--{flag.name}=')]
        assert shown in line and flag.meaning in line and flag.meaning.endswith('.'), line
    assert ('--config.train.steps=10000  Steps of the whole run.' in lines) == (command.settings is not None)


@pytest.mark.parametrize('name', COMMANDS)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(name, capsys):
    main, command, words = load(name)
    number = next((flag for flag in command.flags if flag.kind in (int, float)), None)
    cases = [
        (['--nonsense=1'], 'unknown flag --nonsense'),
        ([f'--{command.flags[0].name}'], f'--{command.flags[0].name} has no value'),
        (['--flagfile=/nonexistent'], 'unknown flag --flagfile'),
    ]
    if not command.arguments:
        cases += [
            (['nonsense'], 'unexpected argument nonsense'),
            (['--', 'nonsense'], 'unexpected argument nonsense'),
        ]
    cases += [(required(command)[1:], ' is missing, e.g. --')] if required(command) else []
    if number:
        cases += [
            ([f'--{number.name}=many'], f"--{number.name}='many' must be {number.kind.__name__}"),
            ([f'--{number.name}=nan'], f'--{number.name}='),
        ]
    if command.settings:
        cases += [([*required(command), '--config.train.steps'], '--config.train.steps has no value')]
    for argv, message in cases:
        assert main([*words, *argv]) == ExitCode.WRONG_INPUT, argv
        out, err = capsys.readouterr()
        assert out == '' and err.startswith('error: ') and err.count('\n') == 1 and message in err, (argv, err)


@pytest.mark.parametrize('name', ['train', 'plan', 'evals.mqar', 'evals.decode_speed'])
def test_a_wrong_config_is_one_line_and_exit_code_2(name, tmp_path, capsys):
    main, command, words = load(name)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    given = [f'--workdir={tmp_path}/run'] if name == 'train' else []
    file = f'--config={ROOT}/configs/tiny.py'
    for argv, message in [
        ([], '--config=PATH is missing'),
        (['--config=nowhere.py'], 'nowhere.py: no such file'),
        (['--config=' + 'x' * 5000], 'File name too long'),
        ([file, '--config.model.d_modle=1'], 'unknown setting model.d_modle; did you mean model.d_model?'),
        ([file, '--config.train.seed=9223372036854775808'], 'must be at most 4294967295'),
        ([file, '--config.train.seed=1e20'], 'must be at most 4294967295'),
        ([file, '--config.model.attention_period=9999999999'], 'must be at most 4096'),
        ([file, '--config.train.steps=1.5'], 'must be int (a whole number)'),
    ]:
        assert main([*words, *given, *argv]) == ExitCode.WRONG_INPUT, argv
        out, err = capsys.readouterr()
        assert out == '' and err.startswith('error: ') and err.count('\n') == 1 and message in err, (argv, err)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize('name', COMMANDS)
def test_a_list_without_a_value_is_refused(name):
    _, command, _ = load(name)
    for flag in command.flags:
        if isinstance(flag.default, tuple) and flag.default:
            with pytest.raises(UsageError, match=f'--{flag.name} is empty; give a value'):
                command.parse([*required(command), f'--{flag.name}='])


@pytest.mark.parametrize('name', COMMANDS)
def test_a_url_is_no_path(name):
    _, command, _ = load(name)
    for flag in command.flags:
        if flag.is_path:
            # Of a place on an object store, s3:// and gs:// are taken.
            url = f'{"hdfs" if flag.is_place else "gs"}://a/b'
            with pytest.raises(UsageError, match=f'--{flag.name}={url} must be a path'):
                command.parse([f'--{flag.name}={url}'])
            if flag.is_place:
                given = [word for word in required(command) if not word.startswith(f'--{flag.name}=')]
                assert getattr(command.parse([*given, f'--{flag.name}=gs://a/b']), flag.name) == 'gs://a/b'


def test_convert_needs_a_first_word(capsys):
    from transxssm_jax import convert

    for argv, message in [([], 'give import or export'), (['exprot'], 'must be import or export, not exprot')]:
        assert convert.main(argv) == ExitCode.WRONG_INPUT
        assert message in capsys.readouterr().err
    assert convert.main(['--help']) == ExitCode.FINISHED
    out = capsys.readouterr().out
    assert '--source=DIR (required)' in out and '--max_shard_size=5GB' in out


def test_one_name_for_one_thing():
    """A flag that several commands have means the same in each."""
    kinds = {}
    for name in COMMANDS:
        if name == 'evals.harness':
            continue  # which may not be installed
        for flag in load(name)[1].flags:
            kinds.setdefault(flag.name, {})[name] = (flag.kind, flag.is_path)
    kinds['documents'].pop('replay')  # it prints documents, where perplexity reads files of them
    del kinds['lengths']  # perplexity takes multiples of the training length too
    for name, by_command in kinds.items():
        assert len(set(by_command.values())) == 1, (name, by_command)
    assert 'out' not in kinds and len(kinds['output']) >= 6


# ---- one error class, one table of exit codes ------------------------------


def test_every_error_of_the_package_is_a_user_error():
    seen = set()
    for module in pkgutil.walk_packages(transxssm_jax.__path__, 'transxssm_jax.'):
        if module.name == 'transxssm_jax.evals.harness' or module.name.endswith('_transxssm'):
            continue  # what they need may not be installed
        for name, value in vars(importlib.import_module(module.name)).items():
            if inspect.isclass(value) and issubclass(value, Exception) and value.__module__ == module.name:
                assert issubclass(value, UserError), f'{module.name}.{name}'
                assert value.exit_code in list(ExitCode), name
                seen.add(name)
    assert {
        'ConfigError',
        'DataError',
        'CheckpointError',
        'ProcessesError',
        'NotFiniteError',
        'DoesNotFitError',
    } <= seen


def test_exit_codes_and_flags_come_from_one_place():
    codes = set(ExitCode.__members__)
    for path in PACKAGE:
        if path.name == 'cli.py':
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign):
                names = {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
                constants = [value for value in ast.walk(node.value) if isinstance(value, ast.Constant)]
                assert not (names & codes and constants), f'{path}:{node.lineno}'
            if isinstance(node, ast.Import):
                assert 'argparse' not in {name.name for name in node.names}, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert not node.func.attr.startswith('DEFINE_'), f'{path}:{node.lineno}'


@pytest.mark.parametrize(
    'error, code, message',
    [
        (UsageError('a\nb  c'), 2, 'a b c'),
        (config_lib.ConfigError('x=1'), 2, 'x=1'),
        (FileNotFoundError(2, 'No such file or directory', '/a/b'), 2, '/a/b: No such file or directory'),
        (OSError(28, 'No space left on device', b'/a'), 2, '/a: No space left on device'),
        (OSError(18, 'Invalid cross-device link', '/a', None, '/b'), 2, '/a -> /b: Invalid cross-device link'),
        (OSError('bare'), 2, 'bare'),
        (BrokenPipeError(32, 'Broken pipe'), 2, '[Errno 32] Broken pipe'),  # not of stdout: of a worker
        (UsageError('\udcff'), 2, '\\udcff'),
    ],
)
def test_an_error_becomes_an_exit_code_and_one_line(error, code, message, capsys):
    def work(flags):
        raise error

    assert cli.run(Command('c', 'A command.', []), work, []) == code
    out, err = capsys.readouterr()
    assert (out, err.replace('\udcff', '\\udcff')) == ('', f'error: {message}\n')


def test_codes_of_errors_and_of_work():
    from transxssm_jax.planning.topology import DoesNotFitError
    from transxssm_jax.training.health import NotFiniteError

    assert cli.explain(NotFiniteError('nan')) == (ExitCode.NOT_FINITE, 'nan')
    assert cli.explain(DoesNotFitError('big', [])) == (ExitCode.DOES_NOT_FIT, 'big')
    command = Command('c', 'A command.', [])
    for value, code in ((None, 0), (0, 0), (ExitCode.TERMINATED, 75)):
        assert cli.run(command, lambda flags, value=value: value, []) == code


def test_a_fault_of_the_program_keeps_its_traceback():
    for error in (ZeroDivisionError('x'), NotImplementedError('some part of jax'), AssertionError('x')):
        assert cli.explain(error) is None

        def work(flags, error=error):
            raise error

        with pytest.raises(type(error)):
            cli.run(Command('c', 'A command.', []), work, [])


def test_a_kernels_refusal_is_wrong_input():
    from pallas_kernels.ssd.api import rotary_ssd

    x, dt, b = jnp.ones((1, 16, 2, 16)), jnp.ones((1, 16, 2)), jnp.ones((1, 16, 1, 16))
    for implementation in ('nonsense', 'mosaic_gpu'):  # unknown; not for this device
        with pytest.raises((ValueError, NotImplementedError)) as refused:
            rotary_ssd(x, dt, -jnp.ones(2), b, b, implementation=implementation)
        code, message = cli.explain(refused.value)
        assert code == ExitCode.WRONG_INPUT
        assert message.startswith('model.ssd_implementation or model.attention_implementation: implementation=')


@pytest.mark.parametrize('words, expected', [('', ''), ('run it again', 'interrupted; run it again\n')])
def test_ctrl_c_is_quiet(words, expected, capsys):
    def work(flags):
        raise KeyboardInterrupt

    assert cli.run(Command('c', 'A command.', [], if_interrupted=words), work, []) == 130
    assert capsys.readouterr() == ('', expected)


# ---- processes of their own ------------------------------------------------


def process(tmp_path, body, before='', **kwargs):
    """(exit code, stdout, stderr) of a command whose module has this body."""
    (tmp_path / 'module.py').write_text(body)
    program = f'import sys; sys.path.insert(0, {str(tmp_path)!r}); {before}\nfrom transxssm_jax import cli; cli.start("module")'
    result = subprocess.run(
        [sys.executable, '-c', program],
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        **({'stdout': subprocess.PIPE} | kwargs),
    )
    return result.returncode, result.stdout, result.stderr


KILL = 'import os, signal\nos.kill(os.getpid(), signal.{signal})\n'
MAIN = '\ndef main(argv):\n    print("ran")\n    return 3\n'


def test_start_runs_main_and_ends_with_its_exit_code(tmp_path):
    assert process(tmp_path, MAIN) == (3, 'ran\n', '')


def test_a_closed_stream_and_a_terminal_of_few_characters_are_no_fault(tmp_path):
    body = 'import sys\ndef main(argv):\n    print("ab\u00e9")\n    sys.stdout.flush()\n    return 3\n'
    assert process(tmp_path, body, before='sys.stdout.reconfigure(encoding="ascii", errors="strict")') == (
        3,
        'ab?\n',
        '',
    )
    (tmp_path / 'run.py').write_text(
        f'import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom transxssm_jax import cli; cli.start("closed")\n'
    )
    (tmp_path / 'closed.py').write_text(
        'import os\nfrom transxssm_jax import cli\n'
        'def main(argv):\n'
        '    open("report", "w").write(str(sorted(int(n) for n in os.listdir("/proc/self/fd"))[:3]))\n'
        '    return cli.run(cli.Command("c", "A command.", []), lambda flags: print("x"), [])\n'
    )
    for closed in ('>&-', '2>&-', '<&-', '>&- 2>&- <&-'):
        run = subprocess.run(
            f'{sys.executable} run.py {closed}', shell=True, cwd=tmp_path, env=os.environ | {'PYTHONPATH': str(ROOT)}
        )
        assert run.returncode == 0, closed
        assert (tmp_path / 'report').read_text() == '[0, 1, 2]', closed


@pytest.mark.parametrize('name, code', [('SIGINT', 130), ('SIGTERM', 75)])
def test_a_signal_during_imports_ends_quietly(tmp_path, name, code):
    # Even where an import makes another error of KeyboardInterrupt, or goes on after it.
    body = (
        'try:\n    ' + KILL.format(signal=name).replace('\n', '\n    ') + '\nexcept BaseException:\n    pass\n' + MAIN
    )
    assert process(tmp_path, body) == (code, '', '')


def test_a_background_job_that_ignores_ctrl_c_goes_on(tmp_path):
    ignore = 'import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)'
    assert process(tmp_path, KILL.format(signal='SIGINT') + MAIN, before=ignore) == (3, 'ran\n', '')


def test_ctrl_c_after_the_imports_is_the_commands(tmp_path):
    body = '\ndef main(argv):\n    try:\n        ' + KILL.format(signal='SIGINT').replace('\n', '\n        ')
    body += '\n    except KeyboardInterrupt:\n        return 4\n'
    assert process(tmp_path, body) == (4, '', '')


def test_a_missing_package_is_one_line(tmp_path):
    body = 'from transxssm_jax import cli\nraise cli.MissingPackageError("x is not installed", name="x")\n'
    assert process(tmp_path, body) == (2, '', 'error: x is not installed\n')


def test_a_reader_that_goes_away_is_no_traceback(tmp_path):
    body = (
        'from transxssm_jax import cli\n'
        'def main(argv):\n'
        '    return cli.run(cli.Command("c", "C.", []), lambda flags: print("x" * 100000), argv)\n'
    )
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert process(tmp_path, body, stdout=writer) == (2, None, '')
    finally:
        os.close(writer)


def test_cli_and_settings_import_nothing_slow(tmp_path):
    body = 'import sys\nfrom transxssm_jax import config\n\ndef main(argv):\n    print({"jax", "numpy"} & set(sys.modules))\n'
    assert process(tmp_path, body) == (0, 'set()\n', '')


# ---- flags -----------------------------------------------------------------

FLAGS = Command(
    'c',
    'A command.',
    [
        Flag('workdir', '', 'A path.', is_path=True),
        Flag('steps', 10, 'A number.', minimum=0, maximum=1000000),
        Flag('rate', 0.5, 'A number.', minimum=0.0),
        Flag('json', False, 'A switch.'),
        Flag('progress', True, 'A switch.'),
        Flag('lengths', (1, 2), 'Numbers.', minimum=1),
        Flag('stop', (), 'Texts.', repeated=True),
        Flag('mode', 'one', 'A word.', choices=('one', 'all')),
    ],
)


@pytest.mark.parametrize(
    'argv, name, value',
    [
        ([], 'steps', 10),
        (['--steps=1e5'], 'steps', 100000),
        (['--steps', '1_000'], 'steps', 1000),
        (['-steps=7'], 'steps', 7),
        (['--steps=1', '--steps=2'], 'steps', 2),
        (['--rate=1'], 'rate', 1.0),
        (['--rate', '1e-3'], 'rate', 1e-3),
        (['--json'], 'json', True),
        (['--json=true'], 'json', True),
        (['--json', '--nojson'], 'json', False),
        (['--noprogress'], 'progress', False),
        (['--progress=no'], 'progress', False),
        (['--lengths=1e3,4'], 'lengths', (1000, 4)),
        ([], 'stop', ()),
        (['--stop=a,b', '--stop', 'c'], 'stop', ('a,b', 'c')),
        (['--stop='], 'stop', ('',)),
        (['--mode=all'], 'mode', 'all'),
        (['--workdir=~/x'], 'workdir', str(pathlib.Path.home() / 'x')),
        (['--workdir', 'a=b c'], 'workdir', 'a=b c'),
        (['--workdir=a\nb'], 'workdir', 'a\nb'),
    ],
)
def test_flags_are_parsed(argv, name, value):
    parsed = getattr(FLAGS.parse(argv), name)
    assert parsed == value and type(parsed) is type(value)
    assert FLAGS.parse(argv).given == ({name} if argv else set())


@pytest.mark.parametrize(
    'argv, message',
    [
        (['--steps=1.5'], "--steps='1.5' must be int (a whole number)"),
        (['--steps=-1'], '--steps=-1 must be at least 0'),
        (['--steps=1e300'], 'must be at most 1000000'),
        (['--steps=' + '9' * 5000], 'must be int'),
        (['--steps', '--json'], '--steps has no value'),
        (['--rate=inf'], '--rate=inf must be a finite number'),
        (['--rate=nan'], '--rate=nan must be a finite number'),
        (['--json=maybe'], "--json='maybe' must be bool (true or false)"),
        (['--nosteps'], 'unknown flag --nosteps'),
        (['--lengths=1,x'], "--lengths='x' must be int"),
        (['--lengths=1,,2'], "--lengths='' must be int"),
        (['--lengths='], '--lengths is empty; give a value, e.g. --lengths=1,2'),
        (['--lengths=0'], '--lengths=0 must be at least 1'),
        (['--mode=on'], '--mode=on is not one of the choices; did you mean one?'),
        (['--step=1'], 'unknown flag --step; did you mean --steps?'),
        (['--mope'], 'unknown flag --mope; did you mean --mode?'),
        (['--nil'], 'unknown flag --nil; known: '),
        (['--config.train.steps=1'], 'unknown flag --config.train.steps'),
        (['-'], 'unexpected argument -'),
        ([''], 'unexpected argument'),
        (['x' * 9999], 'unexpected argument xxx'),
    ],
)
def test_wrong_flags_are_refused(argv, message):
    with pytest.raises(UsageError) as error:
        FLAGS.parse(argv)
    assert message in str(error.value) and '\n' not in str(error.value) and len(str(error.value)) < 500


def test_a_full_device_is_one_line_with_a_remedy():
    import jax

    error = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes.\nmore lines')
    code, message = cli.explain(error)
    assert code == ExitCode.DOES_NOT_FIT and '\n' not in message
    assert 'allocating 12 bytes' in message and 'train.accumulation_steps' in message
    assert cli.explain(jax.errors.JaxRuntimeError('INTERNAL: a fault')) is None
