"""The bench's table for a TPU that need not be attached, from the compiler's own dumps.

  python -m pallas_kernels.bench --target=v5p [--shapes=1p3b_g8] [--implementations=xla] [--all-kernels]

Columns: cycles of one step of the kernel's longest loop, and its steps on one core; the lower
bound of the time in ms and what sets it (core: cycles over clock; HBM: bytes over bandwidth);
busy share of the units' slots in that step (MXU: of the peak); vector registers spilled and
filled (instructions in the code); scoped VMEM in MiB; HBM MB, over the contract's least in the
rows of a sum. Those rows stand for the whole program; their MXU share is of all its cycles.

Directions: forward also writes the boundary states; backward starts from the inputs, these and
dy, so that the two add up to a training step; state is `rotary_ssd_state`. See tpu_profile.py
for what is counted and hlo.py for the bytes.

Legend: B batch, L length, H heads, G groups, P head width, N state width.
"""

import functools
import importlib.metadata

import jax
import jax.numpy as jnp

from pallas_kernels import tpu_profile
from pallas_kernels.bench_rows import Rows
from pallas_kernels.chips import TPUS
from pallas_kernels.ssd import rotary_ssd, rotary_ssd_state, rotary_ssd_step, xla

DIRECTIONS = ('forward', 'backward', 'state')
SHOWN = 0.05  # kernels below this share of the lower bound are summed up in one row
SHOWN_UNITS = ('MXU', 'XLU', 'VALU', 'EUP', 'VLOAD', 'VSTORE')


def scan_case(implementation, direction, B, L, H, P, N, G, dtype):
    """(f, args) for tpu_profile.profile: the scan of one shape in one direction, with rope."""

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    # Heads and widths share one axis, as the projections before and after the scan make them: with
    # four axes XLA would lay the entry parameters out with L in the lanes, and copy them.
    x, bc = array(B, L, H * P, dtype=dtype), array(B, L, G * N, dtype=dtype)
    inputs = (x, array(B, L, H), array(H), bc, bc)
    rope = (array(L, N // 2), array(L, N // 2))
    # The process compiles for a TPU but runs on a CPU, whose chunk the xla form would take.
    chunk = xla.default_plan('tpu', None).chunk if implementation == 'xla' else None

    def shaped(inputs):
        x, dt, a, b, c = inputs
        return x.reshape(B, L, H, P), dt, a, b.reshape(B, L, G, N), c.reshape(B, L, G, N)

    # As in training: the inputs and the boundary states are kept for the backward pass. Without
    # the policy, views of the inputs would be written as residuals of their own.
    keep_states = jax.checkpoint_policies.save_only_these_names(xla.STATES_NAME)

    @functools.partial(jax.checkpoint, policy=keep_states, prevent_cse=False)
    def scan(inputs, rope):
        y, _ = rotary_ssd(*shaped(inputs), rope, implementation=implementation, chunk_size=chunk)
        return y.reshape(B, L, H * P)

    def whole(inputs, rope):
        return jax.vjp(lambda v: scan(v, rope), inputs)

    def forward(inputs, rope):
        y, pull = whole(inputs, rope)
        given = jax.tree.leaves((inputs, rope))
        return y, [kept for kept in jax.tree.leaves(pull) if not any(kept is v for v in given)]

    if direction == 'forward':
        return forward, (inputs, rope)
    if direction == 'backward':
        y, pull = jax.eval_shape(whole, inputs, rope)
        return lambda pull, dy: pull(dy), (pull, y)

    def state(inputs, rope):
        return rotary_ssd_state(*shaped(inputs)[:-1], rope, implementation=implementation, chunk_size=chunk)

    return state, (inputs, rope)


def step_case(B, H, P, N, G, dtype):
    """(f, args): one step of decoding."""
    x, bc = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((B, H, P), (B, G, N)))
    state, dt, a, table = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((B, H, P, N), (B, H), (H,), (N // 2,)))
    return rotary_ssd_step, (state, x, dt, a, bc, bc, (table, table))


def least_bytes(s, direction, least_work):
    """Least HBM bytes of a direction; `least_work` is the bench's."""
    forward = least_work(s, 'forward')[0]
    if direction == 'forward':
        return forward
    if direction == 'backward':
        return least_work(s, 'forward+backward')[0] - forward
    size = jnp.dtype(s.dtype).itemsize
    return s.B * s.L * (s.H * (s.P * size + 4) + s.G * s.N * size) + 4 * s.B * s.H * (s.P * s.N + 1)


def rows_of(profile, least, all_kernels):
    """The kernels that matter, the others in one row, and the whole program in the last."""
    chip, seconds, whole = profile.chip, profile.seconds, profile.total_seconds
    ordered = sorted(profile.kernels, key=seconds, reverse=True)
    shown = [k for k in ordered if all_kernels or seconds(k) >= SHOWN * whole]
    others = ordered[len(shown) :]

    def row(name, kernels, seconds, **columns):
        return {
            'kernel': name,
            'ms': 1e3 * seconds,
            'spills': sum(k.spills for k in kernels),
            'fills': sum(k.fills for k in kernels),
            'hbm_mb': sum(k.hbm for k in kernels) / 1e6,
            **columns,
        }

    def limit(core_seconds, hbm_seconds):
        return 'HBM' if hbm_seconds > core_seconds else 'core'

    for k in shown:
        by = limit(k.cycles / chip.clock, k.hbm / chip.bandwidth)
        yield row(
            k.name, [k], seconds(k), cycles=k.step_cycles, steps=k.steps, by=by, busy=k.busy, vmem_mib=k.vmem / 2**20
        )
    if others:
        yield row(f'{len(others)} others', others, sum(seconds(k) for k in others if k.cycles))
    yield row(
        f'all {len(ordered)}',
        ordered,
        whole,
        by=limit(sum(k.cycles for k in ordered) / chip.clock, profile.hbm / chip.bandwidth),
        busy={'MXU': profile.mxu_share},
        vmem_mib=max(k.vmem for k in ordered) / 2**20,
        least=profile.hbm / least,
    )


def sum_of_directions(rows, labels):
    """A row for the forward and the backward direction together, where `rows` has both: what a training step takes."""
    directions = [r for r in rows if 'least' in r and r['direction'] in ('forward', 'backward')]
    if len(directions) == 2:
        total = {key: sum(r[key] for r in directions) for key in ('ms', 'spills', 'fills', 'hbm_mb')}
        least = sum(r['hbm_mb'] / r['least'] for r in directions)
        yield {**labels, 'direction': 'both', 'kernel': 'all', **total, 'least': total['hbm_mb'] / least}


def show(row):
    head = f'{row["shape"]:9} {row["implementation"]:14} {row["direction"]:9}'
    if 'failed' in row:
        return f'{head} failed: {row["failed"]}'

    def cell(value, form, width):
        return ' ' * width if value is None else f'{value:{width}{form}}'

    units = ' '.join(cell(row.get('busy', {}).get(unit), '.1%', 6) for unit in SHOWN_UNITS)
    return (
        f'{head} {row["kernel"]:28} {cell(row.get("cycles"), ".0f", 7)} {cell(row.get("steps"), "d", 7)} {row["ms"]:8.3f} '
        f'{row.get("by", ""):4} {units} {row["spills"]:6d} {row["fills"]:6d} {cell(row.get("vmem_mib"), ".1f", 5)} '
        f'{row["hbm_mb"]:8.1f} {cell(row.get("least"), ".2f", 6)}'
    ).rstrip()


def run(chip, shapes, implementations, directions, least_work, all_kernels, out):
    """Prints the table. shapes: name -> the bench's Shape; out: a JSON file for the rows, or ''."""
    device = TPUS[chip]
    versions = f'jax {jax.__version__}, libtpu {importlib.metadata.version("libtpu")}'
    print(
        f'{chip}, per device: {device.cores} core(s) of {device.clock / 1e9:.2f} GHz, {device.peak / 1e12:.0f} TFLOP/s, '
        f'{device.bandwidth / 1e9:.0f} GB/s, VMEM {device.vmem >> 20} MiB, {device.scoped_vmem >> 20} for a kernel '
        f'that asks for no more; {versions}'
    )
    units = ' '.join(f'{unit:>6}' for unit in SHOWN_UNITS)
    print(
        f'{"shape":9} {"implementation":14} {"direction":9} {"kernel":28} {"cycles":>7} {"steps":>7} {"ms":>8} by   '
        f'{units} {"spills":>6} {"fills":>6} {"VMEM":>5} {"HBM MB":>8} {"/least":>6}'
    )
    rows = Rows({'target': chip, 'versions': versions}, show, out)
    for name, s in shapes.items():
        step = ('step_case', s.B, s.H, s.P, s.N, s.G, s.dtype)
        for implementation in implementations if s.L > 1 else ['step']:
            labels, first = {'shape': name, 'implementation': implementation}, len(rows)
            for direction in directions if s.L > 1 else ['forward']:
                case, *arguments = ('scan_case', implementation, direction, *s) if s.L > 1 else step
                try:
                    profile = tpu_profile.profile(chip, f'{__name__}:{case}', *arguments)
                except RuntimeError as error:
                    rows.add({**labels, 'direction': direction, 'failed': str(error).splitlines()[0]})
                    continue
                for row in rows_of(profile, least_bytes(s, direction, least_work), all_kernels):
                    rows.add({**labels, 'direction': direction, **row})
            for row in sum_of_directions(rows[first:], labels):
                rows.add(row)
    return rows
