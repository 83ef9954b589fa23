"""Block and LanguageModel: a module of layers, repeated.

Shape legend: B batch, L length, D model, V vocabulary.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from transxssm_jax.config import Model
from transxssm_jax.model import layers, rope
from transxssm_jax.model.attention import Attention, save_attention_residuals
from transxssm_jax.model.ssd import SSD_STATES, RotarySSD
from transxssm_jax.parallel import collectives

MIXERS = {'ssd': RotarySSD, 'attention': Attention}


class Block(nnx.Module):
    """Pre-norm mixer, learned residual, pre-norm MLP, learned residual.

    In the fused form, of decoding, linear maps of one input are one matrix that the scale of the norm before it is folded
    into: a token's products are bound by reading weights, and few large reads are faster than many small ones. Training
    keeps a matrix a map, as its checkpoints do.
    """

    def __init__(self, model: Model, kind: str, *, rngs: nnx.Rngs, fused: bool = False):
        self.epsilon = model.norm_epsilon
        if not fused:
            self.mixer_norm = layers.RMSNorm(model.d_model, model.norm_epsilon)
            self.mlp_norm = layers.RMSNorm(model.d_model, model.norm_epsilon)
        self.mixer = MIXERS[kind](model, rngs=rngs, fused=fused)
        self.mixer_residual = layers.LearnedResidual(model.d_model)
        self.mlp = layers.SwiGLU(
            model.d_model, model.d_mlp, std=model.init_std, use_bias=model.use_bias, rngs=rngs, fused=fused
        )
        self.mlp_residual = layers.LearnedResidual(model.d_model)

    @staticmethod
    def fuse(params: dict, model: Model, kind: str) -> dict:
        """Parameters of the fused form from those of one block, not stacked."""
        return {
            'mixer': MIXERS[kind].fuse(params['mixer'], params['mixer_norm'], model),
            'mixer_residual': params['mixer_residual'],
            'mlp': layers.SwiGLU.fuse(params['mlp'], params['mlp_norm']),
            'mlp_residual': params['mlp_residual'],
        }

    def __call__(self, x_BLD: jax.Array, **context) -> jax.Array:
        x_BLD = self.mixer_residual(x_BLD, self.mixer(self.mixer_norm(x_BLD), **context))
        x_BLD = self.mlp_residual(x_BLD, self.mlp(self.mlp_norm(x_BLD)))
        return collectives.constrain(x_BLD, 'batch', 'length', None)

    def prefill(self, x_BLD: jax.Array, **context):
        """The fused block's output and its mixer's cache after the rows' last tokens."""
        x_BLD, u_BLD, factor_BL = layers.measured(x_BLD, self.epsilon)
        y_BLD, cache = self.mixer.prefill(u_BLD, factor_BL, **context)
        return self._after_mixer(x_BLD, y_BLD), cache

    def step(self, x_B1D: jax.Array, cache, **context):
        """The same for one more token."""
        x_B1D, u_B1D, factor_B1 = layers.measured(x_B1D, self.epsilon)
        y_B1D, cache = self.mixer.step(u_B1D, factor_B1, cache, **context)
        return self._after_mixer(x_B1D, y_B1D), cache

    def _after_mixer(self, x_BLD, y_BLD):
        x_BLD, u_BLD, factor_BL = layers.measured(self.mixer_residual(x_BLD, y_BLD), self.epsilon)
        x_BLD = self.mlp_residual(x_BLD, self.mlp(u_BLD, factor_BL))
        return collectives.constrain(x_BLD, 'batch', 'length', None)


class LanguageModel(nnx.Module):
    """Embedding, num_layers blocks in modules of `model.layer_kinds`, final norm, head.

    Layers of one kind are stacked, [modules, layers of the kind in a module, ...],
    and scanned, so that neither compile time nor the names of parameters grow
    with depth. In the form for decoding each layer is by itself, and fused (see
    `Block`): a step would copy every weight that it cuts out of a stack.
    """

    def __init__(self, model: Model, *, rngs: nnx.Rngs, for_decoding: bool = False):
        self.model, self.for_decoding = model, for_decoding
        embed_shape = (model.vocab_size, model.d_model)
        self.embedding = nnx.Param(
            model.init_std * jax.random.normal(rngs.params(), embed_shape, jnp.float32), axes=('vocab', 'embed')
        )
        kinds = model.layer_kinds
        num_modules = model.num_layers // len(kinds)
        if for_decoding:
            self.layers = nnx.Dict(
                {layer_name(i): Block(model, kind, rngs=rngs, fused=True) for i, kind in enumerate(kinds * num_modules)}
            )
        else:
            self.layers = nnx.Dict(
                {
                    kind: _stack_of_blocks(model, kind, (num_modules, kinds.count(kind)), rngs)
                    for kind in sorted(set(kinds))
                }
            )
        self.final_norm = layers.RMSNorm(model.d_model, model.norm_epsilon)
        if not model.tie_embeddings:
            self.head = nnx.Param(
                model.init_std * jax.random.normal(rngs.params(), embed_shape, jnp.float32), axes=('vocab', 'embed')
            )

    def __call__(
        self,
        tokens_BL: Int32[Array, 'B L'],
        *,
        segment_ids_BL: Int32[Array, 'B L'] | None = None,
        positions_BL: Int32[Array, 'B L'] | None = None,
        rope_length_B: Int32[Array, 'B'] | None = None,
    ) -> Float[Array, 'B L D']:
        """Hidden states after the final norm.

        Args:
          tokens_BL: int32 token ids.
          segment_ids_BL: int32, a document's tokens share an id; default: one document a row.
          positions_BL: int32 position within the document; default: 0, 1, 2, ...
          rope_length_B: see `rope.tables`.

        Returns:
          [B, L, D] in model.dtype; `head_VD` maps it to logits.
        """
        if segment_ids_BL is None:
            segment_ids_BL = jnp.ones_like(tokens_BL)
        if positions_BL is None:
            positions_BL = _places(tokens_BL)
        contexts = self._contexts(positions_BL, rope_length_B, segment_ids_BL=segment_ids_BL)

        def apply(block, x_BLD, context):
            return block(x_BLD, **context), None

        return self.final_norm(self._scan_layers(apply, self._embed(tokens_BL), contexts)[0])

    @property
    def head_VD(self) -> jax.Array:
        """float32 [V, D] (for decoding: in model.dtype); logits = hidden @ head_VD.T."""
        return self.embedding[...] if self.model.tie_embeddings else self.head[...]

    def logits(self, *args, **kwargs) -> jax.Array:
        """float32 logits [B, L, V], whole; training never makes them (see loss.py)."""
        return self._to_logits(self(*args, **kwargs))

    # ---- decoding ----------------------------------------------------------

    def empty_caches(self, batch: int, length: int) -> list:
        """What every layer keeps of rows without tokens, with room for `length`; see the mixers."""
        return [block.mixer.empty_cache(batch, length, self.model.dtype) for block in self.layers.values()]

    def prefill(
        self, tokens_BL: Int32[Array, 'B L'], length_B: Int32[Array, 'B'], rope_length_B: Int32[Array, 'B']
    ) -> tuple[Float[Array, 'B V'], list]:
        """Reads prompts of unequal lengths, filled up on the right; in the form for decoding.

        Args:
          tokens_BL: int32 token ids, any where a row is over.
          length_B: int32 tokens of each row, from 1 to L.
          rope_length_B: see `rope.tables`.

        Returns:
          float32 logits [B, V] after each row's last token; every layer's cache, in order.
        """
        contexts = self._contexts(_places(tokens_BL), rope_length_B, is_token_BL=_places(tokens_BL) < length_B[:, None])

        def apply(block, x_BLD, context):
            return block.prefill(x_BLD, **context)

        x_BLD, stacked = self._scan_layers(apply, self._embed(tokens_BL), contexts)
        last_B1D = jnp.take_along_axis(x_BLD, length_B[:, None, None] - 1, axis=1)
        caches = [
            jax.tree.map(lambda leaf: leaf[where], stacked[kind])  # noqa: B023
            for kind, where in layer_order(self.model)
        ]
        return self._to_logits(self.final_norm(last_B1D))[:, 0], caches

    def step(
        self, token_B: Int32[Array, 'B'], caches: list, position_B: Int32[Array, 'B'], rope_length_B: Int32[Array, 'B']
    ) -> tuple[Float[Array, 'B V'], list]:
        """Reads one more token a row, at position_B; in the form for decoding.

        Returns:
          float32 logits [B, V] after it, and the caches with it.
        """
        contexts = self._contexts(position_B[:, None], rope_length_B, position_B=position_B)
        x_B1D, after = self._embed(token_B[:, None]), []
        for (kind, _), block, cache in zip(layer_order(self.model), self.layers.values(), caches, strict=True):
            x_B1D, cache = block.step(x_B1D, cache, **contexts[kind])
            after.append(cache)
        return self._to_logits(self.final_norm(x_B1D))[:, 0], after

    # ---- parts -------------------------------------------------------------

    def _contexts(self, positions_BL, rope_length_B, **common):
        """What the mixers of each kind take beside their input."""
        model = self.model
        widths = {'ssd': model.d_state, 'attention': model.head_dim}
        return {
            kind: dict(
                rope=rope.tables(positions_BL, widths[kind], model, rope_length_B),
                scale_BL=rope.length_scale(positions_BL, model),
                **common,
            )
            for kind in sorted(set(model.layer_kinds))
        }

    def _embed(self, tokens_BL):
        # The table is gathered over D before the look-up: looking up split rows would gather activations.
        table_VD = collectives.all_gather_params(self.embedding[...], ('vocab', 'embed'), self.model.dtype)
        if names := collectives.sharded_over('vocab'):
            # A device has some of the rows; of the others' tokens it gives zeros.
            rows = table_VD.shape[0]
            place_BL = tokens_BL - jax.lax.axis_index(names) * rows
            place_BL = jnp.where(place_BL < 0, rows, place_BL)  # negative places count from the end
            x_BLD = jnp.take(table_VD, place_BL, axis=0, mode='fill', fill_value=0)
            return collectives.all_reduce(x_BLD, 'vocab')
        table_VD = collectives.constrain(table_VD, 'vocab', None)
        return collectives.constrain(jnp.take(table_VD, tokens_BL, axis=0), 'batch', 'length', None)

    def _to_logits(self, hidden_BLD):
        return jnp.einsum(
            'BLD,VD->BLV', hidden_BLD, self.head_VD.astype(hidden_BLD.dtype), preferred_element_type=jnp.float32
        )

    def _stacks(self):
        """(graph definition, state) of each kind's stacked blocks."""
        if not self.for_decoding:
            return {kind: nnx.split(stack) for kind, stack in self.layers.items()}
        blocks = {}
        for (kind, _), block in zip(layer_order(self.model), self.layers.values(), strict=True):
            blocks.setdefault(kind, []).append(nnx.split(block))
        num_modules = self.model.num_layers // len(self.model.layer_kinds)

        def stack(*leaves):
            return jnp.stack(leaves).reshape(num_modules, -1, *leaves[0].shape)

        return {
            kind: (parts[0][0], jax.tree.map(stack, *(state for _, state in parts))) for kind, parts in blocks.items()
        }

    def _scan_layers(self, apply, x_BLD, contexts):
        """(x after all layers, what apply(block, x, context) -> (x, extra) gave besides, stacked by kind)."""
        stacks = self._stacks()

        def layer(kind):
            def body(x_BLD, state):
                return apply(nnx.merge(stacks[kind][0], state), x_BLD, contexts[kind])

            return _remat(body, self.model.remat)

        def module(x_BLD, module_states):
            extras = {kind: [] for kind in stacks}
            for kind, start, stop in _runs(self.model.layer_kinds):
                states_of_run = jax.tree.map(lambda leaf: leaf[start:stop], module_states[kind])  # noqa: B023
                x_BLD, extra = jax.lax.scan(layer(kind), x_BLD, states_of_run)
                extras[kind].append(extra)
            return x_BLD, {
                kind: jax.tree.map(lambda *runs: jnp.concatenate(runs), *of_kind) for kind, of_kind in extras.items()
            }

        return jax.lax.scan(module, x_BLD, {kind: state for kind, (_, state) in stacks.items()})


def layer_order(model: Model):
    """Yields (kind, (module, place among the module's layers of the kind)) of every layer, in order."""
    kinds = model.layer_kinds
    for module, (i, kind) in itertools.product(range(model.num_layers // len(kinds)), enumerate(kinds)):
        yield kind, (module, kinds[:i].count(kind))


def layer_name(i: int) -> str:
    """Name of the i-th layer in the form for decoding; names sort in the order of the layers."""
    return f'{i:04d}'


def _places(tokens_BL):
    return jnp.broadcast_to(jnp.arange(tokens_BL.shape[1], dtype=jnp.int32), tokens_BL.shape)


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
        while kinds[i + length : i + length + 1] == (kind,):
            length += 1
        yield kind, seen[kind], seen[kind] + length
        seen[kind] += length
        i += length


def _remat(body, policy: str):
    """Wraps a layer by what its backward pass recomputes; `hybrid` is this model's own.

    All but none gather what fsdp splits of a layer's weights a second time; none keeps the weights of all layers, whole.

    hybrid keeps the mixers' projections, outputs and kernel residuals: 16 KB a
    token and layer at the 1.3B size, where the MLP's gate and up would be 24 KB
    more for work that the matrix units redo fast; the scan and attention, which
    are slower than their operations suggest, are not redone.
    """
    policies = jax.checkpoint_policies
    if policy == 'none':
        return body
    # prevent_cse is for code outside of a scan; inside, it only hinders fusion.
    return jax.checkpoint(
        body,
        prevent_cse=False,
        policy={
            'full': policies.nothing_saveable,
            'dots': policies.dots_with_no_batch_dims_saveable,
            'hybrid': policies.save_from_both_policies(
                policies.save_only_these_names('mixer_in', 'mixer_out', SSD_STATES), save_attention_residuals
            ),
        }[policy],
    )
