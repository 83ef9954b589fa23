"""The rotary state-space mixer: y = (L o (R C)(R B)^T) X, computed as a scan.

No convolution, no gate, no D skip (paper, TransXSSM layer).
Shape legend: B batch, L length, D model, H heads, P head width, G groups, N state.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.ssd.api import rotary_ssd
from pallas_kernels.ssd.xla import STATES_NAME as SSD_STATES
from transxssm_jax import layers, mesh
from transxssm_jax.config import Model
from transxssm_jax.rope import Rope

__all__ = ['SSD_STATES', 'RotarySSD']


class RotarySSD(nnx.Module):
    """x, B, C, dt projections, the rotary scan, and the output projection.

    a = -exp(a_log) with exp(a_log) uniform in [a_min, a_max]; the dt bias, where
    there is one, starts softplus(bias) log-uniform in [dt_min, dt_max] (Mamba-2).
    """

    def __init__(self, model: Model, *, rngs: nnx.Rngs):
        self.implementation = None if model.ssd_implementation == 'auto' else model.ssd_implementation
        self.chunk_size = model.ssd_chunk_size or None
        kwargs = dict(std=model.init_std, use_bias=model.use_bias, rngs=rngs)
        heads = {'heads': model.num_heads, 'width': model.head_dim}
        groups = {'groups': model.num_ssd_groups, 'state': model.d_state}
        self.x_proj = layers.Linear({'embed': model.d_model}, heads, **kwargs)
        self.b_proj = layers.Linear({'embed': model.d_model}, groups, **kwargs)
        self.c_proj = layers.Linear({'embed': model.d_model}, groups, **kwargs)
        self.dt_proj = layers.Linear({'embed': model.d_model}, {'heads': model.num_heads}, **kwargs)
        self.out_proj = layers.Linear(heads, {'embed': model.d_model}, **kwargs)
        rate_H = jax.random.uniform(rngs.params(), (model.num_heads,), jnp.float32, model.a_min, model.a_max)
        self.a_log = nnx.Param(jnp.log(rate_H), axes=('heads',))
        if model.use_dt_bias:
            dt_H = layers.log_uniform(rngs.params(), (model.num_heads,), model.dt_min, model.dt_max)
            self.dt_bias = nnx.Param(layers.inverse_softplus(dt_H), axes=('heads',))

    def __call__(self, u_BLD: Float[Array, 'B L D'], *, rope: Rope, scale_BL: Float32[Array, 'B L'] | None,
                 segment_ids_BL: Int32[Array, 'B L']) -> Float[Array, 'B L D']:
        """[B, L, D] -> [B, L, D]; the state restarts where segment_ids change. scale_BL multiplies C."""
        x_BLHP = checkpoint_name(self.x_proj(u_BLD), 'mixer_in')
        b_BLGN = checkpoint_name(self.b_proj(u_BLD), 'mixer_in')
        c_BLGN = checkpoint_name(self.c_proj(u_BLD), 'mixer_in')
        dt_BLH = self.dt_proj(u_BLD, out_dtype=jnp.float32)
        if hasattr(self, 'dt_bias'):
            dt_BLH = dt_BLH + self.dt_bias[...]
        dt_BLH = checkpoint_name(jax.nn.softplus(dt_BLH), 'mixer_in')
        if scale_BL is not None:
            c_BLGN = (c_BLGN * scale_BL[..., None, None]).astype(c_BLGN.dtype)
        a_H = -jnp.exp(self.a_log[...])

        def scan(x, dt, a, b, c, rope, segment_ids):
            return rotary_ssd(x, dt, a, b, c, rope, segment_ids=segment_ids,
                              chunk_size=self.chunk_size, implementation=self.implementation)[0]

        table = ('batch', None, None)
        y_BLHP = mesh.on_shards(
            scan,
            (('batch', None, 'heads', None), ('batch', None, 'heads'), ('heads',), ('batch', None, 'groups', None),
             ('batch', None, 'groups', None), (table, table), ('batch', None)),
            ('batch', None, 'heads', None))(x_BLHP, dt_BLH, a_H, b_BLGN, c_BLGN, rope, segment_ids_BL)
        return self.out_proj(checkpoint_name(y_BLHP, 'mixer_out'))
