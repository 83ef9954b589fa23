"""Dense causal attention: the definition against which every other implementation is tested.

Shapes: B batch, L query position, S key position, H heads, G key/value heads, R heads per
key/value head (H = G R, head h reads key/value head h // R), K head width.
"""

import jax
import jax.numpy as jnp


def attention(q_BLHK, k_BSGK, v_BSGK, segment_ids_BL, scale):
    """Softmax over all allowed keys, with an [L, L] score matrix. For tests and small L.

    Args:
      q_BLHK: [B, L, H, K] bfloat16, float32 or float64.
      k_BSGK, v_BSGK: [B, L, G, K], same dtype.
      segment_ids_BL: [B, L] int32 or None.
      scale: float, factor of the scores.

    Returns:
      [B, L, H, K], computed in float32 (float64 for float64 inputs), in q's dtype.
    """
    B, L, H, K = q_BLHK.shape
    G = k_BSGK.shape[2]
    wide = jnp.promote_types(q_BLHK.dtype, jnp.float32)
    q_BLGRK = q_BLHK.reshape(B, L, G, H // G, K).astype(wide)
    highest = jax.lax.Precision.HIGHEST
    s_BGRLS = scale * jnp.einsum('BLGRK,BSGK->BGRLS', q_BLGRK, k_BSGK.astype(wide), precision=highest)
    allowed_BLS = jnp.tril(jnp.ones((L, L), bool))[None]
    if segment_ids_BL is not None:
        allowed_BLS &= segment_ids_BL[:, :, None] == segment_ids_BL[:, None, :]
    s_BGRLS = jnp.where(allowed_BLS[:, None, None], s_BGRLS, -jnp.inf)
    p_BGRLS = jax.nn.softmax(s_BGRLS, axis=-1)
    out_BLGRK = jnp.einsum('BGRLS,BSGK->BLGRK', p_BGRLS, v_BSGK.astype(wide), precision=highest)
    return out_BLGRK.reshape(B, L, H, K).astype(q_BLHK.dtype)
