"""Where kernels run: they raise by name where they are lowered for another platform, and see no axes of a shard_map."""

import functools

import jax
import jax.extend.core
from jax.interpreters import batching, mlir

from pallas_kernels.dispatch import refusal


def only_on(platform: str, hardware: str, implementation: str) -> jax.extend.core.Primitive:
    """The identity that lowers for one platform only, to be bound on an operand of a kernel.

    A traced function's platform is known at lowering, not earlier: a host without an accelerator may
    lower a program for one. Pallas would raise too, but without the name of the implementation. Not
    differentiable: kernels have gradients of their own.

    Args:
      platform: as in `lowering_platforms`: 'tpu', 'cuda'.
      hardware: the platform's name in the message.
      implementation: name of the operator's implementation that runs there.
    """
    only_p = jax.extend.core.Primitive(f'kernel_only_on_{platform}')
    only_p.def_abstract_eval(lambda x: x)
    batching.defvectorized(only_p)
    mlir.register_lowering(only_p, lambda ctx, x: [x], platform=platform)

    @functools.partial(mlir.register_lowering, only_p)
    def refuse(ctx, x):
        platforms = ', '.join(ctx.module_context.platforms)
        raise refusal(
            implementation,
            f"it is lowered for {platforms} and runs on {hardware} only; use implementation='xla' or None, or "
            'interpret=True for a test',
        )

    @only_p.def_impl
    def run_alone(x):
        return jax.jit(only_p.bind)(x)

    return only_p


only_on_cuda_p = only_on('cuda', 'NVIDIA GPUs', 'mosaic_gpu')
only_on_tpu_p = only_on('tpu', 'TPU', 'mosaic_tpu')

# The identity, whose result varies over no axes of a shard_map.
_local_p = jax.extend.core.Primitive('kernel_local')
_local_p.def_abstract_eval(lambda x: x.update(manual_axis_type=type(x.manual_axis_type)()))
_local_p.def_impl(lambda x: x)
batching.defvectorized(_local_p)
mlir.register_lowering(_local_p, lambda ctx, x: [x])


def of_one_device(f, only_p=only_on_cuda_p):
    """f(static, *arrays) of a Pallas kernel, called with arrays that vary over no axes of a shard_map.

    The results vary over the axes of the first array. Pallas traces the bodies of the kernels without
    these axes, but not what the bodies load and receive.

    Args:
      f: static[1] tells whether its kernels are interpreted.
      only_p: of `only_on`, for the platform that they run on if they are not.
    """

    def run(static, *arrays, **keywords):
        leaves, structure = jax.tree.flatten(arrays)
        axes = tuple(sorted(jax.typeof(leaves[0]).manual_axis_type.varying))
        if not static[1]:
            leaves[0] = only_p.bind(leaves[0])
        if axes:
            leaves = map(_local_p.bind, leaves)
        results = f(static, *structure.unflatten(leaves), **keywords)
        return jax.tree.map(lambda v: jax.lax.pcast(v, axes, to='varying'), results) if axes else results

    return run


def shape_like(example: jax.Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """An output of a kernel that varies over the same axes of a shard_map as example."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(example).manual_axis_type)
