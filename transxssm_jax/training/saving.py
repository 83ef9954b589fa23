"""When a run saves, and what: on the shared file system, on the hosts' own disks, and where it is told to stop.

`run` is a `loop.Run` throughout.
"""

import functools

from transxssm_jax.parallel import processes
from transxssm_jax.training import elastic, splits


def is_among_best(run) -> bool:
    """Whether this step was evaluated, with a loss that is among the train.keep_best lowest of the run's checkpoints."""
    loss = run.evaluation.get('eval_loss') if run.evaluated_at == run.step else None
    return loss is not None and run.checkpoints.is_among_best(loss)


def save(run) -> None:
    """Starts writing a checkpoint, where there is none of this step."""
    run.pending.flush()  # a step that is not finite is not saved
    with run.phases.within('save'):
        # All processes save or none: a listing of the directory may come late to one of them.
        if run.step in processes.broadcast_from_0(run.checkpoints.steps()):
            return
        eval_loss = run.evaluation.get('eval_loss') if run.evaluated_at == run.step else None
        run.checkpoints.save(run.step, run.state, data_position(run), eval_loss)
        run.goodput.mark(run.step)


def save_locally(run) -> None:
    """Starts writing a checkpoint to the host's own disk."""
    run.pending.flush()
    with run.phases.within('save'):
        run.local.save(run.step, run.state, data_position(run))
        run.goodput.mark(run.step)


def data_position(run) -> dict:
    """What a checkpoint keeps beside the state; the metrics of all steps are read."""
    watched = run.pending.spikes
    position = splits.data_position(run.config, run.loader, run.step, watched.order)
    return position | watched.saved() | elastic.saved(run.config, run.mesh)


def save_and_stop(run) -> None:
    """Saves what was trained, and says so."""
    if run.step == 0:  # a checkpoint of it would hold a workdir to settings that nothing was trained with
        line = 'stopped before the first step; nothing was saved'
    else:
        save(run)
        with run.phases.within('save'):
            run.checkpoints.wait(functools.partial(save, run))
        line = f'stopped at step {run.step} and saved; the same command goes on from there'
        run.goodput.write()
    run.stop.request.finish()
    run.writers.print(line)
