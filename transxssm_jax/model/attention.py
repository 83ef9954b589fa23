"""The self-attention mixer, with the same rotary embedding as the state-space layers.

Shape legend: B batch, L length, D model, H heads, G groups of K and V, K head width, S tokens that a cache has room for.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.attention.api import causal_attention
from pallas_kernels.attention.api import save_residuals as save_attention_residuals
from pallas_kernels.attention.decode import IMPLEMENTATIONS as DECODE_IMPLEMENTATIONS
from pallas_kernels.attention.decode import decode_attention, write_token
from pallas_kernels.attention.ring import ring_attention
from transxssm_jax.config import Model
from transxssm_jax.model import layers
from transxssm_jax.model.rope import Rope, rotate
from transxssm_jax.parallel import collectives, mesh

__all__ = ['Attention', 'save_attention_residuals']

# Logical axes of a sequence's heads and groups, of one token's, and of a cache.
_HEADS, _GROUPS = ('batch', 'length', 'heads', None), ('batch', 'length', 'groups', None)
_HEADS_OF_TOKEN, _GROUPS_OF_TOKEN = ('batch', 'heads', None), ('batch', 'groups', None)
_CACHE = ('batch', 'groups', None, None)

Cache = tuple[Float[Array, 'B G S K'], Float[Array, 'B G S K']]  # rotated K, V


class Attention(nnx.Module):
    """Causal self-attention with grouped K and V; keys of other documents are never seen.

    Fused: the three projections are one matrix, of u / rms(u), see `Block`.
    """

    def __init__(self, model: Model, *, rngs: nnx.Rngs, fused: bool = False):
        self.model, self.fused = model, fused
        self.implementation = None if model.attention_implementation == 'auto' else model.attention_implementation
        kwargs = dict(std=model.init_std, use_bias=model.use_bias, rngs=rngs, outputs_first=fused)
        heads = {'heads': model.num_heads, 'width': model.head_dim}
        groups = {'groups': model.num_kv_heads, 'width': model.head_dim}
        if fused:
            joint = {
                'groups': model.num_kv_heads,
                'width': (model.num_heads // model.num_kv_heads + 2) * model.head_dim,
            }
            self.in_proj = layers.Linear({'embed': model.d_model}, joint, **kwargs)
        else:
            self.q_proj = layers.Linear({'embed': model.d_model}, heads, **kwargs)
            self.k_proj = layers.Linear({'embed': model.d_model}, groups, **kwargs)
            self.v_proj = layers.Linear({'embed': model.d_model}, groups, **kwargs)
        self.out_proj = layers.Linear(heads, {'embed': model.d_model}, **kwargs)

    @staticmethod
    def fuse(params: dict, norm: dict, model: Model) -> dict:
        """Parameters of the fused form, with those of the norm before it."""
        joined = [params[name] for name in ('q_proj', 'k_proj', 'v_proj')]
        joint = layers.join_projections(joined, model.num_kv_heads)
        return {
            'in_proj': layers.fold_norm(joint, norm),
            'out_proj': layers.outputs_first(params['out_proj'], num_inputs=2),
        }

    def __call__(
        self,
        u_BLD: Float[Array, 'B L D'],
        *,
        rope: Rope,
        scale_BL: Float32[Array, 'B L'] | None,
        segment_ids_BL: Int32[Array, 'B L'],
    ) -> Float[Array, 'B L D']:
        """[B, L, D] -> [B, L, D]; scale_BL multiplies Q."""
        u_BLD, pieces = collectives.copy_to_tensor_parallel(u_BLD, 'heads'), collectives.axis_size('context')

        def attend(q, k, v, segment_ids):
            return ring_attention(
                q,
                k,
                v,
                axis_name='context',
                axis_size=pieces,
                segment_ids=segment_ids,
                implementation=self.implementation,
            )

        y_BLHK = collectives.shard_map(attend, (_HEADS, _GROUPS, _GROUPS, mesh.BATCH), _HEADS)(
            *self._inputs(u_BLD, rope, scale_BL), segment_ids_BL
        )
        return self.out_proj(y_BLHK)

    def prefill(
        self,
        u_BLD: Float[Array, 'B L D'],
        factor_BL: Float32[Array, 'B L'] | None,
        *,
        rope: Rope,
        scale_BL: Float32[Array, 'B L'] | None,
        is_token_BL: Bool[Array, 'B L'],
    ) -> tuple[Float[Array, 'B L D'], Cache]:
        """As __call__ on one document a row, and its keys and values, [B, G, L, K] each; u, factor_BL: of `layers.measured`.

        Rows are filled from the left, so that a token never sees what is none (is_token_BL).
        """
        del is_token_BL

        def attend(q, k, v):
            return causal_attention(q, k, v, implementation=self.implementation)

        q_BLHK, k_BLGK, v_BLGK = self._inputs(u_BLD, rope, scale_BL, factor_BL)
        y_BLHK = collectives.shard_map(attend, *collectives.of_whole_rows(((_HEADS, _GROUPS, _GROUPS), _HEADS)))(
            q_BLHK, k_BLGK, v_BLGK
        )
        return self.out_proj(y_BLHK), (k_BLGK.swapaxes(1, 2), v_BLGK.swapaxes(1, 2))

    def step(
        self,
        u_B1D: Float[Array, 'B 1 D'],
        factor_B1: Float32[Array, 'B 1'] | None,
        cache: Cache,
        *,
        rope: Rope,
        scale_BL: Float32[Array, 'B 1'] | None,
        position_B: Int32[Array, 'B'],
    ) -> tuple[Float[Array, 'B 1 D'], Cache]:
        """One more token at position_B of each row: the layer's output, and the cache with the token's key and value."""
        # The names of implementations are those of causal attention; not all of them are for one query.
        implementation = self.implementation if self.implementation in DECODE_IMPLEMENTATIONS else None

        def attend(q_BHK, k_BGK, v_BGK, k_BGSK, v_BGSK, position_B):
            k_BGSK = write_token(k_BGSK, k_BGK, position_B)
            v_BGSK = write_token(v_BGSK, v_BGK, position_B)
            y_BHK = decode_attention(q_BHK, k_BGSK, v_BGSK, position_B + 1, implementation=implementation)
            return y_BHK, k_BGSK, v_BGSK

        q, k, v = (x[:, 0] for x in self._inputs(u_B1D, rope, scale_BL, factor_B1))
        y_BHK, *cache = collectives.shard_map(
            attend,
            (_HEADS_OF_TOKEN, _GROUPS_OF_TOKEN, _GROUPS_OF_TOKEN, _CACHE, _CACHE, ('batch',)),
            (_HEADS_OF_TOKEN, _CACHE, _CACHE),
        )(q, k, v, *cache, position_B)
        return self.out_proj(y_BHK[:, None]), tuple(cache)

    def empty_cache(self, batch: int, length: int, dtype) -> Cache:
        """Room for the keys and values of rows of up to `length` tokens: two of [B, G, S, K] in dtype."""
        model = self.model
        shape = (batch, model.num_kv_heads, length, model.head_dim)
        return tuple(collectives.constrain(jnp.zeros(shape, dtype), *_CACHE) for _ in range(2))

    def _inputs(self, u_BLD, rope, scale_BL, factor_BL=None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated Q and K, and V."""
        model = self.model
        if self.fused:
            heads = model.num_heads // model.num_kv_heads
            joint = self.in_proj(u_BLD, factor=factor_BL).reshape(
                *u_BLD.shape[:2], model.num_kv_heads, heads + 2, model.head_dim
            )
            q, k_BLGK, v_BLGK = joint[..., :heads, :], joint[..., heads, :], joint[..., heads + 1, :]
            q_BLHK = q.reshape(*u_BLD.shape[:2], model.num_heads, model.head_dim)
        else:
            q_BLHK, k_BLGK, v_BLGK = self.q_proj(u_BLD), self.k_proj(u_BLD), self.v_proj(u_BLD)
        q_BLHK = checkpoint_name(rotate(q_BLHK, rope), 'mixer_in')
        k_BLGK = checkpoint_name(rotate(k_BLGK, rope), 'mixer_in')
        v_BLGK = checkpoint_name(v_BLGK, 'mixer_in')
        if scale_BL is not None:
            q_BLHK = (q_BLHK * scale_BL[..., None, None]).astype(q_BLHK.dtype)
        return q_BLHK, k_BLGK, v_BLGK
