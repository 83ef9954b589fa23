"""A run goes back to an earlier step of its own and leaves batches out (train.spike_action='rollback')."""

from transxssm_jax.training import initial_state, layer_health, metrics, spikes, splits
from transxssm_jax.training import step as step_lib
from transxssm_jax.training.ledger import Ledger


def go_back(run, back: spikes.RollBack, open_weights: initial_state.OpenWeights) -> None:
    """Puts a run at the newest checkpoint of at most step `back.to`, to take the steps from there with its new order.

    What the run has of later steps is removed, as where it starts again from a checkpoint: they are other steps now. The
    steps up to `back.to` are taken again, and are the same.

    Args:
      run: a `loop.Run`; its step is compiled already.
      back: tells where to, and in which order of batches.

    Raises:
      checkpoint.CheckpointError, DataError: as `loop.train`.
    """
    run.state = None  # makes room for the other
    run.loader.close()
    run.local.forget_after(back.to)
    run.checkpoints.forget_after(back.to)
    restored = run.checkpoints.restore(step_lib.abstract_state(run.config, run.mesh))
    step, state, position = restored or (0, None, None)
    if state is None:
        state, _ = initial_state.create(run.config, run.mesh, open_weights)
    seconds_before, config = run.writers.seconds_before, run.config
    run.writers.close()
    run.ledger.close()
    run.next_batch = back.order.batch(step + 1)
    run.loader = splits.open_train_split(config, run.mesh, run.next_batch)
    run.state, run.step, run.started_from = state, step, step
    run.writers = metrics.Writers(run.workdir, config, step)
    run.writers.seconds_before = seconds_before
    run.ledger = Ledger(run.workdir, config, run.mesh, step)
    run.health = layer_health.LayerHealth(run.workdir, config, run.mesh, step)
    run.pending = metrics.PendingMetrics(spikes.Spikes(config, run.workdir, run.loader, step, position, back))
    run.pending.on_read = run.ledger.write
    run.evaluated_at, run.evaluation = -1, {}
    run.goodput.went_back(step)
    run.phases.forget_steps()
    run.writers.print(
        f'step {back.step} went wrong: back to step {back.to}'
        + (f', from the checkpoint of step {step}' if step != back.to else '')
        + f'; the batches of the {back.step - back.to} steps from there on are left out'
    )
