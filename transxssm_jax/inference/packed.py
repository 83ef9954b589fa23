"""The layers in the form for decoding: a norm and all maps of one input are one matrix.

A token's matrix products are bound by reading weights, and few large reads are faster than many small ones. So the
scale of a norm is folded into the maps that read it, the maps of one input are packed into one matrix, kernels are
out-in (the rows of a product lie together in memory), and each layer has its own arrays: a step would copy every weight
that it cuts out of a stack. Training keeps one matrix per map, as its checkpoints do. A packed block has the two names
of the unpacked one: `in_proj` and `out_proj`.

A packed mixer is a class with the methods of `PackedMixer`. Its functions run inside `collectives.shard_map` on one
device's rows and heads, whose number they read from the weights.

Shape legend: B batch, L length, D model, F mlp, H heads, G groups, K attention head width, S tokens that a cache has room
for.
"""

import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.attention.api import causal_attention
from pallas_kernels.attention.decode import IMPLEMENTATIONS as DECODE_IMPLEMENTATIONS
from pallas_kernels.attention.decode import decode_attention, write_token
from transxssm_jax.config import Model
from transxssm_jax.inference.packed_linear import (
    Weights,
    defer_rms,
    fold_norm,
    linear,
    pack_linear,
    pack_projections,
    with_bias,
)
from transxssm_jax.inference.packed_ssd import PackedMamba2, PackedSSD
from transxssm_jax.model import layers, rope
from transxssm_jax.model.mixers import mixer_of


class PackedMixer(typing.Protocol):
    """What decoding needs of a mixer; add a class for a new kind to PACKED."""

    cache_axes: typing.Any  # logical axes of the cache, in its tree

    def __init__(self, model: Model): ...

    def pack(self, params: dict) -> Weights:
        """The packed weights of one layer's mixer, from its parameters in training."""

    def axes(self) -> dict:
        """Logical axes of the packed weights, in their tree."""

    def empty_cache(self, batch: int, length: int):
        """The cache of rows without tokens, with room for `length`; whole, not one device's block."""

    def prefill(self, weights: Weights, x_BLD: jax.Array, is_token_BL: jax.Array, **side_inputs):
        """(mixer output, residual stream that it read, cache) of whole prompts."""

    def step(self, weights: Weights, x_B1D: jax.Array, cache, position_B: jax.Array, **side_inputs):
        """The same for one more token per row."""


# ---- attention -----------------------------------------------------------------


class PackedAttention:
    """Attention with Q, K and V in one matrix; its cache is rotated K, and V, each [B, G, S, K] in model.dtype."""

    cache_axes = (('batch', 'groups', None, None), ('batch', 'groups', None, None))
    maps = ('q', 'k', 'v')

    def __init__(self, model: Model):
        self.model = model
        self.implementation = None if model.attention_implementation == 'auto' else model.attention_implementation
        self.norms = ('q_norm', 'k_norm') if model.qk_norm else ()

    def pack(self, params: dict) -> Weights:
        return {
            'in_proj': pack_projections(params['in_proj'], self.maps, self.model.num_kv_heads),
            'out_proj': pack_linear(params['out_proj'], num_inputs=2),
            **{name: params[name] for name in self.norms},
        }

    def axes(self) -> dict:
        return {
            'in_proj': with_bias({'kernel': ('groups', None, 'embed')}, self.model, ('groups', None)),
            'out_proj': with_bias({'kernel': ('embed', 'heads', None)}, self.model, ('embed',)),
            **{name: {'scale': (None,)} for name in self.norms},
        }

    def empty_cache(self, batch: int, length: int) -> tuple[Float[Array, 'B G S K'], Float[Array, 'B G S K']]:
        model = self.model
        shape = (batch, model.num_kv_heads, length, model.head_dim)
        return jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype)

    def prefill(
        self,
        weights: Weights,
        x_BLD: Float[Array, 'B L D'],
        is_token_BL: Bool[Array, 'B L'],
        *,
        rope: rope.Rope | None,
        scale_BL: Float32[Array, 'B L'] | None,
    ):
        """Rows are filled from the left, so that a token never sees the padding after it."""
        del is_token_BL
        x_BLD, q_BLHK, k_BLGK, v_BLGK = self._inputs(weights, x_BLD, rope, scale_BL)
        y_BLHK = causal_attention(q_BLHK, k_BLGK, v_BLGK, implementation=self.implementation)
        return self._output(weights, y_BLHK), x_BLD, (k_BLGK.swapaxes(1, 2), v_BLGK.swapaxes(1, 2))

    def step(
        self,
        weights: Weights,
        x_B1D: Float[Array, 'B 1 D'],
        cache: tuple[Float[Array, 'B G S K'], Float[Array, 'B G S K']],
        position_B: Int32[Array, 'B'],
        *,
        rope: rope.Rope | None,
        scale_BL: Float32[Array, 'B 1'] | None,
    ):
        """The key and the value of the token are written at position_B of each row."""
        # The words for implementations are those of causal attention; not all of them exist for one query.
        implementation = self.implementation if self.implementation in DECODE_IMPLEMENTATIONS else None
        x_B1D, q, k, v = self._inputs(weights, x_B1D, rope, scale_BL)
        k_BGSK, v_BGSK = (write_token(old, new[:, 0], position_B) for old, new in zip(cache, (k, v)))
        y_BHK = decode_attention(q[:, 0], k_BGSK, v_BGSK, position_B + 1, implementation=implementation)
        return self._output(weights, y_BHK[:, None]), x_B1D, (k_BGSK, v_BGSK)

    def _inputs(self, weights, x_BLD, rope_tables, scale_BL):
        """The residual stream; Q and K, rotated where the model rotates them, and V."""
        model, shape = self.model, x_BLD.shape[:2]
        x_BLD, u_BLD, rms_scale_BL = defer_rms(x_BLD, model.norm_epsilon)
        joint = linear(weights['in_proj'], self.axes()['in_proj'], u_BLD, 1, rms_scale_BL=rms_scale_BL)
        heads = model.num_heads // model.num_kv_heads  # per group
        joint = joint.reshape(*shape, -1, heads + 2, model.head_dim)
        q, k_BLGK, v_BLGK = joint[..., :heads, :], joint[..., heads, :], joint[..., heads + 1, :]
        q_BLHK = q.reshape(*shape, -1, model.head_dim)
        if self.norms:
            q_BLHK, k_BLGK = (
                layers.head_norm(x, weights[name]['scale'], model.norm_epsilon)
                for name, x in zip(self.norms, (q_BLHK, k_BLGK))
            )
        if rope_tables is not None:
            q_BLHK, k_BLGK = rope.rotate(q_BLHK, rope_tables), rope.rotate(k_BLGK, rope_tables)
        if scale_BL is not None:
            q_BLHK = (q_BLHK * scale_BL[..., None, None]).astype(q_BLHK.dtype)
        return x_BLD, q_BLHK, k_BLGK, v_BLGK

    def _output(self, weights, y_BLHK):
        return linear(weights['out_proj'], self.axes()['out_proj'], y_BLHK, 2)


PACKED = {'ssd': PackedSSD, 'attention': PackedAttention, 'mamba2': PackedMamba2}


# ---- block -----------------------------------------------------------------------


class PackedBlock:
    """A block of one kind for decoding: pure functions of its packed weights."""

    def __init__(self, model: Model, kind: str):
        if kind not in PACKED:
            raise NotImplementedError(
                f'layers of kind {kind!r} have no form for decoding; add one to inference/packed.py'
            )
        self.model, self.kind, self.mixer = model, kind, PACKED[kind](model)
        self.rope_width = mixer_of(kind).rope_width(model)

    def pack(self, params: dict) -> Weights:
        """Packed weights from the parameters of one block, not stacked."""
        packed = {'mixer': self.mixer.pack(params['mixer']), 'mixer_residual': params['mixer_residual']}
        if 'mlp' not in params:
            return packed
        mlp = params['mlp']
        gate_up = {
            leaf: jnp.stack([mlp['in_proj'][name][leaf] for name in ('gate', 'up')], axis=-2)
            for leaf in mlp['in_proj']['gate']
        }
        return packed | {
            'mlp': {
                'in_proj': fold_norm(pack_linear(gate_up, num_inputs=1), mlp['in_proj']['norm']),
                'out_proj': pack_linear(mlp['out_proj'], num_inputs=1),
            },
            'mlp_residual': params['mlp_residual'],
        }

    def axes(self) -> dict:
        """Logical axes of the packed weights."""
        axes = {'mixer': self.mixer.axes(), 'mixer_residual': {'weight': (None,)}}
        if not self.model.d_mlp:
            return axes
        return axes | {
            'mlp': {
                'in_proj': with_bias({'kernel': (None, 'mlp', 'embed')}, self.model, (None, 'mlp')),
                'out_proj': with_bias({'kernel': ('embed', 'mlp')}, self.model, ('embed',)),
            },
            'mlp_residual': {'weight': (None,)},
        }

    def prefill(self, weights: Weights, x_BLD: jax.Array, is_token_BL: jax.Array, **side_inputs):
        """The block's output and the mixer's cache after the rows' last tokens."""
        y_BLD, x_BLD, cache = self.mixer.prefill(weights['mixer'], x_BLD, is_token_BL, **side_inputs)
        return self._after_mixer(weights, x_BLD, y_BLD), cache

    def step(self, weights: Weights, x_B1D: jax.Array, cache, position_B: jax.Array, **side_inputs):
        """The same for one more token per row."""
        y_B1D, x_B1D, cache = self.mixer.step(weights['mixer'], x_B1D, cache, position_B, **side_inputs)
        return self._after_mixer(weights, x_B1D, y_B1D), cache

    def _after_mixer(self, weights, x_BLD, y_BLD):
        x_BLD = _weighted_residual(x_BLD, y_BLD, weights['mixer_residual']['weight'])
        if 'mlp' not in weights:
            return x_BLD
        x_BLD, u_BLD, rms_scale_BL = defer_rms(x_BLD, self.model.norm_epsilon)
        mlp, axes = weights['mlp'], self.axes()['mlp']
        joint = linear(mlp['in_proj'], axes['in_proj'], u_BLD, 1, rms_scale_BL=rms_scale_BL)
        gate_BLF, up_BLF = jnp.unstack(joint, axis=-2)
        y_BLD = linear(mlp['out_proj'], axes['out_proj'], jax.nn.silu(gate_BLF) * up_BLF, 1)
        return _weighted_residual(x_BLD, y_BLD, weights['mlp_residual']['weight'])


def _weighted_residual(x_BLD: jax.Array, y_BLD: jax.Array, weight_D: jax.Array) -> jax.Array:
    """weight * x + y in y's dtype, computed in float32 (`layers.PreNormResidual`)."""
    return (x_BLD * weight_D + y_BLD).astype(y_BLD.dtype)
