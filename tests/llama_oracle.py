"""Llama in float64, in numpy, on tensors by the names of transformers' LlamaForCausalLM; random ones to try it on."""

import numpy as np

V, D, F, LAYERS, H, G = 96, 64, 112, 3, 4, 2
K = D // H
THETA, EPSILON = 500000.0, 1e-5  # Llama 3's
TOKENS = np.random.default_rng(1).integers(0, V, (2, 37))


def random_tensors():
    """Weights by the names of transformers' LlamaForCausalLM, float32."""
    rng = np.random.default_rng(0)

    def matrix(outputs, inputs):
        return (rng.standard_normal((outputs, inputs)) * inputs**-0.5).astype(np.float32)

    def norm():
        return (1 + 0.1 * rng.standard_normal(D)).astype(np.float32)

    tensors = {'model.embed_tokens.weight': matrix(V, D), 'lm_head.weight': matrix(V, D), 'model.norm.weight': norm()}
    for i in range(LAYERS):
        layer = {
            'input_layernorm.weight': norm(),
            'self_attn.q_proj.weight': matrix(H * K, D),
            'self_attn.k_proj.weight': matrix(G * K, D),
            'self_attn.v_proj.weight': matrix(G * K, D),
            'self_attn.o_proj.weight': matrix(D, H * K),
            'post_attention_layernorm.weight': norm(),
            'mlp.gate_proj.weight': matrix(F, D),
            'mlp.up_proj.weight': matrix(F, D),
            'mlp.down_proj.weight': matrix(D, F),
        }
        tensors |= {f'model.layers.{i}.{name}': value for name, value in layer.items()}
    return tensors


def logits(tensors):
    """Llama's forward pass in float64: pre-norm, rotary Q and K in halves, grouped K and V, SwiGLU."""
    t = {name: value.astype(np.float64) for name, value in tensors.items()}
    B, L = TOKENS.shape

    def rms(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * scale

    angles = np.arange(L)[:, None] / THETA ** (np.arange(0, K, 2) / K)
    cos, sin = (np.concatenate([f(angles)] * 2, axis=-1)[:, None] for f in (np.cos, np.sin))

    def rotated(x):
        first, second = x[..., : K // 2], x[..., K // 2 :]
        return x * cos + np.concatenate([-second, first], axis=-1) * sin

    x = t['model.embed_tokens.weight'][TOKENS]
    for i in range(LAYERS):
        w = {name: t[f'model.layers.{i}.{name}.weight'] for name in (
            'input_layernorm', 'post_attention_layernorm', 'self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj',
            'self_attn.o_proj', 'mlp.gate_proj', 'mlp.up_proj', 'mlp.down_proj')}  # fmt: skip
        u = rms(x, w['input_layernorm'])
        q, k, v = ((u @ w[f'self_attn.{n}_proj'].T).reshape(B, L, -1, K) for n in ('q', 'k', 'v'))
        q, k = rotated(q), rotated(k)
        k, v = (np.repeat(y, H // G, axis=2) for y in (k, v))
        scores = np.einsum('blhk,bmhk->bhlm', q, k) / np.sqrt(K)
        scores = np.where(np.tril(np.ones((L, L), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y = np.einsum('bhlm,bmhk->blhk', weights / weights.sum(-1, keepdims=True), v)
        x = x + y.reshape(B, L, -1) @ w['self_attn.o_proj'].T
        u = rms(x, w['post_attention_layernorm'])
        gate = u @ w['mlp.gate_proj'].T
        x = x + (gate / (1 + np.exp(-gate)) * (u @ w['mlp.up_proj'].T)) @ w['mlp.down_proj'].T
    return rms(x, t['model.norm.weight']) @ t['lm_head.weight'].T
