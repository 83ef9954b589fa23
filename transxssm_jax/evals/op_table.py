"""Where the time of a compiled program goes, op by op, from a trace of the profiler."""

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable

import jax

from transxssm_jax.evals import run_report

_CALLERS = re.compile(r'(while|call|conditional)(?![a-z-])')  # whose own ops are counted
_PRODUCT = re.compile(r'nvjet|gemm|cutlass|xmma|cublas|^(dot|convolution)(?![a-z])', re.IGNORECASE)
_COLLECTIVE = re.compile(r'nccl|all-?reduce|all-?gather|reduce-?scatter|all-?to-?all|collective|permute', re.IGNORECASE)


def measure(call: Callable, calls: int) -> list[dict]:
    """Traces calls of a function that has been called before.

    Args:
      call: returns arrays of the device, which are waited for at the end.
      calls: how many.

    Returns:
      For each op of one device, those of one name and other numbers together: 'op'; 'kind', of 'product', 'collective' and
      'other'; 'count' and 'ms' of one call; the longest first. Times add up to more than a call takes where ops run side by
      side. While it is traced, XLA launches op by op what a GPU otherwise runs as command buffers, so that a trace shows
      waits of the host which a run need not have.
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(calls):
                last = call()
            jax.block_until_ready(last)
        [trace] = pathlib.Path(directory).rglob('*.xplane.pb')
        return _rows(jax.profiler.ProfileData.from_file(str(trace)), calls)


def markdown(rows: list[dict], ms: float) -> str:
    """A table of the rows beside the median time of a call, and the sums by kind."""
    total = sum(row['ms'] for row in rows)
    by_kind = collections.Counter()
    for row in rows:
        by_kind[row['kind']] += row['ms']
    sums = ', '.join(f'{kind} {value:.2f}' for kind, value in by_kind.most_common())
    table = run_report.markdown(
        ['op', 'kind', 'count', 'ms', '% of all'],
        [[r['op'], r['kind'], f'{r["count"]:,.4g}', f'{r["ms"]:.3f}', f'{100 * r["ms"] / total:.1f}'] for r in rows],
    )
    return f'A call takes {ms:.2f} ms; its ops add up to {total:.2f}: {sums}.\n\n{table}\n'


def _rows(profile, calls: int) -> list[dict]:
    time_of, count_of = collections.Counter(), collections.Counter()
    for name, nanoseconds in _events(profile):
        name = name.partition(' = ')[0].removeprefix('%')  # a TPU has the whole instruction as an op's name
        if _CALLERS.match(name):
            continue
        op = re.sub(r'[._]\d+(?![^._])', '', name)  # of an HLO op its number, but of a kernel no sizes: 128x256
        time_of[op] += nanoseconds
        count_of[op] += 1
    return [
        {'op': op, 'kind': _kind(op), 'count': count_of[op] / calls, 'ms': nanoseconds / calls / 1e6}
        for op, nanoseconds in time_of.most_common()
    ]


def _events(profile):
    """(name, nanoseconds) of what the first device of this process ran."""
    planes = {plane.name: plane for plane in profile.planes}
    for device in ('/device:GPU:0', '/device:TPU:0'):
        if device in planes:
            # A GPU has a line for each stream; a TPU one of its ops, beside those of steps and modules.
            for line in planes[device].lines:
                if line.name.startswith('Stream') or line.name == 'XLA Ops':
                    yield from ((event.name, event.duration_ns) for event in line.events)
            return
    for line in planes['/host:CPU'].lines:
        for event in line.events:
            stats = dict(event.stats)
            if 'hlo_op' in stats and int(stats.get('device_ordinal', 0)) == 0:
                yield event.name, event.duration_ns


def _kind(op: str) -> str:
    return 'product' if _PRODUCT.search(op) else 'collective' if _COLLECTIVE.search(op) else 'other'
