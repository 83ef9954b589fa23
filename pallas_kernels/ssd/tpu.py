"""The rotary scan as Pallas Mosaic kernels for TPU: geometry of the grid, layout, gradients.

Legend: B batch, L length, H heads, G groups, R heads per group, P head width, N state width,
C chunks, Q chunk length, W blocks of heads (a grid step computes one), T = N / 2.
"""

import functools
import typing

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import in_32_bits
from pallas_kernels.platforms import only_on_tpu_p, shape_like
from pallas_kernels.ssd import tpu_backward, tpu_chunk, tpu_forward
from pallas_kernels.ssd.residuals import STATES_NAME
from pallas_kernels.ssd.tpu_chunk import LANES

CHUNK = 128  # one row of the lanes; with P = 64 two blocks of positions


class Plan(typing.NamedTuple):
    """How the kernels cut their work. Static under jit."""

    chunk: int = CHUNK  # Q
    heads: int = 32  # per grid step, at most
    vmem_limit: int = 0  # bytes; 0: the compiler's own


# The tuning table: most heads per grid step, where a group has fewer than 4 heads, and where it has
# 4 or more. Many heads hide the chain of small operations that every chunk begins with: on v5e,
# cycles of a backward step for 8, 16 and 32 heads 4,740, 7,400 and 13,000. The limit is VMEM:
# scores and rotated b and c are held once per group. The backward kernel takes up to 18 MiB at 32
# heads and 8 groups, which is more than the compiler grants unasked on v5e and v5p (16 MiB of 128
# and of 64), and than v4 has at all.
HEADS = {'v4': (16, 16), 'v5e': (16, 32), 'v5p': (16, 32), 'v6e': (16, 32), '7x': (16, 32)}
TWO_CORES = ('v4', 'v5p')  # two cores are one device, which shards the grid over rows or blocks of heads
FALLBACK_HEADS = (16, 16)  # fits the least VMEM of the table
VMEM_LIMIT = {'v5e': 32 << 20, 'v5p': 32 << 20, 'v6e': 32 << 20, '7x': 32 << 20}


def generation() -> str:
    """The TPU generation that the trace is for, as `pltpu.get_tpu_info` names it; '' where it is unknown.

    On a host without a TPU it is known under an abstract mesh of TPU devices, as in a shard_map
    over a topology.
    """
    try:
        return pltpu.get_tpu_info().chip_version.value
    except ValueError:
        return ''


def default_plan(generation: str, shape: tuple[int, ...]) -> Plan:
    """From the table above, for shape (B, L, H, P, G, N); FALLBACK_HEADS for a generation that is not in it.

    The table is for P = 64 and N = 128. A head of P = 128 counts as two. With N = 256 a quarter of
    the heads is taken: half of them would need 16.6 MiB in the backward kernel on v5e.
    """
    B, _, H, P, G, N = shape
    few, many = HEADS.get(generation, FALLBACK_HEADS)
    wider = min(_tile_width(P), LANES) // 64 * (-(-N // LANES)) ** 2
    heads = (few if H // G < 4 else many) // wider
    if generation in TWO_CORES and B == 1:
        heads = min(heads, H // 2)  # a block of heads for each core
    return Plan(heads=max(heads, tpu_chunk.SUBLANES), vmem_limit=VMEM_LIMIT.get(generation, 0))


def fills_tiles(P: int, N: int) -> bool:
    """Whether heads and states of these widths need no padding."""
    return (P == 64 or P % LANES == 0) and N % LANES == 0


class _Call(typing.NamedTuple):
    """The static properties of a call, after padding."""

    g: tpu_chunk.Geometry
    B: int
    H: int
    G: int
    R: int
    interpret: object
    vmem_limit: int

    @property
    def W(self):
        return self.H // self.g.H

    @property
    def C(self):
        return -(-self.g.L // self.g.Q)


def scan_chunks(plan, x_BLHP, dt_BLH, a_H, b_BLGN, c_BLGN, rope, run_BL, state_BHPN, interpret=False):
    """y and final state; arguments and results as `reference.scan_tokens`, x float32 or bfloat16.

    Widths and head counts that do not fill the kernel's tiles are padded, at the cost of a copy:
    P to 64 or to a multiple of 128, N to a multiple of 128, H to whole tiles of 128 lanes.
    """
    B, L, H, P = x_BLHP.shape
    N = b_BLGN.shape[-1]
    x, dt, a, b, c, rope, state, R = _fill_tiles(x_BLHP, dt_BLH, a_H, b_BLGN, c_BLGN, rope, state_BHPN)
    Q = plan.chunk
    short = max(0, Q - L)
    if short:  # a block may overhang the array, but not be longer
        x, dt, b, c, rope, run_BL = jax.tree.map(
            lambda v: jnp.pad(v, ((0, 0), (0, short)) + ((0, 0),) * (v.ndim - 2)), (x, dt, b, c, rope, run_BL)
        )
    heads, width = x.shape[2:]
    groups, states = b.shape[2:]
    g = tpu_chunk.Geometry(
        Q=Q,
        H=_heads_of_a_step(heads, R, width, plan.heads),
        R=R,
        P=width,
        N=states,
        L=L,
        exact=x.dtype == jnp.float32,
        interpret=bool(interpret),
        rotated=rope is not None,
        segmented=run_BL is not None,
    )
    call = _Call(g, B, heads, groups, R, interpret, plan.vmem_limit)
    # dt and the table with positions in lanes: XLA keeps arrays with a narrow last axis like this.
    y, final = _scan(
        call,
        x.reshape(*x.shape[:2], -1),
        jnp.swapaxes(dt, 1, 2),
        a,
        b.reshape(*b.shape[:2], -1),
        None if c is None else c.reshape(*c.shape[:2], -1),
        None if rope is None else tuple(jnp.swapaxes(t, 1, 2) for t in rope),
        _runs_by_chunk(run_BL, L, Q),
        state.reshape(B, -1, states),
    )
    if y is not None:
        y = y[:, :L].reshape(B, L, -1)
        y = y.reshape(B, L, -1, _tile_width(P))[:, :, :H, :P] if P <= LANES else y.reshape(B, L, H, -1)[..., :P]
    final = final.reshape(B, -1, _tile_width(P), states)[:, :H, :P]
    return y, _halves(final, states // 2, N // 2)


def _tile_width(P):
    return 64 if P <= 64 else -(-P // LANES) * LANES


def _halves(v, old, new):
    """Each half of the last axis, old wide, cut or padded with zeros to new."""
    if old == new:
        return v
    v = v.reshape(*v.shape[:-1], 2, old)
    v = v[..., :new] if new < old else jnp.pad(v, ((0, 0),) * (v.ndim - 1) + ((0, new - old),))
    return v.reshape(*v.shape[:-2], 2 * new)


def _fill_tiles(x, dt, a, b, c, rope, state):
    B, L, H, P = x.shape
    G, N = b.shape[2:]
    R = H // G
    half, wide_half = N // 2, -(-N // LANES) * LANES // 2
    b, state = _halves(b, half, wide_half), _halves(state, half, wide_half)
    c = None if c is None else _halves(c, half, wide_half)
    if rope is not None and half != wide_half:
        rope = tuple(jnp.pad(t, ((0, 0), (0, 0), (0, wide_half - half))) for t in rope)
    width = _tile_width(P)
    if width != P:
        x = jnp.pad(x, ((0, 0),) * 3 + ((0, width - P),))
        state = jnp.pad(state, ((0, 0),) * 2 + ((0, width - P), (0, 0)))
    if width > LANES:  # as several heads with one dt
        split = width // LANES
        x, state = x.reshape(B, L, H * split, LANES), state.reshape(B, H * split, LANES, 2 * wide_half)
        dt, a, R, H, width = jnp.repeat(dt, split, axis=2), jnp.repeat(a, split), R * split, H * split, LANES
    rest = -H % (LANES // width)
    if rest:
        x, dt = (jnp.pad(v, ((0, 0), (0, 0), (0, rest)) + ((0, 0),) * (v.ndim - 3)) for v in (x, dt))
        a, state = jnp.pad(a, (0, rest), constant_values=-1.0), jnp.pad(state, ((0, 0), (0, rest), (0, 0), (0, 0)))
        missing = -(-(H + rest) // R) - G
        b, c = (v if v is None else jnp.pad(v, ((0, 0), (0, 0), (0, missing), (0, 0))) for v in (b, c))
    return x, dt, a, b, c, rope, state, R


def _heads_of_a_step(H, R, P, most):
    """The largest number of heads, at most `most`, that divides H into blocks of whole tiles and groups."""

    def fits(h):
        return (
            H % h == 0 and h * P % LANES == 0 and (h % R == 0 or R % h == 0) and (h % tpu_chunk.SUBLANES == 0 or h == H)
        )

    return max((h for h in range(1, min(most, H) + 1) if fits(h)), default=H)


def _runs_by_chunk(run_BL, L, Q):
    """[B, C, 2, Q]: the run of each token, and of the token before it. Padding continues the last run."""
    if run_BL is None:
        return None
    run_BL = run_BL[:, :L]
    run_BL = jnp.pad(run_BL, ((0, 0), (0, -L % Q)), mode='edge')
    before_BL = jnp.concatenate([run_BL[:, :1], run_BL[:, :-1]], axis=1)
    return jnp.stack([v.reshape(v.shape[0], -1, Q) for v in (run_BL, before_BL)], axis=2)


# --- kernel calls -------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(call, x, dt, a, b, c, rope, runs, state):
    y, final, _ = _forward(call, x, dt, a, b, c, rope, runs, state, with_states=False)
    return y, final


def _scan_fwd(call, x, dt, a, b, c, rope, runs, state):
    y, final, states = _forward(call, x, dt, a, b, c, rope, runs, state, with_states=True)
    return (y, final), (x, dt, a, b, c, rope, runs, checkpoint_name(states, STATES_NAME))


def _scan_bwd(call, residuals, cotangents):
    return _backward(call, *residuals, *cotangents)


_scan.defvjp(_scan_fwd, _scan_bwd)


class _Specs:
    """Block specifications, named by what a block holds. `at`: the grid's last index -> a chunk."""

    def __init__(self, call, at):
        g, Q = call.g, call.g.Q
        heads = g.H * g.P
        if g.H % g.R == 0:

            def group(w):
                return w
        else:

            def group(w):
                return w * g.H // g.R

        self.heads = pl.BlockSpec((1, Q, heads), lambda b, w, c: (b, at(c), w))
        self.groups = pl.BlockSpec((1, Q, g.G * g.N), lambda b, w, c: (b, at(c), group(w)))
        self.steps = pl.BlockSpec((1, g.H, Q), lambda b, w, c: (b, w, at(c)))
        self.table = pl.BlockSpec((1, g.N // 2, Q), lambda b, w, c: (b, 0, at(c)))
        self.shared_table = pl.BlockSpec((1, g.N // 2, Q), lambda b, w, c: (0, 0, at(c)))
        self.runs = pl.BlockSpec((1, 1, 2, Q), lambda b, w, c: (b, at(c), 0, 0))
        self.states = pl.BlockSpec((1, 1, g.N, heads), lambda b, w, c: (b, at(c), 0, w))
        self.state = pl.BlockSpec((1, heads, g.N), lambda b, w, c: (b, w, 0))
        self.rates = pl.BlockSpec((1, g.H, 1), lambda b, w, c: (w, 0, 0))
        self.rate_sums = pl.BlockSpec((1, 1, g.H, 1), lambda b, w, c: (b, w, 0, 0))


def _call(call, kernel, name, steps, inputs, outputs, scratch):
    """inputs: name -> (array, spec); outputs: name -> (shape, dtype, spec). Returns name -> array."""
    example = inputs['x'][0]
    if not call.interpret:
        inputs = inputs | {'x': (only_on_tpu_p.bind(example), inputs['x'][1])}
    shapes = [shape_like(example, shape, dtype) for shape, dtype, _ in outputs.values()]
    names = (*inputs, *outputs, *scratch)
    run = pl.pallas_call(
        functools.partial(kernel, names),
        grid=(call.B, call.W, steps),
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for *_, spec in outputs.values()],
        out_shape=shapes,
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'parallel', 'arbitrary'), vmem_limit_bytes=call.vmem_limit or None
        ),
        interpret=call.interpret,
        name=name,
    )
    results = in_32_bits(run)(*(array for array, _ in inputs.values()))
    return dict(zip(outputs, results, strict=True))


def _common_inputs(call, specs, x, dt, a, b, c, rope, runs, ahead):
    """ahead: specs of the inputs that a step reads one chunk before it reads x, see tpu_forward.py."""
    inputs = {'x': (x, specs.heads), 'dt': (dt, ahead.steps), 'a': (a.reshape(call.W, call.g.H, 1), ahead.rates)}
    inputs['b_in'] = (b, ahead.groups)
    if c is not None:
        inputs['c_in'] = (c, ahead.groups)
    if rope is not None:
        spec = ahead.table if rope[0].shape[0] > 1 else ahead.shared_table
        inputs |= {'cos': (rope[0], spec), 'sin': (rope[1], spec)}
    if runs is not None:
        inputs['run'] = (runs, ahead.runs)
    return inputs


def _forward(call, x, dt, a, b, c, rope, runs, state, with_states):
    g = call.g
    specs = _Specs(call, lambda c: jnp.maximum(c - 1, 0))
    ahead = _Specs(call, lambda c: jnp.minimum(c, call.C - 1))
    inputs = _common_inputs(call, specs, x, dt, a, b, c, rope, runs, ahead) | {'initial': (state, specs.state)}
    outputs = {'final': (state.shape, jnp.float32, specs.state)}
    if c is not None:
        outputs['y'] = (x.shape, x.dtype, specs.heads)
    if with_states:
        outputs['states'] = ((call.B, call.C, g.N, call.H * g.P), x.dtype, specs.states)
    scratch = tpu_forward.scratch_shapes(g, x.dtype, c is not None)
    name = 'rotary_ssd_forward' if c is not None else 'rotary_ssd_state'
    kernel = functools.partial(tpu_forward.kernel, g)
    results = _call(call, kernel, name, call.C + 1, inputs, outputs, scratch)
    return results.get('y'), results['final'], results.get('states')


def _backward(call, x, dt, a, b, c, rope, runs, states, dy, dfinal):
    g = call.g
    specs = _Specs(call, lambda c: call.C - 1 - c)
    inputs = _common_inputs(call, specs, x, dt, a, b, c, rope, runs, specs)
    inputs |= {'states': (states, specs.states), 'dfinal': (dfinal, specs.state)}
    if dy is not None:
        inputs['dy'] = (dy, specs.heads)
    W, split = call.W, g.H < g.R  # several blocks of heads share a group: one db and dc each
    db_shape = b.shape[:2] + ((W if split else call.G) * g.N,)
    groups = pl.BlockSpec((1, g.Q, g.N), lambda b, w, c: (b, call.C - 1 - c, w)) if split else specs.groups
    outputs = {
        'dx': (x.shape, x.dtype, specs.heads),
        'ddt': (dt.shape, jnp.float32, specs.steps),
        'da': ((call.B, W, g.H, 1), jnp.float32, specs.rate_sums),
        'db': (db_shape, jnp.float32 if split else b.dtype, groups),
        'dinitial': (dfinal.shape, jnp.float32, specs.state),
    }
    if dy is not None:
        outputs['dc'] = (db_shape, outputs['db'][1], groups)
    scratch = tpu_backward.scratch_shapes(g, x.dtype, dy is not None)
    kernel = functools.partial(tpu_backward.kernel, g)
    r = _call(call, kernel, 'rotary_ssd_backward', call.C, inputs, outputs, scratch)
    if split:
        for name in ('db', 'dc'):
            if name in r:
                r[name] = (
                    jnp.sum(r[name].reshape(*b.shape[:2], call.G, -1, g.N), axis=3).reshape(b.shape).astype(b.dtype)
                )
    da = jnp.sum(r['da'], axis=0).reshape(a.shape)
    rope_gradient = None if rope is None else tuple(jnp.zeros_like(t) for t in rope)
    return r['dx'], r['ddt'], da, r['db'], r.get('dc'), rope_gradient, None, r['dinitial']
