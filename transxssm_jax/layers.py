"""The parts that every block is made of.

Shape legend: B batch, L length, D model, F mlp.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from transxssm_jax import mesh


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32; returns x's dtype."""

    def __init__(self, features: int, epsilon: float):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32), axes=(None,))

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        x32_BLD = x_BLD.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32_BLD), axis=-1, keepdims=True)
        return (x32_BLD * jax.lax.rsqrt(mean_square + self.epsilon) * self.scale[...]).astype(x_BLD.dtype)


class Linear(nnx.Module):
    """A linear map between groups of axes, e.g. D -> (H, P), with float32 parameters.

    Args:
      inputs, outputs: name -> size of the contracted and of the new axes; the
        names are logical axes ('embed', 'heads', ...; None-like: 'width').
      std: standard deviation of the initial kernel; biases start at 0.
    """

    def __init__(self, inputs: dict[str, int], outputs: dict[str, int], *, std: float, use_bias: bool, rngs: nnx.Rngs):
        shape = (*inputs.values(), *outputs.values())
        self.num_inputs = len(inputs)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=(*inputs, *outputs))
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(tuple(outputs.values()), jnp.float32), axes=tuple(outputs))

    def __call__(self, x: jax.Array, out_dtype=None) -> jax.Array:
        """Contracts x's last axes with the kernel in x's dtype, accumulating float32.

        Returns:
          [*batch, *outputs] in out_dtype (default: x's dtype).
        """
        n = self.num_inputs
        y = jax.lax.dot_general(
            x, self.kernel[...].astype(x.dtype), ((tuple(range(x.ndim - n, x.ndim)), tuple(range(n))), ((), ())),
            preferred_element_type=out_dtype or x.dtype)
        return y + self.bias[...].astype(y.dtype) if hasattr(self, 'bias') else y


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, d_model: int, d_mlp: int, *, std: float, use_bias: bool, rngs: nnx.Rngs):
        kwargs = dict(std=std, use_bias=use_bias, rngs=rngs)
        self.gate_proj = Linear({'embed': d_model}, {'mlp': d_mlp}, **kwargs)
        self.up_proj = Linear({'embed': d_model}, {'mlp': d_mlp}, **kwargs)
        self.down_proj = Linear({'mlp': d_mlp}, {'embed': d_model}, **kwargs)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        gate_BLF = mesh.constrain(self.gate_proj(x_BLD), 'batch', None, 'mlp')
        up_BLF = mesh.constrain(self.up_proj(x_BLD), 'batch', None, 'mlp')
        return self.down_proj(jax.nn.silu(gate_BLF) * up_BLF)


class LearnedResidual(nnx.Module):
    """weight * residual + branch, one weight a channel, started at 1 (paper: learned residual)."""

    def __init__(self, features: int):
        self.weight = nnx.Param(jnp.ones((features,), jnp.float32), axes=(None,))

    def __call__(self, residual_BLD: jax.Array, branch_BLD: jax.Array) -> jax.Array:
        # In float32: near 1 a bfloat16 weight could not move by less than 0.4%.
        return (residual_BLD * self.weight[...] + branch_BLD).astype(branch_BLD.dtype)


def inverse_softplus(y: jax.Array) -> jax.Array:
    """x with softplus(x) = y > 0, stable for small y."""
    return y + jnp.log(-jnp.expm1(-y))


def log_uniform(key: jax.Array, shape: tuple[int, ...], low: float, high: float) -> jax.Array:
    return jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(low), math.log(high)))
