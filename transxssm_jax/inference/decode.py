"""Decoding on the device: packed weights, the state of rows that grow, prefill, and blocks of steps.

Everything that is compiled here is one `collectives.shard_map`: a device holds some of the rows, of the heads and of the
weights. Prompts are never split over the context axis.

Shape legend: B rows, L length, V vocabulary, S tokens that a cache has room for, T steps of a block.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.residual_norm import rms_norm
from transxssm_jax.config import Config, Model
from transxssm_jax.inference import sampling
from transxssm_jax.inference.completion import NO_TOKEN
from transxssm_jax.inference.packed import PackedBlock
from transxssm_jax.inference.sampling import SamplingFlags
from transxssm_jax.model import rope
from transxssm_jax.model.language_model import embed, positions, to_logits
from transxssm_jax.parallel import collectives, mesh

MATRICES = ('kernel', 'embedding', 'head')  # stored in model.dtype; vectors are used in float32

_ROWS = ('batch',)  # logical axes of one number per row


def blocks_of(model: Model) -> dict[str, PackedBlock]:
    """Packed block of every layer by its name, in order; names sort in the order of the layers."""
    return {f'{i:04d}': PackedBlock(model, kind) for i, kind in enumerate(model.layer_pattern * model.num_periods)}


def pack_params(model: Model, params: dict) -> dict:
    """Parameters of training -> weights for decoding: layers unstacked and packed, matrices in model.dtype."""
    pattern, packed = model.layer_pattern, {}
    where = itertools.product(range(model.num_periods), range(len(pattern)))
    for (name, block), (period, i) in zip(blocks_of(model).items(), where, strict=True):
        index = period, pattern[:i].count(block.kind)
        packed[name] = block.pack(jax.tree.map(lambda leaf: leaf[index], params['layers'][block.kind]))  # noqa: B023

    def cast(path, leaf):
        return leaf.astype(model.dtype) if path[-1].key in MATRICES else leaf

    return jax.tree_util.tree_map_with_path(cast, params | {'layers': packed})


def packed_axes(model: Model) -> dict:
    """Logical axes of the packed weights, in the tree of pack_params."""
    axes = {
        'embedding': ('vocab', 'embed'),
        'layers': {name: block.axes() for name, block in blocks_of(model).items()},
        'final_norm': {'scale': (None,)},
    }
    return axes if model.tie_embeddings else axes | {'head': ('vocab', 'embed')}


class Decoder:
    """Packed weights and the compiled functions that use them.

    A state is a dict: 'caches', a list of every layer's; 'logits_BV', float32, after each row's last token;
    'position_B', int32, tokens of each row; 'done_B', bool, rows that take no more; and 'seen_BV', bool, tokens that
    each row holds, where a repetition penalty needs it. The functions that change a state consume it (its memory is
    reused). All run under the mesh in use (jax.set_mesh), which shards the rows over data and fsdp, heads and the
    vocabulary over tensor, or on one device without one.
    """

    def __init__(self, params: dict, config: Config):
        """params: nested dict of float32 arrays as in training; they are copied."""
        self.model = config.model
        self._blocks = blocks_of(self.model)
        self._axes = packed_axes(self.model)
        self.weights = jax.jit(functools.partial(pack_params, self.model), out_shardings=_specs(self._axes))(params)
        self._compiled = {}

    def empty(self, batch: int, length: int, with_seen: bool = False) -> dict:
        """The state of rows without tokens, all done until `prefill` starts them.

        Args:
          batch: rows; a multiple of the devices that shard them.
          length: S, most tokens of a row.
          with_seen: whether a repetition penalty will be used.
        """

        def make():
            state = {
                'caches': [block.mixer.empty_cache(batch, length) for block in self._blocks.values()],
                'logits_BV': jnp.zeros((batch, self.model.vocab_size), jnp.float32),
                'position_B': jnp.zeros(batch, jnp.int32),
                'done_B': jnp.ones(batch, bool),
            }
            return state | ({'seen_BV': jnp.zeros((batch, self.model.vocab_size), bool)} if with_seen else {})

        key = 'empty', batch, length, with_seen
        if key not in self._compiled:
            self._compiled[key] = jax.jit(make, out_shardings=_specs(self._state_axes(with_seen)))
        return self._compiled[key]()

    def prefill(
        self, state: dict, tokens_BL: jax.Array, length_B: jax.Array, rope_length_B: jax.Array, first_row: int = 0
    ) -> dict:
        """Reads prompts into rows first_row, first_row + 1, ... of a state.

        Where n devices shard the rows, each reads its share of the prompts into the rows that it holds from its
        first_row on: `prompt_order` gives the rows that the prompts of a call go to.

        Args:
          tokens_BL: int32 token ids, filled up on the right by any; L at most the S of the state. Compiled for each
            shape.
          length_B: int32, from 1 to L.
          rope_length_B: int32, the length that dynamic rope scaling computes with, of this and every later step.
        """
        function = self._function('prefill', state, self._prefill_block, [('batch', None), _ROWS, _ROWS, ()])
        return function(self.weights, state, tokens_BL, length_B, rope_length_B, first_row)

    @staticmethod
    def prompt_order(batch: int, count: int, first_row: int) -> list[int]:
        """Rows of a state of `batch` rows that a prefill of `count` prompts at first_row writes, in the prompts' order."""
        shards = collectives.num_shards('batch')
        rows, prompts = batch // shards, count // shards
        return [shard * rows + first_row + i for shard in range(shards) for i in range(prompts)]

    def step(self, state: dict, token_B: jax.Array, rope_length_B: jax.Array) -> dict:
        """Reads one given token per row."""
        function = self._function('step', state, self._step_block, [_ROWS, _ROWS])
        return function(self.weights, state, token_B, rope_length_B)

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
        """Samples and reads up to `steps` tokens per row; fewer where all rows are done.

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
        # Never empty: XLA's CPU compiler crashes on an empty operand of a program of several devices.
        stop_T = np.append(np.asarray(stop_T, np.int32), np.int32(NO_TOKEN))
        function = self.run_function(state, flags, block)
        return function(self.weights, state, rows, stop_T, done_B, steps, values)

    def run_function(self, state: dict, flags: SamplingFlags, block: int):
        """What `run` calls, compiled for each value of flags and block: (weights, state, rows, stop_T, done_B, steps, values)."""
        return self._function(
            ('run', flags, block),
            state,
            functools.partial(self._run_block, flags=flags, block=block),
            [dict.fromkeys(('seed_B', 'limit_B', 'rope_length_B'), _ROWS), (None,), _ROWS, (), ()],
            out_axes=(('batch', None),),
        )

    def _state_axes(self, with_seen: bool) -> dict:
        axes = {
            'caches': [block.mixer.cache_axes for block in self._blocks.values()],
            'logits_BV': ('batch', None),
            'position_B': _ROWS,
            'done_B': _ROWS,
        }
        return axes | ({'seen_BV': ('batch', None)} if with_seen else {})

    def _function(self, name, state, of_block, in_axes, out_axes=()):
        """jit of of_block(weights, state, *arguments) -> state, *outputs; the state is donated, outputs are whole."""
        key = name, 'seen_BV' in state
        if key not in self._compiled:
            state_axes = self._state_axes('seen_BV' in state)
            outputs = (state_axes, *out_axes) if out_axes else state_axes
            # Every process reads the outputs.
            whole = (_specs(state_axes), *(mesh.spec((None,) * len(axes)) for axes in out_axes))
            shardings = None if jax.sharding.get_abstract_mesh().empty else whole if out_axes else whole[0]
            function = collectives.shard_map(of_block, (self._axes, state_axes, *in_axes), outputs)
            self._compiled[key] = jax.jit(function, donate_argnums=1, out_shardings=shardings)
        return self._compiled[key]

    # ---- on one device's rows ------------------------------------------------

    def _prefill_block(self, weights, state, tokens_BL, length_B, rope_length_B, first_row):
        is_token_BL = jnp.arange(tokens_BL.shape[1]) < length_B[:, None]
        side_inputs = self._side_inputs(positions(tokens_BL), rope_length_B)
        x_BLD, caches = embed(weights['embedding'], tokens_BL, self.model.dtype), []
        for name, block in self._blocks.items():
            x_BLD, cache = block.prefill(weights['layers'][name], x_BLD, is_token_BL, **side_inputs[block.kind])
            caches.append(cache)
        last_B1D = jnp.take_along_axis(x_BLD, length_B[:, None, None] - 1, axis=1)
        read = {
            'caches': caches,
            'logits_BV': self._logits(weights, last_B1D),
            'position_B': length_B,
            'done_B': jnp.zeros_like(length_B, bool),
        }
        if 'seen_BV' in state:
            rows_B = jnp.arange(tokens_BL.shape[0])
            seen_BV = jnp.zeros(read['logits_BV'].shape, bool)
            read['seen_BV'] = seen_BV.at[rows_B[:, None], tokens_BL].max(is_token_BL)

        def write(whole, rows):
            start = (first_row,) + (0,) * (whole.ndim - 1)
            return jax.lax.dynamic_update_slice(whole, rows.astype(whole.dtype), start)

        return jax.tree.map(write, state, read)

    def _step_block(self, weights, state, token_B, rope_length_B):
        position_B = state['position_B']
        side_inputs = self._side_inputs(position_B[:, None], rope_length_B)
        x_B1D, caches = embed(weights['embedding'], token_B[:, None], self.model.dtype), []
        for (name, block), cache in zip(self._blocks.items(), state['caches'], strict=True):
            arguments = weights['layers'][name], x_B1D, cache, position_B
            x_B1D, cache = block.step(*arguments, **side_inputs[block.kind])
            caches.append(cache)
        state = state | {'caches': caches, 'logits_BV': self._logits(weights, x_B1D), 'position_B': position_B + 1}
        if 'seen_BV' in state:
            state['seen_BV'] = _with_seen(state['seen_BV'], token_B)
        return state

    def _run_block(self, weights, state, rows, stop_T, done_B, steps, values, *, flags, block):
        state = state | {'done_B': state['done_B'] | done_B}

        def any_going(done_B):
            # Devices that hold other rows go on together: a step may communicate.
            return collectives.all_reduce_max(jnp.any(~done_B).astype(jnp.int32), 'batch') > 0

        def goes_on(carry):
            i, going, _, _ = carry
            return (i < steps) & going

        def one(carry):
            i, _, state, out_BT = carry
            was_done_B, position_B = state['done_B'], state['position_B']
            key_B = jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(rows['seed_B']), position_B)
            token_B = sampling.sample_tokens(flags, values, state['logits_BV'], key_B, state.get('seen_BV'))
            out_BT = out_BT.at[:, i].set(jnp.where(was_done_B, NO_TOKEN, token_B))
            # Rows that are done are stepped along with the others; their position stays, so that they stay within S.
            after = self._step_block(weights, state, token_B, rows['rope_length_B'])
            is_stop_B = jnp.any(token_B[:, None] == stop_T, axis=1)
            after['position_B'] = jnp.where(was_done_B, position_B, position_B + 1)
            after['done_B'] = was_done_B | is_stop_B | (after['position_B'] >= rows['limit_B'])
            return i + 1, any_going(after['done_B']), after, out_BT

        out_BT = jnp.full((state['done_B'].shape[0], block), NO_TOKEN, jnp.int32)
        carry = jnp.int32(0), any_going(state['done_B']), state, out_BT
        _, _, state, out_BT = jax.lax.while_loop(goes_on, one, carry)
        return state, out_BT

    def _side_inputs(self, positions_BL, rope_length_B):
        widths = {block.kind: block.rope_width for block in self._blocks.values()}
        return {
            kind: rope.side_inputs(self.model, width, positions_BL, rope_length_B) for kind, width in widths.items()
        }

    def _logits(self, weights, x_B1D):
        hidden_B1D = rms_norm(x_B1D, weights['final_norm']['scale'], self.model.norm_epsilon)
        return to_logits(hidden_B1D, weights.get('head', weights['embedding']), self.model.logit_soft_cap)[:, 0]


def _specs(axes):
    """Shardings of a tree of logical axes on the mesh in use; None without one."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    return jax.tree.map(mesh.spec, axes, is_leaf=collectives.is_axes)


def _with_seen(seen_BV, token_B):
    return jax.vmap(lambda seen_V, token: seen_V.at[token].set(True))(seen_BV, token_B)
