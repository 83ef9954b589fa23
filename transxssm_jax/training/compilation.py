"""Compiles the functions of a run for the mesh in use."""

from collections.abc import Callable

import jax

from transxssm_jax.config import Config
from transxssm_jax.parallel import mesh
from transxssm_jax.training import step as step_lib


def compile_train_step(config: Config, device_mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
    """`step.train_step`, compiled; the state is donated. It takes limits where train.spike_action is 'skip'."""
    shardings, replicated = step_lib.state_shardings(config, device_mesh), mesh.sharding(device_mesh, ())
    limits = [jax.ShapeDtypeStruct((2,), 'float32')] if config.train.spike_action == 'skip' else []
    jitted = jax.jit(
        step_lib.train_step(config),
        donate_argnums=0,
        in_shardings=(shardings, step_lib.batch_sharding(device_mesh), *(replicated for _ in limits)),
        out_shardings=(shardings, replicated),  # numbers that every process reads
    )
    lowered = jitted.lower(*abstract_inputs(config, device_mesh), *limits)
    return lowered.compile(compiler_options=compiler_options(device_mesh))


def compiler_options(device_mesh: jax.sharding.Mesh) -> dict[str, int]:
    """What XLA is told for the train step, by the names of its flags.

    Where GPUs cut rows, its scheduler computes the backward pass's recomputation many layers ahead, to have work beside what
    is sent, and holds all of it: a step of 4 x 65,536 tokens at 1.3B over 4 H100 needed 103 GiB a device. With a fence at
    every large buffer it needs 59. On one GPU the fence changed neither memory nor time.
    """
    sends_tokens = device_mesh.shape.get('context', 1) > 1
    if device_mesh.devices.flat[0].platform == 'gpu' and sends_tokens:
        return {'xla_gpu_experimental_scheduler_memory_fencing_threshold_bytes': 100_000_000}
    return {}


def jit_eval_step(config: Config, device_mesh: jax.sharding.Mesh) -> Callable:
    """`step.eval_step`, jitted."""
    shardings = step_lib.param_shardings(config, device_mesh), step_lib.batch_sharding(device_mesh)
    return jax.jit(step_lib.eval_step(config), in_shardings=shardings, out_shardings=mesh.sharding(device_mesh, ()))


def compile_eval_step(config: Config, device_mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
    """`step.eval_step`, compiled."""
    state, batch = abstract_inputs(config, device_mesh)
    return jit_eval_step(config, device_mesh).lower(state['params'], batch).compile()


def abstract_inputs(config: Config, device_mesh: jax.sharding.Mesh) -> tuple[step_lib.State, dict]:
    """ShapeDtypeStructs with shardings of a state and of a global batch."""
    shape, sharding = (config.data.global_batch, config.data.seq_len), step_lib.batch_sharding(device_mesh)
    rows = jax.ShapeDtypeStruct(shape, 'int32', sharding=sharding)
    batch = dict.fromkeys(('tokens', 'targets', 'segment_ids', 'positions'), rows)
    return step_lib.abstract_state(config, device_mesh), batch
