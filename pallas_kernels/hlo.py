"""Reads compiled programs: the one parser of XLA's HLO text, and the one counter of the HBM bytes of its operations.

The text is that of an optimised module (`compiled.as_text()`), of any backend. An operation reads each operand and
writes each result once, as far as they lie in HBM: of slices and gathers what they take, of what is updated in place what
is new.
Arrays count as they lie in memory, with the padding of their tiles. A fusion that reads an operand again for other
windows is not seen, so this bounds traffic from below.
"""

import math
import re
import typing
from collections.abc import Iterator

import jax
import numpy as np

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')


class Op(typing.NamedTuple):
    """One operation.

    Attributes:
      name, opcode: as in the text, without '%'.
      shape: of the result, with its layout.
      inside: the parenthesis after the opcode.
      attributes: what follows the parenthesis.
    """

    name: str
    opcode: str
    shape: str
    inside: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r'%([\w.-]+)', self.inside)

    @property
    def kind(self) -> str:
        """The opcode of what it does or takes part in: without '-start' and '-done'."""
        return self.opcode.removesuffix('-start').removesuffix('-done')

    @property
    def called(self) -> str:
        """The computation that a fusion or an asynchronous operation runs; '' for others."""
        match = re.search(r'calls=%([\w.-]+)', self.attributes)
        return match[1] if match else ''

    @property
    def custom_call(self) -> str:
        """The target of a custom call; '' for others."""
        match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return match[1] if match else ''


Computations = dict[str, list[Op]]  # name -> operations in order; the entry's name is 'ENTRY'

_OP = re.compile(r'^ *(?:ROOT )?%(\S+) = (.*)$')
_ARRAY = re.compile(r'(pred|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([^}]*)\})?')


# ---- parsing ---------------------------------------------------------------


def parse(text: str) -> Computations:
    """The computations of a module."""
    computations, ops = {}, []
    for line in text.splitlines():
        if line.endswith('{') and (head := re.match(r'^(ENTRY )?%(\S+) \(', line)):
            ops = computations.setdefault('ENTRY' if head[1] else head[2], [])
        elif match := _OP.match(line):
            if match[2].startswith('('):
                shape, rest = _close(match[2])
            else:
                shape, _, rest = match[2].partition(' ')
            opcode, _, rest = rest.strip().partition('(')
            ops.append(Op(match[1], opcode, shape, *_close('(' + rest)))
    return computations


def _close(text):
    """Splits after the parenthesis that `text` begins with."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == '(') - (letter == ')')
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    raise ValueError(f'no end of the parenthesis in {text[:80]!r}')


def executed(computations: Computations, name: str = 'ENTRY', runs: int = 1) -> Iterator[tuple[str, list[Op], int]]:
    """Yields (computation, its operations, how often it runs); bodies of loops, branches and calls by themselves."""
    ops = computations[name]
    yield name, ops, runs
    for op in ops:
        if op.opcode == 'while':
            body = re.search(r'body=%([\w.-]+)', op.attributes)
            yield from executed(computations, body[1], runs * max(trips(op, ops, computations), 1))
        elif op.opcode == 'conditional':
            listed = re.search(r'branch_computations=\{([^}]*)\}', op.attributes)
            either = re.findall(r'(?:true|false)_computation=(%[\w.-]+)', op.attributes)
            for branch in re.findall(r'%([\w.-]+)', listed[1] if listed else ' '.join(either)):
                yield from executed(computations, branch, runs)
        elif op.opcode == 'call':
            yield from executed(computations, re.search(r'to_apply=%([\w.-]+)', op.attributes)[1], runs)


def trips(loop: Op, around: list[Op], computations: Computations) -> int:
    """Trips of a `while`: as the compiler annotates them, or, of a loop that counts up to a constant, as scans do, from
    that constant; 0 where neither is there.

    Args:
      loop: the operation.
      around: the operations of the computation that it stands in.
      computations: the module.
    """
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


def unknown_loops(computations: Computations) -> int:
    """Loops whose trips are not known; they count as one."""
    return sum(op.opcode == 'while' and not trips(op, ops, computations) for ops in computations.values() for op in ops)


# ---- bytes of arrays -------------------------------------------------------


def arrays(shape: str) -> list[tuple[str, tuple[int, ...], str]]:
    """(dtype, dims, layout) of every array of a shape."""
    return [
        (dtype, tuple(int(d) for d in dims.split(',') if d), layout) for dtype, dims, layout in _ARRAY.findall(shape)
    ]


def array_bytes(dtype: str, dims: typing.Sequence[int], layout: str = '') -> int:
    """Bytes in memory: `1,0:T(8,128)(2,1)` pads the two minor dimensions to the first tile."""
    dims, (order, _, tiles) = list(dims), layout.partition(':')
    if (tile := re.match(r'T\(([\d,]+)\)', tiles)) and dims:
        for size, dim in zip(reversed(tile[1].split(',')), order.split(',')):
            dims[int(dim)] = -(-dims[int(dim)] // int(size)) * int(size)
    bits = 8 if dtype == 'pred' else int(re.search(r'\d+', dtype)[0])
    return math.prod(dims) * bits // 8


def hbm_bytes(shape: str) -> int:
    """Bytes of the arrays of a shape, padding included, that live in HBM: no memory space S(..) in the layout."""
    return sum(array_bytes(*array) for array in arrays(shape) if 'S(' not in array[2])


def _as_if_in_hbm(shape):
    return hbm_bytes(re.sub(r'S\(\d+\)', '', shape))


# ---- bytes of operations ---------------------------------------------------

# Ops that move nothing themselves: no data, views, and the ends of transfers counted at their start.
# fmt: off
_FREE = {
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'opt-barrier', 'copy-done', 'slice-done',
    'async-update', 'async-done', 'while', 'conditional', 'call', 'custom-call-start', 'custom-call-done',
}
# fmt: on
_FREE_CALLS = ('ConcatBitcast', 'AllocateBuffer')
_VIEWS = ('bitcast', 'get-tuple-element', 'reshape')
_IN_PLACE = {'dynamic-update-slice': 1, 'scatter': 2}  # opcode -> the operand that holds what is written


def op_bytes(op: Op, shapes: dict[str, str], computations: Computations, grid: dict | None = None) -> int:
    """HBM bytes of one run of an operation. Loops, branches and calls count nothing: `executed` yields what they run.

    Args:
      op: the operation.
      shapes: of every operation of its computation by name.
      computations: the module.
      grid: the entry of `pallas_grids` for a Pallas kernel, whose blocks may be read several times.

    Raises:
      ValueError: the kernel's operands are not those of its grid.
    """
    if op.opcode in _FREE or op.custom_call in _FREE_CALLS:
        return 0
    if op.opcode == 'copy-start':  # (destination, source, context)
        return hbm_bytes(op.shape)
    if op.opcode == 'custom-call-update':  # ((operands), results, context): what runs on the SparseCore
        operands, rest = _close(op.shape[1:])
        rest = rest.removeprefix(', ')
        results = _close(rest)[0] if rest.startswith('(') else rest.partition(', (')[0]
        read = hbm_bytes(operands)
        if op.name.startswith('gather_offload'):
            (table, *indices) = (array_bytes(*array) for array in arrays(operands))
            read = min(table, _as_if_in_hbm(results)) + sum(indices)
        return read + hbm_bytes(results)
    if op.opcode == 'gather':
        table, indices = (shapes[name] for name in op.operands)
        return hbm_bytes(op.shape) + min(hbm_bytes(table), _as_if_in_hbm(op.shape)) + hbm_bytes(indices)
    if op.opcode in ('slice', 'dynamic-slice', 'slice-start'):
        taken = op.shape
        if op.opcode == 'slice-start':  # ((source), destination, context)
            taken = _ARRAY.search(_close(taken[1:])[1])[0]
        return hbm_bytes(taken) + (_as_if_in_hbm(taken) if hbm_bytes(shapes[op.operands[0]]) else 0)
    if grid is not None:
        found = arrays(' '.join(shapes[o] for o in op.operands) + ' ' + op.shape)
        if len(found) != len(grid['blocks']):
            raise ValueError(f'{op.name} has {len(found)} arrays in HLO and {len(grid["blocks"])} in Pallas')
        return sum(
            times * array_bytes(dtype, block, layout)
            for (dtype, _, layout), moved in zip(found, grid['blocks'])
            for times, block in moved
            if 'S(' not in layout
        )
    if op.opcode == 'fusion' and op.called:
        return _fusion_bytes(op, shapes, computations[op.called])
    return hbm_bytes(op.shape) + sum(hbm_bytes(shapes[name]) for name in op.operands if name in shapes)


def _fusion_bytes(op, shapes, inner):
    """HBM bytes of one fusion; collectives inside it count nothing, because they are counted as collectives."""
    made = {o.name: o for o in inner}

    def origin(name):  # through what moves nothing
        while name in made and made[name].opcode in _VIEWS:
            name = made[name].operands[0]
        return made.get(name)

    total = 0
    results = inner[-1].operands if inner[-1].opcode == 'tuple' else [inner[-1].name]
    for array, name in zip(_ARRAY.finditer(op.shape), results):
        source = origin(name)
        if not source or source.opcode == 'parameter' or _communicates(source):
            continue
        written = hbm_bytes(array[0])
        if source.opcode in _IN_PLACE:
            written = min(written, _as_if_in_hbm(made[source.operands[_IN_PLACE[source.opcode]]].shape))
        total += written
    for number, operand in enumerate(op.operands):
        size = hbm_bytes(shapes[operand])
        if not size:
            continue
        parameter = {o.name for o in inner if o.opcode == 'parameter' and o.inside == f'({number})'}
        read = 0
        for user in inner:
            if user.opcode in (*_VIEWS, 'tuple') or _communicates(user):
                continue
            uses = [
                i for i, name in enumerate(user.operands) if name in made and (origin(name) or user).name in parameter
            ]
            if user.opcode in ('slice', 'dynamic-slice', 'gather') and uses == [0]:
                read += _as_if_in_hbm(user.shape)
            elif user.opcode == 'scatter' and uses == [0]:  # it adds to what is there
                read += _as_if_in_hbm(made[user.operands[_IN_PLACE['scatter']]].shape)
            elif uses and not (user.opcode == 'dynamic-update-slice' and uses == [0]):
                read = size
                break
        total += min(read, size)
    return total


def _communicates(op):
    """Whether it is a collective, or a step of one that runs beside other work."""
    return op.kind in COLLECTIVES or 'AsyncCollective' in op.attributes


# ---- Pallas kernels --------------------------------------------------------


def grid_of(op: Op, grids: dict[str, dict]) -> dict | None:
    """The entry of `grids` for an operation that is a Pallas TPU kernel; None for others and for kernels not in it."""
    if op.custom_call != 'tpu_custom_call':
        return None
    # The name of its pallas_call, perhaps with that of a transformation around it.
    return grids.get(max((name for name in grids if name in op.name), key=len, default=''))


def pallas_grids(jaxpr) -> dict[str, dict]:
    """name -> {'steps': grid steps, 'blocks': [[fetches, block shape], ...]} of each pallas_call in a jaxpr.

    Blocks are inputs, then outputs. A block is moved once for each change of its index along
    the grid; blocks that reach over the array's end are counted by what they cover of it.

    Raises:
      NotImplementedError: a kernel reads where its blocks are from memory, or its blocks are not rectangles.
    """
    found = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == 'pallas_call':
            mapping = eqn.params['grid_mapping']
            found[eqn.params['name']] = {
                'steps': math.prod(mapping.grid),
                'blocks': [_moved(mapping.grid, block) for block in mapping.block_mappings],
            }
            continue
        for inner in inner_jaxprs(eqn):
            found.update(pallas_grids(inner))
    return found


def inner_jaxprs(eqn) -> list:
    """The jaxprs among an equation's parameters."""
    leaves = jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, 'eqns') or hasattr(p, 'jaxpr'))
    inner = [getattr(leaf, 'jaxpr', leaf) for leaf in leaves]
    return [jaxpr for jaxpr in inner if hasattr(jaxpr, 'eqns')]


def _moved(grid, block):
    """[[times, shape], ...] of one block specification: what the pipeline moves between HBM and VMEM."""
    if 'any' in str(block.block_aval) or 'hbm' in str(block.block_aval):
        return [[1, list(block.array_aval.shape)]]  # the kernel moves it itself; taken for once
    if not {type(b).__name__ for b in block.block_shape} <= {'Blocked', 'Squeezed'}:
        raise NotImplementedError(f'traffic of {block.block_shape} is not counted, only of blocked dimensions')
    index_map = block.index_map_jaxpr
    if len(index_map.jaxpr.invars) != len(grid):
        raise NotImplementedError('index maps that read prefetched scalars are not evaluated')
    points = np.indices(grid, np.int32).reshape(len(grid), -1)
    at = jax.vmap(lambda *point: jax.core.eval_jaxpr(index_map.jaxpr, index_map.consts, *point))(*points)
    at = np.stack([np.broadcast_to(np.asarray(index), points.shape[1]) for index in at], axis=1)
    new = np.ones(len(at), bool)
    new[1:] = np.any(at[1:] != at[:-1], axis=1)
    sizes = np.array([getattr(b, 'block_size', 1) for b in block.block_shape])
    covered = np.clip(block.array_aval.shape - at[new] * sizes, 0, sizes)
    shapes, times = np.unique(covered, axis=0, return_counts=True)
    return [[int(n), shape.tolist()] for n, shape in zip(times, shapes)]
