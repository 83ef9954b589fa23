"""A function of whole matrices, where every device holds a block of each: gathered, or a share of the matrices a device.

A stack of n matrices is cut over the g devices that shard its axes. Either each device gathers every matrix, and keeps
its own block of what comes out: it sends its block g - 1 times. Or the devices deal out the matrices among themselves,
each works on n / g whole ones, and all send the results back: each sends its block less than twice, and the work is
shared too. Where n is much smaller than g, dealing out sends padding, and gathering sends less. `choose` counts both.

Devices along axes that do not shard the matrices (data, context) all do the same.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from transxssm_jax.parallel import collectives
from transxssm_jax.parallel.mesh import RULES


class Choice(NamedTuple):
    """How devices come to whole matrices.

    Attributes:
      way: 'gather' or 'distribute'; 'local' where each device holds them whole.
      sent: elements that a device sends, there and back.
      matrices: that each device works on.
    """

    way: str
    sent: float
    matrices: int


def choose(num_matrices: int, elements: int, devices: int) -> Choice:
    """The way in which a device sends less; of equal ones that in which it computes less.

    Args:
      num_matrices: n, of the stack.
      elements: of the whole stack.
      devices: g, that shard it.
    """
    if devices == 1:
        return Choice('local', 0.0, num_matrices)
    block, share = elements / devices, -(-num_matrices // devices)
    distribute = 2 * block * (share * devices / num_matrices) * (devices - 1) / devices
    gather = block * (devices - 1)
    return Choice('distribute', distribute, share) if distribute <= gather else Choice('gather', gather, num_matrices)


def on_whole(function, stack: jax.Array, axes: tuple) -> jax.Array:
    """function of the whole matrices of a stack; on one device or within `collectives.shard_map`.

    Args:
      function: of a stack [n, ...] of whole matrices, one by one; returns the same shape.
      stack: this device's block of [n, ...].
      axes: the logical axes of all but the first axis.

    Returns:
      This device's block of the result.
    """
    names = collectives.sharded_over(*(axis for axis in axes if axis))
    if not names:
        return function(stack)
    sizes = [jax.sharding.get_abstract_mesh().shape[name] for name in names]
    cut = [next(i for i, axis in enumerate(axes, 1) if name in RULES.get(axis, ())) for name in names]
    devices, n = math.prod(sizes), len(stack)
    if choose(n, stack.size * devices, devices).way == 'gather':
        whole = stack
        for name, axis in zip(names, cut):
            whole = jax.lax.all_gather(whole, name, axis=axis, tiled=True)
        result = function(whole)
        for name, size, axis in zip(names, sizes, cut):
            length = result.shape[axis] // size
            result = jax.lax.dynamic_slice_in_dim(result, jax.lax.axis_index(name) * length, length, axis)
        return result
    share = -(-n // devices)
    padded = jnp.pad(stack, ((0, share * devices - n), *((0, 0) for _ in axes)))
    dealt = padded.reshape(devices, share, *stack.shape[1:])
    # [g, n / g, ...]: the blocks of this device's matrices, by the device that they come from.
    blocks = jax.lax.all_to_all(dealt, names, 0, 0)
    result = function(_assemble(blocks, sizes, cut))
    back = jax.lax.all_to_all(_cut(result, sizes, cut), names, 0, 0)
    return back.reshape(padded.shape)[:n]


def _assemble(blocks, sizes, cut):
    """Whole arrays [m, ...] of blocks [g, m, ...], g the product of sizes; size i cuts axis cut[i] of the whole."""
    count = len(sizes)
    blocks = blocks.reshape(*sizes, *blocks.shape[1:])
    order, shape = [], []
    for axis, length in enumerate(blocks.shape[count:]):
        pieces = [i for i in range(count) if cut[i] == axis]
        order += [*pieces, count + axis]
        shape.append(length * math.prod(sizes[i] for i in pieces))
    return blocks.transpose(order).reshape(shape)


def _cut(whole, sizes, cut):
    """The inverse of `_assemble`."""
    count, order, shape, block = len(sizes), [], [], []
    for axis, length in enumerate(whole.shape):
        pieces = [i for i in range(count) if cut[i] == axis]
        block.append(length // math.prod(sizes[i] for i in pieces))
        order += [*pieces, count + axis]
        shape += [*(sizes[i] for i in pieces), block[-1]]
    blocks = whole.reshape(shape).transpose(sorted(range(len(order)), key=order.__getitem__))
    return blocks.reshape(math.prod(sizes), *block)
