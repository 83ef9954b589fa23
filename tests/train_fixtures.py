"""A tiny run for the trainer's tests: data, a config file, and training in this process or another."""

import contextlib
import io
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import typing

import quick_compile

ROOT = pathlib.Path(__file__).parents[1]
TESTS = pathlib.Path(__file__).parent

CONFIG = """
from transxssm_jax.config import Config, Data, Model, Optimizer, Train


def get_config():
    return Config(
        model=Model(vocab_size=264, d_model=32, num_layers=2, num_heads=2, num_kv_heads=2, num_ssd_groups=2, d_state=16,
                    d_mlp=32, attention_period=2, attention_offset=1, dtype='float32', remat='none', ssd_chunk_size=16),
        data=Data(path={data!r}, seq_len=32, global_batch=8),
        optimizer=Optimizer(learning_rate=1e-2, schedule='constant', warmup_steps=2),
        train=Train(steps=12, log_every_steps=1, eval_every_steps=6, eval_batches=2, checkpoint_every_steps=4,
                    tensorboard=False, progress=False, loss_chunk_tokens=64),
    )
"""


def prepare_bytes(directory: pathlib.Path) -> pathlib.Path:
    """A prepared byte data set of two splits: 40 rows of 32 tokens and more, and a held-out part."""
    from transxssm_jax.data import prepare

    for split, first, last in (('train', 0, 60), ('validation', 60, 80)):
        source = directory / f'{split}.jsonl'
        source.write_text(
            ''.join(
                json.dumps({'text': f'{i} and {i} make {2 * i}. ' * (1 + i % 5)}) + '\n' for i in range(first, last)
            )
        )
        assert (
            prepare.main(
                [
                    f'--output={directory / "prepared"}',
                    f'--split={split}',
                    '--tokenizer=byte',
                    f'--source={source}',
                    '--num_workers=1',
                ]
            )
            == 0
        )
    return directory / 'prepared'


def write_config(directory: pathlib.Path, data: pathlib.Path) -> pathlib.Path:
    path = directory / 'small.py'
    path.write_text(CONFIG.format(data=str(data)))
    return path


def arguments(config: pathlib.Path, workdir: pathlib.Path, **settings) -> list[str]:
    """'train' and its command line; settings by dotted name with __ for the dot."""
    return [
        'train',
        f'--config={config}',
        f'--workdir={workdir}',
        *(f'--config.{name.replace("__", ".")}={value}' for name, value in settings.items()),
    ]


class Result(typing.NamedTuple):
    code: int
    out: str
    err: str


def train(config, workdir, **settings) -> Result:
    """A run in this process, on all of its devices; signal handlers are put back."""
    return call(arguments(config, workdir, **settings))


@contextlib.contextmanager
def compiled_once(directory: pathlib.Path):
    """Runs of this process keep what they compile in a directory, so that only the first of equal ones compiles."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    settings = {
        'jax_compilation_cache_dir': str(directory / 'compiled'),
        'jax_persistent_cache_min_compile_time_secs': 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def call(argv: list[str]) -> Result:
    from transxssm_jax import train as train_lib
    from transxssm_jax.training import stopping

    handlers = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = train_lib.main(argv[1:])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Result(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def before_saving(step: int, action):
    """Calls action(run) when a run in this process has taken `step` steps, before it evaluates and saves them."""
    from transxssm_jax.training import loop

    def callback(run):
        if run.step == step:
            action(run)

    loop.after_step_callbacks.append(callback)
    try:
        yield
    finally:
        loop.after_step_callbacks.remove(callback)


def send(signal_name: str):
    """An action for before_saving: the process sends itself a signal."""
    return lambda run: os.kill(os.getpid(), getattr(signal, signal_name))


def start_process(config, *runs) -> subprocess.Popen:
    """Runs, one after another, in a process of their own with one CPU device.

    Args:
      config: path of the config file.
      runs: a command line each (see arguments), or (signal name, step, command
        line): the process sends itself that signal after that step; or ('file
        size', bytes, command line): files cannot grow beyond that, as on a full disk.
    """
    environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
    environment |= {
        'JAX_PLATFORMS': 'cpu',
        'PYTHONPATH': str(ROOT),
        'XLA_FLAGS': quick_compile.XLA_FLAGS,
        'JAX_COMPILATION_CACHE_DIR': str(config.parent / 'compiled'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    if len(runs) == 1 and runs[0][0] == 'train':
        program = ['-m', 'transxssm_jax.train', *runs[0][1:]]
    else:
        program = [str(TESTS / 'train_fixtures.py'), json.dumps(runs)]
    return subprocess.Popen(
        [sys.executable, *program], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> Result:
    out, err = process.communicate(timeout=600)
    return Result(process.returncode, out, err)


def records(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def losses(workdir: pathlib.Path) -> dict[int, float]:
    """Training loss by step."""
    return {record['step']: record['loss'] for record in records(workdir) if 'loss' in record}


def checkpoint_steps(workdir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit())


if __name__ == '__main__':
    from transxssm_jax import streams
    from transxssm_jax import train as train_lib

    streams.prepare()  # as a command's start does
    for run in json.loads(sys.argv[1]):
        kind, number, command = run if run[0] != 'train' else ('', -1, run)
        if kind == 'file size':
            resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
        with before_saving(number, send(kind)) if kind.startswith('SIG') else contextlib.nullcontext():
            print('exit code', train_lib.main(command[1:]), flush=True)
