"""Public functions of the rotary scan: checks, defaults and the choice of implementation.

Legend: B batch, L length, H heads, G groups (H % G == 0), P head width, N state width.
"""

import os
import typing

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import dispatch
from pallas_kernels.device import current_device
from pallas_kernels.ssd import decode, gpu, reference, tpu, xla
from pallas_kernels.ssd.residuals import STATES_NAME

__all__ = ['IMPLEMENTATIONS', 'STATES_NAME', 'rotary_ssd', 'rotary_ssd_state', 'rotary_ssd_step']

Table = Float32[Array, '*table L half']
Rope = tuple[Table, Table] | None
Interpret = bool | pltpu.InterpretParams | plgpu.InterpretGPUParams


def rotary_ssd(
    x: Float[Array, 'B L H P'],
    dt: Float[Array, 'B L H'],
    a: Float[Array, 'H'],
    b: Float[Array, 'B L G N'],
    c: Float[Array, 'B L G N'],
    rope: Rope = None,
    *,
    segment_ids: Int[Array, 'B L'] | None = None,
    initial_state: Float[Array, 'B H P N'] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    interpret: Interpret = False,
) -> tuple[Float[Array, 'B L H P'], Float[Array, 'B H P N']]:
    """h_t = exp(dt_t a) h_{t-1} + dt_t x_t (R_t b_t)^T;  y_t = h_t R_t c_t.

    Source: the TransXSSM paper's state-space layer with unified RoPE, as a recurrence.
    Differentiable (reverse mode) in x, dt, a, b, c and initial_state, through y and final_state.

    Args:
      x: [B, L, H, P] bfloat16 or float32, any L >= 1, P a multiple of 16.
      dt: [B, L, H] float32, >= 0 (after softplus).
      a: [H] float32, < 0; the log-decay of a step is dt * a.
      b, c: [B, L, G, N] in x's dtype, not rotated; N a multiple of 16, H % G == 0. Head h
        uses group h // (H / G).
      rope: (cos, sin), each [L, N/2] or [B, L, N/2] float32, half-split rotation. None: no rotation.
      segment_ids: [B, L] int32. The state restarts at t where segment_ids[t] != segment_ids[t-1].
      initial_state: [B, H, P, N] float32, rotated frame; it belongs to the first segment of the
        row. None: zeros.
      chunk_size: tokens per chunk, a multiple of 16 in [16, 256]; it changes speed and rounding
        only. None: from the implementation's table. 'reference' ignores it.
      implementation: a name of the table, or None: the fastest on `device.current_device()` that can
        serve (`OPERATOR`), with the reason logged once. When lowering for a platform other than
        the process's (a TPU topology on a CPU host), set the mesh (`jax.set_mesh`), or name it.

        | name         | runs on       | dtypes    | chunk_size | partitioned by GSPMD / Shardy |
        | 'reference'  | all           | all       | any        | yes                           |
        | 'xla'        | all           | bf16, f32 | any        | yes, over B, H and G          |
        | 'mosaic_tpu' | TPU           | bf16, f32 | 128        | no: wrap in jax.shard_map     |
        | 'mosaic_gpu' | NVIDIA Hopper | bf16      | 64         | no: wrap in jax.shard_map     |

        "wrap" means shard_map over batch and heads, with L, P and N whole on every device and
        G sharded as H is, or replicated where G is 1. Every implementation works there, so a
        model can always wrap. 'mosaic_gpu' takes P that is a multiple of 64 and N of 64 or 128.
      interpret: run the Pallas kernels on CPU, slowly. True; or pltpu.InterpretParams, which also
        models the TPU's memory and DMA; or plgpu.InterpretGPUParams, which is what True means for
        'mosaic_gpu'. Its warpgroups are then threads that wait for each other, and a machine of
        fewer than 8 cores needs NPROC=8 in the environment. 'reference' and 'xla' ignore it.

    Returns:
      y [B, L, H, P] in x's dtype, and final_state [B, H, P, N] float32 in the rotated frame, which
      `initial_state` of the tokens that follow and `rotary_ssd_step` take.

    Raises:
      ValueError: an argument's shape, dtype or value breaks a rule above, or the
        implementation is unknown.
      dispatch.UnsupportedError (a NotImplementedError): the named implementation cannot serve this
        call. For which platform a traced function is compiled shows only at lowering: there
        'mosaic_tpu' refuses others than TPU, and 'mosaic_gpu' others than CUDA.
    """
    _check_sequence(x, dt, a, b, rope, segment_ids, chunk_size)
    _check_like('c', c, 'b', b)
    B, _, H, P = x.shape
    if initial_state is None:
        initial_state = jnp.zeros((B, H, P, b.shape[-1]), dt.dtype)
    _check_shape('initial_state', initial_state, (B, H, P, b.shape[-1]), '[B, H, P, N]')
    _check_dtype('initial_state', initial_state, dt.dtype)
    return _scan(x, dt, a, b, c, rope, segment_ids, initial_state, chunk_size, implementation, interpret)


def rotary_ssd_state(
    x: Float[Array, 'B L H P'],
    dt: Float[Array, 'B L H'],
    a: Float[Array, 'H'],
    b: Float[Array, 'B L G N'],
    rope: Rope = None,
    *,
    segment_ids: Int[Array, 'B L'] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    interpret: Interpret = False,
) -> tuple[Float[Array, 'B H'], Float[Array, 'B H P N']]:
    """What one shard of a sequence passes on: final_state(initial h) = decay * h + state.

    Arguments, dtypes and errors are those of `rotary_ssd`, without c. This function does not see a
    boundary between this shard and the one before: the caller drops the incoming state where the
    shards' segment_ids differ. Differentiable in x, dt, a and b, through both results.

    Returns:
      decay [B, H] float32: the factor of an incoming state that belongs to the shard's first
        segment; 0 if a segment boundary lies within the shard.
      state [B, H, P, N] float32: the final state of the shard alone.
    """
    _check_sequence(x, dt, a, b, rope, segment_ids, chunk_size)
    B, _, H, P = x.shape
    zeros = jnp.zeros((B, H, P, b.shape[-1]), dt.dtype)
    _, state = _scan(x, dt, a, b, None, rope, segment_ids, zeros, chunk_size, implementation, interpret)
    decay = jnp.exp(jnp.sum(dt, axis=1) * a)
    if segment_ids is not None:
        whole = jnp.all(segment_ids == segment_ids[:, :1], axis=1)
        decay = jnp.where(whole[:, None], decay, 0.0)
    return decay, state


def rotary_ssd_step(
    state: Float[Array, 'B H P N'],
    x_t: Float[Array, 'B H P'],
    dt_t: Float[Array, 'B H'],
    a: Float[Array, 'H'],
    b_t: Float[Array, 'B G N'],
    c_t: Float[Array, 'B G N'],
    rope_t=None,
) -> tuple[Float[Array, 'B H P N'], Float[Array, 'B H P']]:
    """One token of `rotary_ssd`: takes the state before it, returns the state after it and y.

    Args:
      state: [B, H, P, N] float32, rotated frame.
      x_t: [B, H, P]; dt_t: [B, H] float32; a: [H] float32; b_t, c_t: [B, G, N] in x_t's dtype.
      rope_t: (cos, sin) of the token's position, each [N/2] or [B, N/2] float32. None: no rotation.

    Returns:
      state [B, H, P, N] float32, and y_t [B, H, P] in x_t's dtype.

    Raises:
      ValueError: an argument's shape or dtype breaks a rule above.
    """
    _check_rank('x_t', x_t, 3, '[B, H, P]')
    _check_rank('b_t', b_t, 3, '[B, G, N]')

    # The same rules as a sequence of one token, checked on shapes; nothing is computed.
    def token(v):
        return jax.ShapeDtypeStruct((v.shape[0], 1, *v.shape[1:]), v.dtype)

    _check_rank('dt_t', dt_t, 2, '[B, H]')
    _check_sequence(token(x_t), token(dt_t), a, token(b_t), None, None, None, suffix='_t')
    _check_like('c_t', c_t, 'b_t', b_t)
    (B, H, P), N = x_t.shape, b_t.shape[-1]
    _check_shape('state', state, (B, H, P, N), '[B, H, P, N]')
    _check_dtype('state', state, jnp.float32)
    if rope_t is not None:
        rope_t = _check_rope('rope_t', rope_t, ((N // 2,), (B, N // 2)), '[N/2] or [B, N/2]')
    return decode.step_token(state, x_t, dt_t, a, b_t, c_t, rope_t)


def _scan(x, dt, a, b, c, rope, segment_ids, state, chunk_size, implementation, interpret):
    """Dispatches a checked call. c None: y is not wanted. Returns (y or None, final state)."""
    call = Call(x.dtype.name, chunk_size, (*x.shape, *b.shape[2:]), interpret)
    if rope is not None:
        rope = tuple(jnp.asarray(table if table.ndim == 3 else table[None]) for table in rope)
    run_BL = None
    if segment_ids is not None:
        # Numbers of runs, because an id may come back after another one.
        starts_BL = segment_ids[:, 1:] != segment_ids[:, :-1]
        run_BL = jnp.pad(jnp.cumsum(starts_BL, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    return OPERATOR.run(implementation, call, (x, dt, a, b, c, rope, run_BL, state))


# --- implementations ---------------------------------------------------------------------------


class Call(typing.NamedTuple):
    """The static properties of a call, which decide the choice."""

    dtype: str  # of x
    chunk_size: int | None
    shape: tuple[int, ...]  # B, L, H, P, G, N
    interpret: Interpret = False


def _run_reference(call, *arrays):
    return reference.scan_tokens(*arrays)


def _run_xla(call, *arrays):
    return xla.scan_chunks(xla.default_plan(current_device().backend, call.chunk_size), *arrays)


def _run_tpu(call, *arrays):
    _check_interpreter('mosaic_tpu', call.interpret, pltpu.InterpretParams)
    return tpu.scan_chunks(tpu.default_plan(tpu.generation(), call.shape), *arrays, call.interpret)


def _run_gpu(call, *arrays):
    _check_interpreter('mosaic_gpu', call.interpret, plgpu.InterpretGPUParams)
    interpret = _gpu_interpreter(call.interpret) if call.interpret else False
    return gpu.scan_chunks(gpu.default_plan(call.shape), *arrays, interpret)


_computes_in_float32 = dispatch.computes_in_float32('x')


def _has_other_chunks(call, chunk):
    if call.chunk_size not in (None, chunk):
        return (f"chunk_size={call.chunk_size}, but its chunks are of {chunk}; leave chunk_size to None or use "
                "implementation='xla'")  # fmt: skip
    return None


def _tpu_unsupported(device, call):
    return _computes_in_float32(device, call) or _has_other_chunks(call, tpu.CHUNK)


def _tpu_unwanted(device, call):
    """The static profile (see `OPERATOR`) was taken in bfloat16, of widths that fill tiles.

    Float32 products take six passes of the matrix unit or more in either form.
    """
    *_, P, _, N = call.shape
    if call.dtype != 'bfloat16':
        return f'it is for bfloat16; name it to have it in {call.dtype}'
    if not tpu.fills_tiles(P, N):
        return f'it would pad P={P} or N={N}; name it to have it do so'
    return None


def _gpu_unsupported(device, call):
    reason = _computes_in_float32(device, call) or _has_other_chunks(call, gpu.CHUNK)
    if reason:
        return reason
    *_, P, _, N = call.shape
    if call.dtype != 'bfloat16':
        return f"x is {call.dtype}, but it is for bfloat16; cast x, b and c with astype or use implementation='xla'"
    if P % gpu.WIDTH or N not in gpu.STATES:
        served = ' or '.join(map(str, gpu.STATES))
        return f"P={P} and N={N}, but it is for P a multiple of {gpu.WIDTH} and N of {served}; use implementation='xla'"
    # Blackwell has other matrix instructions than Hopper, which the kernels are made of.
    return dispatch.not_hopper(device)


def _log_line(device, call, chosen, passed_over):
    B, L, H, P, G, N = call.shape
    first = 'the fused kernel' if device.backend in OPERATOR.order else f'no kernel for {device.backend}'
    return (f'rotary_ssd on {device.kind}, {call.dtype} B={B} L={L} H={H} P={P} G={G} N={N}: {chosen}, '
            f'{passed_over or first}')  # fmt: skip


# On TPU the kernel: its lower bound by the compiler's static profile (`python -m pallas_kernels.bench
# --target=v5p`) is 10 to 20 times below that of the XLA form on v4, v5e, v5p and v6e, and 7 times
# forward on tpu7x, where backward was not compared.
# On Hopper the kernel wherever it serves: 4 to 9 times faster on one H200 than XLA's form at the
# shapes of `python -m pallas_kernels.bench --target=gpu`.
OPERATOR = dispatch.Operator(
    implementations={
        'reference': dispatch.Implementation(_run_reference),
        'xla': dispatch.Implementation(_run_xla, _computes_in_float32),
        'mosaic_tpu': dispatch.Implementation(_run_tpu, _tpu_unsupported, _tpu_unwanted),
        'mosaic_gpu': dispatch.Implementation(_run_gpu, _gpu_unsupported),
    },
    order={'tpu': ('mosaic_tpu',), 'gpu': ('mosaic_gpu',)},
    everywhere=('xla',),
    log_line=_log_line,
)
IMPLEMENTATIONS = tuple(OPERATOR.implementations)


def _check_interpreter(implementation, interpret, kind):
    if not isinstance(interpret, bool | kind):
        raise dispatch.UnsupportedError(
            f'implementation={implementation!r} cannot be interpreted with interpret={type(interpret).__name__}; '
            f'use True or {kind.__name__}'
        )


def _gpu_interpreter(interpret):
    """Parameters of the GPU interpreter. Raises where it would hang: each warpgroup blocks a thread of JAX's CPU client."""
    needed = 8  # 4 warpgroups of one device, the program that launches them, and room
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    threads = max(int(os.environ.get('NPROC') or cores), jax.local_device_count())
    if jax.default_backend() == 'cpu' and threads < needed:
        raise dispatch.UnsupportedError(
            f"implementation='mosaic_gpu' cannot be interpreted here: JAX's CPU client has {threads} threads and its "
            f'warpgroups need {needed}; set the environment variable NPROC={needed} before jax starts'
        )
    return plgpu.InterpretGPUParams() if interpret is True else interpret


# --- checks: shapes and dtypes only, so that they run before lowering ------------------------


def _check_sequence(x, dt, a, b, rope, segment_ids, chunk_size, suffix=''):
    _check_rank('x' + suffix, x, 4, '[B, L, H, P]')
    _check_rank('b' + suffix, b, 4, '[B, L, G, N]')
    (B, L, H, P), (G, N) = x.shape, b.shape[2:]
    if x.dtype not in (jnp.bfloat16, jnp.float32, jnp.float64):
        raise ValueError(f'x{suffix}: dtype {x.dtype} must be bfloat16 or float32; cast it with astype')
    if L < 1:
        raise ValueError(f'x{suffix}: shape {x.shape} has length 0; L must be at least 1')
    if P < 16 or P % 16:
        raise ValueError(f'x{suffix}: head width P={P} must be a multiple of 16; try {-(-max(P, 1) // 16) * 16}')
    if N < 16 or N % 16:
        raise ValueError(f'b{suffix}: state width N={N} must be a multiple of 16; try {-(-max(N, 1) // 16) * 16}')
    if G < 1 or H % G:
        divisors = [g for g in range(1, H + 1) if H % g == 0]
        raise ValueError(f'b{suffix}: G={G} groups must divide H={H} heads of x{suffix}; try one of {divisors}')
    _check_shape('b' + suffix, b, (B, L, G, N), '[B, L, G, N] with B and L of x')
    _check_dtype('b' + suffix, b, x.dtype)
    _check_shape('dt' + suffix, dt, (B, L, H), '[B, L, H] of x')
    _check_shape('a', a, (H,), '[H] of x')
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    _check_dtype('dt' + suffix, dt, wide)
    _check_dtype('a', a, wide)
    if rope is not None:
        _check_rope('rope', rope, ((L, N // 2), (B, L, N // 2)), '[L, N/2] or [B, L, N/2]', wide)
    if segment_ids is not None:
        _check_shape('segment_ids', segment_ids, (B, L), '[B, L] of x')
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise ValueError(f'segment_ids: dtype {segment_ids.dtype} must be an integer type; use int32')
    if chunk_size is not None and not (16 <= chunk_size <= xla.MAX_CHUNK and chunk_size % 16 == 0):
        raise ValueError(f'chunk_size={chunk_size} must be a multiple of 16 from 16 to {xla.MAX_CHUNK}; try 128')


def _check_rank(name, v, rank, meaning):
    if len(v.shape) != rank:
        raise ValueError(f'{name}: shape {tuple(v.shape)} must have the {rank} dimensions {meaning}')


def _check_shape(name, v, shape, meaning):
    if tuple(v.shape) != tuple(shape):
        raise ValueError(f'{name}: shape {tuple(v.shape)} must be {tuple(shape)}, {meaning}')


def _check_dtype(name, v, dtype):
    if v.dtype != dtype:
        raise ValueError(f'{name}: dtype {v.dtype} must be {jnp.dtype(dtype)}; cast it with astype')


def _check_like(name, v, other_name, other):
    if v.shape != other.shape or v.dtype != other.dtype:
        raise ValueError(
            f'{name}: {v.dtype}{list(v.shape)} must have shape and dtype of '
            f'{other_name}, {other.dtype}{list(other.shape)}'
        )


def _check_rope(name, rope, shapes, meaning, dtype=jnp.float32):
    if not isinstance(rope, (tuple, list)) or len(rope) != 2:
        raise ValueError(f'{name}: must be None or a pair (cos, sin), got {type(rope).__name__}')
    for half, table in zip(('cos', 'sin'), rope):
        if tuple(table.shape) not in shapes:
            raise ValueError(f'{name} {half}: shape {tuple(table.shape)} must be {meaning}: one of {shapes}')
        _check_dtype(f'{name} {half}', table, dtype)
    if rope[0].shape != rope[1].shape:
        raise ValueError(f'{name}: cos {rope[0].shape} and sin {rope[1].shape} must have one shape')
    return tuple(rope)
