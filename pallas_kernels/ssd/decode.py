"""One token of the rotary scan, for decoding.

Legend: B batch, H heads, G groups, R heads per group (H = G R), P head width, N state width.
"""

import jax.numpy as jnp

from pallas_kernels.ssd.rotation import rotate_heads


def step_token(state_BHPN, x_BHP, dt_BH, a_H, b_BGN, c_BGN, rope):
    """h = exp(dt a) h + dt x (R b)^T;  y = h R c. All float32: the bytes of the state bound the step's time.

    rope: None or (cos, sin), each [1 or B, N/2]. Returns (state_BHPN float32, y_BHP in x's dtype).
    """
    B, H, P, N = state_BHPN.shape
    G = b_BGN.shape[1]
    x_BGRP = x_BHP.astype(jnp.float32).reshape(B, G, H // G, P)
    dt_BGR = dt_BH.reshape(B, G, H // G)
    decay_BGR = jnp.exp(dt_BGR * a_H.reshape(G, H // G))
    b_BGN = rotate_heads(b_BGN.astype(jnp.float32), rope)
    c_BGN = rotate_heads(c_BGN.astype(jnp.float32), rope)
    # Elementwise multiply and reduce, not einsum: XLA fuses it into one pass over the state.
    state = state_BHPN.reshape(B, G, H // G, P, N)
    state = decay_BGR[..., None, None] * state + (dt_BGR[..., None] * x_BGRP)[..., None] * b_BGN[:, :, None, None, :]
    y_BGRP = jnp.sum(state * c_BGN[:, :, None, None, :], axis=-1)
    return state.reshape(B, H, P, N), y_BGRP.reshape(B, H, P).astype(x_BHP.dtype)
