"""The mixers on the scan in the form for decoding: their input maps are one matrix, and so are their convolutions.

Shape legend: B batch, L length, D model, H heads, G groups, P head width, N state, W width of the convolution, R what a
group gives to the convolution: x of its heads, B and C.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.convolution import causal_convolution
from pallas_kernels.gated_norm import skip_gate_norm
from pallas_kernels.ssd.api import rotary_ssd, rotary_ssd_step
from transxssm_jax.config import Model
from transxssm_jax.inference.packed_linear import (
    Weights,
    defer_rms,
    linear,
    pack_linear,
    pack_projections,
    with_bias,
)
from transxssm_jax.model.convolution import skip
from transxssm_jax.model.layers import head_norm
from transxssm_jax.model.rope import Rope

CONVOLVED = ('x', 'b', 'c')


class PackedSSD:
    """RotarySSD with x, B, C and dt in one matrix.

    Its cache is the state, float32 [B, H, P, N] whatever the dtype; with a convolution it is (state, the last W - 1 tokens
    of the convolution's input, [B, W - 1, G, R] in model.dtype).
    """

    maps = (*CONVOLVED, 'dt')

    def __init__(self, model: Model):
        self.model = model
        self.implementation = None if model.ssd_implementation == 'auto' else model.ssd_implementation
        self.chunk_size = model.ssd_chunk_size or None
        self.num_heads, self.has_conv, self.has_dt_bias = self.settings(model)
        self.norms = ('b_norm', 'c_norm') if model.bc_norm else ()
        state_axes = ('batch', 'heads', None, None)
        self.cache_axes = (state_axes, ('batch', None, 'groups', None)) if self.has_conv else state_axes
        heads = self.num_heads // model.num_ssd_groups  # per group
        widths = {'z': heads * model.head_dim, 'x': heads * model.head_dim, 'b': model.d_state, 'c': model.d_state}
        self.widths = {name: (widths | {'dt': heads})[name] for name in self.maps}

    @staticmethod
    def settings(model: Model) -> tuple[int, bool, bool]:
        """(heads, whether there is a convolution and a D skip, whether dt has a bias)."""
        return model.num_heads, model.ssd_encoding == 'conv1d_d', model.use_dt_bias

    def pack(self, params: dict) -> Weights:
        weights = {name: params[name] for name in ('a_log', 'dt_bias', 'd_skip', *self.norms) if name in params} | {
            'in_proj': pack_projections(params['in_proj'], self.maps, self.model.num_ssd_groups),
            'out_proj': pack_linear(params['out_proj'], num_inputs=2),
        }
        if self.has_conv:
            weights['conv'] = {
                'taps': self._join(params['conv'], 'kernel', leading=1),
                'bias': self._join(params['conv'], 'bias', leading=0),
            }
        return weights

    def _join(self, params, leaf, leading):
        """Parameters of the convolutions as one array [*leading axes, G, R]."""
        leaves = [params[name][leaf] for name in CONVOLVED]
        groups = self.model.num_ssd_groups
        return jnp.concatenate([v.reshape(*v.shape[:leading], groups, -1) for v in leaves], axis=-1)

    def axes(self) -> dict:
        model = self.model
        axes = {
            'a_log': ('heads',),
            'in_proj': with_bias({'kernel': ('groups', None, 'embed')}, model, ('groups', None)),
            'out_proj': with_bias({'kernel': ('embed', 'heads', None)}, model, ('embed',)),
        }
        axes |= {name: {'scale': (None,)} for name in self.norms}
        if self.has_dt_bias:
            axes['dt_bias'] = ('heads',)
        if self.has_conv:
            axes['d_skip'] = ('heads',)
            axes['conv'] = {'taps': (None, 'groups', None), 'bias': ('groups', None)}
        return axes

    def empty_cache(self, batch: int, length: int):
        del length
        model = self.model
        state_BHPN = jnp.zeros((batch, self.num_heads, model.head_dim, model.d_state), jnp.float32)
        if not self.has_conv:
            return state_BHPN
        shape = (batch, model.conv_width - 1, model.num_ssd_groups, sum(self.widths[name] for name in CONVOLVED))
        return state_BHPN, jnp.zeros(shape, model.dtype)

    def prefill(
        self,
        weights: Weights,
        x_BLD: Float[Array, 'B L D'],
        is_token_BL: Bool[Array, 'B L'],
        *,
        rope: Rope | None,
        scale_BL: Float32[Array, 'B L'] | None,
    ):
        """Where is_token_BL is False dt is 0: the state keeps its value and takes nothing in."""
        x_BLD, z, u_BLGR, dt_BLH = self._project(weights, x_BLD)
        dt_BLH = jnp.where(is_token_BL[..., None], dt_BLH, 0)
        if self.has_conv:
            before = self.model.conv_width - 1
            window = jnp.pad(u_BLGR, ((0, 0), (before, 0), (0, 0), (0, 0)))
            # Rows are filled from the left: token i is at i + W - 1 of the window.
            last = jnp.sum(is_token_BL, axis=1, dtype=jnp.int32)[:, None] + jnp.arange(before)
            tail = jnp.take_along_axis(window, last[:, :, None, None], axis=1)
            u_BLGR = causal_convolution(u_BLGR, weights['conv']['taps'], weights['conv']['bias'])
        x_BLHP, b_BLGN, c_BLGN = self._split(weights, u_BLGR, scale_BL)
        y_BLHP, state_BHPN = rotary_ssd(
            x_BLHP,
            dt_BLH,
            -jnp.exp(weights['a_log']),
            b_BLGN,
            c_BLGN,
            rope,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
        )
        y_BLD = self._output(weights, y_BLHP, x_BLHP, z)
        return y_BLD, x_BLD, ((state_BHPN, tail) if self.has_conv else state_BHPN)

    def step(
        self,
        weights: Weights,
        x_B1D: Float[Array, 'B 1 D'],
        cache,
        position_B: Int32[Array, 'B'],
        *,
        rope: Rope | None,
        scale_BL: Float32[Array, 'B 1'] | None,
    ):
        """The position is in rope."""
        del position_B
        x_B1D, z, u_B1GR, dt = self._project(weights, x_B1D)
        state_BHPN = cache
        if self.has_conv:
            state_BHPN, before = cache
            tail = jnp.concatenate([before, u_B1GR], axis=1)[:, 1:]
            u_B1GR = causal_convolution(u_B1GR, weights['conv']['taps'], weights['conv']['bias'], before=before)
        x, b, c = self._split(weights, u_B1GR, scale_BL)
        rope_B = None if rope is None else tuple(table[:, 0] for table in rope)
        a_H = -jnp.exp(weights['a_log'])
        state_BHPN, y_BHP = rotary_ssd_step(state_BHPN, x[:, 0], dt[:, 0], a_H, b[:, 0], c[:, 0], rope_B)
        y_B1D = self._output(weights, y_BHP[:, None], x, z)
        return y_B1D, x_B1D, ((state_BHPN, tail) if self.has_conv else state_BHPN)

    def _project(self, weights, x_BLD):
        """The residual stream; z of the gate or nothing, x, B and C side by side, [B, L, G, R], and dt [B, L, H]."""
        model, shape, dtype = self.model, x_BLD.shape[:2], x_BLD.dtype
        x_BLD, u_BLD, rms_scale_BL = defer_rms(x_BLD, model.norm_epsilon)
        joint = linear(weights['in_proj'], self.axes()['in_proj'], u_BLD, 1, jnp.float32, rms_scale_BL)
        gate, heads = self.widths.get('z', 0), self.widths['dt']
        end = sum(self.widths.values()) - heads
        dt_bias = weights.get('dt_bias', jnp.zeros_like(weights['a_log']))
        bias = jnp.pad(dt_bias.reshape(-1, heads), ((0, 0), (end, 0)))
        joint = jnp.where(jnp.arange(end + heads) < end, joint, jax.nn.softplus(joint + bias))
        if math.prod(shape) == 1:
            # One kernel over the whole product; a row's state is updated in as long as it takes to start one more.
            joint = jax.lax.optimization_barrier(joint)
        z, u_BLGR, dt = jnp.split(joint, [gate, end], axis=-1)
        return x_BLD, z.astype(dtype), u_BLGR.astype(dtype), dt.reshape(*shape, -1)

    def _split(self, weights, u_BLGR, scale_BL):
        """x [B, L, H, P], B and C [B, L, G, N] of the scan."""
        x, b, c = (self.widths[name] for name in CONVOLVED)
        x, b_BLGN, c_BLGN = jnp.split(u_BLGR, [x, x + b], axis=-1)
        if self.norms:
            b_BLGN, c_BLGN = (
                head_norm(v, weights[name]['scale'], self.model.norm_epsilon)
                for name, v in zip(self.norms, (b_BLGN, c_BLGN))
            )
        if scale_BL is not None:
            c_BLGN = (c_BLGN * scale_BL[..., None, None]).astype(c_BLGN.dtype)
        return x.reshape(*u_BLGR.shape[:2], -1, self.model.head_dim), b_BLGN, c_BLGN

    def _output(self, weights, y_BLHP, x_BLHP, z):
        del z
        if self.has_conv:
            y_BLHP = skip(y_BLHP, x_BLHP, weights['d_skip']).astype(y_BLHP.dtype)
        return linear(weights['out_proj'], self.axes()['out_proj'], y_BLHP, 2)


class PackedMamba2(PackedSSD):
    """Mamba2 with z, x, B, C and dt in one matrix; its cache is that of PackedSSD with a convolution."""

    maps = ('z', *CONVOLVED, 'dt')

    @staticmethod
    def settings(model: Model) -> tuple[int, bool, bool]:
        return model.num_mamba_heads, True, True

    def pack(self, params: dict) -> Weights:
        return super().pack(params) | {'norm': params['norm']}

    def axes(self) -> dict:
        return super().axes() | {'norm': {'scale': ('heads', None)}}

    def _output(self, weights, y_BLHP, x_BLHP, z):
        num_groups = z.shape[2]
        y_BLHP = skip_gate_norm(
            y_BLHP,
            x_BLHP,
            z.reshape(y_BLHP.shape),
            weights['d_skip'],
            weights['norm']['scale'],
            epsilon=self.model.norm_epsilon,
            num_groups=num_groups,
        )
        return linear(weights['out_proj'], self.axes()['out_proj'], y_BLHP, 2)
