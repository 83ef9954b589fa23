"""The rotary state-space mixer: y = (L o (R C)(R B)^T) X, computed as a scan (paper, TransXSSM layer).

It has no convolution, no gate and no D skip.
Shape legend: B batch, L length, D model, H heads, P head width, G groups, N state.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.ssd.api import STATES_NAME as SSD_STATES
from pallas_kernels.ssd.context import rotary_ssd_in_context
from transxssm_jax.config import Model
from transxssm_jax.model import layers
from transxssm_jax.model.rope import Rope
from transxssm_jax.parallel import collectives

__all__ = ['SSD_STATES', 'RotarySSD']


class RotarySSD(nnx.Module):
    """Projections to x, B, C and dt, the rotary scan, and the output projection.

    h_t = exp(dt_t a) h_{t-1} + dt_t x_t (R_t b_t)^T;  y_t = h_t R_t c_t.
    a = -exp(a_log), with exp(a_log) uniform in [a_min, a_max] at first; dt = softplus(projection + bias), and the
    bias, where there is one, starts with softplus(bias) log-uniform in [dt_min, dt_max] (Mamba-2).
    """

    def __init__(self, model: Model, *, rngs: nnx.Rngs):
        self.implementation = None if model.ssd_implementation == 'auto' else model.ssd_implementation
        self.chunk_size = model.ssd_chunk_size or None
        heads = {'heads': model.num_heads, 'width': model.head_dim}
        groups = {'groups': model.num_ssd_groups, 'state': model.d_state}
        maps = {'x': heads, 'b': groups, 'c': groups, 'dt': {'heads': model.num_heads}}
        self.in_proj = layers.InputProjections(model, maps, rngs=rngs, float32=['dt'])
        self.out_proj = layers.Linear(
            heads, {'embed': model.d_model}, std=model.init_std, use_bias=model.use_bias, rngs=rngs
        )
        rate_H = jax.random.uniform(rngs.params(), (model.num_heads,), jnp.float32, model.a_min, model.a_max)
        self.a_log = nnx.Param(jnp.log(rate_H), axes=('heads',))
        if model.use_dt_bias:
            dt_H = layers.log_uniform(rngs.params(), (model.num_heads,), model.dt_min, model.dt_max)
            self.dt_bias = nnx.Param(layers.inverse_softplus(dt_H), axes=('heads',))

    @staticmethod
    def rope_width(model: Model) -> int:
        """B and C rotate over the state."""
        return model.d_state

    def __call__(
        self,
        x_BLD: Float[Array, 'B L D'],
        *,
        rope: Rope,
        scale_BL: Float32[Array, 'B L'] | None,
        segment_ids_BL: Int32[Array, 'B L'],
    ) -> Float[Array, 'B L D']:
        """The mixer of x before its norm; the state restarts where segment_ids change.

        Args:
          x_BLD: the residual stream.
          rope: cosines and sines of width d_state, of `rope.tables`.
          scale_BL: factor of C, of `rope.length_scale`, or None.
          segment_ids_BL: tokens of one document share an id.

        Returns:
          [B, L, D] in x's dtype, to be added to the residual stream.
        """
        x_BLHP, b_BLGN, c_BLGN, dt_BLH = self.in_proj(x_BLD)
        x_BLHP, b_BLGN, c_BLGN = (checkpoint_name(v, 'mixer_in') for v in (x_BLHP, b_BLGN, c_BLGN))
        if hasattr(self, 'dt_bias'):
            dt_BLH = dt_BLH + self.dt_bias[...]
        # The argument of softplus is saved and not its value, whose gradient would need the projection again.
        dt_BLH = jax.nn.softplus(checkpoint_name(dt_BLH, 'mixer_in'))
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
        return self.out_proj(checkpoint_name(y_BLHP, 'mixer_out'))
