"""The rotary state-space mixer: y = (L o (R C)(R B)^T) X, computed as a scan.

No convolution, no gate, no D skip (paper, TransXSSM layer).
Shape legend: B batch, L length, D model, H heads, P head width, G groups, N state.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.ssd.api import STATES_NAME as SSD_STATES
from pallas_kernels.ssd.api import rotary_ssd, rotary_ssd_step
from pallas_kernels.ssd.context import rotary_ssd_in_context
from transxssm_jax.config import Model
from transxssm_jax.model import layers
from transxssm_jax.model.rope import Rope
from transxssm_jax.parallel import collectives, mesh

__all__ = ['SSD_STATES', 'RotarySSD']

# Logical axes of what the scan takes and gives.
_HEADS, _GROUPS, _TABLE = (
    ('batch', 'length', 'heads', None),
    ('batch', 'length', 'groups', None),
    ('batch', 'length', None),
)
_SEQUENCE = (_HEADS, ('batch', 'length', 'heads'), ('heads',), _GROUPS, _GROUPS, (_TABLE, _TABLE))
_STATE = ('batch', 'heads', None, None)


class RotarySSD(nnx.Module):
    """x, B, C, dt projections, the rotary scan, and the output projection.

    a = -exp(a_log) with exp(a_log) uniform in [a_min, a_max]; the dt bias, where
    there is one, starts softplus(bias) log-uniform in [dt_min, dt_max] (Mamba-2).
    Fused: the four projections are one matrix, of u / rms(u), see `Block`.
    """

    def __init__(self, model: Model, *, rngs: nnx.Rngs, fused: bool = False):
        self.model, self.fused = model, fused
        self.implementation = None if model.ssd_implementation == 'auto' else model.ssd_implementation
        self.chunk_size = model.ssd_chunk_size or None
        kwargs = dict(std=model.init_std, use_bias=model.use_bias, rngs=rngs, outputs_first=fused)
        heads = {'heads': model.num_heads, 'width': model.head_dim}
        groups = {'groups': model.num_ssd_groups, 'state': model.d_state}
        if fused:
            joint = {'groups': model.num_ssd_groups, 'width': sum(self._widths())}
            self.in_proj = layers.Linear({'embed': model.d_model}, joint, **kwargs)
        else:
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

    def _widths(self) -> tuple[int, int, int, int]:
        """Widths of x, B, C, dt of one group."""
        heads = self.model.num_heads // self.model.num_ssd_groups
        return heads * self.model.head_dim, self.model.d_state, self.model.d_state, heads

    @staticmethod
    def fuse(params: dict, norm: dict, model: Model) -> dict:
        """Parameters of the fused form, with those of the norm before it."""
        joined = [params[name] for name in ('x_proj', 'b_proj', 'c_proj', 'dt_proj')]
        rest = {name: params[name] for name in ('a_log', 'dt_bias') if name in params}
        joint = layers.join_projections(joined, model.num_ssd_groups)
        return {
            'in_proj': layers.fold_norm(joint, norm),
            'out_proj': layers.outputs_first(params['out_proj'], num_inputs=2),
            **rest,
        }

    def __call__(
        self,
        u_BLD: Float[Array, 'B L D'],
        *,
        rope: Rope,
        scale_BL: Float32[Array, 'B L'] | None,
        segment_ids_BL: Int32[Array, 'B L'],
    ) -> Float[Array, 'B L D']:
        """[B, L, D] -> [B, L, D]; the state restarts where segment_ids change. scale_BL multiplies C."""
        u_BLD, pieces = collectives.copy_to_tensor_parallel(u_BLD, 'heads'), collectives.axis_size('context')

        def scan(x, dt, a, b, c, rope, segment_ids):
            return rotary_ssd_in_context(
                x,
                dt,
                a,
                b,
                c,
                rope,
                axis_name='context',
                axis_size=pieces,
                segment_ids=segment_ids,
                chunk_size=self.chunk_size,
                implementation=self.implementation,
            )

        y_BLHP = collectives.shard_map(scan, (*_SEQUENCE, mesh.BATCH), _HEADS)(
            *self._inputs(u_BLD, scale_BL), rope, segment_ids_BL
        )
        return self.out_proj(checkpoint_name(y_BLHP, 'mixer_out'))

    def prefill(
        self,
        u_BLD: Float[Array, 'B L D'],
        factor_BL: Float32[Array, 'B L'] | None,
        *,
        rope: Rope,
        scale_BL: Float32[Array, 'B L'] | None,
        is_token_BL: Bool[Array, 'B L'],
    ) -> tuple[Float[Array, 'B L D'], Float32[Array, 'B H P N']]:
        """As __call__ on one document a row, and the state after its last token; u, factor_BL: of `layers.measured`.

        Where is_token_BL is False dt is 0: the state keeps its value and takes nothing in.
        """

        def scan(x, dt, a, b, c, rope):
            return rotary_ssd(x, dt, a, b, c, rope, chunk_size=self.chunk_size, implementation=self.implementation)

        x_BLHP, dt_BLH, *rest = self._inputs(u_BLD, scale_BL, factor_BL)
        dt_BLH = jnp.where(is_token_BL[..., None], dt_BLH, 0)
        y_BLHP, state_BHPN = collectives.shard_map(scan, *collectives.of_whole_rows((_SEQUENCE, (_HEADS, _STATE))))(
            x_BLHP, dt_BLH, *rest, rope
        )
        return self.out_proj(y_BLHP), state_BHPN

    def step(
        self,
        u_B1D: Float[Array, 'B 1 D'],
        factor_B1: Float32[Array, 'B 1'] | None,
        state_BHPN: Float32[Array, 'B H P N'],
        *,
        rope: Rope,
        scale_BL: Float32[Array, 'B 1'] | None,
        position_B: Int32[Array, 'B'],
    ) -> tuple[Float[Array, 'B 1 D'], Float32[Array, 'B H P N']]:
        """One more token: the layer's output and the state after it. The position is in rope."""
        del position_B
        x, dt, a, b, c = self._inputs(u_B1D, scale_BL, factor_B1)
        rope_B = tuple(table[:, 0] for table in rope)
        state_BHPN, y_BHP = rotary_ssd_step(state_BHPN, x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], rope_B)
        return self.out_proj(y_BHP[:, None]), collectives.constrain(state_BHPN, *_STATE)

    def empty_cache(self, batch: int, length: int, dtype) -> jax.Array:
        """The state before a row's first token, float32 [B, H, P, N] whatever the row's length and the model's dtype."""
        del length, dtype
        model = self.model
        return collectives.constrain(
            jnp.zeros((batch, model.num_heads, model.head_dim, model.d_state), jnp.float32), *_STATE
        )

    def _inputs(self, u_BLD, scale_BL, factor_BL=None):
        """x, dt, a, B, C of the scan."""
        dt_bias = self.dt_bias[...] if hasattr(self, 'dt_bias') else jnp.zeros_like(self.a_log[...])
        if self.fused:
            model, shape = self.model, u_BLD.shape[:2]
            *_, width = widths = self._widths()
            places = [sum(widths[:i]) for i in (1, 2, 3)]
            joint = self.in_proj(u_BLD, jnp.float32, factor_BL)
            bias = jnp.pad(dt_bias.reshape(model.num_ssd_groups, width), ((0, 0), (places[-1], 0)))
            joint = jnp.where(jnp.arange(sum(widths)) < places[-1], joint, jax.nn.softplus(joint + bias))
            if math.prod(shape) == 1:
                # One kernel over the whole product; a row's state is updated in as long as it takes to start one more.
                joint = jax.lax.optimization_barrier(joint)
            x, b, c, dt = jnp.split(joint, places, axis=-1)
            x_BLHP = x.astype(u_BLD.dtype).reshape(*shape, model.num_heads, model.head_dim)
            b_BLGN, c_BLGN = b.astype(u_BLD.dtype), c.astype(u_BLD.dtype)
            dt_BLH = dt.reshape(*shape, model.num_heads)
        else:
            x_BLHP = checkpoint_name(self.x_proj(u_BLD), 'mixer_in')
            b_BLGN = checkpoint_name(self.b_proj(u_BLD), 'mixer_in')
            c_BLGN = checkpoint_name(self.c_proj(u_BLD), 'mixer_in')
            # What softplus takes and not what it gives: its gradient would take the projection again.
            dt_BLH = jax.nn.softplus(checkpoint_name(self.dt_proj(u_BLD, out_dtype=jnp.float32) + dt_bias, 'mixer_in'))
        if scale_BL is not None:
            c_BLGN = (c_BLGN * scale_BL[..., None, None]).astype(c_BLGN.dtype)
        return x_BLHP, dt_BLH, -jnp.exp(self.a_log[...]), b_BLGN, c_BLGN
