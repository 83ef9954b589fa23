"""The definition of the rotary scan, token by token.

Legend: B batch, L length, H heads, G groups (H % G == 0), P head width, N state width.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.ssd.rotation import rotate_heads


def scan_tokens(x_BLHP, dt_BLH, a_H, b_BLGN, c_BLGN, rope, run_BL, state_BHPN):
    """h_t = exp(dt_t a) h_{t-1} + dt_t x_t (R_t b_t)^T;  y_t = h_t R_t c_t  (paper, SSD with RoPE).

    Computes in float32, or in float64 if x is float64 (which needs jax_enable_x64), whatever the
    dtype of the other inputs. JAX differentiates it, so it saves one state per token: use it to check.

    Args:
      x_BLHP, dt_BLH, a_H, b_BLGN: as in `api.rotary_ssd`.
      c_BLGN: as there, or None for the final state only.
      rope: None or (cos, sin), each [1 or B, L, N/2].
      run_BL: None or int32 number of the segment a token lies in, counted from 0 along the row.
      state_BHPN: the state before token 0, which belongs to run 0.

    Returns:
      y_BLHP in x's dtype (None if c is None), and the final state [B, H, P, N].
    """
    dtype = jnp.promote_types(x_BLHP.dtype, jnp.float32)
    heads_per_group = x_BLHP.shape[2] // b_BLGN.shape[2]

    def per_head(v_BLGN):
        v = rotate_heads(v_BLGN.astype(dtype), rope)
        return jnp.repeat(v, heads_per_group, axis=2)

    x, dt = x_BLHP.astype(dtype), dt_BLH.astype(dtype)
    decay_BLH = jnp.exp(dt * a_H.astype(dtype))
    if run_BL is not None:
        starts_BL = jnp.diff(run_BL, axis=1, prepend=run_BL[:, :1]) != 0
        decay_BLH = jnp.where(starts_BL[..., None], 0.0, decay_BLH)
    tokens = {'x': x, 'dt': dt, 'decay': decay_BLH, 'b': per_head(b_BLGN)}
    if c_BLGN is not None:
        tokens['c'] = per_head(c_BLGN)

    def step(h_BHPN, t):
        h_BHPN = t['decay'][..., None, None] * h_BHPN + jnp.einsum(
            'BHP,BHN->BHPN', t['dt'][..., None] * t['x'], t['b'], precision='highest'
        )
        if 'c' not in t:
            return h_BHPN, None
        return h_BHPN, jnp.einsum('BHPN,BHN->BHP', h_BHPN, t['c'], precision='highest')

    by_token = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), tokens)
    final_BHPN, y_LBHP = jax.lax.scan(step, state_BHPN.astype(dtype), by_token)
    y_BLHP = None if y_LBHP is None else jnp.moveaxis(y_LBHP, 0, 1).astype(x_BLHP.dtype)
    return y_BLHP, final_BHPN
