"""The rotary state-space mixer: y = (L o (R C)(R B)^T) X, computed as a scan (paper, TransXSSM layer).

It has no gate, and no convolution and no D skip unless model.ssd_encoding='conv1d_d' puts them in place of the rotation.
Shape legend: B batch, L length, D model, H heads, P head width, G groups, N state.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.ssd.api import STATES_NAME as SSD_STATES
from pallas_kernels.ssd.context import rotary_ssd_in_context
from transxssm_jax.config import Model
from transxssm_jax.model import layers
from transxssm_jax.model.convolution import CausalConvolution, skip
from transxssm_jax.model.layer_costs import FLOAT32, STATE_INTERVAL, LayerCosts, dtype_bytes
from transxssm_jax.model.rope import Rope
from transxssm_jax.parallel import collectives

__all__ = ['SSD_STATES', 'RotarySSD']

# Chunk length at which the scan's FLOPs are counted: the least-work figures of the kernel contract use it, and it keeps
# MFU comparable between chunk sizes.
SCAN_CHUNK = 128
KERNEL_EFFICIENCY = 0.115  # H100, 8 x 4096 at 1.3B: 21 layers forward and backward in 27 ms


class RotarySSD(nnx.Module):
    """Projections to x, B, C and dt, the rotary scan, and the output projection.

    h_t = exp(dt_t a) h_{t-1} + dt_t x_t (R_t b_t)^T;  y_t = h_t R_t c_t.
    a = -exp(a_log), with exp(a_log) uniform in [a_min, a_max] at first; dt = softplus(projection + bias), and the
    bias, where there is one, starts with softplus(bias) log-uniform in [dt_min, dt_max] (Mamba-2).

    That is model.ssd_encoding='rope'. Of the paper's table 2: with 'decay_only' R is the identity, and with 'conv1d_d' too,
    but x, b and c pass Mamba-2's convolution, and y_t = h_t c_t + d x_t.

    With model.bc_norm, b and c of every group pass an RMSNorm before they rotate.
    """

    def __init__(self, model: Model, *, rngs: nnx.Rngs):
        self.implementation = None if model.ssd_implementation == 'auto' else model.ssd_implementation
        self.chunk_size = model.ssd_chunk_size or None
        heads = {'heads': model.num_heads, 'width': model.head_dim}
        groups = {'groups': model.num_ssd_groups, 'state': model.d_state}
        maps = {'x': heads, 'b': groups, 'c': groups, 'dt': {'heads': model.num_heads}}
        self.in_proj = layers.InputProjections(model, maps, rngs=rngs, float32=['dt'])
        self.out_proj = layers.Linear(model, heads, {'embed': model.d_model}, rngs=rngs)
        self.a_log = nnx.Param(initial_a_log(model, model.num_heads, rngs), axes=('heads',))
        if model.use_dt_bias:
            self.dt_bias = nnx.Param(initial_dt_bias(model, model.num_heads, rngs), axes=('heads',))
        if model.ssd_encoding == 'conv1d_d':
            inputs = {name: axes for name, axes in maps.items() if name != 'dt'}
            self.conv = CausalConvolution(model.conv_width, inputs, rngs=rngs)
            self.d_skip = nnx.Param(jnp.ones((model.num_heads,), jnp.float32), axes=('heads',))
        if model.bc_norm:
            self.b_norm, self.c_norm = group_norms(model)

    @staticmethod
    def rope_width(model: Model) -> int:
        """B and C rotate over the state; 0: they do not rotate."""
        return model.d_state if model.ssd_encoding == 'rope' else 0

    @staticmethod
    def costs(model: Model) -> LayerCosts:
        """Costs of one layer; the scan is counted in chunks of SCAN_CHUNK tokens."""
        D, H, P, N, G = model.d_model, model.num_heads, model.head_dim, model.d_state, model.num_ssd_groups
        size = dtype_bytes(model)
        state = FLOAT32 * H * P * N
        # Of the convolution, where there is one: what it reads, and its tokens before the first.
        convolved = H * P + 2 * G * N if model.ssd_encoding == 'conv1d_d' else 0
        before = size * (model.conv_width - 1) * convolved
        flops = scan_flops(H, P, G, N) + 2 * model.conv_width * convolved
        return LayerCosts(
            in_proj_flops=2 * D * (H * P + 2 * G * N + H),  # x; B and C; dt
            out_proj_flops=2 * H * P * D,
            kernel_flops=lambda attended: flops,
            kernel_efficiency=KERNEL_EFFICIENCY,
            context_flops=2 * 2 * H * P * N,  # what the state before a shard adds to y, and its gradient
            mixer_in_bytes=size * (H * P + 2 * G * N) + FLOAT32 * H,
            mixer_out_bytes=size * H * P,
            residual_bytes=residual_bytes(model, H),
            state_bytes=state + before,
            cache_bytes=0,
            handed_over='states',
            # The prefix scan over shards passes one state on in each of its rounds, forward and backward.
            context_bytes=lambda shards, tokens: (
                2 * state * math.ceil(math.log2(shards)) + (2 * before if shards > 1 else 0)
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
        """The mixer of u = norm(x); the state restarts where segment_ids change.

        Args:
          u_BLD: norm(x) of the residual stream x, [B, L, D] or this device's part of it.
          rope: cosines and sines of width d_state, of `rope.tables`; None where nothing rotates.
          scale_BL: factor of C, of `rope.length_scale`, or None.
          segment_ids_BL: tokens of one document share an id.

        Returns:
          As x, to be added to the residual stream.
        """
        x_BLHP, b_BLGN, c_BLGN, dt_BLH = self.in_proj(u_BLD)
        x_BLHP, b_BLGN, c_BLGN = (checkpoint_name(v, 'mixer_in') for v in (x_BLHP, b_BLGN, c_BLGN))
        if hasattr(self, 'dt_bias'):
            dt_BLH = dt_BLH + self.dt_bias[...]
        # The argument of softplus is saved and not its value, whose gradient would need the projection again.
        dt_BLH = jax.nn.softplus(checkpoint_name(dt_BLH, 'mixer_in'))
        if hasattr(self, 'conv'):
            x_BLHP, b_BLGN, c_BLGN = self.conv((x_BLHP, b_BLGN, c_BLGN), segment_ids_BL)
        if hasattr(self, 'b_norm'):
            b_BLGN, c_BLGN = self.b_norm(b_BLGN), self.c_norm(c_BLGN)
        if scale_BL is not None:
            c_BLGN = (c_BLGN * scale_BL[..., None, None]).astype(c_BLGN.dtype)
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
        if hasattr(self, 'conv'):
            y_BLHP = skip(y_BLHP, x_BLHP, self.d_skip[...]).astype(y_BLHP.dtype)
        return self.out_proj(y_BLHP)


# ---- what every mixer on the scan shares ---------------------------------------


def initial_a_log(model: Model, num_heads: int, rngs: nnx.Rngs) -> jax.Array:
    """float32 [H] whose exp, the rate of decay -a, is uniform in [a_min, a_max]."""
    return jnp.log(jax.random.uniform(rngs.params(), (num_heads,), jnp.float32, model.a_min, model.a_max))


def initial_dt_bias(model: Model, num_heads: int, rngs: nnx.Rngs) -> jax.Array:
    """float32 [H] whose softplus is log-uniform in [dt_min, dt_max]."""
    return layers.inverse_softplus(layers.log_uniform(rngs.params(), (num_heads,), model.dt_min, model.dt_max))


def group_norms(model: Model) -> tuple[layers.HeadNorm, layers.HeadNorm]:
    """The norms of B and C."""
    b_norm, c_norm = (layers.HeadNorm('groups', model.d_state, model.norm_epsilon) for _ in 'bc')
    return b_norm, c_norm


def scan_flops(H: int, P: int, G: int, N: int) -> int:
    """Forward FLOPs of the scan per token, in chunks of SCAN_CHUNK."""
    # Scores and scores times x over half a chunk; state in and state out.
    return G * N * SCAN_CHUNK + H * P * SCAN_CHUNK + 4 * H * N * P


def residual_bytes(model: Model, num_heads: int) -> float:
    """The states that the scan keeps for its backward pass, per token."""
    return dtype_bytes(model) * num_heads * model.head_dim * model.d_state / STATE_INTERVAL
