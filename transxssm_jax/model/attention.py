"""The self-attention mixer, with the same rotary embedding as the state-space layers.

Shape legend: B batch, L length, D model, H heads, G groups of K and V, K head width.
"""

from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.attention.api import save_residuals as save_attention_residuals
from pallas_kernels.attention.ring import ring_attention
from transxssm_jax.config import Model
from transxssm_jax.model import layers
from transxssm_jax.model.rope import Rope, rotate
from transxssm_jax.parallel import collectives

__all__ = ['Attention', 'save_attention_residuals']


class Attention(nnx.Module):
    """softmax((R q)(R k)^T / sqrt(K)) v with grouped K and V, causal and within each document."""

    def __init__(self, model: Model, *, rngs: nnx.Rngs):
        self.implementation = None if model.attention_implementation == 'auto' else model.attention_implementation
        heads = {'heads': model.num_heads, 'width': model.head_dim}
        groups = {'groups': model.num_kv_heads, 'width': model.head_dim}
        self.in_proj = layers.InputProjections(model, {'q': heads, 'k': groups, 'v': groups}, rngs=rngs)
        self.out_proj = layers.Linear(
            heads, {'embed': model.d_model}, std=model.init_std, use_bias=model.use_bias, rngs=rngs
        )

    @staticmethod
    def rope_width(model: Model) -> int:
        """Q and K rotate over the head width."""
        return model.head_dim

    def __call__(
        self,
        x_BLD: Float[Array, 'B L D'],
        *,
        rope: Rope,
        scale_BL: Float32[Array, 'B L'] | None,
        segment_ids_BL: Int32[Array, 'B L'],
    ) -> Float[Array, 'B L D']:
        """The mixer of x before its norm; keys of other documents are never seen.

        Args:
          x_BLD: the residual stream.
          rope: cosines and sines of width head_dim, of `rope.tables`.
          scale_BL: factor of Q, of `rope.length_scale`, or None.
          segment_ids_BL: tokens of one document share an id.

        Returns:
          [B, L, D] in x's dtype, to be added to the residual stream.
        """
        q_BLHK, k_BLGK, v_BLGK = self.in_proj(x_BLD)
        q_BLHK, k_BLGK = rotate(q_BLHK, rope), rotate(k_BLGK, rope)
        q_BLHK, k_BLGK, v_BLGK = (checkpoint_name(v, 'mixer_in') for v in (q_BLHK, k_BLGK, v_BLGK))
        if scale_BL is not None:
            q_BLHK = (q_BLHK * scale_BL[..., None, None]).astype(q_BLHK.dtype)
        y_BLHK = ring_attention(
            q_BLHK,
            k_BLGK,
            v_BLGK,
            segment_ids=segment_ids_BL,
            implementation=self.implementation,
            **collectives.context_axis(),
        )
        return self.out_proj(y_BLHK)
