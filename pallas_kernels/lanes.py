"""What the element-wise kernels for Hopper share: Pallas Mosaic GPU, lane by lane, whose threads share nothing."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import in_32_bits

TOKENS = 16  # of the shortest part


def launch(name: str, body: Callable, shapes: Sequence, grid: dict[str, int], interpret, *inputs: jax.Array):
    """Runs a kernel.

    Args:
      name: in profiles.
      body: of references to the inputs and to the outputs.
      shapes: of the outputs, ShapeDtypeStruct.
      grid: name -> size of its axes, the one that changes fastest first.
      interpret: False, or parameters of Pallas's interpreter.

    Returns:
      The outputs, a list.
    """
    body.__name__ = name
    run = plgpu.kernel(
        in_32_bits(body),  # under vmap it is traced again, after the call
        out_type=shapes,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        interpret=interpret,
        # No store need wait for another thread.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
    return in_32_bits(run)(*inputs)


def interpreter(interpret: bool):
    """`launch`'s argument."""
    return plgpu.InterpretGPUParams() if interpret else False


def tokens_of_part(tokens: int, most: int) -> int:
    """The longest part, at most `most`, of which `tokens`, a multiple of TOKENS, are a multiple."""
    return next(n for n in (256, 128, 64, 32, TOKENS) if n <= most and tokens % n == 0)


def sigmoid(v: jax.Array) -> jax.Array:
    """1 / (1 + exp(-v)), whose division would take more instructions than the rest of a kernel."""
    root = lax.rsqrt(1.0 + jnp.exp(-v))
    return root * root
