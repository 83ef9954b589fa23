"""The layers in the form for decoding: a norm and all maps of one input are one matrix.

A token's matrix products are bound by reading weights, and few large reads are faster than many small ones. So the
scale of a norm is folded into the maps that read it, the maps of one input are packed into one matrix, kernels are
out-in (the rows of a product lie together in memory), and each layer has its own arrays: a step would copy every weight
that it cuts out of a stack. Training keeps one matrix per map, as its checkpoints do. A packed block has the two names
of the unpacked one: `in_proj` and `out_proj`.

A packed mixer is a class with the methods of `PackedMixer`. Its functions run inside `collectives.shard_map` on one
device's rows and heads, whose number they read from the weights.

Shape legend: B batch, L length, D model, F mlp, H heads, G groups, P SSD head width, K attention head width, N state,
S tokens that a cache has room for.
"""

import math
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.attention.api import causal_attention
from pallas_kernels.attention.decode import IMPLEMENTATIONS as DECODE_IMPLEMENTATIONS
from pallas_kernels.attention.decode import decode_attention, write_token
from pallas_kernels.ssd.api import rotary_ssd, rotary_ssd_step
from transxssm_jax.config import Model
from transxssm_jax.model import layers, rope
from transxssm_jax.model.language_model import MIXERS
from transxssm_jax.parallel import collectives

Weights = dict  # of one layer or one map: arrays by name


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


# ---- maps --------------------------------------------------------------------


def pack_linear(params: dict, num_inputs: int) -> Weights:
    """A Linear's parameters with an out-in kernel, [*outputs, *inputs]."""
    kernel = params['kernel']
    order = (*range(num_inputs, kernel.ndim), *range(num_inputs))
    return params | {'kernel': kernel.transpose(order)}


def pack_projections(params: dict, names: typing.Sequence[str], num_groups: int) -> Weights:
    """An InputProjections' parameters as one matrix [groups, width, D] with the norm's scale folded in.

    The first output axis of every map, of heads or groups, is cut into num_groups, whose parts are laid side by side:
    a mesh that shards heads shards the packed matrix as it shards each map.
    """

    def join(leaf, num_inputs):
        leaves = [params[name][leaf] for name in names]
        return jnp.concatenate([x.reshape(*x.shape[:num_inputs], num_groups, -1) for x in leaves], axis=-1)

    joint = {leaf: join(leaf, 1 if leaf == 'kernel' else 0) for leaf in params[names[0]]}
    return _fold_norm(pack_linear(joint, num_inputs=1), params['norm'])


def _fold_norm(weights: Weights, norm: dict) -> Weights:
    """Weights of a map of x / rms(x) from those of a map of RMSNorm(x); out-in."""
    return weights | {'kernel': weights['kernel'] * norm['scale']}


def _with_bias(axes: dict, model: Model, bias_axes) -> dict:
    return axes | ({'bias': bias_axes} if model.use_bias else {})


def linear(weights: Weights, axes: dict, x: jax.Array, num_inputs: int, out_dtype=None, rms_scale_BL=None) -> jax.Array:
    """The product of x with an out-in kernel, all-reduced where an input axis is sharded.

    Args:
      weights, axes: `kernel` and perhaps `bias`, and their logical axes.
      num_inputs: contracted axes, the last of x and of the kernel.
      out_dtype: default: x's dtype.
      rms_scale_BL: float32, multiplies the product of each vector in float32 (`defer_rms`); None: 1.
    """
    out_dtype = out_dtype or x.dtype
    kernel = collectives.all_gather_params(weights['kernel'], axes['kernel'], x.dtype)
    inputs = [axis for axis in axes['kernel'][-num_inputs:] if axis not in (None, 'embed')]
    if rms_scale_BL is None:
        y = _product(kernel, x, num_inputs, out_dtype, inputs)
    else:
        y = _product(kernel, x, num_inputs, jnp.float32, inputs)
        y = (y * rms_scale_BL.reshape(*rms_scale_BL.shape, *(1,) * (y.ndim - rms_scale_BL.ndim))).astype(out_dtype)
    if 'bias' in weights:
        y += collectives.all_gather_params(weights['bias'], axes['bias'], y.dtype)
    return y


def _product(kernel, x, num_inputs, out_dtype, input_axes):
    batch, outputs = x.shape[: x.ndim - num_inputs], kernel.shape[: kernel.ndim - num_inputs]
    if math.prod(batch) == 1:
        # Not as a dot: for one vector XLA chooses forms that read some matrices at a fifth of the memory's speed.
        products = kernel.reshape(*outputs, -1).astype(jnp.float32) * x.reshape(-1).astype(jnp.float32)
        y = jnp.sum(products, axis=-1).astype(out_dtype)
        return collectives.all_reduce(y.reshape(*batch, *outputs), *input_axes)
    y = jax.lax.dot_general(
        x.reshape(*batch, -1),
        kernel.reshape(math.prod(outputs), -1),
        (((len(batch),), (1,)), ((), ())),
        preferred_element_type=out_dtype,
    )
    return collectives.all_reduce(y.reshape(*batch, *outputs), *input_axes)


def defer_rms(x_BLD: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """RMS-normalises x for a `linear` whose kernel already contains the norm's scale.

    Returns:
      (x, the input of the linear, a scale of its output or None). The last two are x / rms(x) and None, or, for a
      single vector, x and float32 [1, 1] 1 / rms(x): a normalised x would be a kernel of its own, in the time of
      reading megabytes of weights.
    """
    x32_BLD = x_BLD.astype(jnp.float32)
    squares_BL = jnp.sum(jnp.square(x32_BLD), axis=-1)
    if squares_BL.size == 1:
        # One kernel makes both; without the barrier the terms of x would be added anew wherever x is read. What
        # follows the sum belongs to the readers: it would be a kernel of its own here.
        x_BLD, squares_BL = jax.lax.optimization_barrier((x_BLD, squares_BL))
    rms_scale_BL = jax.lax.rsqrt(squares_BL / x_BLD.shape[-1] + epsilon)
    if squares_BL.size == 1:
        return x_BLD, x_BLD, rms_scale_BL
    return x_BLD, (x32_BLD * rms_scale_BL[..., None]).astype(x_BLD.dtype), None


# ---- mixers --------------------------------------------------------------------


class PackedSSD:
    """RotarySSD with x, B, C and dt in one matrix; its cache is the state, float32 [B, H, P, N] whatever the dtype."""

    cache_axes = ('batch', 'heads', None, None)
    maps = ('x', 'b', 'c', 'dt')

    def __init__(self, model: Model):
        self.model = model
        self.implementation = None if model.ssd_implementation == 'auto' else model.ssd_implementation
        self.chunk_size = model.ssd_chunk_size or None

    def pack(self, params: dict) -> Weights:
        vectors = {name: params[name] for name in ('a_log', 'dt_bias') if name in params}
        return vectors | {
            'in_proj': pack_projections(params['in_proj'], self.maps, self.model.num_ssd_groups),
            'out_proj': pack_linear(params['out_proj'], num_inputs=2),
        }

    def axes(self) -> dict:
        model = self.model
        return {
            'a_log': ('heads',),
            'in_proj': _with_bias({'kernel': ('groups', None, 'embed')}, model, ('groups', None)),
            'out_proj': _with_bias({'kernel': ('embed', 'heads', None)}, model, ('embed',)),
        } | ({'dt_bias': ('heads',)} if model.use_dt_bias else {})

    def empty_cache(self, batch: int, length: int) -> Float32[Array, 'B H P N']:
        del length
        model = self.model
        return jnp.zeros((batch, model.num_heads, model.head_dim, model.d_state), jnp.float32)

    def prefill(
        self,
        weights: Weights,
        x_BLD: Float[Array, 'B L D'],
        is_token_BL: Bool[Array, 'B L'],
        *,
        rope: rope.Rope,
        scale_BL: Float32[Array, 'B L'] | None,
    ):
        """Where is_token_BL is False dt is 0: the state keeps its value and takes nothing in."""
        x_BLD, x_BLHP, dt_BLH, *rest = self._inputs(weights, x_BLD, scale_BL)
        dt_BLH = jnp.where(is_token_BL[..., None], dt_BLH, 0)
        y_BLHP, state_BHPN = rotary_ssd(
            x_BLHP, dt_BLH, *rest, rope, chunk_size=self.chunk_size, implementation=self.implementation
        )
        return self._output(weights, y_BLHP), x_BLD, state_BHPN

    def step(
        self,
        weights: Weights,
        x_B1D: Float[Array, 'B 1 D'],
        state_BHPN: Float32[Array, 'B H P N'],
        position_B: Int32[Array, 'B'],
        *,
        rope: rope.Rope,
        scale_BL: Float32[Array, 'B 1'] | None,
    ):
        """The position is in rope."""
        del position_B
        x_B1D, x, dt, a, b, c = self._inputs(weights, x_B1D, scale_BL)
        rope_B = tuple(table[:, 0] for table in rope)
        state_BHPN, y_BHP = rotary_ssd_step(state_BHPN, x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], rope_B)
        return self._output(weights, y_BHP[:, None]), x_B1D, state_BHPN

    def _inputs(self, weights, x_BLD, scale_BL):
        """The residual stream; x, dt, a, B, C of the scan."""
        model, shape, dtype = self.model, x_BLD.shape[:2], x_BLD.dtype
        x_BLD, u_BLD, rms_scale_BL = defer_rms(x_BLD, model.norm_epsilon)
        joint = linear(weights['in_proj'], self.axes()['in_proj'], u_BLD, 1, jnp.float32, rms_scale_BL)
        heads = model.num_heads // model.num_ssd_groups  # per group
        widths = (heads * model.head_dim, model.d_state, model.d_state, heads)
        ends = [sum(widths[:i]) for i in (1, 2, 3)]
        dt_bias = weights.get('dt_bias', jnp.zeros_like(weights['a_log']))
        bias = jnp.pad(dt_bias.reshape(-1, heads), ((0, 0), (ends[-1], 0)))
        joint = jnp.where(jnp.arange(sum(widths)) < ends[-1], joint, jax.nn.softplus(joint + bias))
        if math.prod(shape) == 1:
            # One kernel over the whole product; a row's state is updated in as long as it takes to start one more.
            joint = jax.lax.optimization_barrier(joint)
        x, b, c, dt = jnp.split(joint, ends, axis=-1)
        x_BLHP = x.astype(dtype).reshape(*shape, -1, model.head_dim)
        b_BLGN, c_BLGN = b.astype(dtype), c.astype(dtype)
        if scale_BL is not None:
            c_BLGN = (c_BLGN * scale_BL[..., None, None]).astype(c_BLGN.dtype)
        return x_BLD, x_BLHP, dt.reshape(*shape, -1), -jnp.exp(weights['a_log']), b_BLGN, c_BLGN

    def _output(self, weights, y_BLHP):
        return linear(weights['out_proj'], self.axes()['out_proj'], y_BLHP, 2)


class PackedAttention:
    """Attention with Q, K and V in one matrix; its cache is rotated K, and V, each [B, G, S, K] in model.dtype."""

    cache_axes = (('batch', 'groups', None, None), ('batch', 'groups', None, None))
    maps = ('q', 'k', 'v')

    def __init__(self, model: Model):
        self.model = model
        self.implementation = None if model.attention_implementation == 'auto' else model.attention_implementation

    def pack(self, params: dict) -> Weights:
        return {
            'in_proj': pack_projections(params['in_proj'], self.maps, self.model.num_kv_heads),
            'out_proj': pack_linear(params['out_proj'], num_inputs=2),
        }

    def axes(self) -> dict:
        return {
            'in_proj': _with_bias({'kernel': ('groups', None, 'embed')}, self.model, ('groups', None)),
            'out_proj': _with_bias({'kernel': ('embed', 'heads', None)}, self.model, ('embed',)),
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
        rope: rope.Rope,
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
        rope: rope.Rope,
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
        """The residual stream; rotated Q and K, and V."""
        model, shape = self.model, x_BLD.shape[:2]
        x_BLD, u_BLD, rms_scale_BL = defer_rms(x_BLD, model.norm_epsilon)
        joint = linear(weights['in_proj'], self.axes()['in_proj'], u_BLD, 1, rms_scale_BL=rms_scale_BL)
        heads = model.num_heads // model.num_kv_heads  # per group
        joint = joint.reshape(*shape, -1, heads + 2, model.head_dim)
        q, k_BLGK, v_BLGK = joint[..., :heads, :], joint[..., heads, :], joint[..., heads + 1, :]
        q_BLHK = rope.rotate(q.reshape(*shape, -1, model.head_dim), rope_tables)
        if scale_BL is not None:
            q_BLHK = (q_BLHK * scale_BL[..., None, None]).astype(q_BLHK.dtype)
        return x_BLD, q_BLHK, rope.rotate(k_BLGK, rope_tables), v_BLGK

    def _output(self, weights, y_BLHK):
        return linear(weights['out_proj'], self.axes()['out_proj'], y_BLHK, 2)


PACKED = {'ssd': PackedSSD, 'attention': PackedAttention}


# ---- block -----------------------------------------------------------------------


class PackedBlock:
    """A block of one kind for decoding: pure functions of its packed weights."""

    def __init__(self, model: Model, kind: str):
        if kind not in PACKED:
            raise NotImplementedError(
                f'layers of kind {kind!r} have no form for decoding; add one to inference/packed.py'
            )
        self.model, self.kind, self.mixer = model, kind, PACKED[kind](model)
        self.rope_width = MIXERS[kind].rope_width(model)

    def pack(self, params: dict) -> Weights:
        """Packed weights from the parameters of one block, not stacked."""
        mlp = params['mlp']
        gate_up = {
            leaf: jnp.stack([mlp['in_proj'][name][leaf] for name in ('gate', 'up')], axis=-2)
            for leaf in mlp['in_proj']['gate']
        }
        return {
            'mixer': self.mixer.pack(params['mixer']),
            'mixer_residual': params['mixer_residual'],
            'mlp': {
                'in_proj': _fold_norm(pack_linear(gate_up, num_inputs=1), mlp['in_proj']['norm']),
                'out_proj': pack_linear(mlp['out_proj'], num_inputs=1),
            },
            'mlp_residual': params['mlp_residual'],
        }

    def axes(self) -> dict:
        """Logical axes of the packed weights."""
        return {
            'mixer': self.mixer.axes(),
            'mixer_residual': {'weight': (None,)},
            'mlp': {
                'in_proj': _with_bias({'kernel': (None, 'mlp', 'embed')}, self.model, (None, 'mlp')),
                'out_proj': _with_bias({'kernel': ('embed', 'mlp')}, self.model, ('embed',)),
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
        x_BLD = layers.learned_residual(x_BLD, y_BLD, weights['mixer_residual']['weight'])
        x_BLD, u_BLD, rms_scale_BL = defer_rms(x_BLD, self.model.norm_epsilon)
        mlp, axes = weights['mlp'], self.axes()['mlp']
        joint = linear(mlp['in_proj'], axes['in_proj'], u_BLD, 1, rms_scale_BL=rms_scale_BL)
        gate_BLF, up_BLF = jnp.unstack(joint, axis=-2)
        y_BLD = linear(mlp['out_proj'], axes['out_proj'], jax.nn.silu(gate_BLF) * up_BLF, 1)
        return layers.learned_residual(x_BLD, y_BLD, weights['mlp_residual']['weight'])
