"""TransXSSM, Mamba-2, Jamba and their like for the transformers library, in plain PyTorch.

    model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)

`python -m transxssm_jax.convert export` puts this file and scan_transxssm.py beside the weights; they need torch and
transformers alone. The scan is computed in chunks, in float32; on a GPU and in 16 bits, mamba_ssm's Triton kernel takes its
place where that package is installed. What a layer keeps of the tokens before has a constant size, but for the keys and values
of attention.

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

from .scan_transxssm import Convolution, Norm, rope_tables, rotate, scan

# How this version of transformers calls what a model keeps between calls.
_NAMES = inspect.signature(vars(GenerationMixin)['prepare_inputs_for_generation']).parameters
CACHE = 'cache' if 'cache' in _NAMES else 'past_key_values'
# What stays float32 in a model of 16 bits; transformers 4 takes no 'bias' here.
_BIAS = () if transformers.__version__.startswith('4.') else ('bias',)
NORMS = ('norm', 'q_norm', 'k_norm', 'b_norm', 'c_norm', 'final_norm')
FLOAT32 = (*NORMS, 'mixer_residual', 'mlp_residual', 'conv', 'a_log', 'dt_bias', 'd_skip', *_BIAS)


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
    qk_norm: bool = False  # RMSNorm of every head of q and k before they rotate
    bc_norm: bool = False  # RMSNorm of every group of b and c
    logit_soft_cap: float = 0.0  # logits are cap * tanh(logits / cap); 0: as they are
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


# ---- layers ---------------------------------------------------------------------


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
        if config.bc_norm:
            self.b_norm, self.c_norm = (Norm(config.state_size, config.rms_norm_eps) for _ in 'bc')

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
        if self.config.bc_norm:
            b_BLGN, c_BLGN = self.b_norm(b_BLGN), self.c_norm(c_BLGN)
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
        self.width, self.has_norms = config.head_dim, config.qk_norm
        heads, groups = config.num_attention_heads * self.width, config.num_key_value_heads * self.width
        self.in_proj = InputProjections(config, {'q': heads, 'k': groups, 'v': groups})
        self.out_proj = Linear(heads, config.hidden_size, bias=config.use_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = (Norm(self.width, config.rms_norm_eps) for _ in 'qk')

    def forward(self, x_BLD: Tensor, at: Positions, kept: SimpleNamespace) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.width)) for y in self.in_proj(x_BLD))
        if self.has_norms:
            q, k = self.q_norm(q), self.k_norm(k)
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
        logits, cap = self.lm_head(hidden_BLD[:, wanted]).float(), self.config.logit_soft_cap
        logits = cap * torch.tanh(logits / cap) if cap else logits
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
