"""Block and LanguageModel: a period of layers, repeated.

Shape legend: B batch, L length, D model, V vocabulary.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.device import current_device
from pallas_kernels.residual_norm import STATISTICS_NAME as NORM_STATISTICS
from transxssm_jax.config import Model
from transxssm_jax.model import layers, rope
from transxssm_jax.model.attention import save_attention_residuals
from transxssm_jax.model.loss import soft_cap
from transxssm_jax.model.mixers import mixer_of
from transxssm_jax.model.ssd import SSD_STATES
from transxssm_jax.parallel import collectives


class Block(nnx.Module):
    """x = w1 * x + mixer(norm(x));  x = w2 * x + mlp(norm(x)). The norms are of mixer and MLP. No MLP where model.d_mlp is 0."""

    def __init__(self, model: Model, kind: str, *, rngs: nnx.Rngs):
        self.mixer = mixer_of(kind)(model, rngs=rngs)
        self.mixer_residual = layers.PreNormResidual(model.d_model)
        if model.d_mlp:
            self.mlp = layers.SwiGLU(model, rngs=rngs)
            self.mlp_residual = layers.PreNormResidual(model.d_model)

    def __call__(self, x_BLD: jax.Array, **side_inputs) -> jax.Array:
        """side_inputs: what the mixer takes beside norm(x), see its __call__."""
        mixer = functools.partial(self.mixer, **side_inputs)
        x_BLD = self.mixer_residual(x_BLD, self.mixer.in_proj.norm, mixer)
        if not hasattr(self, 'mlp'):
            return x_BLD
        return self.mlp_residual(checkpoint_name(x_BLD, 'residual'), self.mlp.in_proj.norm, self.mlp)


class LanguageModel(nnx.Module):
    """Embedding, model.num_periods times the layers of model.layer_pattern, final norm, head.

    Layers of one kind are stacked, [periods, layers of the kind per period, ...], so that the names of parameters do not
    grow with depth. They are scanned, so that compile time does not grow either, or unrolled (model.layer_loop): a scan
    copies what every layer keeps for its backward pass into one array and out of it again.
    """

    def __init__(self, model: Model, *, rngs: nnx.Rngs):
        self.model = model
        shape, pattern = (model.vocab_size, model.d_model), model.layer_pattern
        self.embedding = nnx.Param(
            model.init_std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=('vocab', 'embed')
        )
        self.layers = nnx.Dict(
            {
                kind: _stack_of_blocks(model, kind, (model.num_periods, pattern.count(kind)), rngs)
                for kind in sorted(set(pattern))
            }
        )
        self.final_norm = layers.RMSNorm(model.d_model, model.norm_epsilon)
        if not model.tie_embeddings:
            self.head = nnx.Param(
                model.init_std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=('vocab', 'embed')
            )

    def __call__(
        self,
        tokens_BL: Int[Array, 'B L'],
        *,
        segment_ids_BL: Int32[Array, 'B L'] | None = None,
        positions_BL: Int32[Array, 'B L'] | None = None,
        rope_length_B: Int32[Array, 'B'] | None = None,
    ) -> Float[Array, 'B L D']:
        """Hidden states after the final norm.

        Args:
          tokens_BL: token ids.
          segment_ids_BL: tokens of one document share an id; default: one document per row.
          positions_BL: position within the document; default: 0, 1, 2, ...
          rope_length_B: see `rope.tables`.

        Returns:
          [B, L, D] in model.dtype; `head_VD` maps it to logits. Where tensor shards that, each device gives the gradient
          of its rows of the head; they are summed here.
        """
        tokens_BL = tokens_BL.astype(jnp.int32)
        if segment_ids_BL is None:
            segment_ids_BL = jnp.ones_like(tokens_BL)
        if positions_BL is None:
            positions_BL = positions(tokens_BL)
        unrolled = is_unrolled(self.model, current_device().backend)
        # Not in a scan, whose every step XLA schedules by itself.
        num_parts = collectives.num_overlapped_parts(len(tokens_BL)) if unrolled else 1

        def parts_of(array):
            return [array] if num_parts == 1 else jnp.split(array, num_parts)

        lengths = [None] * num_parts if rope_length_B is None else parts_of(rope_length_B)
        side_inputs = [
            self._side_inputs(*arrays)
            for arrays in zip(parts_of(segment_ids_BL), parts_of(positions_BL), lengths, strict=True)
        ]
        streams = [embed(self.embedding[...], part_BL, self.model.dtype) for part_BL in parts_of(tokens_BL)]
        stacks = {kind: nnx.split(stack) for kind, stack in self.layers.items()}

        @functools.cache
        def layer(kind, policy):
            def of_one(x_BLD, state, side_inputs):
                return nnx.merge(stacks[kind][0], state)(x_BLD, **side_inputs)

            of_one = _remat(of_one, policy, in_scan=not unrolled)
            # Unrolled layers of a kind and policy are calls of one function, which is traced once.
            of_one = jax.jit(of_one) if unrolled else of_one
            return lambda streams, state: [
                of_one(x_BLD, state, inputs[kind]) for x_BLD, inputs in zip(streams, side_inputs, strict=True)
            ]

        policies = self.model.remat_of_layers

        def period(streams, states):
            for kind, start, stop in _consecutive(self.model.layer_pattern):
                states_of_run = jax.tree.map(lambda leaf: leaf[start:stop], states[kind])  # noqa: B023
                streams, _ = jax.lax.scan(
                    lambda streams, state: (layer(kind, policies[0])(streams, state), None),  # noqa: B023
                    streams,
                    states_of_run,
                )
            return streams, None

        states = {kind: state for kind, (_, state) in stacks.items()}
        if unrolled:
            state_of = {kind: iter(_unstack(_cast_matrices(state, self.model.dtype))) for kind, state in states.items()}
            kinds = self.model.layer_pattern * self.model.num_periods
            for kind, policy in zip(kinds, policies, strict=True):
                streams = layer(kind, policy)(streams, next(state_of[kind]))
        else:
            streams, _ = jax.lax.scan(period, streams, states)
        hidden = [collectives.gather_from_stream(self.final_norm(x_BLD), 'vocab') for x_BLD in streams]
        return hidden[0] if num_parts == 1 else jnp.concatenate(hidden)

    def _side_inputs(self, segment_ids_BL, positions_BL, rope_length_B) -> dict[str, dict]:
        """What the mixer of each kind takes beside x."""
        return {
            kind: dict(
                segment_ids_BL=segment_ids_BL,
                **rope.side_inputs(self.model, mixer_of(kind).rope_width(self.model), positions_BL, rope_length_B),
            )
            for kind in self.layers
        }

    @property
    def head_VD(self) -> jax.Array:
        """float32 [V, D]; logits = hidden @ head_VD.T, capped by `soft_cap` where model.logit_soft_cap says so."""
        return self.embedding[...] if self.model.tie_embeddings else self.head[...]

    def logits(self, *args, **kwargs) -> jax.Array:
        """float32 logits [B, L, V], whole; training never makes them (see loss.py). Arguments as `__call__`."""
        return to_logits(self(*args, **kwargs), self.head_VD, self.model.logit_soft_cap)


def is_unrolled(model: Model, platform: str) -> bool:
    """Whether layers are unrolled on a platform of JAX ('cpu', 'gpu', 'tpu'), see model.layer_loop."""
    wanted = platform in ('gpu', 'tpu') or len(set(model.remat_of_layers)) > 1
    return model.layer_loop == 'unrolled' or (model.layer_loop == 'auto' and wanted)


def embed(table_VD: jax.Array, tokens_BL: jax.Array, dtype) -> jax.Array:
    """Rows of the embedding in dtype, the residual stream [B, L, D]."""
    # The table is gathered over D before the look-up: looking up sharded rows would gather activations.
    table_VD = collectives.all_gather_params(table_VD, ('vocab', 'embed'), dtype)
    if not collectives.sharded_over('vocab'):
        return look_up(table_VD, tokens_BL)
    # A device holds some of the rows and gives zeros for the tokens of the others.
    num_rows = table_VD.shape[0]
    row_BL = tokens_BL - collectives.shard_index('vocab') * num_rows
    row_BL = jnp.where(row_BL < 0, num_rows, row_BL)  # negative indices would count from the end
    x_BLD = look_up(table_VD, row_BL, 0.0)
    return collectives.reduce_to_stream(x_BLD, 'vocab')


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(table_VD: jax.Array, ids: jax.Array, outside: float = np.nan) -> jax.Array:
    """Rows of the table in its dtype, [*ids.shape, D]; its gradient is the sum for each id, rounded once from float32.

    Args:
      ids: integers, any shape, not negative.
      outside: what an id of V or more gets; it has no gradient.
    """
    return jnp.take(table_VD, ids, axis=0, mode='fill', fill_value=outside)


def _look_up_forward(table_VD, ids, outside):
    return look_up(table_VD, ids, outside), (table_VD[:, :0], ids)


def _look_up_backward(outside, residuals, d_rows):
    # The gradient of indexing adds up in bfloat16, in which a sum stops growing at 256 times what is added: 6 to 11% were
    # lost with ids as frequent as words. And GPUs add one token of an id after the other: 17 ms for 65,536 tokens of
    # width 1,024 on an H100, where float32 takes 0.4.
    table_V0, ids = residuals
    d_table_VD = jnp.zeros((len(table_V0), d_rows.shape[-1]), jnp.float32)
    d_table_VD = d_table_VD.at[ids].add(d_rows.astype(jnp.float32), mode='drop')
    return d_table_VD.astype(table_V0.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)


def to_logits(hidden_BLD: jax.Array, head_VD: jax.Array, cap: float) -> jax.Array:
    """float32 [B, L, V], whole on every device, capped (`loss.soft_cap`).

    Not differentiable where the mesh shards the vocabulary.
    """
    head_VD = collectives.all_gather_params(head_VD, ('vocab', 'embed'), hidden_BLD.dtype)
    logits_BLV = jnp.einsum('BLD,VD->BLV', hidden_BLD, head_VD, preferred_element_type=jnp.float32)
    return collectives.all_gather(soft_cap(logits_BLV, cap), 'vocab', axis=-1)


def positions(tokens_BL: jax.Array) -> jax.Array:
    """0, 1, 2, ... of every row, int32 [B, L]; with a row's tokens sharded, those of this device's."""
    shard = collectives.shard_index('length') * tokens_BL.shape[1]
    return jnp.broadcast_to(shard + jnp.arange(tokens_BL.shape[1], dtype=jnp.int32), tokens_BL.shape)


def _stack_of_blocks(model: Model, kind: str, shape: tuple[int, int], rngs: nnx.Rngs) -> Block:
    """Blocks whose parameters have two leading axes: period, and index among the period's layers of this kind."""

    def make(rngs):
        return Block(model, kind, rngs=rngs)

    for size in reversed(shape):
        make = nnx.split_rngs(splits=size)(nnx.vmap(make, in_axes=0, out_axes=0))
    return make(rngs)


def _cast_matrices(state, dtype: str):
    """The state with what layers multiply with in dtype, in which they use it; where fsdp shards that, as it is.

    Cast in each layer, XLA copied the float32 weights of all layers out of their stack and kept them for the backward
    pass, which cast them again: 16 bytes a weight where 6 do, and 4 kept where 2 do.
    """

    def cast(param):
        axes = param.get_metadata('axes')
        if 'embed' not in axes or collectives.sharded_over('embed'):
            return param  # a gradient that is summed in float32 over fsdp stays so
        return param.replace(param[...].astype(dtype))

    return jax.tree.map(cast, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _unstack(state) -> list:
    """The states of single layers, in order, of a stack whose leaves have two leading axes."""
    leaves, tree = jax.tree.flatten(state)

    def single(leaf):
        return _split(leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]))

    return [jax.tree.unflatten(tree, layer) for layer in zip(*map(single, leaves), strict=True)]


@jax.custom_vjp
def _split(stack_N: jax.Array) -> list[jax.Array]:
    parts = jax.lax.split(stack_N, [1] * len(stack_N))
    return [part[0] for part in jax.lax.optimization_barrier(parts)]


def _split_backward(_, parts):
    # One concatenation; the transpose of slices would be padded arrays, added up.
    return (_join(parts),)


_split.defvjp(lambda stack_N: (_split(stack_N), None), _split_backward)


def _join(parts: list[jax.Array]) -> jax.Array:
    """`jnp.stack`, behind a barrier. On GPUs of words of 64 bits: XLA's kernel for more than ten arrays moves one number a
    thread, and of two bytes each it reached a third of the memory's speed (5.4 ms of a 1.3B step on an H200)."""
    shape, dtype = parts[0].shape, parts[0].dtype
    numbers = 8 // dtype.itemsize
    if current_device().backend != 'gpu' or numbers == 1 or math.prod(shape) % numbers:
        return jax.lax.concatenate([part[None] for part in jax.lax.optimization_barrier(parts)], 0)
    with jax.enable_x64(True):
        words = [jax.lax.bitcast_convert_type(x.reshape(1, -1, numbers), 'uint64') for x in parts]
        # Without the barrier between them XLA takes both conversions away.
        stack = jax.lax.concatenate(jax.lax.optimization_barrier(words), 0)
        return jax.lax.bitcast_convert_type(stack, dtype).reshape(len(parts), *shape)


def _consecutive(pattern: tuple[str, ...]):
    """Yields (kind, start, stop) of each run of equal layers; start and stop count layers of that kind."""
    seen = dict.fromkeys(pattern, 0)
    i = 0
    while i < len(pattern):
        kind, length = pattern[i], 1
        while pattern[i + length : i + length + 1] == (kind,):
            length += 1
        yield kind, seen[kind], seen[kind] + length
        seen[kind] += length
        i += length


def _remat(body, policy: str, in_scan: bool):
    """Wraps a layer by what its backward pass recomputes.

    Every policy except 'none' all-gathers the fsdp-sharded weights again in the backward pass; 'none' keeps the
    gathered weights of all layers. So it is with the norms' outputs that tensor gathers.

    Bytes are per token and layer of the 1.3B size. 'hybrid' keeps the mixers' projections, outputs and kernel residuals,
    16 KB: the scan and attention, which are slower than their FLOPs suggest, are not recomputed. 'matmuls' adds the MLP's
    gate and up and the residual stream between mixer and MLP, 28 KB: only norms, SiLU and the like are recomputed. 'none'
    adds their outputs, 20 KB, and the weights in model.dtype. Each keeps what it names once, in model.dtype.
    """
    policies = jax.checkpoint_policies
    if policy == 'dots':
        keep = policies.dots_with_no_batch_dims_saveable
    elif policy == 'full':
        keep = policies.nothing_saveable
    else:
        keep = policies.save_from_both_policies(
            policies.save_only_these_names(*_KEPT[policy]), save_attention_residuals
        )
    # prevent_cse is for code outside of a scan; inside, it only hinders fusion.
    return jax.checkpoint(body, prevent_cse=not in_scan, policy=keep)


# Names of `checkpoint_name` that a remat policy keeps.
_KEPT = {'hybrid': ('mixer_in', 'mixer_out', SSD_STATES)}
_KEPT['matmuls'] = (*_KEPT['hybrid'], 'residual', 'mlp_in', NORM_STATISTICS, 'quantized')
_KEPT['none'] = (*_KEPT['matmuls'], 'norm_out', 'gathered', 'mlp_hidden', 'weight', 'quantized_weight')
