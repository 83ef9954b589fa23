"""What a compiled step sends between devices and runs: every collective with its bytes and how often it runs, and kernels.

Reads the text of an optimised HLO module (`compiled.as_text()`), of any backend, by `pallas_kernels.hlo`. Bytes are
those of one device; collectives count arrays without the padding of their tiles.
"""

import math
import re
import typing

import numpy as np

from pallas_kernels import hlo
from pallas_kernels.hlo import COLLECTIVES, Computations, Op


class Collective(typing.NamedTuple):
    """One collective of the program.

    Attributes:
      kind: one of `hlo.COLLECTIVES`.
      arrays: (dtype, dims) of each operand, as one device holds it.
      groups: [groups, size] indices of the devices that communicate; of a permute [pairs, (source, target)].
      runs: how often it runs in a step; the trips of every loop around it, multiplied.
      source: the operation of the model it came from, as JAX names it; '' where the compiler does not record it.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    groups: np.ndarray
    runs: int
    source: str

    @property
    def operand_bytes(self) -> int:
        return sum(hlo.array_bytes(dtype, dims) for dtype, dims in self.arrays)

    @property
    def comm_bytes(self) -> float:
        """Bytes that a device sends in one run; the least that any algorithm of the kind can do."""
        n = self.groups.shape[1]
        factors = {
            'all-gather': n - 1,
            'all-reduce': 2 * (n - 1) / n,
            'reduce-scatter': (n - 1) / n,
            'all-to-all': (n - 1) / n,
            'collective-permute': 1,
        }
        return self.operand_bytes * factors[self.kind]

    def axes(self, sizes: dict[str, int]) -> tuple[str, ...]:
        """Mesh axes it runs along; sizes: of the mesh's axes, in order."""
        coordinates = np.stack(np.unravel_index(self.groups, tuple(sizes.values())))  # [axis, group, member]
        along = np.any(coordinates != coordinates[:, :, :1], axis=(1, 2))
        return tuple(name for name, moves in zip(sizes, along) if moves)


def collectives(computations: Computations) -> list[Collective]:
    """Every collective of a module that has more than one member, in the order of the text.

    Both branches of a conditional count. A collective that the compiler has cut into the steps of several fusions, to
    run beside them, counts where it starts.
    """
    found = []
    for caller, ops, runs in hlo.executed(computations):
        for op in ops:
            for where, inner in _with_called(op, computations):
                if inner.opcode == 'send' and (between := _between_slices(inner)):
                    found.append(between._replace(runs=runs))
                if inner.opcode.removesuffix('-start') not in COLLECTIVES:
                    continue
                if where.startswith('async_collective_fusion') or op.name.startswith('async-collective-done'):
                    continue
                # The TPU compiler's form of a reduce-scatter: a reduction of which each device keeps its shard.
                kind = 'reduce-scatter' if where.startswith('all-reduce-scatter') else inner.kind
                shapes = {o.name: o.shape for o in computations[where or caller]}
                arrays = tuple(array[:2] for name in inner.operands for array in hlo.arrays(shapes[name]))
                groups = _groups(inner.attributes)
                if groups.shape[1] > 1 and arrays:
                    found.append(Collective(kind, arrays, groups, runs, _source(inner) or _source(op)))
    return found


def step_hbm_bytes(computations: Computations, grids: dict[str, dict]) -> int:
    """Bytes that a scheduled TPU program reads from and writes to HBM in a step, from below.

    Args:
      computations: the module.
      grids: `hlo.pallas_grids` of the traced function; kernels that are not in it count every operand and result once.
    """
    total = 0
    for c in collectives(computations):  # their arrays count once, however many fusions they are cut into
        n = c.groups.shape[1]
        total += c.runs * c.operand_bytes * {'all-gather': 1 + n, 'reduce-scatter': 1 + 1 / n}.get(c.kind, 2)
    for _, ops, runs in hlo.executed(computations):
        shapes = {op.name: op.shape for op in ops}
        for op in ops:
            if op.kind in ('send', 'recv', *COLLECTIVES):
                continue
            try:
                total += runs * hlo.op_bytes(op, shapes, computations, hlo.grid_of(op, grids))
            except ValueError:  # a kernel whose operands are not those of its grid
                total += runs * hlo.op_bytes(op, shapes, computations)
    return int(total)


def kernels(computations: Computations) -> dict[str, int]:
    """How often each Pallas kernel of a TPU program runs in a step, by name."""
    found = {}
    for _, ops, runs in hlo.executed(computations):
        for op in ops:
            if op.custom_call == 'tpu_custom_call':
                name = op.name.partition('.')[0]
                found[name] = found.get(name, 0) + runs
    return dict(sorted(found.items()))


def _source(op: Op) -> str:
    match = re.search(r'op_name="([^"]*)"', op.attributes)
    return match[1] if match else ''


def _with_called(op, computations):
    """Yields ('', op), and (computation, operation) of all that it calls: fusions, and what runs asynchronously."""
    yield '', op
    if op.opcode in ('fusion', 'async-start') and op.called in computations:
        for inner in computations[op.called]:
            for where, innermost in _with_called(inner, computations):
                yield where or op.called, innermost


def _between_slices(send):
    """The collective between TPU slices that a send starts: the TPU compiler makes host transfers of those that cross.

    Raises:
      ValueError: its devices are not named in a known form.
    """
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
    if not transfer:
        return None
    target = re.search(r'_xla_megascale_target="\{([\d:,]+)\}x\{([\d:,]+)\}"', send.attributes)
    if not target:
        raise ValueError(f'a transfer between slices is not read: {send.attributes[:300]}')
    slices, devices = (
        sum(int(ids.split(':')[-1]) - int(ids.split(':')[0]) + 1 for ids in id_ranges.split(','))
        for id_ranges in target.groups()
    )
    kind = transfer[1].lower().replace('_', '-')
    # Slices are the outermost dimension of the mesh, so a device's partners have its index in the other slices.
    groups = np.arange(slices * devices).reshape(slices, devices).T
    array = hlo.arrays(send.shape)[0][:2]
    return Collective(kind if kind in COLLECTIVES else 'collective-permute', (array,), groups, 1, '')


# ---- groups of devices -----------------------------------------------------


def _groups(attributes: str) -> np.ndarray:
    """[groups, size] of replica_groups in any of its forms; [pairs, 2] of source_target_pairs.

    Raises:
      ValueError: a form that is not known.
    """
    if match := re.search(r'(source_target_pairs|replica_groups)=\{((?:\{[\d,]*\},?)*)\}', attributes):
        rows = [[int(n) for n in row.split(',')] for row in re.findall(r'\{([\d,]+)\}', match[2])]
        return np.array(rows or [[0]])
    if match := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes):
        shape, dims, order = ([int(n) for n in part.split(',')] if part else [] for part in match.groups())
        ids = np.arange(math.prod(dims)).reshape(dims)
        return (ids.transpose(order) if order else ids).reshape(shape)
    if match := re.search(r'replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}', attributes):
        if match[2].strip():
            raise ValueError(f'replica_groups with devices of their own are not read: {match[0]}')
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        return _along(sizes, re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match[3]))
    raise ValueError(f'replica_groups are not read: {attributes[:200]}')


def _along(sizes, named):
    """Groups along the named axes of a mesh; an axis may be named in part, as (elements before it, its size)."""
    dims, inside = [], []
    parts = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in named}
    for name, size in sizes.items():
        if name not in parts:
            dims, inside = dims + [size], inside + [False]
            continue
        before, part = parts[name]
        dims += [before, part, size // (before * part)]
        inside += [False, True, False]
    ids = np.arange(math.prod(dims)).reshape(dims)
    order = [i for i, within in enumerate(inside) if not within] + [i for i, within in enumerate(inside) if within]
    return ids.transpose(order).reshape(-1, math.prod(d for d, within in zip(dims, inside) if within))
