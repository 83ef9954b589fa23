"""The published recurrence of Mamba-2 in float64, token by token, in numpy, on tensors of the published format.

Written from the definition (Dao and Gu, 2024, and the names of the reference module): no chunks, no kernels, nothing of ours.
"""

import numpy as np

WIDTH = 4


def silu(x):
    return x / (1 + np.exp(-x))


def softplus(x):
    return np.logaddexp(0, x)


def rms_norm(x, weight, epsilon):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * weight


def mixer(t, u, *, head_dim, groups, state, epsilon=1e-5, segment_ids=None):
    """Mamba2.forward of the reference module without its norm before: u [B, L, D] -> [B, L, D], all float64.

    Args:
      t: name -> tensor, without prefix: in_proj.weight, conv1d.weight, conv1d.bias, dt_bias, A_log, D, norm.weight,
        out_proj.weight.
      segment_ids: [B, L]; state and convolution restart where the id changes. None: one document per row.
    """
    B, L, _ = u.shape
    inner = t['out_proj.weight'].shape[1]
    heads = inner // head_dim
    joint = u @ t['in_proj.weight'].T
    z, xbc, dt = np.split(joint, [inner, 2 * inner + 2 * groups * state], axis=-1)
    dt = softplus(dt + t['dt_bias'])
    a = -np.exp(t['A_log'])
    width = t['conv1d.weight'].shape[-1]
    out = np.zeros((B, L, inner))
    for row in range(B):
        h = np.zeros((heads, head_dim, state))
        start = 0
        for i in range(L):
            if segment_ids is not None and i and segment_ids[row, i] != segment_ids[row, i - 1]:
                h, start = np.zeros_like(h), i
            v = t['conv1d.bias'].copy()
            for back in range(width):
                if i - back >= start:
                    v = v + t['conv1d.weight'][:, 0, width - 1 - back] * xbc[row, i - back]
            v = silu(v)
            x, b, c = np.split(v, [inner, inner + groups * state])
            x, b, c = x.reshape(heads, head_dim), b.reshape(groups, state), c.reshape(groups, state)
            for head in range(heads):
                group = head // (heads // groups)
                h[head] = np.exp(dt[row, i, head] * a[head]) * h[head] + dt[row, i, head] * np.outer(x[head], b[group])
                y = h[head] @ c[group] + t['D'][head] * x[head]
                out[row, i, head * head_dim : (head + 1) * head_dim] = y
    gated = (out * silu(z)).reshape(B, L, groups, -1)
    normed = gated / np.sqrt(np.mean(gated**2, axis=-1, keepdims=True) + epsilon)
    return (normed.reshape(B, L, inner) * t['norm.weight']) @ t['out_proj.weight'].T


def logits(tensors, tokens, *, head_dim, groups, state):
    """Logits [B, L, V] of a whole model with the tensors of a published checkpoint (MambaLMHeadModel)."""
    t = {name: value.astype(np.float64) for name, value in tensors.items()}
    x = t['backbone.embedding.weight'][tokens]
    for i in range(1 + max(int(name.split('.')[2]) for name in t if name.startswith('backbone.layers.'))):
        prefix = f'backbone.layers.{i}.'
        layer = {name.removeprefix(prefix): value for name, value in t.items() if name.startswith(prefix)}
        own = {name.removeprefix('mixer.'): value for name, value in layer.items() if name.startswith('mixer.')}
        x = x + mixer(own, rms_norm(x, layer['norm.weight'], 1e-5), head_dim=head_dim, groups=groups, state=state)
        if 'mlp.fc1.weight' in layer:
            up, gate = np.split(rms_norm(x, layer['norm2.weight'], 1e-5) @ layer['mlp.fc1.weight'].T, 2, axis=-1)
            x = x + (up * silu(gate)) @ layer['mlp.fc2.weight'].T
    x = rms_norm(x, t['backbone.norm_f.weight'], 1e-5)
    return x @ t.get('lm_head.weight', t['backbone.embedding.weight']).T


def random_tensors(rng, *, vocab, d_model, layers, head_dim, groups, state, expand=2, width=WIDTH, mlp=0):
    """Tensors of a published checkpoint by name, float32, away from their initial values."""
    inner = expand * d_model
    heads, convolved = inner // head_dim, inner + 2 * groups * state

    def normal(*shape, scale=1.0, middle=0.0):
        return (middle + scale * rng.standard_normal(shape)).astype(np.float32)

    tensors = {'backbone.embedding.weight': normal(vocab, d_model, scale=0.5)}
    for i in range(layers):
        layer = {
            'norm.weight': normal(d_model, scale=0.1, middle=1),
            'mixer.in_proj.weight': normal(inner + convolved + heads, d_model, scale=d_model**-0.5),
            'mixer.conv1d.weight': normal(convolved, 1, width, scale=0.5),
            'mixer.conv1d.bias': normal(convolved, scale=0.2),
            'mixer.dt_bias': normal(heads, middle=-1),
            'mixer.A_log': normal(heads, scale=0.5),
            'mixer.D': normal(heads, scale=0.5, middle=1),
            'mixer.norm.weight': normal(inner, scale=0.1, middle=1),
            'mixer.out_proj.weight': normal(d_model, inner, scale=inner**-0.5),
        }
        if mlp:
            layer |= {
                'norm2.weight': normal(d_model, scale=0.1, middle=1),
                'mlp.fc1.weight': normal(2 * mlp, d_model, scale=d_model**-0.5),
                'mlp.fc2.weight': normal(d_model, mlp, scale=mlp**-0.5),
            }
        tensors |= {f'backbone.layers.{i}.{name}': value for name, value in layer.items()}
    tensors['backbone.norm_f.weight'] = normal(d_model, scale=0.1, middle=1)
    return tensors
