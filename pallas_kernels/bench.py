"""Times the kernels: one row for each implementation, shape and direction.

  python -m pallas_kernels.bench --target=gpu [--shapes=1p3b_g8,1p3b_g1] [--variants] [--output=bench.json]

Columns: median and spread of the time in ms; the least bytes and FLOPs of the contract over that
time, in GB/s and TFLOP/s, each with its share of the device's roofline; temporary memory; compile
seconds; the worst relative error of the outputs or gradients against float32 of the highest
precision, with its name. On a GPU, bench_peers.py adds other people's scans, where installed.

For a TPU that need not be attached, --target=v5p (v4, v5e, v6e, tpu7x) prints what the compiler's
own dumps show of each kernel; bench_tpu.py explains that table.

Times are medians over rounds of calls, after a warm-up. The calls of a round rotate over inputs, so
that none lies in cache from the call before, and follow each other without waiting, so that launches
are hidden.

Legend: B batch, L length, H heads, G groups, P head width, N state width.
"""

import argparse
import functools
import importlib.util
import statistics
import sys
import time
import typing

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import bench_peers, bench_tpu
from pallas_kernels.bench_rows import Rows
from pallas_kernels.chips import TPUS
from pallas_kernels.ssd import IMPLEMENTATIONS, rotary_ssd, rotary_ssd_step, xla


class Shape(typing.NamedTuple):
    B: int
    L: int
    H: int
    P: int
    N: int
    G: int
    dtype: str = 'bfloat16'


# The four shapes of the kernel contract first.
SHAPES = {
    '1p3b_g32': Shape(8, 4096, 32, 64, 128, 32),
    '1p3b_g8': Shape(8, 4096, 32, 64, 128, 8),
    '1p3b_g1': Shape(8, 4096, 32, 64, 128, 1),
    '1p3b_16k': Shape(2, 16384, 32, 64, 128, 8),
    '1p3b_128k': Shape(1, 131072, 32, 64, 128, 8),
    '320m': Shape(16, 4096, 12, 64, 128, 4),
    'decode': Shape(128, 1, 32, 64, 128, 8),
    'small': Shape(2, 1024, 4, 64, 128, 2),
}
DEFAULT_SHAPES = {
    'cpu': ('small',),
    'gpu': ('1p3b_g32', '1p3b_g8', '1p3b_g1', '1p3b_16k', '1p3b_128k', 'decode'),
    **dict.fromkeys(TPUS, ('1p3b_g8',)),
}
DEFAULT_IMPLEMENTATIONS = {
    'cpu': ('xla',), 'gpu': ('xla', 'mosaic_gpu', *bench_peers.PEERS), **dict.fromkeys(TPUS, ('xla', 'mosaic_tpu')),
}  # fmt: skip
BOUNDARY = 128  # tokens per boundary state, in the contract's least work
# Measured ceilings of one H200: bytes/s, FLOP/s. None known for CPU.
ROOFLINE = {'gpu': (4.3e12, 790e12)}
ROUND_MS, MOST_CALLS = 20, 30  # of a round
RESULTS = ('y', 'final_state')
GRADIENTS = ('dx', 'ddt', 'da', 'db', 'dc')


def least_work(s: Shape, direction: str) -> tuple[float, float]:
    """Least bytes and FLOPs of one call, `direction` 'forward' or 'forward+backward'.

    Bytes: every input once, every output once, and one boundary state in x's dtype for each
    BOUNDARY tokens (written forward, read backward). FLOPs: causal half of the chunk's squares.
    The decode step reads and writes the state.
    """
    size = jnp.dtype(s.dtype).itemsize
    tokens = s.B * s.L
    x, dt, bc = tokens * s.H * s.P * size, tokens * s.H * 4, 2 * tokens * s.G * s.N * size
    state = s.B * s.H * s.P * s.N
    if s.L == 1:
        return 2 * state * 4 + 2 * x + dt + bc, 5 * state
    boundaries = state * size * -(-s.L // BOUNDARY)
    half, wide = BOUNDARY, s.H * s.P  # 2 FLOPs per multiply-add, times Q / 2 sources
    forward = (2 * x + dt + bc + boundaries, tokens * (half * (s.G * s.N + wide) + 4 * wide * s.N))
    if direction == 'forward':
        return forward
    # reads x, dy, dt, b, c, boundaries; writes dx, ddt, db, dc
    backward_bytes = 3 * x + 2 * dt + 2 * bc + boundaries
    # scores, db, dc once per group; dy x^T, M^T dy once per head; four products with states
    backward_flops = tokens * (half * (3 * s.G * s.N + 2 * wide) + 4 * 2 * wide * s.N)
    return forward[0] + backward_bytes, forward[1] + backward_flops


def draw(s: Shape, seed: int):
    """(x, dt, a, b, c), rope, dy on the device, with Mamba-2's ranges of dt and a."""

    @jax.jit
    def make(key):
        k = jax.random.split(key, 6)
        normal = functools.partial(jax.random.normal, dtype=s.dtype)
        x, dy = normal(k[0], (s.B, s.L, s.H, s.P)), normal(k[1], (s.B, s.L, s.H, s.P))
        b, c = (normal(key, (s.B, s.L, s.G, s.N)) * s.N**-0.5 for key in k[2:4])
        dt = jnp.exp(jax.random.uniform(k[4], (s.B, s.L, s.H), minval=np.log(1e-3), maxval=np.log(1e-1)))
        a = -jax.random.uniform(k[5], (s.H,), minval=1.0, maxval=16.0)
        return (x, dt, a, b.astype(s.dtype), c.astype(s.dtype)), dy

    angles = np.arange(s.L)[:, None] * 10000.0 ** (-np.arange(s.N // 2) / (s.N // 2))
    rope = tuple(jnp.asarray(t, jnp.float32) for t in (np.cos(angles), np.sin(angles)))
    inputs, dy = make(jax.random.key(seed))
    return inputs, rope, dy


def candidates(names, variants: bool):
    """name -> f(inputs, rope) returning (y, final_state)."""

    def public(inputs, rope, **keywords):
        return rotary_ssd(*inputs, rope, **keywords)

    def planned(inputs, rope, plan):
        (x, *_, b, _) = inputs
        state = jnp.zeros((x.shape[0], *x.shape[2:], b.shape[-1]))
        return xla.scan_chunks(plan, *inputs, tuple(t[None] for t in rope), None, state)

    result = {name: functools.partial(public, implementation=name) for name in names}
    if variants:
        for chunk in (64, 128, 256):
            result[f'xla {chunk}'] = functools.partial(planned, plan=xla.Plan(chunk=chunk))
    return result


def directed(f, direction):
    """f as a function of (inputs, rope, dy) returning a dict of named arrays."""

    def run(inputs, rope, dy):
        if direction == 'forward':
            return dict(zip(RESULTS, f(inputs, rope)))
        y, pull = jax.vjp(lambda v: f(v, rope)[0], inputs)
        (gradients,) = pull(dy)
        return {'y': y, **dict(zip(GRADIENTS, gradients))}

    return run


def reference_values(s: Shape, direction, inputs, rope, dy):
    """Values in float32 of the highest precision, from the inputs cast to float32.

    Computed by 'reference', whose backward pass keeps one state per token, or by 'xla' where that
    is too much. Both are good enough to measure bfloat16's error (1e-3); the conformance suite
    judges both against an independent float64 oracle.
    """
    wide = tuple(v.astype(jnp.float32) for v in inputs)
    small = direction == 'forward' or s.B * s.L * s.H * s.P * s.N <= 2**27
    f = functools.partial(rotary_ssd, implementation='reference' if small else 'xla')
    return jax.jit(directed(lambda v, r: f(*v, r), direction))(wide, rope, dy.astype(jnp.float32))


def time_rounds(timed, seconds):
    """Milliseconds per call, of each round. timed(calls): milliseconds of a round; it has been warmed up."""
    calls = max(1, min(MOST_CALLS, round(ROUND_MS / timed(1))))
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
        times.append(timed(calls) / calls)
    return times


def timed_calls(call, sets):
    """For `time_rounds`: JAX calls over rotating input sets, by the host's clock."""
    for inputs in sets:
        jax.block_until_ready(call(*inputs))

    def timed(calls):
        start = time.perf_counter()
        for i in range(calls):
            out = call(*sets[i % len(sets)])
        jax.block_until_ready(out)
        return 1e3 * (time.perf_counter() - start)

    return timed


@jax.jit
def _relative_errors(out, ref):
    def error(o, r):
        r = r.astype(jnp.float32)
        return jnp.linalg.norm((o.astype(jnp.float32) - r).ravel()) / jnp.linalg.norm(r.ravel())

    return {name: error(out[name], ref[name]) for name in out}


def measured(labels, prepare, target, seconds, ref, expected=Exception):
    """A row: the labels, and what was measured, or in 'failed' why it was not.

    Args:
      labels: 'shape', 'implementation' and 'direction'.
      prepare: () -> (timed, results, columns): for `time_rounds`; () -> the results by name; further columns.
      target: of the bench.
      seconds: measuring time.
      ref: what the results are compared with.
      expected: errors that cost the row and not the table.
    """
    try:
        timed, results, columns = prepare()
        return finish(labels | columns, target, time_rounds(timed, seconds), results(), ref)
    except expected as error:
        name = '' if isinstance(error, OWN_ERRORS) else f'{type(error).__name__}: '
        return {**labels, 'failed': f'{name}{error}'.splitlines()[0][:80]}


OWN_ERRORS = (NotImplementedError, jax.errors.JaxRuntimeError)  # of an implementation that does not serve


def measure(labels, f, target, seconds, sets, ref):
    """The row of one of our implementations, f(inputs, rope)."""

    def prepare():
        start = time.perf_counter()
        call = jax.jit(directed(f, labels['direction'])).lower(*sets[0]).compile()
        columns = {
            'compile_s': time.perf_counter() - start,
            'temp_mb': call.memory_analysis().temp_size_in_bytes / 1e6,
        }
        return timed_calls(call, sets), lambda: call(*sets[0]), columns

    return measured(labels, prepare, target, seconds, ref, OWN_ERRORS)


def measure_peer(labels, target, seconds, sets, ref):
    """The row of a peer; whatever its error is, it is theirs, and the rest of the table is wanted."""
    name = labels['implementation']
    if reason := bench_peers.missing(name):
        return {**labels, 'failed': reason}

    def prepare():
        return *bench_peers.prepare(name, labels['direction'], sets, RESULTS, GRADIENTS), {}

    return measured(labels, prepare, target, seconds, ref)


def finish(row, target, times, out, ref):
    """Returns the row with the times, the rates of the least work, and the errors."""
    ms = statistics.median(times)
    least_bytes, flops = least_work(SHAPES[row['shape']], row['direction'])
    row = row | {'ms': ms, 'spread_ms': float(np.subtract(*np.percentile(times, (90, 10))))}
    row |= {'gb_s': least_bytes / ms / 1e6, 'tflop_s': flops / ms / 1e9}
    if target in ROOFLINE:
        bandwidth, peak = ROOFLINE[target]
        row |= {'of_bandwidth': 1e9 * row['gb_s'] / bandwidth, 'of_peak': 1e12 * row['tflop_s'] / peak}
    errors = {k: float(v) for k, v in _relative_errors(out, ref).items()}
    row['worst'] = max(errors, key=errors.get)
    row['error'] = errors[row['worst']]
    return row


def measure_decode(shape_name, target, seconds):
    s = SHAPES[shape_name]

    def prepare(seed):
        (x, dt, a, b, c), (cos, sin), _ = draw(s, seed)
        state = jax.random.normal(jax.random.key(seed), (s.B, s.H, s.P, s.N))
        return state, (x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], (cos[0], sin[0]))

    call = jax.jit(lambda state, token: rotary_ssd_step(state, *token), donate_argnums=0)
    states, tokens = map(list, zip(*(prepare(seed) for seed in range(3))))
    state, y = call(jnp.copy(states[0]), tokens[0])
    wide = [jax.tree.map(lambda v: v.astype(jnp.float32), v) for v in (states[0], tokens[0])]
    out, ref = dict(zip(RESULTS, (y, state))), dict(zip(RESULTS, call(*wide)[::-1]))
    states = [jax.random.normal(jax.random.key(i), state.shape) for i in range(3)]

    def timed(calls):
        start = time.perf_counter()
        for i in range(calls):  # each state goes from step to step
            states[i % 3], _ = call(states[i % 3], tokens[i % 3])
        jax.block_until_ready(states)
        return 1e3 * (time.perf_counter() - start)

    timed(3)
    row = {'shape': shape_name, 'implementation': 'step', 'direction': 'forward'}
    return finish(row, target, time_rounds(timed, seconds), out, ref)


def show(row):
    head = f'{row["shape"]:10} {row["implementation"]:26} {row["direction"]:16}'
    if 'failed' in row:
        return f'{head} failed: {row["failed"]}'
    of_bandwidth, of_peak = (f'{row[name]:5.1%}' if name in row else '    -' for name in ('of_bandwidth', 'of_peak'))
    temp_mb, compile_s = (
        f'{row[name]:8.{n}f}' if name in row else '       -' for name, n in (('temp_mb', 0), ('compile_s', 1))
    )
    return (
        f'{head} {row["ms"]:9.3f} {row["spread_ms"]:8.3f} {row["gb_s"]:7.0f} {of_bandwidth} {row["tflop_s"]:8.2f} {of_peak} '
        f'{temp_mb} {compile_s}  {row["error"]:.1e} {row["worst"]}'
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--target', choices=sorted(DEFAULT_SHAPES), required=True)
    parser.add_argument('--shapes', default='', help=f'comma-separated, of {", ".join(SHAPES)}')
    parser.add_argument(
        '--implementations',
        default='',
        help=f'comma-separated, of {", ".join((*IMPLEMENTATIONS, *bench_peers.PEERS))}; those of the target',
    )
    parser.add_argument(
        '--directions',
        default='',
        help='comma-separated, of forward, forward+backward; for a TPU of ' + ', '.join(bench_tpu.DIRECTIONS),
    )
    parser.add_argument('--all-kernels', action='store_true', help='for a TPU: a row for every kernel')
    parser.add_argument('--variants', action='store_true', help="sweep the chunk size of 'xla'")
    parser.add_argument('--seconds', type=float, default=1.0, help='measuring time per row')
    parser.add_argument('--output', default='', help='also write the rows to this JSON file, after every row')
    flags = parser.parse_args(argv)

    names = [n for n in flags.shapes.split(',') if n] or DEFAULT_SHAPES[flags.target]
    tpu = flags.target in TPUS
    implementations = [n for n in flags.implementations.split(',') if n] or DEFAULT_IMPLEMENTATIONS[flags.target]
    known = (*IMPLEMENTATIONS, *(bench_peers.PEERS if flags.target == 'gpu' else ()))
    known_directions = bench_tpu.DIRECTIONS if tpu else ('forward', 'forward+backward')
    directions = [n for n in flags.directions.split(',') if n] or known_directions[:2]
    for given, names_known in ((names, SHAPES), (implementations, known), (directions, known_directions)):
        for name in given:
            if name not in names_known:
                parser.error(f'{name!r} is unknown; use one of {", ".join(names_known)}')
    if tpu:
        if importlib.util.find_spec('libtpu') is None:
            parser.error(f'--target={flags.target} needs the TPU compiler: pip install jax[tpu]')
        shapes = {name: SHAPES[name] for name in names}
        bench_tpu.run(flags.target, shapes, implementations, directions, least_work, flags.all_kernels, flags.output)
        return
    if jax.default_backend() != flags.target:
        parser.error(
            f'--target={flags.target}, but JAX runs on {jax.default_backend()}; set JAX_PLATFORMS or the target'
        )

    print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}')
    print(
        f'{"shape":10} {"implementation":26} {"direction":16} {"ms":>9} {"p90-p10":>8} {"GB/s":>7} {"of it":>5} {"TFLOP/s":>8} '
        f'{"of it":>5} {"temp MB":>8} {"compile":>8}  error'
    )
    rows = Rows({'device': jax.devices()[0].device_kind, 'jax': jax.__version__}, show, flags.output)
    for shape_name in names:
        if SHAPES[shape_name].L == 1:
            rows.add(measure_decode(shape_name, flags.target, flags.seconds))
            continue
        sets = [draw(SHAPES[shape_name], seed) for seed in range(3)]
        for direction in directions:
            ref = reference_values(SHAPES[shape_name], direction, *sets[0])
            common = (flags.target, flags.seconds, sets, ref)

            def labels(name, shape_name=shape_name, direction=direction):
                return {'shape': shape_name, 'implementation': name, 'direction': direction}

            own = [name for name in implementations if name in IMPLEMENTATIONS]
            for name, f in candidates(own, flags.variants).items():
                rows.add(measure(labels(name), f, *common))
            for name in implementations:
                if name in bench_peers.PEERS:
                    rows.add(measure_peer(labels(name), *common))


if __name__ == '__main__':
    sys.exit(main())
