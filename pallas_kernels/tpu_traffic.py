"""HBM bytes of a scheduled TPU program: from its HLO text, and from the grids of its Pallas kernels.

An op reads each operand and writes each result once, as far as they live in HBM; arrays count
as they lie in memory, with the padding of their tiles. A fusion that reads an operand again for
other windows is not seen, so this bounds traffic from below.
"""

import math
import re
import typing

import jax
import numpy as np


def pallas_grids(jaxpr) -> dict:
    """name -> {'steps': grid steps, 'blocks': [[fetches, block shape], ...]} of each pallas_call in it.

    Blocks are inputs, then outputs. A block is moved once for each change of its index along
    the grid; blocks that reach over the array's end are counted by what they cover of it.
    """
    found = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == 'pallas_call':
            mapping = eqn.params['grid_mapping']
            found[eqn.params['name']] = {
                'steps': math.prod(mapping.grid), 'blocks': [_moved(mapping.grid, b) for b in mapping.block_mappings],
            }
            continue
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, 'eqns') or hasattr(p, 'jaxpr')):
            inner = getattr(inner, 'jaxpr', inner)
            if hasattr(inner, 'eqns'):
                found.update(pallas_grids(inner))
    return found


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


_SHAPE = re.compile(r'(pred|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([^}]*)\})?')
_OP = re.compile(r'^ *(?:ROOT )?%(\S+) = (.*)$')
# Ops that move nothing themselves: no data, views, and the ends of transfers counted at their start.
_FREE = {
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'opt-barrier',
    'copy-done', 'slice-done', 'async-update', 'async-done',
}


class Op(typing.NamedTuple):
    name: str
    opcode: str
    shape: str
    inside: str  # the parenthesis after the opcode
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r'%([\w.-]+)', self.inside)


def parse_hlo(text: str) -> dict[str, list[Op]]:
    """computation -> its ops in order; the entry's key is 'ENTRY'."""
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


def array_bytes(dtype: str, dims: list[int], layout: str = '') -> int:
    """Bytes in memory: `1,0:T(8,128)(2,1)` pads the two minor dimensions to the first tile."""
    dims, (order, _, tiles) = list(dims), layout.partition(':')
    if (tile := re.match(r'T\(([\d,]+)\)', tiles)) and dims:
        for size, dim in zip(reversed(tile[1].split(',')), order.split(',')):
            dims[int(dim)] = -(-dims[int(dim)] // int(size)) * int(size)
    bits = 8 if dtype == 'pred' else int(re.search(r'\d+', dtype)[0])
    return math.prod(dims) * bits // 8


def hbm_bytes(shape: str) -> int:
    """Bytes of the arrays of a shape, padding included, that live in HBM: no space S(..) in the layout."""
    return sum(
        array_bytes(dtype, [int(d) for d in dims.split(',') if d], layout)
        for dtype, dims, layout in _SHAPE.findall(shape)
        if 'S(' not in layout
    )


def _as_hbm(shape):
    return hbm_bytes(re.sub(r'S\(\d+\)', '', shape))


def op_bytes(op: Op, shapes: dict[str, str], computations: dict[str, list[Op]], grid: dict | None = None) -> int:
    """HBM bytes of one op: operands read and results written, each once, of slices only what is taken.

    grid: the entry of `pallas_grids` for a Pallas kernel, whose blocks may be read several times.
    """
    if op.opcode in _FREE or 'custom_call_target="ConcatBitcast"' in op.attributes:
        return 0
    if op.opcode == 'copy-start':  # (destination, source, context)
        return hbm_bytes(op.shape)
    if op.opcode in ('slice', 'dynamic-slice', 'slice-start'):
        taken = op.shape
        if op.opcode == 'slice-start':  # ((source), destination, context)
            taken = _SHAPE.search(_close(taken[1:])[1])[0]
        return hbm_bytes(taken) + (_as_hbm(taken) if hbm_bytes(shapes[op.operands[0]]) else 0)
    if grid is not None:
        arrays = _SHAPE.findall(' '.join(shapes[o] for o in op.operands) + ' ' + op.shape)
        if len(arrays) != len(grid['blocks']):
            raise ValueError(f'{op.name} has {len(arrays)} arrays in HLO and {len(grid["blocks"])} in Pallas')
        return sum(
            times * array_bytes(dtype, block, layout)
            for (dtype, _, layout), moved in zip(arrays, grid['blocks'])
            for times, block in moved
            if 'S(' not in layout
        )
    called = re.search(r'calls=%([\w.-]+)', op.attributes)
    inner = computations[called[1]] if op.opcode == 'fusion' and called else []
    total = hbm_bytes(op.shape)
    for number, operand in enumerate(op.operands):
        size = hbm_bytes(shapes[operand])
        names = {o.name for o in inner if o.opcode == 'parameter' and o.inside == f'({number})'}
        users = [o for o in inner if names & set(o.operands)]
        if size and users and all(o.opcode in ('slice', 'dynamic-slice') for o in users):
            size = min(size, sum(_as_hbm(o.shape) for o in users))
        total += size
    return total
