"""The self-attention mixer, with the same rotary embedding as the state-space layers.

Shape legend: B batch, L length, D model, H heads, G groups of K and V, K head width.
"""

from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.attention.api import causal_attention
from pallas_kernels.attention.api import save_residuals as save_attention_residuals
from transxssm_jax import layers, mesh
from transxssm_jax.config import Model
from transxssm_jax.rope import Rope, rotate

__all__ = ['Attention', 'save_attention_residuals']


class Attention(nnx.Module):
    """Causal self-attention with grouped K and V; keys of other documents are never seen."""

    def __init__(self, model: Model, *, rngs: nnx.Rngs):
        self.implementation = None if model.attention_implementation == 'auto' else model.attention_implementation
        kwargs = dict(std=model.init_std, use_bias=model.use_bias, rngs=rngs)
        heads = {'heads': model.num_heads, 'width': model.head_dim}
        groups = {'groups': model.num_kv_heads, 'width': model.head_dim}
        self.q_proj = layers.Linear({'embed': model.d_model}, heads, **kwargs)
        self.k_proj = layers.Linear({'embed': model.d_model}, groups, **kwargs)
        self.v_proj = layers.Linear({'embed': model.d_model}, groups, **kwargs)
        self.out_proj = layers.Linear(heads, {'embed': model.d_model}, **kwargs)

    def __call__(self, u_BLD: Float[Array, 'B L D'], *, rope: Rope, scale_BL: Float32[Array, 'B L'] | None,
                 segment_ids_BL: Int32[Array, 'B L']) -> Float[Array, 'B L D']:
        """[B, L, D] -> [B, L, D]; scale_BL multiplies Q."""
        q_BLHK = checkpoint_name(rotate(self.q_proj(u_BLD), rope), 'mixer_in')
        k_BLGK = checkpoint_name(rotate(self.k_proj(u_BLD), rope), 'mixer_in')
        v_BLGK = checkpoint_name(self.v_proj(u_BLD), 'mixer_in')
        if scale_BL is not None:
            q_BLHK = (q_BLHK * scale_BL[..., None, None]).astype(q_BLHK.dtype)

        def attend(q, k, v, segment_ids):
            return causal_attention(q, k, v, segment_ids=segment_ids, implementation=self.implementation)

        heads, groups = ('batch', None, 'heads', None), ('batch', None, 'groups', None)
        y_BLHK = mesh.on_shards(attend, (heads, groups, groups, ('batch', None)), heads)(
            q_BLHK, k_BLGK, v_BLGK, segment_ids_BL)
        return self.out_proj(y_BLHK)
