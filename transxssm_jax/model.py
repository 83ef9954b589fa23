"""Block and LanguageModel: a module of layers, repeated.

Shape legend: B batch, L length, D model, V vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from transxssm_jax import layers, mesh, rope
from transxssm_jax.attention import Attention, save_attention_residuals
from transxssm_jax.config import Model
from transxssm_jax.ssd import SSD_STATES, RotarySSD

MIXERS = {'ssd': RotarySSD, 'attention': Attention}


class Block(nnx.Module):
    """Pre-norm mixer, learned residual, pre-norm MLP, learned residual."""

    def __init__(self, model: Model, kind: str, *, rngs: nnx.Rngs):
        self.mixer_norm = layers.RMSNorm(model.d_model, model.norm_epsilon)
        self.mixer = MIXERS[kind](model, rngs=rngs)
        self.mixer_residual = layers.LearnedResidual(model.d_model)
        self.mlp_norm = layers.RMSNorm(model.d_model, model.norm_epsilon)
        self.mlp = layers.SwiGLU(model.d_model, model.d_mlp, std=model.init_std, use_bias=model.use_bias, rngs=rngs)
        self.mlp_residual = layers.LearnedResidual(model.d_model)

    def __call__(self, x_BLD: jax.Array, **context) -> jax.Array:
        x_BLD = self.mixer_residual(x_BLD, self.mixer(self.mixer_norm(x_BLD), **context))
        x_BLD = self.mlp_residual(x_BLD, self.mlp(self.mlp_norm(x_BLD)))
        return mesh.constrain(x_BLD, 'batch', None, None)


class LanguageModel(nnx.Module):
    """Embedding, num_layers blocks in modules of `model.layer_kinds`, final norm, head.

    Layers of one kind are stacked, [modules, layers of the kind in a module, ...],
    and scanned, so that neither compile time nor the names of parameters grow
    with depth.
    """

    def __init__(self, model: Model, *, rngs: nnx.Rngs):
        self.model = model
        embed_shape = (model.vocab_size, model.d_model)
        self.embedding = nnx.Param(
            model.init_std * jax.random.normal(rngs.params(), embed_shape, jnp.float32), axes=('vocab', 'embed'))
        kinds = model.layer_kinds
        num_modules = model.num_layers // len(kinds)
        self.layers = nnx.Dict({
            kind: _stack_of_blocks(model, kind, (num_modules, kinds.count(kind)), rngs) for kind in sorted(set(kinds))})
        self.final_norm = layers.RMSNorm(model.d_model, model.norm_epsilon)
        if not model.tie_embeddings:
            self.head = nnx.Param(
                model.init_std * jax.random.normal(rngs.params(), embed_shape, jnp.float32), axes=('vocab', 'embed'))

    def __call__(self, tokens_BL: Int32[Array, 'B L'], *, segment_ids_BL: Int32[Array, 'B L'] | None = None,
                 positions_BL: Int32[Array, 'B L'] | None = None) -> Float[Array, 'B L D']:
        """Hidden states after the final norm.

        Args:
          tokens_BL: int32 token ids.
          segment_ids_BL: int32, a document's tokens share an id; default: one document a row.
          positions_BL: int32 position within the document; default: 0, 1, 2, ...

        Returns:
          [B, L, D] in model.dtype; `head_VD` maps it to logits.
        """
        model = self.model
        if segment_ids_BL is None:
            segment_ids_BL = jnp.ones_like(tokens_BL)
        if positions_BL is None:
            positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1], dtype=jnp.int32), tokens_BL.shape)
        widths = {'ssd': model.d_state, 'attention': model.head_dim}
        contexts = {
            kind: dict(rope=rope.tables(positions_BL, widths[kind], model),
                       scale_BL=rope.length_scale(positions_BL, model), segment_ids_BL=segment_ids_BL)
            for kind in self.layers}
        # The table is gathered over D before the look-up: looking up split rows would gather activations.
        table_VD = mesh.constrain(self.embedding[...].astype(model.dtype), 'vocab', None)
        x_BLD = mesh.constrain(jnp.take(table_VD, tokens_BL, axis=0), 'batch', None, None)
        return self.final_norm(self._run_layers(x_BLD, contexts))

    @property
    def head_VD(self) -> jax.Array:
        """float32 [V, D]; logits = hidden @ head_VD.T."""
        return self.embedding[...] if self.model.tie_embeddings else self.head[...]

    def logits(self, *args, **kwargs) -> jax.Array:
        """float32 logits [B, L, V], whole; training never makes them (see loss.py)."""
        hidden_BLD = self(*args, **kwargs)
        return jnp.einsum('BLD,VD->BLV', hidden_BLD, self.head_VD.astype(hidden_BLD.dtype),
                          preferred_element_type=jnp.float32)

    def _run_layers(self, x_BLD, contexts):
        graphs, states = {}, {}
        for kind, stack in self.layers.items():
            graphs[kind], states[kind] = nnx.split(stack)

        def layer(kind):
            def body(x_BLD, state):
                return nnx.merge(graphs[kind], state)(x_BLD, **contexts[kind]), None
            return _remat(body, self.model.remat)

        def module(x_BLD, module_states):
            for kind, start, stop in _runs(self.model.layer_kinds):
                states_of_run = jax.tree.map(lambda leaf: leaf[start:stop], module_states[kind])  # noqa: B023
                x_BLD, _ = jax.lax.scan(layer(kind), x_BLD, states_of_run)
            return x_BLD, None

        return jax.lax.scan(module, x_BLD, states)[0]


def _stack_of_blocks(model: Model, kind: str, shape: tuple[int, int], rngs: nnx.Rngs) -> Block:
    """Blocks whose parameters carry two leading axes: module, and place among the module's layers of this kind."""
    def make(rngs):
        return Block(model, kind, rngs=rngs)
    for size in reversed(shape):
        make = nnx.split_rngs(splits=size)(nnx.vmap(make, in_axes=0, out_axes=0))
    return make(rngs)


def _runs(kinds: tuple[str, ...]):
    """Yields (kind, start, stop) of each run of equal layers; start and stop count layers of that kind."""
    seen = dict.fromkeys(kinds, 0)
    i = 0
    while i < len(kinds):
        kind, length = kinds[i], 1
        while kinds[i + length:i + length + 1] == (kind,):
            length += 1
        yield kind, seen[kind], seen[kind] + length
        seen[kind] += length
        i += length


def _remat(body, policy: str):
    """Wraps a layer by what its backward pass recomputes; `hybrid` is this model's own.

    hybrid keeps the mixers' projections, outputs and kernel residuals: 16 KB a
    token and layer at the 1.3B size, where the MLP's gate and up would be 24 KB
    more for work that the matrix units redo fast; the scan and attention, which
    are slower than their operations suggest, are not redone.
    """
    policies = jax.checkpoint_policies
    if policy == 'none':
        return body
    # prevent_cse is for code outside of a scan; inside, it only hinders fusion.
    return jax.checkpoint(body, prevent_cse=False, policy={
        'full': policies.nothing_saveable,
        'dots': policies.dots_with_no_batch_dims_saveable,
        'hybrid': policies.save_from_both_policies(
            policies.save_only_these_names('mixer_in', 'mixer_out', SSD_STATES), save_attention_residuals),
    }[policy])
