"""Kernels raise by name where they are lowered for a platform that they do not run on."""

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
      implementation: name of rotary_ssd's implementation that runs there.
    """
    only_p = jax.extend.core.Primitive(f'rotary_ssd_only_on_{platform}')
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
