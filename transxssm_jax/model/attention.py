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
from transxssm_jax.model.layer_costs import BFLOAT16, FLOAT32, LayerCosts, dtype_bytes
from transxssm_jax.model.rope import Rope, rotate
from transxssm_jax.parallel import collectives

__all__ = ['Attention', 'save_attention_residuals']


class Attention(nnx.Module):
    """softmax((R q)(R k)^T / sqrt(K)) v with grouped K and V, causal and within each document.

    R is the identity where model.attention_encoding='none'. With model.qk_norm every head of q and k passes an RMSNorm first.
    """

    def __init__(self, model: Model, *, rngs: nnx.Rngs):
        self.implementation = None if model.attention_implementation == 'auto' else model.attention_implementation
        heads = {'heads': model.num_heads, 'width': model.head_dim}
        groups = {'groups': model.num_kv_heads, 'width': model.head_dim}
        self.in_proj = layers.InputProjections(model, {'q': heads, 'k': groups, 'v': groups}, rngs=rngs)
        self.out_proj = layers.Linear(model, heads, {'embed': model.d_model}, rngs=rngs)

        if model.qk_norm:
            self.q_norm = layers.HeadNorm('heads', model.head_dim, model.norm_epsilon)
            self.k_norm = layers.HeadNorm('groups', model.head_dim, model.norm_epsilon)

    @staticmethod
    def rope_width(model: Model) -> int:
        """Q and K rotate over the head width; 0: they do not rotate."""
        return model.head_dim if model.attention_encoding == 'rope' else 0

    @staticmethod
    def costs(model: Model) -> LayerCosts:
        """Costs of one layer; the kernel counts the tokens that a token attends to."""
        D, H, K, G = model.d_model, model.num_heads, model.head_dim, model.num_kv_heads
        size = dtype_bytes(model)
        return LayerCosts(
            in_proj_flops=2 * D * (H * K + 2 * G * K),
            out_proj_flops=2 * H * K * D,
            kernel_flops=lambda attended: 4 * H * K * attended,  # QK^T and PV
            kernel_efficiency=0.33,  # H200, 8 x 4096 at 1.3B, cuDNN: one layer forward and backward in 5.1 ms
            context_flops=0,
            mixer_in_bytes=size * (H * K + 2 * G * K),
            mixer_out_bytes=size * H * K,
            residual_bytes=FLOAT32 * H,  # log-sum-exp
            state_bytes=0,
            cache_bytes=size * 2 * G * K,
            handed_over='keys_values',
            # Every other shard's K and V, forward and backward, in bfloat16, and the sums of their gradients in float32.
            context_bytes=lambda shards, tokens: (2 * BFLOAT16 + FLOAT32) * (shards - 1) * tokens * 2 * G * K,
        )

    def __call__(
        self,
        u_BLD: Float[Array, '*stream D'],
        *,
        rope: Rope | None,
        scale_BL: Float32[Array, 'B L'] | None,
        segment_ids_BL: Int32[Array, 'B L'],
    ) -> Float[Array, '*stream D']:
        """The mixer of u = norm(x); keys of other documents are never seen.

        Args:
          u_BLD: norm(x) of the residual stream x, [B, L, D] or this device's part of it.
          rope: cosines and sines of width head_dim, of `rope.tables`; None where nothing rotates.
          scale_BL: factor of Q, of `rope.length_scale`, or None.
          segment_ids_BL: tokens of one document share an id.

        Returns:
          As x, to be added to the residual stream.
        """
        q_BLHK, k_BLGK, v_BLGK = self.in_proj(u_BLD)
        if hasattr(self, 'q_norm'):
            # The backward pass of a norm needs its input, which then is what is kept: rotated it would be kept twice.
            q_BLHK, k_BLGK, v_BLGK = (checkpoint_name(v, 'mixer_in') for v in (q_BLHK, k_BLGK, v_BLGK))
            q_BLHK, k_BLGK = self.q_norm(q_BLHK), self.k_norm(k_BLGK)
        if rope is not None:
            q_BLHK, k_BLGK = rotate(q_BLHK, rope), rotate(k_BLGK, rope)
        if not hasattr(self, 'q_norm'):
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
