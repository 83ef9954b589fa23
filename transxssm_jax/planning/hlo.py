"""What a compiled step moves: every collective with its bytes and how often it runs, and the bytes of HBM.

Reads the text of an optimised HLO module (`compiled.as_text()`), of any backend. Bytes are those
of one device; arrays count without the padding of their tiles in collectives, with it in HBM.
"""

import math
import re
import typing

import numpy as np

from pallas_kernels import tpu_traffic

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')


class Collective(typing.NamedTuple):
    """One collective of the program.

    Attributes:
      kind: one of KINDS.
      arrays: (dtype, dims) of each operand, as one device holds it.
      groups: [groups, size] places in the mesh that talk to each other; of a permute [pairs, (source, target)].
      runs: how often it runs a step; the trips of every loop around it, multiplied.
      source: the operation of the model it came from, as JAX names it; '' where the compiler does not say.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    groups: np.ndarray
    runs: int
    source: str

    @property
    def operand_bytes(self) -> int:
        return sum(tpu_traffic.array_bytes(dtype, list(dims)) for dtype, dims in self.arrays)

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends in one run; the least that any algorithm of the kind can do."""
        n = self.groups.shape[1]
        return (
            self.operand_bytes
            * {
                'all-gather': n - 1,
                'all-reduce': 2 * (n - 1) / n,
                'reduce-scatter': (n - 1) / n,
                'all-to-all': (n - 1) / n,
                'collective-permute': 1,
            }[self.kind]
        )

    @property
    def result_dims(self) -> list[tuple[int, ...]]:
        """Dims of what a gather makes, per operand, up to which axis grew; others: of the operands."""
        return [dims for _, dims in self.arrays]

    def axes(self, sizes: dict[str, int]) -> tuple[str, ...]:
        """Mesh axes it runs along; sizes: of the mesh's axes, in order."""
        places = np.stack(np.unravel_index(self.groups, tuple(sizes.values())))  # [axis, group, member]
        along = np.any(places != places[:, :, :1], axis=(1, 2))
        return tuple(name for name, moves in zip(sizes, along) if moves)


def collectives(text: str) -> list[Collective]:
    """Every collective of a module that has more than one member, in the order of the text.

    What a conditional may or may not do counts as done. A collective that the compiler has cut into
    the steps of several fusions, to run beside them, is one.
    """
    computations = tpu_traffic.parse_hlo(text)
    found = []
    for caller, operations, runs in _executed(computations):
        seen = set()
        for op in operations:
            for where, inner in _with_fused(op, computations):
                kind = inner.opcode.removesuffix('-start')
                if kind == 'send' and (between := _between_slices(inner)):
                    found.append(between._replace(runs=runs))
                if kind not in KINDS:
                    continue
                channel = re.search(r'channel_id=(\d+)', inner.attributes)
                if where:  # the steps of one collective have its channel
                    key = (kind, channel and channel[1], inner.shape if not channel else '')
                    if key in seen:
                        continue
                    seen.add(key)
                if where.startswith('all-reduce-scatter'):
                    kind = 'reduce-scatter'  # the TPU compiler's form: a reduction of which each device keeps its part
                shapes = {o.name: o.shape for o in (computations[where] if where else computations[caller])}
                arrays = [array for name in inner.operands for array in _arrays(shapes[name])]
                groups = _groups(inner.attributes)
                if groups.shape[1] > 1 and arrays:
                    source = re.search(r'op_name="([^"]*)"', inner.attributes) or re.search(
                        r'op_name="([^"]*)"', op.attributes
                    )
                    found.append(Collective(kind, tuple(arrays), groups, runs, source[1] if source else ''))
    return found


def hbm_bytes(text: str, grids: dict) -> int:
    """Bytes that a scheduled TPU program reads from and writes to HBM in a step, from below.

    Every operation reads its operands and writes its results once, of slices what they take, of what is
    updated in place what is new; a collective's arrays count once, however many fusions it is cut into.

    Args:
      text: the module.
      grids: `tpu_traffic.pallas_grids` of the traced function; kernels that are not in it count
        every operand and result once.
    """
    computations = tpu_traffic.parse_hlo(text)
    total = 0
    for c in collectives(text):
        n = c.groups.shape[1]
        total += c.runs * c.operand_bytes * {'all-gather': 1 + n, 'reduce-scatter': 1 + 1 / n}.get(c.kind, 2)
    for _, operations, runs in _executed(computations):
        shapes = {op.name: op.shape for op in operations}
        for op in operations:
            kind = op.opcode.removesuffix('-done').removesuffix('-start')
            if kind in ('while', 'conditional', 'call', 'send', 'recv', *KINDS):
                continue  # their computations are walked themselves, and collectives are counted above
            if 'custom_call_target="AllocateBuffer"' in op.attributes:
                continue  # room, not yet written
            grid = None
            if 'custom_call_target="tpu_custom_call"' in op.attributes:
                grid = grids.get(max((name for name in grids if name in op.name), key=len, default=''))
            called = re.search(r'calls=%([\w.-]+)', op.attributes)
            if op.opcode == 'fusion' and called:
                total += runs * _fusion_bytes(op, shapes, computations[called[1]])
                continue
            try:
                total += runs * tpu_traffic.op_bytes(op, shapes, computations, grid)
            except (KeyError, ValueError):  # a kernel whose operands are not those of its grid
                total += runs * (
                    tpu_traffic.hbm_bytes(op.shape)
                    + sum(tpu_traffic.hbm_bytes(shapes[name]) for name in op.operands if name in shapes)
                )
    return int(total)


def _fusion_bytes(op, shapes, inner):
    """HBM bytes of one fusion, its collectives left out."""
    made = {o.name: o for o in inner}

    def origin(name):  # through what moves nothing
        while name in made and made[name].opcode in ('bitcast', 'get-tuple-element', 'reshape'):
            name = made[name].operands[0]
        return made.get(name)

    def in_hbm(shape):  # an array of the fusion's inside as it would lie in HBM
        return tpu_traffic.hbm_bytes(re.sub(r'S\(\d+\)', '', shape))

    total = 0
    results = inner[-1].operands if inner[-1].opcode == 'tuple' else [inner[-1].name]
    for shape, name in zip(re.findall(r'(?:pred|[a-z]+\d+\w*)\[[\d,]*\](?:\{[^}]*\})?', op.shape), results):
        source = origin(name)
        if not source or source.opcode == 'parameter' or _transfers(source):
            continue
        written = tpu_traffic.hbm_bytes(shape)
        if source.opcode == 'dynamic-update-slice':
            written = min(written, in_hbm(made[source.operands[1]].shape))
        total += written
    for number, operand in enumerate(op.operands):
        size = tpu_traffic.hbm_bytes(shapes[operand])
        if not size:
            continue
        names = {o.name for o in inner if o.opcode == 'parameter' and o.inside == f'({number})'}
        read = 0
        for user in inner:
            if user.opcode in ('bitcast', 'get-tuple-element', 'reshape', 'tuple') or _transfers(user):
                continue
            places = [
                i for i, name in enumerate(user.operands) if name in made and (origin(name) or user).name in names
            ]
            if user.opcode in ('slice', 'dynamic-slice') and places:
                read += in_hbm(user.shape)
            elif places and not (user.opcode == 'dynamic-update-slice' and places == [0]):
                read = size
                break
        total += min(read, size)
    return total


def _transfers(op):
    """Whether it is a collective, or a step of one that runs beside other work."""
    return op.opcode.removesuffix('-start').removesuffix('-done') in KINDS or 'AsyncCollective' in op.attributes


def loops_without_trips(text: str) -> int:
    """Loops whose trips are not known; they count as one."""
    computations = tpu_traffic.parse_hlo(text)
    return sum(
        op.opcode == 'while' and not _trips(op, operations, computations)
        for operations in computations.values()
        for op in operations
    )


# ---- walking ---------------------------------------------------------------


def _executed(computations, name='ENTRY', runs=1):
    """Yields (computation, its operations, how often it runs a step); bodies of loops by themselves."""
    yield name, computations[name], runs
    for op in computations[name]:
        if op.opcode == 'while':
            body = re.search(r'body=%([\w.-]+)', op.attributes)
            yield from _executed(computations, body[1], runs * max(_trips(op, computations[name], computations), 1))
        elif op.opcode == 'conditional':
            listed = re.search(r'branch_computations=\{([^}]*)\}', op.attributes)
            branches = (
                listed[1] if listed else ' '.join(re.findall(r'(?:true|false)_computation=(%[\w.-]+)', op.attributes))
            )
            for branch in re.findall(r'%([\w.-]+)', branches):
                yield from _executed(computations, branch, runs)
        elif op.opcode == 'call':
            yield from _executed(computations, re.search(r'to_apply=%([\w.-]+)', op.attributes)[1], runs)


def _trips(loop, around, computations):
    """Trips of a loop: what the compiler says, or, of one that counts up to a constant, as scans do, from the count; else 0."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = computations[re.search(r'condition=%([\w.-]+)', loop.attributes)[1]]
    ends = [int(op.inside[1:-1]) for op in condition if op.opcode == 'constant' and re.match(r'[su]32\[\]', op.shape)]
    counters = [
        int(re.search(r'index=(\d+)', op.attributes)[1]) for op in condition if op.opcode == 'get-tuple-element'
    ]
    if len(ends) != 1 or len(counters) != 1:
        return 0
    made = {op.name: op for op in around}
    start = made.get(loop.operands[0])
    if start and start.opcode == 'tuple':
        start = made.get(start.operands[counters[0]])
        while start and start.opcode in ('copy', 'bitcast'):
            start = made.get(start.operands[0])
        if start and start.opcode == 'constant':
            return ends[0] - int(start.inside[1:-1])
    return ends[0]


def _with_fused(op, computations):
    """Yields ('', op), and (computation, operation) of all that it calls: fusions, and what runs asynchronously."""
    yield '', op
    called = re.search(r'calls=%([\w.-]+)', op.attributes)
    if called and op.opcode in ('fusion', 'async-start') and called[1] in computations:
        for inner in computations[called[1]]:
            for where, innermost in _with_fused(inner, computations):
                yield where or called[1], innermost


def _between_slices(send):
    """The collective between TPU slices that a send starts: host transfers, which the TPU compiler makes of those that cross.

    Raises:
      ValueError: it does not say between which devices.
    """
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
    if not transfer:
        return None
    target = re.search(r'_xla_megascale_target="\{([\d:,]+)\}x\{([\d:,]+)\}"', send.attributes)
    if not target:
        raise ValueError(f'a transfer between slices is not read: {send.attributes[:300]}')
    slices, devices = (
        sum(int(part.split(':')[-1]) - int(part.split(':')[0]) + 1 for part in part_list.split(','))
        for part_list in target.groups()
    )
    kind = transfer[1].lower().replace('_', '-')
    # Slices are the outermost part of the mesh, so that a device's partners have its place in the others.
    groups = np.arange(slices * devices).reshape(slices, devices).T
    return Collective(kind if kind in KINDS else 'collective-permute', tuple(_arrays(send.shape)[:1]), groups, 1, '')


def _arrays(shape):
    """(dtype, dims) of every array of a shape."""
    return [
        (dtype, tuple(int(d) for d in dims.split(',') if d))
        for dtype, dims in re.findall(r'(pred|[a-z]+\d+\w*)\[([\d,]*)\]', shape)
    ]


# ---- who talks to whom -----------------------------------------------------


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
    """Groups along the named axes of a mesh; an axis may be named in part, (elements before it, its size)."""
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
