"""One run in one workdir, from top to bottom: open, restore or create, train, evaluate, save, stop."""

import contextlib
import dataclasses
import functools
import logging
import pathlib
import time
from collections.abc import Callable

import jax

from transxssm_jax.cli import ExitCode
from transxssm_jax.config import Config
from transxssm_jax.data.loader import Loader, WorkerLostError
from transxssm_jax.data.manifest import DataError
from transxssm_jax.parallel import mesh, processes
from transxssm_jax.training import (
    announcement,
    checkpoint,
    compilation,
    compilation_cache,
    elastic,
    going_back,
    initial_state,
    layer_health,
    lease,
    metrics,
    run_directory,
    spikes,
    splits,
    trackers,
)
from transxssm_jax.training import step as step_lib
from transxssm_jax.training.batch_order import BatchOrder
from transxssm_jax.training.checkpoint_exchange import CheckpointExchange
from transxssm_jax.training.ending import close, summarise
from transxssm_jax.training.evaluators import Evaluator, HeldOutLoss
from transxssm_jax.training.goodput import Goodput
from transxssm_jax.training.ledger import Ledger
from transxssm_jax.training.local_checkpoint import LocalCheckpoints
from transxssm_jax.training.phases import Phases
from transxssm_jax.training.profiler import ProfilerWindow
from transxssm_jax.training.rescue import saved_if_data_fails
from transxssm_jax.training.saving import is_among_best, save, save_and_stop, save_locally
from transxssm_jax.training.stopping import Stop, StopRequest
from transxssm_jax.training.watchdog import Pace, Watchdog

log = logging.getLogger(__name__)

# Called with the Run after every step, once it is logged and before it is evaluated and saved: for notebooks and tests.
after_step_callbacks: list[Callable[['Run'], None]] = []


@dataclasses.dataclass
class Run:
    """What a run is made of; data only.

    Attributes:
      step, state: how many steps are taken, and `step.State` after them.
      evaluation: metrics of the evaluation at `evaluated_at`, the newest one; empty before the first.
      started_from: the step of the checkpoint that this run goes on from; 0 for a new run.
      attended: mean tokens that a token of the training split attends to, see `metrics.mean_attended`.
      local: checkpoints on the own disks of the hosts.
      next_batch: number of the batch that the loader gives next.
      ledger: of the steps that are taken; None where none are.
      train_step, eval_step: compiled by `compile_steps`; None before, and train_step where the run is finished already.
    """

    config: Config
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    checkpoints: checkpoint.Checkpoints
    loader: Loader
    state: step_lib.State
    step: int
    stop: Stop
    writers: metrics.Writers
    started_from: int
    attended: float
    health: layer_health.LayerHealth
    local: LocalCheckpoints
    phases: Phases
    goodput: Goodput
    watchdog: Watchdog
    next_batch: int
    train_step: Callable | None = None
    eval_step: Callable | None = None
    ledger: Ledger | None = None
    evaluated_at: int = -1
    evaluation: dict[str, float] = dataclasses.field(default_factory=dict)
    clock: metrics.Clock = dataclasses.field(default_factory=metrics.Clock)
    pending: metrics.PendingMetrics = dataclasses.field(default_factory=metrics.PendingMetrics)
    pace: Pace = dataclasses.field(default_factory=Pace)
    began: float = dataclasses.field(default_factory=time.perf_counter)


def train(
    config: Config,
    workdir: pathlib.Path,
    stop: StopRequest,
    sample: Callable,
    open_weights: initial_state.OpenWeights,
    fit: Callable,
    exchange: CheckpointExchange | None = None,
) -> int:
    """Trains from the newest checkpoint of the workdir, or from the start, to train.steps or a request to stop.

    Args:
      sample: writes the continuation at the end, as `inference.generator.sample`.
      fit: chooses what the config leaves open and compiles the step, as `planning.fitting.fit`.
      exchange: hands checkpoints from process to process, where the workdir is not the same directory for all.

    Returns:
      The exit code of the process.

    Raises:
      ConfigError, DataError, checkpoint.CheckpointError: wrong input; the message is one line.
      health.NotFiniteError, spikes.TooManySpikesError: naming the step and the norms.
      OSError: a file cannot be written; the message names it.
      KeyboardInterrupt: a Ctrl-C after the first request to stop.
    """
    phases = Phases()
    check_input(config)
    config = initial_state.settle(config, workdir, open_weights)
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(lease.hold(workdir))  # before anything is written there
        stop.last_acts += [held.release] if held else []
        where_compiled = stack.enter_context(compilation_cache.kept(config, workdir))
        run = open_run(config, workdir, stop, open_weights, phases, exchange)
        stack.callback(close, run)
        run.writers.print(where_compiled)
        with jax.set_mesh(run.mesh):
            with phases.within('compile'):
                compile_steps(run, fit)
            run.began = time.perf_counter()
            run.watchdog.start()
            while True:
                try:
                    with stop.saves_first():
                        train_to_the_end(run)
                    break
                except spikes.RollBack as back:
                    with phases.within('restore'):
                        going_back.go_back(run, back, open_weights)
            if run.stop.exit_code:
                return run.stop.exit_code
            summarise(run, sample)
            stop.finish()
            return ExitCode.FINISHED


# ---- open, restore or create -------------------------------------------------


def check_input(config: Config) -> None:
    """Raises ConfigError or DataError for what can be known before the workdir is touched."""
    mesh.build(config)
    trackers.check_installed(config)
    splits.check_data(config)


def open_run(
    config: Config,
    workdir: pathlib.Path,
    stop: StopRequest,
    open_weights: initial_state.OpenWeights,
    phases: Phases,
    exchange: CheckpointExchange | None = None,
) -> Run:
    """Opens the workdir and the data, restores or creates the state, and prints what the run is. Raises as `train`."""
    device_mesh = mesh.build(config)
    run_directory.open_workdir(workdir, config, is_shared=exchange is None)

    # The state, and the data at the step where it stands.
    checkpoints, local = checkpoint.Checkpoints(workdir, config, exchange), LocalCheckpoints(workdir, config)
    with phases.within('restore'):
        wanted = step_lib.abstract_state(config, device_mesh)
        newest = max(processes.broadcast_from_0(checkpoints.steps()), default=0)
        restored = local.restore(wanted, newer_than=newest) or checkpoints.restore(wanted)
        if restored and restored[0] < newest:  # the newest cannot be read
            restored = local.restore(wanted, newer_than=restored[0]) or restored
    step, state, position = restored or (0, None, None)
    local.forget_after(step)
    next_batch = BatchOrder.of(position).batch(step + 1)
    loader = splits.open_train_split(config, device_mesh, next_batch)
    if position is not None:
        splits.check_position(config, loader, step, position, workdir)
    run_directory.check_same_on_all_processes(config, loader)
    for split in splits.eval_splits(config):
        splits.open_eval_split(config, device_mesh, split).close()  # so that a missing split is reported at the start
    origin = []
    if state is None:
        state, origin = initial_state.create(config, device_mesh, open_weights)

    writers = metrics.Writers(workdir, config, step)
    attended = splits.mean_over_parts(loader, functools.partial(metrics.mean_attended, seq_len=config.data.seq_len))
    for line in [*announcement.describe(config, device_mesh, loader, workdir, attended), *origin]:
        writers.print(line)
    if restored is not None:
        before = local.restored_config or checkpoints.restored_config
        given, (config, lines) = config, elastic.keep_batch(config, device_mesh, before, position)
        for line in [*announcement.describe_resumption(before, given, step), *lines]:
            writers.print(line + (', local' if local.restored_config and line == f'resuming from step {step}' else ''))
    return Run(
        config=config,
        workdir=workdir,
        mesh=device_mesh,
        checkpoints=checkpoints,
        loader=loader,
        state=state,
        step=step,
        started_from=step,
        attended=attended,
        health=layer_health.LayerHealth(workdir, config, device_mesh, step),
        stop=Stop(stop),
        writers=writers,
        pending=metrics.PendingMetrics(spikes.Spikes(config, workdir, loader, step, position)),
        local=local,
        phases=phases,
        goodput=Goodput(workdir, phases, step),
        watchdog=Watchdog(config, phases, stop.request),
        next_batch=next_batch,
    )


def compile_steps(run: Run, fit: Callable) -> None:
    """Chooses what the config leaves open, and compiles on every process before any starts the first step.

    run.config leaves nothing open from here on; what the workdir keeps is the config as it was given.
    """
    compile_step = functools.partial(compilation.compile_train_step, device_mesh=run.mesh)
    fitted = fit(run.config, run.mesh, compile_step if run.step < run.config.train.steps else None)
    run.config, run.train_step = fitted.config, fitted.step
    for line in fitted.lines:
        run.writers.print(line)
    if run.train_step:
        run.ledger = Ledger(run.workdir, run.config, run.mesh, run.step)
        run.pending.on_read = run.ledger.write
    run.eval_step = compilation.jit_eval_step(run.config, run.mesh)
    if processes.is_multiprocess():
        if splits.is_evaluated(run.config):
            run.eval_step = compilation.compile_eval_step(run.config, run.mesh)
        processes.all_gather_json('compiled')  # compile times differ


# ---- the loop ----------------------------------------------------------------


def next_batch(run: Run) -> dict[str, jax.Array]:
    """The next global batch on the devices. Where a worker process of the loader was killed, asks the run to stop."""
    with run.clock.input(), run.phases.within('input'):
        number = run.pending.spikes.order.batch(run.step + 1)
        if number != run.next_batch:  # the batches between are left out
            reopen_loader(run, number)
        try:
            batch = next(run.loader)
        except WorkerLostError as error:
            log.error(
                'a loader process (data.num_workers=%d) was lost: %s; the run saves and stops with exit code %d, and the '
                'same command goes on from there',
                run.config.data.num_workers,
                error,
                ExitCode.TERMINATED,
            )
            run.stop.request.request(ExitCode.TERMINATED)
            # The processes of a run stop after the same step, which may be one or two further: read those here.
            reopen_loader(run, number, num_workers=0)
            batch = next(run.loader)
        except StopIteration:
            raise DataError(
                f'the data ends before step {run.step + 1}, because batches were left out; lower train.steps, or raise '
                'data.max_epochs'
            ) from None
        run.next_batch = number + 1
        run.ledger.read_batch(run.step + 1, number, batch)
    return to_devices(run, batch)


def reopen_loader(run: Run, number: int, **options) -> None:
    """Opens the training split anew, at the batch with a number."""
    with contextlib.suppress(Exception):  # what is left of its workers
        run.loader.close()
    run.loader, run.next_batch = splits.open_train_split(run.config, run.mesh, number, **options), number


def to_devices(run: Run, batch: dict) -> dict[str, jax.Array]:
    return mesh.global_batch(run.mesh, batch, run.config.data.global_batch)


def train_to_the_end(run: Run) -> None:
    """The loop: until all is trained, evaluated and saved, or, with run.stop.exit_code, until it is asked to stop.

    Raises:
      spikes.RollBack: the run is to go back, and come here again.
    """
    train = run.config.train
    clock, pending, writers, stop, phases = run.clock, run.pending, run.writers, run.stop, run.phases
    profiler = ProfilerWindow(train, run.workdir / 'profile')
    evaluators = make_evaluators(run)
    if run.step >= train.steps:
        writers.print(f'already finished: step {run.step} of train.steps={train.steps}; raise it to go on')
    phases.begin('steps')
    clock.restart()
    window_start = run.step  # the first step of the window that the clock measures

    save_again = functools.partial(save, run)
    make_up_evaluation(run, evaluators)
    while run.step < train.steps and not stop.is_due():
        run.checkpoints.check(save_again)
        if profiler.begins_at(run.step):
            profiler.start()
        elif profiler.ends_at(run.step):
            pending.flush()
            writers.print(profiler.stop())

        with saved_if_data_fails(run, save):
            batch = next_batch(run)
        run.state, step_metrics = run.train_step(run.state, batch, *pending.spikes.limits(run.step + 1))
        run.step += 1
        pending.push(run.step, step_metrics)
        run.health.write_if_due(run.step, run.state['params'], step_metrics['grad_norms'])
        writers.advance()
        phases.took_step(run.step)
        if run.next_batch in run.loader.events:
            writers.print(f'step {run.step}: {run.loader.events[run.next_batch]}')

        is_first = run.step == run.started_from + 1
        is_last = run.step == train.steps
        log_now = is_last or run.step % train.log_every_steps == 0
        if is_first:
            pending.flush()
            writers.print(f'first step after {time.perf_counter() - run.began:.1f} s')
            phases.forget_steps()
        if log_now:
            record = pending.record()
            # The first step's time is compilation, which tells nothing about speed.
            rates = {} if is_first else metrics.rates(run.config, run.step - window_start, clock, run.attended)
            write_training_record(run, record, rates)
            if slow := run.pace.compare(clock.seconds - pending.waited_seconds, clock.seconds, run.step - window_start):
                log.warning('step %d: %s', run.step, slow)
        if is_first or log_now:
            pending.waited_seconds = 0.0
            clock.restart()
            window_start = run.step
        for callback in after_step_callbacks:
            callback(run)

        evaluate_now = is_evaluation_due(run)
        save_now = is_last or run.step % train.checkpoint_every_steps == 0
        if evaluate_now or save_now:
            pending.flush()
            with clock.paused():
                if evaluate_now:
                    evaluate(run, evaluators)
                if save_now or is_among_best(run):
                    save(run)
        elif run.local.is_due(run.step):
            save_locally(run)

    if profiler.is_tracing:
        pending.flush()
        writers.print(profiler.stop())
    if not stop.exit_code:
        with phases.within('save'):
            run.checkpoints.wait(save_again)
        if evaluators and run.evaluated_at != run.step:
            evaluate(run, evaluators)
    if stop.exit_code:
        save_and_stop(run)


def write_training_record(run: Run, record: dict, rates: dict) -> None:
    """Writes the metrics of the steps since the last record.

    Args:
      record: from `metrics.PendingMetrics.record`.
      rates: from `metrics.rates`, or empty.
    """
    run.writers.write(
        run.step,
        {
            **metrics.of_loss(record.pop('loss'), metrics.targets_per_byte(run.loader)),
            **record,
            **rates,
            **metrics.memory(),
            **run.goodput.record(),
            'seconds': run.writers.seconds_before + time.perf_counter() - run.began,
            'tokens': run.step * run.config.tokens_per_step,
        },
    )


# ---- evaluate ----------------------------------------------------------------


def make_evaluators(run: Run) -> list[Evaluator]:
    """One evaluator for each split of data.eval_splits. The first also yields the metrics eval_loss, ..."""

    def eval_step(params, batch):
        run.phases.beat()
        return run.eval_step(params, to_devices(run, batch))

    return [
        HeldOutLoss(
            functools.partial(splits.open_eval_split, run.config, run.mesh, split),
            eval_step,
            max_batches=run.config.train.eval_batches,
            should_stop=run.stop.is_due,
            prefixes=[f'eval/{split}/'] if index else ['eval_', f'eval/{split}/'],
        )
        for index, split in enumerate(splits.eval_splits(run.config))
    ]


def is_evaluation_due(run: Run) -> bool:
    train = run.config.train
    return splits.is_evaluated(run.config) and (run.step == train.steps or run.step % train.eval_every_steps == 0)


def evaluate(run: Run, evaluators: list[Evaluator]) -> None:
    """Runs the evaluators and writes one record of their metrics; nothing where the run is told to stop meanwhile."""
    weights = step_lib.evaluated_weights(run.config, run.state)
    with saved_if_data_fails(run, save), run.phases.within('evaluation'):
        values = {name: value for evaluator in evaluators for name, value in evaluator.run(weights)}
    if run.stop.exit_code:
        return
    run.evaluated_at, run.evaluation = run.step, values
    run.writers.write(run.step, values)
    if run.step < run.config.train.steps and 'eval_loss' in values:
        run.writers.print(f'step {run.step}: evaluation loss {values["eval_loss"]:.4f}')


def make_up_evaluation(run: Run, evaluators: list[Evaluator]) -> None:
    """Evaluates where the run was stopped before an evaluation that was due."""
    has_evaluation = processes.broadcast_from_0(run.writers.has_evaluation(run.step))
    if 0 < run.step < run.config.train.steps and is_evaluation_due(run) and not has_evaluation:
        evaluate(run, evaluators)
        if run.evaluated_at == run.step and 'eval_loss' in run.evaluation:
            run.checkpoints.evaluated(run.step, run.evaluation['eval_loss'])
