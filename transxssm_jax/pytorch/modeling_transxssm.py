"""TransXSSM, Mamba-2, Jamba and their like for the transformers library, in plain PyTorch.

    model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)

`python -m transxssm_jax.convert export` puts this file beside the weights; it needs torch and transformers alone. The scan
is computed in chunks, in float32; on a GPU and in 16 bits, mamba_ssm's Triton kernel takes its place where that package is
installed. What a layer keeps of the tokens before has a constant size, but for the keys and values of attention.

A batch may be padded anywhere. Padding is no part of a row: it moves no position and no state.

Shape legend: B batch, L length, S cached and new tokens, D model, F MLP, H heads, G groups, K attention head width, P head width
of the scan, N state, Q and R tokens of a chunk, W width of the convolution, V vocabulary.
"""

import inspect
import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

try:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # pyright: ignore[reportMissingImports]
except ImportError:
    mamba_chunk_scan_combined = None

CHUNK = 128  # tokens of the scan that are computed at a time
# How this version of transformers calls what a model keeps between calls.
_NAMES = inspect.signature(vars(GenerationMixin)['prepare_inputs_for_generation']).parameters
CACHE = 'cache' if 'cache' in _NAMES else 'past_key_values'
# What stays float32 in a model of 16 bits; transformers 4 takes no 'bias' here.
_BIAS = () if transformers.__version__.startswith('4.') else ('bias',)
FLOAT32 = ('norm', 'final_norm', 'mixer_residual', 'mlp_residual', 'conv', 'a_log', 'dt_bias', 'd_skip', *_BIAS)


class TransXSSMConfig(PretrainedConfig):
    """Sizes of a model. `layer_kinds` names the mixers of one period, 'ssd', 'attention' or 'mamba2', which repeats."""

    model_type = 'transxssm_jax'
    keys_to_ignore_at_inference = ['cache', 'past_key_values']
    vocab_size: int = 50304
    hidden_size: int = 2048
    intermediate_size: int = 6144  # 0: layers have no MLP
    num_hidden_layers: int = 24
    layer_kinds: list[str] | tuple[str, ...] = (*('ssd',) * 7, 'attention')
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    num_ssd_groups: int = 8
    state_size: int = 128
    conv_width: int = 4
    mamba_expand: int = 2
    attention_encoding: str = 'rope'  # or 'none'
    ssd_encoding: str = 'rope'  # or 'conv1d_d', 'decay_only'
    use_bias: bool = False
    use_dt_bias: bool = True
    rotary_base: float = 10000.0
    rotary_scaling: str = 'none'  # or 'linear', 'dynamic', 'length'
    rotary_factor: float = 4.0
    rotary_original_length: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    max_position_embeddings: int = 4096
    use_cache: bool = True
    tie_word_embeddings: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class TransXSSMCache:
    """What the layers keep of the tokens before: states, the convolutions' last inputs, keys and values.

    Args:
      max_length: tokens of the longest row at the end, padding included, which rotary_scaling='dynamic' computes with
        from the start, because what is rotated is kept; None: the tokens of the first call.
    """

    is_linear: list[bool] = []  # transformers asks for both
    is_compileable = False

    def __init__(self, max_length: int | None = None):
        self.max_length = max_length
        self.length = 0  # tokens seen, padding included
        self.layers: list[SimpleNamespace] = []  # hooks that move inputs to a device would copy a dict
        self.rows: dict[str, Tensor] = {}  # 'position' [B] of the next token, 'valid' [B, S], 'rope_length' [B]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for kept in (*map(vars, self.layers), self.rows):
            for name, value in kept.items():
                kept[name] = value.index_select(0, beam_idx.to(value.device))


class Positions(NamedTuple):
    """Where the tokens of a call stand. `valid` and `keys` are None where nothing is padding."""

    rope: dict[str, tuple[Tensor, Tensor] | None]  # by kind of layer: cosines and sines [B, L, 1, width / 2]
    scale: Tensor | None  # [B, L, 1, 1], of rotary_scaling='length'
    valid: Tensor | None  # bool [B, L]
    keys: Tensor | None  # bool [B, S]


# ---- positions ------------------------------------------------------------------


def rope_tables(config: TransXSSMConfig, positions_BL: Tensor, width: int, length_B: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [B, L, 1, width / 2], of angles in float64."""
    wide = torch.float32 if positions_BL.device.type == 'mps' else torch.float64
    exponent = torch.arange(0, width, 2, dtype=wide, device=positions_BL.device) / width
    frequency = config.rotary_base**-exponent / (config.rotary_factor if config.rotary_scaling == 'linear' else 1.0)
    if config.rotary_scaling == 'dynamic':
        longer_B = length_B.to(wide).clamp(min=config.rotary_original_length) / config.rotary_original_length
        stretch_B11 = (config.rotary_factor * longer_B - (config.rotary_factor - 1))[:, None, None]
        frequency = frequency * stretch_B11 ** (-exponent * width / (width - 2))
    angle = (positions_BL.to(wide)[..., None] * frequency)[:, :, None]
    return angle.cos().float(), angle.sin().float()


def rotate(x_BLHK: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """Turns the pairs (i, i + K/2), in float32."""
    if rope is None:
        return x_BLHK
    (first, second), (cos, sin) = x_BLHK.float().chunk(2, dim=-1), rope
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BLHK.dtype)


# ---- layers ---------------------------------------------------------------------


class Norm(nn.Module):
    def __init__(self, features: int, epsilon: float):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(features)), epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (wide * inverse * self.weight.float()).to(x.dtype)


class Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # whose bias may be wider than the weight
        y = F.linear(input, self.weight.to(input.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class InputProjections(nn.Module):
    """A norm and all linear maps of its output; that of dt is float32."""

    def __init__(self, config: TransXSSMConfig, features: dict[str, int]):
        super().__init__()
        self.names = tuple(features)
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        for name, size in features.items():
            setattr(self, name, Linear(config.hidden_size, size, bias=config.use_bias))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.norm(x)
        return [getattr(self, name)(x.float() if name == 'dt' else x) for name in self.names]


class Residual(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return (x * self.weight.float() + branch).to(branch.dtype)


class MLP(nn.Module):
    def __init__(self, config: TransXSSMConfig):
        super().__init__()
        self.in_proj = InputProjections(config, dict.fromkeys(('gate', 'up'), config.intermediate_size))
        self.out_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.use_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.in_proj(x)
        return self.out_proj(F.silu(gate) * up)


class Convolution(nn.Module):
    """silu of a causal convolution, one filter per channel; `kept` holds the W - 1 inputs before that are no padding."""

    def __init__(self, width: int, features: dict[str, int]):
        super().__init__()
        self.before, self.names = width - 1, tuple(features)
        for name, size in features.items():
            setattr(self, name, nn.Conv1d(size, size, width, groups=size))

    def forward(self, inputs: list[Tensor], kept: SimpleNamespace, valid_BL: Tensor | None) -> list[Tensor]:
        outputs, order, back = [], None, None
        if valid_BL is not None:  # padding goes before all else, so that a token's window is the tokens before it
            order = F.pad(valid_BL.int(), (self.before, 0), value=1).argsort(dim=1, stable=True)[..., None]
            back = valid_BL.int().argsort(dim=1, stable=True).argsort(dim=1)[..., None]
        for name, u_BLC in zip(self.names, inputs):
            tail = getattr(kept, name, u_BLC.new_zeros(u_BLC.shape[0], self.before, u_BLC.shape[2]))
            window = torch.cat([tail, u_BLC], dim=1)
            window = window if order is None else window.take_along_dim(order, dim=1)
            setattr(kept, name, window[:, window.shape[1] - self.before :])
            filters = getattr(self, name)
            y_BCL = F.conv1d(window.float().mT, filters.weight.float(), filters.bias.float(), groups=window.shape[2])
            y_BLC = F.silu(y_BCL).transpose(1, 2).to(u_BLC.dtype)
            outputs.append(y_BLC if back is None else y_BLC.take_along_dim(back, dim=1))
        return outputs


def scan(x_BLHP: Tensor, dt_BLH: Tensor, a_H: Tensor, b_BLGN: Tensor, c_BLGN: Tensor, state_BHPN: Tensor):
    """h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T;  y_t = h_t c_t. Returns y in x's dtype and the last state, float32."""
    if mamba_chunk_scan_combined and x_BLHP.is_cuda and x_BLHP.dtype != torch.float32 and x_BLHP.shape[1] > 1:
        arrays = [v.contiguous() for v in (x_BLHP, dt_BLH, a_H, b_BLGN, c_BLGN)]
        states = dict(initial_states=state_BHPN.contiguous(), return_final_states=True)
        y, state = mamba_chunk_scan_combined(*arrays, chunk_size=256, **states)
        return y.to(x_BLHP.dtype), state.float()
    G, wide = b_BLGN.shape[2], torch.float32 if x_BLHP.device.type == 'mps' else torch.float64
    state = state_BHPN.float().unflatten(1, (G, -1))
    outputs = []
    for x, dt, b, c in zip(*(v.split(CHUNK, dim=1) for v in (x_BLHP, dt_BLH, b_BLGN, c_BLGN))):
        x, b, c = x.float().unflatten(2, (G, -1)), b.float(), c.float()  # x [B, Q, G, heads of a group, P]
        # Sums in float64: where a strong decay stands before weak ones, float32 would lose these.
        cum_BHQ = torch.cumsum((dt * a_H).to(wide), dim=1).transpose(1, 2)
        since = (cum_BHQ[..., :, None] - cum_BHQ[..., None, :]).float()  # [B, H, Q, R]
        causal = torch.ones(since.shape[-2:], dtype=torch.bool, device=since.device).tril()
        decay = torch.exp(since.masked_fill(~causal, -math.inf)) * dt.transpose(1, 2)[:, :, None]
        enter, leave = torch.exp(cum_BHQ).float(), torch.exp(cum_BHQ[..., -1:] - cum_BHQ).float() * dt.transpose(1, 2)
        decay, enter, leave = (v.unflatten(1, (G, -1)) for v in (decay, enter, leave))
        weights = torch.einsum('bqgn,brgn->bgqr', c, b)[:, :, None] * decay
        y = torch.einsum('bghqr,brghp->bqghp', weights, x)
        y = y + torch.einsum('bqgn,bghpn->bqghp', c, state) * enter.permute(0, 3, 1, 2)[..., None]
        local = torch.einsum('brghp,brgn->bghpn', x * leave.permute(0, 3, 1, 2)[..., None], b)
        state = enter[..., -1, None, None] * state + local
        outputs.append(y.flatten(2, 3).to(x_BLHP.dtype))
    return torch.cat(outputs, dim=1), state.flatten(1, 2)


class ScanMixer(nn.Module):
    """The rotary state-space layer ('ssd'), or Mamba-2, which has a gate, a convolution and a D skip and no rotation."""

    def __init__(self, config: TransXSSMConfig, kind: str):
        super().__init__()
        self.is_mamba2, self.config = kind == 'mamba2', config
        self.heads = config.num_attention_heads * (config.mamba_expand if self.is_mamba2 else 1)
        inner, grouped = self.heads * config.head_dim, config.num_ssd_groups * config.state_size
        features = {'x': inner, 'b': grouped, 'c': grouped}
        gate = {'z': inner} if self.is_mamba2 else {}
        self.in_proj = InputProjections(config, {**gate, **features, 'dt': self.heads})
        self.out_proj = Linear(inner, config.hidden_size, bias=config.use_bias)
        self.a_log = nn.Parameter(torch.zeros(self.heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.heads)) if self.is_mamba2 or config.use_dt_bias else None
        convolved = self.is_mamba2 or config.ssd_encoding == 'conv1d_d'
        self.conv = Convolution(config.conv_width, features) if convolved else None
        self.d_skip = nn.Parameter(torch.ones(self.heads)) if convolved else None
        self.norm = Norm(inner, config.rms_norm_eps) if self.is_mamba2 else None

    def forward(self, x_BLD: Tensor, at: Positions, kept: SimpleNamespace) -> Tensor:
        (B, L, _), H, G = x_BLD.shape, self.heads, self.config.num_ssd_groups
        *gate, x, b, c, dt_BLH = self.in_proj(x_BLD)
        dt_BLH = F.softplus(dt_BLH if self.dt_bias is None else dt_BLH + self.dt_bias.float())
        if at.valid is not None:  # padding adds nothing to the state, and the state does not decay over it
            dt_BLH = dt_BLH * at.valid[..., None]
        if self.conv is not None:
            inputs = [x, b, c] if at.valid is None else [v * at.valid[..., None] for v in (x, b, c)]
            x, b, c = self.conv(inputs, kept, at.valid)
        x_BLHP, b_BLGN, c_BLGN = x.view(B, L, H, -1), b.view(B, L, G, -1), c.view(B, L, G, -1)
        rope = None if self.is_mamba2 else at.rope['ssd']
        if at.scale is not None and rope is not None:
            c_BLGN = (c_BLGN * at.scale).to(c_BLGN.dtype)
        state = getattr(kept, 'state', x_BLD.new_zeros(B, H, x_BLHP.shape[-1], b_BLGN.shape[-1], dtype=torch.float32))
        b_BLGN, c_BLGN = rotate(b_BLGN, rope), rotate(c_BLGN, rope)
        y_BLHP, kept.state = scan(x_BLHP, dt_BLH, -torch.exp(self.a_log.float()), b_BLGN, c_BLGN, state)
        if self.d_skip is not None:
            y_BLHP = y_BLHP.float() + self.d_skip.float()[:, None] * x_BLHP.float()
        if self.norm is not None:  # over the heads of one group, in float32
            y = (y_BLHP.flatten(2) * F.silu(gate[0].float())).view(B, L, G, -1)
            inverse = torch.rsqrt(y.square().mean(-1, keepdim=True) + self.norm.epsilon)
            y_BLHP = (y * inverse).flatten(2) * self.norm.weight.float()
        return self.out_proj(y_BLHP.reshape(B, L, -1).to(x_BLD.dtype))


class Attention(nn.Module):
    def __init__(self, config: TransXSSMConfig):
        super().__init__()
        self.width = config.head_dim
        heads, groups = config.num_attention_heads * self.width, config.num_key_value_heads * self.width
        self.in_proj = InputProjections(config, {'q': heads, 'k': groups, 'v': groups})
        self.out_proj = Linear(heads, config.hidden_size, bias=config.use_bias)

    def forward(self, x_BLD: Tensor, at: Positions, kept: SimpleNamespace) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.width)) for y in self.in_proj(x_BLD))
        rope = at.rope['attention']
        q, k = rotate(q, rope), rotate(k, rope)
        if at.scale is not None and rope is not None:
            q = (q * at.scale).to(q.dtype)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # [B, heads, L, K]
        if hasattr(kept, 'k'):
            k, v = torch.cat([kept.k, k], dim=2), torch.cat([kept.v, v], dim=2)
        kept.k, kept.v = k, v
        L, S, mask, gqa = q.shape[2], k.shape[2], None, k.shape[1] != q.shape[1]
        if at.keys is not None or 1 < L < S:
            order = torch.arange(S, device=q.device)
            mask = (order[None] <= order[S - L :, None])[None, None]
            if at.keys is not None:  # padding sees itself, so that no row of scores is empty
                mask = mask & (at.keys[:, None, None] | (order[None] == order[S - L :, None]))
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and L > 1, enable_gqa=gqa)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: TransXSSMConfig, kind: str):
        super().__init__()
        self.mixer = Attention(config) if kind == 'attention' else ScanMixer(config, kind)
        self.mixer_residual = Residual(config.hidden_size)
        if config.intermediate_size:
            self.mlp, self.mlp_residual = MLP(config), Residual(config.hidden_size)

    def forward(self, x: Tensor, at: Positions, kept: SimpleNamespace) -> Tensor:
        x = self.mixer_residual(x, self.mixer(x, at, kept))
        return self.mlp_residual(x, self.mlp(x)) if hasattr(self, 'mlp') else x


class TransXSSMPreTrainedModel(PreTrainedModel):
    config: TransXSSMConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = TransXSSMConfig
    base_model_prefix = 'model'
    _no_split_modules = ['Block']
    _supports_sdpa = True
    _is_stateful = True  # a state cannot go back to fewer tokens

    def post_init(self) -> None:
        names = {part for name, _ in self.named_parameters() for part in name.split('.')}
        self._keep_in_fp32_modules_strict = [name for name in FLOAT32 if name in names]
        super().post_init()


class TransXSSMModel(TransXSSMPreTrainedModel):
    def __init__(self, config: TransXSSMConfig):
        super().__init__(config)
        self.kinds = [config.layer_kinds[i % len(config.layer_kinds)] for i in range(config.num_hidden_layers)]
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kind) for kind in self.kinds)
        self.final_norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: TransXSSMCache | None = None
    ) -> Tensor:
        """Hidden states [B, L, D] after the final norm.

        Args:
          input_ids: the tokens that the cache has not seen.
          attention_mask: [B, L] or [B, cached + L], 0 for padding; None: there is none.
          cache: is updated.
        """
        cache = TransXSSMCache() if cache is None else cache
        at = self._positions(input_ids, attention_mask, cache)
        cache.layers = cache.layers or [SimpleNamespace() for _ in self.layers]
        x = self.embed_tokens(input_ids)
        for layer, kept in zip(self.layers, cache.layers):
            x = layer(x, at, kept)
        return self.final_norm(x)

    def _positions(self, ids_BL: Tensor, attention_mask: Tensor | None, cache: TransXSSMCache) -> Positions:
        """Reads the positions of new tokens off the mask, and moves the cache on."""
        (B, L), config, rows = ids_BL.shape, self.config, cache.rows
        valid = torch.ones_like(ids_BL, dtype=torch.bool)
        if attention_mask is not None:
            valid = attention_mask[:, attention_mask.shape[1] - L :].to(ids_BL.device).bool()
        before = rows.get('position', torch.zeros(B, dtype=torch.long, device=ids_BL.device))
        positions = (before[:, None] + valid.cumsum(-1) - 1).clamp(min=0)
        if not cache.length:
            fixed = None if cache.max_length is None else cache.max_length - L + valid.sum(-1)
            rows['rope_length'] = positions.amax(-1) + 1 if fixed is None else fixed
        rows['position'] = before + valid.sum(-1)
        keys = None
        if 'attention' in self.kinds:
            rows['valid'] = keys = torch.cat([rows['valid'], valid], dim=1) if cache.length else valid
        cache.length += L
        rope = {'ssd': None, 'attention': None}
        if config.ssd_encoding == 'rope':
            rope['ssd'] = rope_tables(config, positions, config.state_size, rows['rope_length'])
        if config.attention_encoding == 'rope':
            rope['attention'] = rope_tables(config, positions, config.head_dim, rows['rope_length'])
        log_length = (positions.float() + 1).log() / math.log(config.rotary_original_length)
        scale = log_length.clamp(min=1)[..., None, None] if config.rotary_scaling == 'length' else None
        return Positions(rope, scale, *(None if v is None or bool(v.all()) else v for v in (valid, keys)))


class TransXSSMForCausalLM(TransXSSMPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {'lm_head.weight': 'model.embed_tokens.weight'}
    accepts_loss_kwargs = False  # of Trainer, in spite of **others

    def __init__(self, config: TransXSSMConfig):
        super().__init__(config)
        self.model = TransXSSMModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: TransXSSMCache | None = None,
        past_key_values: TransXSSMCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """See `TransXSSMModel.forward`; logits are of the last logits_to_keep tokens, 0: of all, or at those indices.

        Args:
          labels: [B, L], the tokens themselves, -100 where no loss is taken; that of token t is predicted from those before.
          use_cache: whether the output has the cache, for the next call.
          others: what peft passes always, None or False; ValueError: another value, which is not computed here.
        """
        if refused := [name for name, value in others.items() if value is not None and value is not False]:
            raise ValueError(f'{refused[0]} is not computed by this model; leave it out')
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        cache = cache or past_key_values or (TransXSSMCache() if use_cache else None)
        hidden_BLD = self.model(input_ids, attention_mask, cache)
        wanted = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_BLD[:, wanted]).float()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **({CACHE: cache} if use_cache else {}))  # pyright: ignore
        return output.to_tuple() if return_dict is False else output

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict[str, Any], *args, **kwargs):  # pyright: ignore
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = TransXSSMCache(generation_config.max_length)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:  # pyright: ignore
        """The tokens that the cache has not seen: of the whole row, or all that are given where they are the new ones."""
        cache = kwargs.get(CACHE)
        if cache is not None and input_ids.shape[1] > cache.length:
            input_ids = input_ids[:, cache.length :]
        names = ('attention_mask', 'use_cache', 'logits_to_keep')
        return {'input_ids': input_ids, CACHE: cache} | {name: kwargs[name] for name in names if name in kwargs}
