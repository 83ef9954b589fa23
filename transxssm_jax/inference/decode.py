"""Decoding on the device: the weights' form for it, the state of rows that grow, prefill, and blocks of steps.

Shape legend: B rows, L length, V vocabulary, S tokens that a cache has room for, T steps of a block.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from transxssm_jax.config import Config, Model
from transxssm_jax.inference import sampling
from transxssm_jax.inference.completion import NO_TOKEN
from transxssm_jax.inference.sampling import SamplingFlags
from transxssm_jax.model.language_model import Block, layer_name, layer_order
from transxssm_jax.model.parameters import param_axes, split_model
from transxssm_jax.parallel import collectives, mesh


class Decoder:
    """Weights in the form for decoding, and the compiled functions that use them.

    A state is a dict: 'caches', a list of every layer's; 'logits_BV', float32, after each row's last token;
    'position_B', int32, tokens of each row; 'done_B', bool, rows that take no more; and 'seen_BV', bool, tokens that
    each row holds, where a repetition penalty needs it. The functions that change a state consume it (its memory is
    reused). All run under the mesh in use, or on one device without one.
    """

    def __init__(self, params: dict, config: Config):
        """params: nested dict of float32 arrays as in step.py; they are copied."""
        self.model = config.model
        self._graph, self._abstract = split_model(self.model, for_decoding=True)
        device_mesh = jax.sharding.get_abstract_mesh()
        shardings = (
            None
            if device_mesh.empty
            else jax.tree.map(
                mesh.spec, param_axes(self.model, for_decoding=True), is_leaf=lambda node: isinstance(node, tuple)
            )
        )
        self.weights = jax.jit(functools.partial(prepare, self.model), out_shardings=shardings)(params)
        self._empty = jax.jit(self._traced_empty, static_argnums=(0, 1, 2))
        self._prefill = jax.jit(self._traced_prefill, donate_argnums=1)
        self._step = jax.jit(self._traced_step, donate_argnums=1)
        self._run = jax.jit(self._traced_run, donate_argnums=1, static_argnames=('flags', 'block'))

    def empty(self, batch: int, length: int, with_seen: bool = False) -> dict:
        """The state of rows without tokens, all done until `prefill` starts them.

        Args:
          batch: rows; a multiple of the devices that split them.
          length: S, most tokens of a row.
          with_seen: whether a repetition penalty will be used.
        """
        return self._empty(batch, length, with_seen)

    def prefill(
        self, state: dict, tokens_BL: jax.Array, length_B: jax.Array, rope_length_B: jax.Array, first_row: int = 0
    ) -> dict:
        """Reads prompts into rows first_row, first_row + 1, ... of a state.

        Args:
          tokens_BL: int32 token ids, filled up on the right by any; L at most the S of the state. Compiled for each
            shape.
          length_B: int32, from 1 to L.
          rope_length_B: int32, the length that dynamic rope scaling computes with, of this and every later step.
        """
        return self._prefill(self.weights, state, tokens_BL, length_B, rope_length_B, first_row)

    def step(self, state: dict, token_B: jax.Array, rope_length_B: jax.Array) -> dict:
        """Reads one given token a row."""
        return self._step(self.weights, state, token_B, rope_length_B)

    def run(
        self,
        state: dict,
        rows: dict,
        stop_T: jax.Array,
        done_B: jax.Array,
        steps: int,
        *,
        flags: SamplingFlags,
        values: dict,
        block: int,
    ) -> tuple[dict, jax.Array]:
        """Samples and reads up to `steps` tokens a row; fewer where all rows are done.

        Args:
          rows: 'seed_B', uint32; 'limit_B', int32, tokens at which a row is done; 'rope_length_B', as in prefill.
            The choice of a row's token depends on its logits, its seed and its position alone.
          stop_T: int32, tokens that end a row, of any number.
          done_B: bool, rows to end besides those that have.
          steps: up to block; may differ from call to call.
          flags, values: of a Sampling.
          block: most steps a call, compiled for each.

        Returns:
          The state, and int32 tokens [B, block], a row's stop token included, then NO_TOKEN.
        """
        return self._run(self.weights, state, rows, stop_T, done_B, steps, values, flags=flags, block=block)

    # ---- what is compiled --------------------------------------------------

    def _traced_empty(self, batch, length, with_seen):
        lm = nnx.merge(self._graph, self._abstract)
        state = {
            'caches': lm.empty_caches(batch, length),
            'logits_BV': jnp.zeros((batch, self.model.vocab_size), jnp.float32),
            'position_B': jnp.zeros(batch, jnp.int32),
            'done_B': jnp.ones(batch, bool),
        }
        if with_seen:
            state['seen_BV'] = jnp.zeros((batch, self.model.vocab_size), bool)
        return _laid_out(state)

    def _traced_prefill(self, weights, state, tokens_BL, length_B, rope_length_B, first_row):
        logits_BV, caches = nnx.merge(self._graph, weights).prefill(tokens_BL, length_B, rope_length_B)
        read = {
            'caches': caches,
            'logits_BV': logits_BV,
            'position_B': length_B,
            'done_B': jnp.zeros_like(length_B, bool),
        }
        if 'seen_BV' in state:
            is_token_BL = jnp.arange(tokens_BL.shape[1]) < length_B[:, None]
            rows_B = jnp.arange(tokens_BL.shape[0])
            read['seen_BV'] = jnp.zeros(logits_BV.shape, bool).at[rows_B[:, None], tokens_BL].max(is_token_BL)

        def write(whole, part):
            return jax.lax.dynamic_update_slice(whole, part.astype(whole.dtype), (first_row,) + (0,) * (whole.ndim - 1))

        return _laid_out(jax.tree.map(write, state, read))

    def _traced_step(self, weights, state, token_B, rope_length_B):
        lm = nnx.merge(self._graph, weights)
        logits_BV, caches = lm.step(token_B, state['caches'], state['position_B'], rope_length_B)
        state = state | {'caches': caches, 'logits_BV': logits_BV, 'position_B': state['position_B'] + 1}
        if 'seen_BV' in state:
            state['seen_BV'] = _with_seen(state['seen_BV'], token_B)
        return _laid_out(state)

    def _traced_run(self, weights, state, rows, stop_T, done_B, steps, values, *, flags, block):
        state = state | {'done_B': state['done_B'] | done_B}

        def goes_on(carry):
            i, state, _ = carry
            return (i < steps) & ~jnp.all(state['done_B'])

        def one(carry):
            i, state, out_BT = carry
            was_done_B, position_B = state['done_B'], state['position_B']
            key_B = jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(rows['seed_B']), position_B)
            token_B = sampling.sample_tokens(flags, values, state['logits_BV'], key_B, state.get('seen_BV'))
            out_BT = out_BT.at[:, i].set(jnp.where(was_done_B, NO_TOKEN, token_B))
            # Rows that are done are stepped along with the others; their position stays, so that they stay within S.
            after = self._traced_step(weights, state, token_B, rows['rope_length_B'])
            is_stop_B = jnp.any(token_B[:, None] == stop_T, axis=1)
            after['position_B'] = jnp.where(was_done_B, position_B, position_B + 1)
            after['done_B'] = was_done_B | is_stop_B | (after['position_B'] >= rows['limit_B'])
            return i + 1, after, out_BT

        out_BT = jnp.full((state['done_B'].shape[0], block), NO_TOKEN, jnp.int32)
        _, state, out_BT = jax.lax.while_loop(goes_on, one, (jnp.int32(0), state, out_BT))
        return state, collectives.constrain(out_BT, None, None)  # whole on every host


def prepare(model: Model, params: dict) -> dict:
    """Parameters of training -> weights of the form for decoding: a layer by itself, fused, matrices in model.dtype."""
    layers = {}
    for i, (kind, where) in enumerate(layer_order(model)):
        block = jax.tree.map(lambda leaf: leaf[where], params['layers'][kind])  # noqa: B023
        layers[layer_name(i)] = Block.fuse(block, model, kind)

    def cast(path, leaf):
        # Vectors are used in float32; matrices are cast where they are used, which is at every step.
        return leaf.astype(model.dtype) if path[-1].key in ('kernel', 'embedding', 'head') else leaf

    return jax.tree_util.tree_map_with_path(cast, params | {'layers': layers})


def _with_seen(seen_BV, token_B):
    return jax.vmap(lambda seen_V, token: seen_V.at[token].set(True))(seen_BV, token_B)


def _laid_out(state):
    """The state with each row's numbers on the devices that hold the row; the caches are so already."""
    return state | {
        name: collectives.constrain(state[name], 'batch', *(None,) * (state[name].ndim - 1))
        for name in state
        if name != 'caches'
    }
