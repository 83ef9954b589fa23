"""Float64 oracles of the rotary scan, independent of `pallas_kernels` and of each other.

`recurrence` is plain numpy, token by token. `dense` is the quadratic form (paper: y =
(L o (R C)(R B)^T) X) in float64 JAX, whose gradients are JAX's own. The suite compares with
`dense` and checks `dense` against `recurrence`.

Legend: B batch, L length (query), S length (source), H heads, G groups, P head width, N state width.
"""

import jax
import jax.numpy as jnp
import numpy as np

GRADIENTS = ('x', 'dt', 'a', 'b', 'c', 'initial_state')


def _complex_rotation(v, rope, xp):
    """Rotates as complex numbers v1 + i v2, unlike the library's way."""
    if rope is None:
        return v
    cos, sin = (xp.asarray(t, dtype=xp.float64) for t in rope)
    half = v.shape[-1] // 2
    turn = cos + 1j * sin
    turn = turn[..., None, :] if turn.ndim == 3 else turn[None, :, None, :]
    z = (v[..., :half] + 1j * v[..., half:]) * turn
    return xp.concatenate([z.real, z.imag], axis=-1)


def recurrence(x, dt, a, b, c, rope, segment_ids, initial_state):
    """y [B, L, H, P] and the final state [B, H, P, N], float64 numpy."""
    x, dt, a, b, c, h = (np.asarray(v, dtype=np.float64) for v in (x, dt, a, b, c, initial_state))
    heads = x.shape[2] // b.shape[2]
    b = np.repeat(_complex_rotation(b, rope, np), heads, axis=2)
    c = np.repeat(_complex_rotation(c, rope, np), heads, axis=2)
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        if segment_ids is not None and t:
            same = np.asarray(segment_ids)[:, t] == np.asarray(segment_ids)[:, t - 1]
            h = h * same[:, None, None, None]
        h = np.exp(dt[:, t] * a)[..., None, None] * h
        h = h + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None, :]
        y[:, t] = np.sum(h * c[:, t, :, None, :], axis=-1)
    return y, h


def dense(x, dt, a, b, c, rope, segment_ids, initial_state):
    """The same as `recurrence`, as L x L matrices; to be traced with x64 enabled."""
    heads = x.shape[2] // b.shape[2]
    L = x.shape[1]
    b = jnp.repeat(_complex_rotation(b, rope, jnp), heads, axis=2)
    c = jnp.repeat(_complex_rotation(c, rope, jnp), heads, axis=2)
    total = jnp.cumsum(jnp.einsum('BLH,H->BHL', dt, a), axis=-1)
    seen = jnp.tril(jnp.ones((L, L), bool))[None]
    first = last = jnp.ones((1, L), bool)
    if segment_ids is not None:
        run = jnp.cumsum(jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0, axis=1)
        seen = seen & (run[:, :, None] == run[:, None, :])
        first, last = run == 0, run == run[:, -1:]
    exponent = jnp.where(seen[:, None], total[..., :, None] - total[..., None, :], 0.0)
    decay = jnp.where(seen[:, None], jnp.exp(exponent), 0.0)
    scores = jnp.einsum('BLHN,BSHN->BHLS', c, b) * decay
    y = jnp.einsum('BHLS,BSH,BSHP->BLHP', scores, dt, x)
    enter = jnp.exp(total) * first[:, None]
    y = y + jnp.einsum('BHL,BHPN,BLHN->BLHP', enter, initial_state, c)
    leave = jnp.exp(total[..., -1:] - total) * last[:, None]
    final = jnp.einsum('BHS,BSH,BSHP,BSHN->BHPN', leave, dt, x, b)
    final = final + (enter[..., -1] * last[:, 0, None])[..., None, None] * initial_state
    return y, final


def _wide(v):
    return np.asarray(v).astype(np.float64)


@jax.jit
def _pull_dense(inputs, rope, segment_ids, cotangents):
    def f(x, dt, a, b, c, state):
        return dense(x, dt, a, b, c, rope, segment_ids, state)

    outputs, pull = jax.vjp(f, *inputs)
    return outputs, pull(cotangents)


def with_gradients(arguments, rope, segment_ids, dy, dfinal):
    """Dict of float64 arrays: y, final_state and the gradient of <y, dy> + <final, dfinal> by name.

    arguments: dict with the keys of GRADIENTS.
    """
    with jax.enable_x64(True):
        inputs = [_wide(arguments[name]) for name in GRADIENTS]
        rope = None if rope is None else tuple(map(_wide, rope))
        outputs = _pull_dense(inputs, rope, segment_ids, (_wide(dy), _wide(dfinal)))
        (y, final), gradients = jax.tree.map(np.asarray, outputs)
    result = {'y': y, 'final_state': final}
    result.update({'d' + name: g for name, g in zip(GRADIENTS, gradients)})
    return result


def relative_error(out, ref):
    """||out - ref|| / ||ref||; the plain norm of out where ref is zero."""
    out, ref = np.asarray(out, dtype=np.float64), np.asarray(ref, dtype=np.float64)
    scale = np.linalg.norm(ref)
    return float(np.linalg.norm(out - ref) / (scale if scale else 1.0))
