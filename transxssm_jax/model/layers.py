"""The layers that every block is made of.

Shape legend: B batch, L length, D model, F mlp.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.residual_norm import norm_and_residual, rms_norm
from transxssm_jax.config import Model
from transxssm_jax.model import quantized
from transxssm_jax.parallel import collectives


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over D of the residual stream, in float32; returns x's dtype."""

    def __init__(self, features: int, epsilon: float):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32), axes=(None,))

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        return rms_norm(x_BLD, collectives.copy_to_stream(self.scale[...]), self.epsilon)


class HeadNorm(nnx.Module):
    """RMSNorm of each head's, or each group's, own vector: x [B, L, heads, width], one scale [width] for all of them.

    Args:
      axis: logical axis of the heads or groups. Where the mesh shards it, the scale's gradient is of all shards.
      width: of a vector.
    """

    def __init__(self, axis: str, width: int, epsilon: float):
        self.axis, self.epsilon = axis, epsilon
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32), axes=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        return head_norm(x, collectives.copy_param_to_tensor_parallel(self.scale[...], self.axis), self.epsilon)


def head_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """See `HeadNorm`; in float32, in x's dtype. Its input is kept for the backward pass and not its statistics."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon) * scale).astype(x.dtype)


class Linear(nnx.Module):
    """A linear map between groups of axes, e.g. D -> (H, P), with float32 parameters.

    Whatever the mesh shards of its axes, the map is the whole one: a kernel that fsdp shards is all-gathered, the
    gradient of an input that several shards of the outputs read is all-reduced, and so is a product over a sharded
    input axis. A map of D reads the residual stream and one to D writes it (`collectives.gather_from_stream`,
    `reduce_to_stream`).

    Args:
      inputs, outputs: name -> size of the contracted axes and of the new ones; the
        names are logical axes ('embed', 'heads', ...), or any other for an axis that is never sharded.
      model: gives the standard deviation of the initial kernel, and whether there is a bias, which starts at 0.
      quantization: what the operands of its products are rounded to, as model.quantization.
    """

    def __init__(
        self,
        model: Model,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        rngs: nnx.Rngs,
        quantization: str = 'none',
    ):
        self.quantization = quantization
        if quantization != 'none':
            quantized.qwix()  # that it is missing is said before anything is computed
        sizes = inputs | outputs
        kernel = model.init_std * jax.random.normal(rngs.params(), tuple(sizes.values()), jnp.float32)
        self.kernel = nnx.Param(kernel, axes=tuple(sizes))
        # 'embed' is whole on every device once the kernel is gathered.
        self.input_axes = tuple(axis for axis in inputs if axis != 'embed')
        self.output_axes = tuple(axis for axis in outputs if axis != 'embed')
        self.reads_stream, self.writes_stream = 'embed' in inputs, 'embed' in outputs
        self.num_inputs = len(inputs)
        if model.use_bias:
            self.bias = nnx.Param(jnp.zeros(tuple(outputs.values()), jnp.float32), axes=tuple(outputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Contracts x's last axes with the kernel in x's dtype, or in 8 bits (`quantized`), accumulating float32.

        Returns:
          [*batch, *outputs] in x's dtype.
        """
        copy = collectives.gather_from_stream if self.reads_stream else collectives.copy_to_tensor_parallel
        return self.apply_to_copy(copy(x, *self.output_axes))

    def apply_to_copy(self, x: jax.Array, is_float32: bool = False) -> jax.Array:
        """The same for an input that is already what each shard reads, which several maps may share; or in float32."""
        n, axes = self.num_inputs, self.kernel.get_metadata('axes')
        kernel = checkpoint_name(collectives.all_gather_params(self.kernel[...], axes, x.dtype), 'weight')
        batch, inputs, outputs = x.shape[: x.ndim - n], kernel.shape[:n], kernel.shape[n:]
        # Heads and their width as one axis: of a product with both XLA lays a TPU's result out with the sequence in
        # lanes, and copies it to where a kernel reads heads side by side.
        x, kernel = x.reshape(*batch, -1), kernel.reshape(math.prod(inputs), -1)
        if is_float32:
            y = _matmul_float32(x, kernel)
        elif self.quantization == 'none':
            y = _matmul(x, kernel)
        else:
            y = quantized.matmul(x, kernel, self.quantization)
        reduce = collectives.reduce_to_stream if self.writes_stream else collectives.all_reduce
        y = reduce(y.reshape(*batch, *outputs), *self.input_axes)
        if not hasattr(self, 'bias'):
            return y
        bias = collectives.copy_to_stream(self.bias[...]) if self.writes_stream else self.bias[...]
        return y + collectives.all_gather_params(bias, self.bias.get_metadata('axes'), y.dtype)


def _matmul(x: jax.Array, kernel_IO: jax.Array, dtype=None) -> jax.Array:
    """x [..., I] @ kernel in dtype (default: x's), accumulated in float32."""
    dimensions = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, kernel_IO, dimensions, preferred_element_type=dtype or x.dtype)


@jax.custom_vjp
def _matmul_float32(x: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    """x @ kernel in float32. Its gradient is rounded to x's dtype, so that no product has float32 operands."""
    return _matmul(x, kernel_IO, jnp.float32)


def _matmul_float32_forward(x, kernel_IO):
    return _matmul(x, kernel_IO, jnp.float32), (x, kernel_IO)


def _matmul_float32_backward(residuals, cotangent):
    x, kernel_IO = residuals
    cotangent, tokens = cotangent.astype(x.dtype), tuple(range(x.ndim - 1))
    d_x = _matmul(cotangent, kernel_IO.T)
    return d_x, jax.lax.dot_general(x, cotangent, ((tokens, tokens), ((), ())))


_matmul_float32.defvjp(_matmul_float32_forward, _matmul_float32_backward)


class InputProjections(nnx.Module):
    """A norm and all linear maps of its output: the input side of a mixer or an MLP.

    Every map reads the same normalised x, so that its gradient is summed over devices once for all of them. The norm is
    applied by `PreNormResidual`, together with the residual connection around the mixer or MLP.

    Args:
      outputs: name of a map -> its output axes, as for `Linear`. The parameters of map 'q' are `q/kernel` and, with
        model.use_bias, `q/bias`; those of the norm are `norm/scale`.
      float32: names of the maps whose output is float32; the others keep x's dtype.
      quantization: of the maps, see `Linear`.
    """

    def __init__(
        self,
        model: Model,
        outputs: dict[str, dict[str, int]],
        *,
        rngs: nnx.Rngs,
        float32=(),
        quantization: str = 'none',
    ):
        self.names, self.float32 = tuple(outputs), tuple(float32)
        self.norm = RMSNorm(model.d_model, model.norm_epsilon)
        for name, axes in outputs.items():
            setattr(self, name, Linear(model, {'embed': model.d_model}, axes, rngs=rngs, quantization=quantization))

    def __call__(self, u_BLD: jax.Array) -> tuple[jax.Array, ...]:
        """What the norm gave, [B, L, D] -> one [B, L, *outputs] per map, in the order of `outputs`."""
        projections = [getattr(self, name) for name in self.names]
        axes = dict.fromkeys(axis for projection in projections for axis in projection.output_axes)
        copies = _copies(collectives.gather_from_stream(u_BLD, *axes), len(projections))
        return tuple(
            projection.apply_to_copy(u_BLD, name in self.float32)
            for name, projection, u_BLD in zip(self.names, projections, copies, strict=True)
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _copies(x: jax.Array, number: int) -> tuple[jax.Array, ...]:
    """x for each of several maps. Its gradient is summed with each map's own on the left: so XLA has cuBLAS add the sum of
    the maps before to the product. With it on the right, as autodiff writes it, every other sum is a pass of its own."""
    return (x,) * number


def _copies_backward(number, _, cotangents):
    return (functools.reduce(lambda total, own: own + total, cotangents),)


_copies.defvjp(lambda x, number: (_copies(x, number), None), _copies_backward)


class SwiGLU(nnx.Module):
    """out_proj(silu(gate) * up), with gate and up linear maps of u = norm(x) (Shazeer, 2020).

    Of all linear maps only these have operands of model.quantization: with those of the mixers in 8 bits too the loss rose
    by 0.6%, and a step of the 1.3B model took 1% less time.
    """

    def __init__(self, model: Model, *, rngs: nnx.Rngs):
        width, how = {'mlp': model.d_mlp}, dict(rngs=rngs, quantization=model.quantization)
        self.in_proj = InputProjections(model, {'gate': width, 'up': width}, **how)
        self.out_proj = Linear(model, width, {'embed': model.d_model}, **how)

    def __call__(self, u_BLD: jax.Array) -> jax.Array:
        gate_BLF, up_BLF = (checkpoint_name(v, 'mlp_in') for v in self.in_proj(u_BLD))
        return self.out_proj(checkpoint_name(jax.nn.silu(gate_BLF) * up_BLF, 'mlp_hidden'))


class PreNormResidual(nnx.Module):
    """weight * x + layer(norm(x)), one weight per channel, initialised to 1 (paper: learned residual)."""

    def __init__(self, features: int):
        self.weight = nnx.Param(jnp.ones((features,), jnp.float32), axes=(None,))

    def __call__(self, x_BLD: jax.Array, norm: RMSNorm, layer: Callable[[jax.Array], jax.Array]) -> jax.Array:
        scale_D, weight_D = (collectives.copy_to_stream(v[...]) for v in (norm.scale, self.weight))
        u_BLD, residual_BLD = norm_and_residual(x_BLD, scale_D, weight_D, epsilon=norm.epsilon)
        # In float32: near 1 a bfloat16 weight could not move by less than 0.4%.
        return (residual_BLD + layer(checkpoint_name(u_BLD, 'norm_out'))).astype(x_BLD.dtype)


def inverse_softplus(y: jax.Array) -> jax.Array:
    """x with softplus(x) = y > 0, stable for small y."""
    return y + jnp.log(-jnp.expm1(-y))


def log_uniform(key: jax.Array, shape: tuple[int, ...], low: float, high: float) -> jax.Array:
    """Samples that are uniform in the logarithm, float32, in [low, high]."""
    return jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(low), math.log(high)))
