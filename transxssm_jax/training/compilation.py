"""Compiles the functions of a run for the mesh in use."""

import os
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


def compiler_options(device_mesh: jax.sharding.Mesh) -> dict[str, bool | int]:
    """What XLA is told for the train step, by the names of its flags; what XLA_FLAGS sets stays as it is there."""
    options = {}
    if device_mesh.devices.flat[0].platform == 'gpu':
        # Triton's products are no faster here than cuBLAS's, which also add the gradients of maps of one input: 501.5 ms
        # in place of 504.9 at 1.3B on an H100, no difference at 320M. And there is less to compile: 34 s in place of 45.
        options['xla_gpu_enable_triton_gemm'] = False
        if device_mesh.shape.get('context', 1) > 1:
            # XLA's scheduler computes the backward pass's recomputation many layers ahead, to have work beside what is
            # sent, and holds all of it: a step of 4 x 65,536 tokens at 1.3B over 4 H100 needed 103 GiB a device. With a
            # fence at every large buffer it needs 59. On one GPU the fence changed neither memory nor time.
            options['xla_gpu_experimental_scheduler_memory_fencing_threshold_bytes'] = 100_000_000
    flags = {flag.partition('=')[0] for flag in os.environ.get('XLA_FLAGS', '').split()}
    return {name: value for name, value in options.items() if f'--{name}' not in flags}


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
