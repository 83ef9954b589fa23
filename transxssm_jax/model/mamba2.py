"""The Mamba-2 mixer (Dao and Gu, 2024): a short convolution, the scan without rotation, a D skip and a gate.

Shape legend: B batch, L length, D model, H heads (`Model.num_mamba_heads`), P head width, G groups, N state.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.gated_norm import skip_gate_norm
from pallas_kernels.ssd.context import rotary_ssd_in_context
from transxssm_jax.config import Model
from transxssm_jax.model import layers, ssd
from transxssm_jax.model.convolution import CausalConvolution
from transxssm_jax.model.layer_costs import FLOAT32, LayerCosts, dtype_bytes
from transxssm_jax.model.rope import Rope
from transxssm_jax.parallel import collectives


class Mamba2(nnx.Module):
    """x, b, c = conv(maps of u);  h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T;  out(norm((h_t c_t + d x_t) * silu(z_t))).

    As the reference module of mamba_ssm with norm_before_gate=False: the gated RMSNorm is over the heads of one group of B
    and C. a, dt and its bias start as those of `RotarySSD`, d at 1. With model.bc_norm, b and c of every group pass an RMSNorm
    behind the convolution.
    """

    def __init__(self, model: Model, *, rngs: nnx.Rngs):
        self.implementation = None if model.ssd_implementation == 'auto' else model.ssd_implementation
        self.chunk_size = model.ssd_chunk_size or None
        H = model.num_mamba_heads
        heads = {'heads': H, 'width': model.head_dim}
        groups = {'groups': model.num_ssd_groups, 'state': model.d_state}
        inputs = {'x': heads, 'b': groups, 'c': groups}
        self.in_proj = layers.InputProjections(
            model, {'z': heads, **inputs, 'dt': {'heads': H}}, rngs=rngs, float32=['dt']
        )
        self.conv = CausalConvolution(model.conv_width, inputs, rngs=rngs)
        self.norm = GatedRMSNorm(heads, model.norm_epsilon)
        self.out_proj = layers.Linear(model, heads, {'embed': model.d_model}, rngs=rngs)
        self.a_log = nnx.Param(ssd.initial_a_log(model, H, rngs), axes=('heads',))
        self.dt_bias = nnx.Param(ssd.initial_dt_bias(model, H, rngs), axes=('heads',))
        self.d_skip = nnx.Param(jnp.ones((H,), jnp.float32), axes=('heads',))
        if model.bc_norm:
            self.b_norm, self.c_norm = ssd.group_norms(model)

    @staticmethod
    def rope_width(model: Model) -> int:
        """Nothing rotates: the convolution and the decay tell positions apart."""
        return 0

    @staticmethod
    def costs(model: Model) -> LayerCosts:
        """Costs of one layer; its kernel is the scan and the convolution."""
        D, H, P, N, G = model.d_model, model.num_mamba_heads, model.head_dim, model.d_state, model.num_ssd_groups
        size = dtype_bytes(model)
        convolved, before = H * P + 2 * G * N, model.conv_width - 1
        state = FLOAT32 * H * P * N
        flops = ssd.scan_flops(H, P, G, N) + 2 * model.conv_width * convolved
        return LayerCosts(
            in_proj_flops=2 * D * (H * P + convolved + H),  # z; x, B and C; dt
            out_proj_flops=2 * H * P * D,
            kernel_flops=lambda attended: flops,
            kernel_efficiency=ssd.KERNEL_EFFICIENCY,
            context_flops=2 * 2 * H * P * N,
            mixer_in_bytes=size * (H * P + convolved) + FLOAT32 * H,
            mixer_out_bytes=size * H * P,
            residual_bytes=ssd.residual_bytes(model, H),
            state_bytes=state + size * before * convolved,
            cache_bytes=0,
            handed_over='states',
            # Besides the scan's states, the tokens before a shard and the gradients of the tokens after it.
            context_bytes=lambda shards, tokens: (
                2 * state * math.ceil(math.log2(shards)) + (2 * size * before * convolved if shards > 1 else 0)
            ),
        )

    def __call__(
        self,
        u_BLD: Float[Array, '*stream D'],
        *,
        rope: Rope | None,
        scale_BL: Float32[Array, 'B L'] | None,
        segment_ids_BL: Int32[Array, 'B L'],
    ) -> Float[Array, '*stream D']:
        """The mixer of u = norm(x); convolution and state restart where segment_ids change.

        Args:
          u_BLD: norm(x) of the residual stream x, [B, L, D] or this device's part of it.
          rope, scale_BL: None, see `rope_width`.
          segment_ids_BL: tokens of one document share an id.

        Returns:
          As x, to be added to the residual stream.
        """
        *maps, dt_BLH = self.in_proj(u_BLD)
        # What is kept for the backward pass is the convolution's input: its output costs nothing but a pass over memory.
        z_BLHP, *maps = (checkpoint_name(v, 'mixer_in') for v in maps)
        dt_BLH = jax.nn.softplus(checkpoint_name(dt_BLH + self.dt_bias[...], 'mixer_in'))
        x_BLHP, b_BLGN, c_BLGN = self.conv(maps, segment_ids_BL)
        if hasattr(self, 'b_norm'):
            b_BLGN, c_BLGN = self.b_norm(b_BLGN), self.c_norm(c_BLGN)
        y_BLHP = rotary_ssd_in_context(
            x_BLHP,
            dt_BLH,
            -jnp.exp(self.a_log[...]),
            b_BLGN,
            c_BLGN,
            rope,
            segment_ids=segment_ids_BL,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
            **collectives.context_axis(),
        )
        y_BLHP = checkpoint_name(y_BLHP, 'mixer_out')
        return self.out_proj(self.norm(y_BLHP, x_BLHP, z_BLHP, self.d_skip[...], num_groups=b_BLGN.shape[2]))


class GatedRMSNorm(nnx.Module):
    """RMSNorm((y + d x) * silu(z)) * scale over the heads of each group, in float32; returns z's dtype."""

    def __init__(self, heads: dict[str, int], epsilon: float):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(tuple(heads.values()), jnp.float32), axes=tuple(heads))

    def __call__(
        self, y_BLHP: jax.Array, x_BLHP: jax.Array, z_BLHP: jax.Array, d_H: jax.Array, num_groups: int
    ) -> jax.Array:
        """num_groups: of the heads that are here."""
        return skip_gate_norm(y_BLHP, x_BLHP, z_BLHP, d_H, self.scale[...], epsilon=self.epsilon, num_groups=num_groups)
