"""The parts that every block is made of.

Shape legend: B batch, L length, D model, F mlp.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from transxssm_jax.parallel import collectives


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32; returns x's dtype."""

    def __init__(self, features: int, epsilon: float):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32), axes=(None,))

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        x32_BLD = x_BLD.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32_BLD), axis=-1, keepdims=True)
        return (x32_BLD * jax.lax.rsqrt(mean_square + self.epsilon) * self.scale[...]).astype(x_BLD.dtype)


def measured(x_BLD: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The inputs of a map that a norm's scale is folded into: x; what the map takes; and the factor of its products.

    The last two are x / rms(x) and None, or, for a single vector, x and the float32 [1, 1] factor 1 / rms(x): a normed x
    would take a kernel of its own, in the time of reading megabytes of weights.
    """
    x32_BLD = x_BLD.astype(jnp.float32)
    squares_BL = jnp.sum(jnp.square(x32_BLD), axis=-1)
    if squares_BL.size == 1:
        # One kernel makes both; without the barrier what x was summed from would be summed anew wherever x is read. What
        # follows the sum belongs to the readers: it would be a kernel of its own here.
        x_BLD, squares_BL = jax.lax.optimization_barrier((x_BLD, squares_BL))
    factor_BL = jax.lax.rsqrt(squares_BL / x_BLD.shape[-1] + epsilon)
    if squares_BL.size == 1:
        return x_BLD, x_BLD, factor_BL
    return x_BLD, (x32_BLD * factor_BL[..., None]).astype(x_BLD.dtype), None


class Linear(nnx.Module):
    """A linear map between groups of axes, e.g. D -> (H, P), with float32 parameters.

    Args:
      inputs, outputs: name -> size of the contracted and of the new axes; the
        names are logical axes ('embed', 'heads', ...; None-like: 'width').
      std: standard deviation of the initial kernel; biases start at 0.
      outputs_first: the kernel is [*outputs, *inputs], of decoding: a single
        vector's product is then sums along rows that lie together in memory,
        which read at full speed and end with what follows them in one kernel.
    """

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        std: float,
        use_bias: bool,
        rngs: nnx.Rngs,
        outputs_first: bool = False,
    ):
        self.num_inputs, self.outputs_first = len(inputs), outputs_first
        sizes = outputs | inputs if outputs_first else inputs | outputs
        kernel = std * jax.random.normal(rngs.params(), tuple(sizes.values()), jnp.float32)
        self.kernel = nnx.Param(kernel, axes=tuple(sizes))
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(tuple(outputs.values()), jnp.float32), axes=tuple(outputs))

    def __call__(self, x: jax.Array, out_dtype=None, factor: jax.Array | None = None) -> jax.Array:
        """Contracts x's last axes with the kernel in x's dtype, accumulating float32.

        Args:
          factor: [*batch] float32, multiplies the product of each vector in float32; default: 1.

        Returns:
          [*batch, *outputs] in out_dtype (default: x's dtype).
        """
        out_dtype = out_dtype or x.dtype
        if factor is None:
            y = self._product(x, out_dtype)
        else:
            y = self._product(x, jnp.float32)
            y = (y * factor.reshape(*factor.shape, *(1,) * (y.ndim - factor.ndim))).astype(out_dtype)
        return (
            y + collectives.all_gather_params(self.bias[...], self.bias.get_metadata('axes'), y.dtype)
            if hasattr(self, 'bias')
            else y
        )

    def _product(self, x, out_dtype):
        n, axes = self.num_inputs, self.kernel.get_metadata('axes')
        kernel = collectives.all_gather_params(self.kernel[...], axes, x.dtype)
        batch = x.shape[: x.ndim - n]
        if self.outputs_first and math.prod(batch) == 1:
            # Not as a dot: for one vector XLA chooses forms that read some matrices at a fifth of the memory's speed.
            outputs = kernel.shape[: kernel.ndim - n]
            products = kernel.reshape(*outputs, -1).astype(jnp.float32) * x.reshape(-1).astype(jnp.float32)
            return jnp.sum(products, axis=-1).astype(out_dtype).reshape(*batch, *outputs)
        # Heads and their width as one axis: of a product with both XLA lays a TPU's result out with the sequence in
        # lanes, and copies it to where a kernel reads heads side by side.
        split = kernel.ndim - n if self.outputs_first else n
        first, second = kernel.shape[:split], kernel.shape[split:]
        outputs, contracted = (first, 1) if self.outputs_first else (second, 0)
        y = jax.lax.dot_general(
            x.reshape(*batch, -1),
            kernel.reshape(math.prod(first), -1),
            (((len(batch),), (contracted,)), ((), ())),
            preferred_element_type=out_dtype,
        )
        y = y.reshape(*batch, *outputs)
        # Of heads or of the MLP's width a device has its part, and so its part of the sum; of D, gathered, all.
        inputs = axes[split:] if self.outputs_first else axes[:split]
        return collectives.all_reduce(y, *(axis for axis in inputs if axis != 'embed'))


def outputs_first(params: dict, num_inputs: int) -> dict:
    """Parameters of a Linear as those of one with outputs_first."""
    kernel = params['kernel']
    order = (*range(num_inputs, kernel.ndim), *range(num_inputs))
    return params | {'kernel': kernel.transpose(order)}


def fold_norm(params: dict, norm: dict) -> dict:
    """Parameters of a Linear of x / rms(x), outputs first, from those of one of RMSNorm(x)."""
    return params | {'kernel': params['kernel'] * norm['scale']}


def join_projections(projections: list[dict], num_groups: int) -> dict:
    """Parameters of several Linear of one input, one vector in, as those of one to [groups, width], outputs first.

    Their first output axis, of heads or groups, is cut into the groups, whose parts are then laid side by side: a mesh
    that splits heads splits the joint matrix as it splits each.
    """

    def join(name, num_inputs):
        leaves = [projection[name] for projection in projections]
        return jnp.concatenate([leaf.reshape(*leaf.shape[:num_inputs], num_groups, -1) for leaf in leaves], axis=-1)

    return outputs_first({name: join(name, 1 if name == 'kernel' else 0) for name in projections[0]}, num_inputs=1)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)). Fused: gate and up are one matrix, of x / rms(x), see `Block`."""

    def __init__(self, d_model: int, d_mlp: int, *, std: float, use_bias: bool, rngs: nnx.Rngs, fused: bool = False):
        kwargs = dict(std=std, use_bias=use_bias, rngs=rngs, outputs_first=fused)
        self.fused = fused
        if fused:
            self.gate_up_proj = Linear({'embed': d_model}, {'pair': 2, 'mlp': d_mlp}, **kwargs)
        else:
            self.gate_proj = Linear({'embed': d_model}, {'mlp': d_mlp}, **kwargs)
            self.up_proj = Linear({'embed': d_model}, {'mlp': d_mlp}, **kwargs)
        self.down_proj = Linear({'mlp': d_mlp}, {'embed': d_model}, **kwargs)

    @staticmethod
    def fuse(params: dict, norm: dict) -> dict:
        """Parameters of the fused form, with those of the norm before it."""
        gate, up = params['gate_proj'], params['up_proj']
        gate_up = {name: jnp.stack([gate[name], up[name]], axis=-2) for name in gate}
        return {
            'gate_up_proj': fold_norm(outputs_first(gate_up, num_inputs=1), norm),
            'down_proj': outputs_first(params['down_proj'], num_inputs=1),
        }

    def __call__(self, x_BLD: jax.Array, factor_BL: jax.Array | None = None) -> jax.Array:
        x_BLD = collectives.copy_to_tensor_parallel(x_BLD, 'mlp')
        if self.fused:
            gate_BLF, up_BLF = jnp.unstack(self.gate_up_proj(x_BLD, factor=factor_BL), axis=-2)
        else:
            gate_BLF, up_BLF = self.gate_proj(x_BLD), self.up_proj(x_BLD)
        gate_BLF = collectives.constrain(gate_BLF, 'batch', 'length', 'mlp')
        up_BLF = collectives.constrain(up_BLF, 'batch', 'length', 'mlp')
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
