"""One harness for faults: a tiny run that is started again and again, struck, and compared with an undisturbed one.

A start is a process forked from a server that has everything imported (multiprocessing's forkserver), with one CPU device and
a cache of compiled functions, so that it takes a second instead of ten. What strikes it is a signal of the test, at a
random time, or one that the process sends itself within a named part of the program (`WITHIN`).
"""

import dataclasses
import importlib
import json
import multiprocessing
import os
import pathlib
import pickle
import random
import resource
import signal
import sys
import threading
import time

import quick_compile
from train_fixtures import arguments, losses, records

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = dict(
    train__steps=24,
    train__checkpoint_every_steps=4,
    train__eval_every_steps=6,
    train__eval_batches=1,
    train__sample_tokens=2,
)
# Parts of the program, each named by the function that is it: module, object, function.
WITHIN = {
    'taking the lease': ('transxssm_jax.training.lease', 'Lease', '_acquire'),
    'opening the workdir': ('transxssm_jax.training.run_directory', '', 'open_workdir'),
    'restore': ('transxssm_jax.training.checkpoint', 'Checkpoints', 'restore'),
    'reading arrays': ('transxssm_jax.training.checkpoint_files', '', 'read_group'),
    'opening the records': ('transxssm_jax.training.metrics', 'JsonLines', '__init__'),
    'compilation': ('transxssm_jax.training.compilation', '', 'compile_train_step'),
    'opening the ledger': ('transxssm_jax.training.ledger', '', '_drop_after'),
    'a step': ('transxssm_jax.training.ledger', 'Ledger', 'write'),
    'evaluation': ('transxssm_jax.training.evaluators', 'HeldOutLoss', 'run'),
    'copying what is saved': ('transxssm_jax.training.checkpoint_files', 'Save', '_copy'),
    'save': ('transxssm_jax.training.checkpoint_files', 'Save', '_write_and_agree'),
    'the commit of a save': ('transxssm_jax.training.checkpoint_files', 'Save', '_commit'),
    'the removal of old checkpoints': ('transxssm_jax.training.checkpoint', 'Checkpoints', '_remove_old'),
    'the final sample': ('transxssm_jax.inference.generator', '', 'sample'),
}
BEFORE_THE_FIRST_STEP = list(WITHIN)[:7]

_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(['transxssm_jax.train', 'harness'])


@dataclasses.dataclass(frozen=True)
class Strike:
    """A signal that the process sends itself.

    Attributes:
      within: of WITHIN; at the `call`-th call of that function, from 1.
      signal: which.
      after_seconds: of the call.
    """

    within: str
    signal: signal.Signals
    call: int = 1
    after_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a start ended: code is negative for a signal."""

    code: int
    out: str
    err: str

    @property
    def has_traceback(self) -> bool:
        return 'Traceback' in self.err or 'Traceback' in self.out


class Start:
    """A start of a run, in a process of its own.

    Args:
      config: path of the config file; the cache of compiled functions is beside it.
      workdir: of the run.
      strike: what it does to itself.
      most_bytes: no file may grow beyond; 0: no bound.
      patch: (module, function): called in the process before it begins, e.g. to make its loader slow.
      settings: of the run, beside SETTINGS.
    """

    def __init__(self, config, workdir, strike: Strike | None = None, most_bytes: int = 0, patch=None, **settings):
        self._logs = workdir.parent / 'logs'
        self._logs.mkdir(exist_ok=True)
        number = len(list(self._logs.iterdir()))
        self._paths = [self._logs / f'{number}.{name}' for name in ('out', 'err')]
        for path in self._paths:
            path.touch()
        argv = arguments(config, workdir, **SETTINGS | settings)[1:]
        call = (argv, [str(path) for path in self._paths], str(config.parent / 'compiled'), strike, most_bytes, patch)
        self.process = _context.Process(target=_run, args=call)
        self.process.start()

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        if self.process.exitcode is None:
            os.kill(self.process.pid, number)

    def is_running(self) -> bool:
        return self.process.exitcode is None

    def output(self) -> tuple[str, str]:
        """(stdout, stderr) so far."""
        return tuple(path.read_text(errors='replace') for path in self._paths)

    def until(self, condition, seconds: float = 300.0) -> bool:
        """Waits for a condition, or for the end of the process; whether the condition came."""
        deadline = time.monotonic() + seconds
        while not (met := condition()) and self.is_running():
            assert time.monotonic() < deadline, [text[-2000:] for text in self.output()]
            time.sleep(0.01)
        return met

    def finish(self, seconds: float = 300.0) -> Ended:
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(('it does not end', *(text[-2000:] for text in self.output())))
        return Ended(self.process.exitcode, *self.output())


def run(config, workdir, **how) -> Ended:
    return Start(config, workdir, **how).finish()


def _run(argv, paths, cache, strike, most_bytes, patch) -> None:
    os.environ['XLA_FLAGS'] = quick_compile.XLA_FLAGS
    for path, number in zip(paths, (1, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = open(1, 'w', closefd=False), open(2, 'w', closefd=False)  # noqa: SIM115
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    import jax

    from transxssm_jax import streams, train

    streams.prepare()  # as a command's start does
    jax.config.update('jax_compilation_cache_dir', cache)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
    share_compiled_steps(pathlib.Path(cache))
    if most_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))
    if patch:
        getattr(importlib.import_module(patch[0]), patch[1])()
    if strike:
        arm(strike)
    code = train.main(argv)
    # The output, which the bound cuts too, is no part of the disk that is full.
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    sys.stdout.flush()
    sys.exit(code)


def share_compiled_steps(directory: pathlib.Path) -> None:
    """Starts take the compiled step of the first, which saves them the tracing too. All are of one model."""
    from jax.experimental import serialize_executable

    from transxssm_jax.training import compilation

    original, path = compilation.compile_train_step, directory.with_suffix('.step')

    def compile_train_step(config, device_mesh):
        if path.exists():
            return serialize_executable.deserialize_and_load(*pickle.loads(path.read_bytes()))
        compiled = original(config, device_mesh)
        partial = path.with_suffix(f'.{os.getpid()}')
        partial.write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))
        partial.replace(path)
        return compiled

    compilation.compile_train_step = compile_train_step


def arm(strike: Strike) -> None:
    """Makes this process send itself a signal."""
    module, owner, name = WITHIN[strike.within]
    holder = importlib.import_module(module)
    holder = getattr(holder, owner) if owner else holder
    original, calls = getattr(holder, name), []

    def struck(*args, **kwargs):
        calls.append(1)
        if len(calls) == strike.call:
            if strike.after_seconds:
                threading.Timer(strike.after_seconds, os.kill, [os.getpid(), strike.signal]).start()
            else:
                os.kill(os.getpid(), strike.signal)
                time.sleep(0.05)  # a handler of Python runs in the main thread, which may be another
        return original(*args, **kwargs)

    setattr(holder, name, struck)
    # Names that were imported from there before.
    for other in list(sys.modules.values()):
        if getattr(other, name, None) is original and getattr(other, '__name__', '').startswith('transxssm_jax'):
            setattr(other, name, struck)


# ---- what must be the same ---------------------------------------------------


def ledger_of(workdir) -> list[dict]:
    lines = (workdir / 'ledger' / 'process-0.jsonl').read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same(workdir, undisturbed, steps: int = 0) -> None:
    """The run took the same steps with the same numbers, bit for bit, each once, and evaluated alike."""
    found, wanted = ledger_of(workdir), ledger_of(undisturbed)
    names = ('step', 'batch', 'batch_number', 'learning_rate', 'loss', 'grad_norm', 'update_norm', 'param_norm')

    def numbers(lines):
        return [{name: line.get(name) for name in names} for line in lines][: steps or None]

    assert numbers(found) == numbers(wanted)
    if steps:
        return
    assert losses(workdir) == losses(undisturbed)
    evaluations = [
        {record['step']: record['eval_loss'] for record in records(path) if 'eval_loss' in record}
        for path in (workdir, undisturbed)
    ]
    assert evaluations[0] == evaluations[1]


def kill_until_finished(config, workdir, seconds: float, rng: random.Random, kills: int, signals=(signal.SIGKILL,)):
    """Starts a run again and again, each start killed at a random time of `seconds`, and at last to the end.

    Returns:
      how many starts were struck while they ran, by signal, and by how each ended.
    """
    struck = []
    while len(struck) < kills:
        start = Start(config, workdir)
        time.sleep(rng.uniform(0, seconds))
        number = rng.choice(signals)
        was_running = start.is_running()
        start.kill(number)
        ended = start.finish()
        assert not ended.has_traceback, str(ended)
        if was_running:
            struck.append((signal.Signals(number).name, ended.code))
        if ended.code == 0:
            break
        assert ended.code in (-signal.SIGKILL, 75, 130, -signal.SIGTERM), str(ended)
    ended = run(config, workdir)
    assert ended.code == 0, str(ended)
    return struck
