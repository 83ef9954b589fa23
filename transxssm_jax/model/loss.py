"""Masked next-token cross-entropy that never holds the logits of a whole batch.

Shape legend: B batch, L length, D model, V vocabulary, T tokens of a device.
"""

import functools

import jax
import jax.numpy as jnp

from transxssm_jax.parallel import collectives

IGNORED = -1  # target of a position where nothing is predicted


def soft_cap(logits: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(logits / cap), between -cap and cap (Gemma 2, 2024); the logits as they are for a cap of 0."""
    return cap * jnp.tanh(logits / cap) if cap else logits


def next_token_loss(
    hidden_BLD: jax.Array,
    head_VD: jax.Array,
    targets_BL: jax.Array,
    *,
    z_loss: float,
    chunk_tokens: int,
    logit_soft_cap: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Summed loss of every position whose target is not IGNORED.

    Logits are made for chunk_tokens tokens per device at a time, from operands of
    hidden's dtype, accumulated in float32. The gradient is taken in the same
    pass, so that the head costs three matmuls and no recomputation.

    Args:
      hidden_BLD: after the final norm; inside `collectives.shard_map`, this device's tokens. The caller all-reduces
        over devices. Where tensor shards the vocabulary, its gradient is that of the rows of head_VD that are here.
      head_VD: whole over D; its gradient has its dtype, rounded once from a float32 sum.
      targets_BL: int32, the next token or IGNORED.
      z_loss: weight of log(sum(exp(logits)))^2, added to the loss.
      chunk_tokens: tokens per device whose logits exist at a time.
      logit_soft_cap: see `soft_cap`.

    Returns:
      (objective, sums): objective = sum of cross-entropy + z_loss * lse^2 in
      nats, float32, differentiable in hidden and head; sums = float32 scalars
      without gradient: 'nll' (cross-entropy alone) and 'tokens' (how many).
    """
    objective, nll, tokens = _loss(hidden_BLD, head_VD, targets_BL, z_loss, chunk_tokens, logit_soft_cap)
    return objective, jax.lax.stop_gradient({'nll': nll, 'tokens': tokens})


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _loss(hidden_BLD, head_VD, targets_BL, z_loss, chunk_tokens, cap):
    return _in_chunks(hidden_BLD, head_VD, targets_BL, z_loss, chunk_tokens, cap, with_gradient=False)


def _loss_forward(hidden_BLD, head_VD, targets_BL, z_loss, chunk_tokens, cap):
    *sums, d_hidden, d_head = _in_chunks(hidden_BLD, head_VD, targets_BL, z_loss, chunk_tokens, cap, with_gradient=True)
    return tuple(sums), (d_hidden, d_head)


def _loss_backward(z_loss, chunk_tokens, cap, residuals, cotangents):
    d_hidden, d_head = residuals
    scale = cotangents[0]
    return d_hidden * scale.astype(d_hidden.dtype), d_head * scale.astype(d_head.dtype), None


_loss.defvjp(_loss_forward, _loss_backward)


def _in_chunks(hidden, head, targets, z_loss, chunk_tokens, cap, with_gradient):
    """Sums, and the gradients where asked for; `head` may hold this device's rows of the vocabulary only."""
    dtype = hidden.dtype
    weights_VD = head.astype(dtype)
    num_rows_V, width_D = weights_VD.shape
    first_V = collectives.shard_index('vocab') * num_rows_V

    x_TD, target_T = hidden.reshape(-1, width_D), targets.reshape(-1)
    num_tokens = x_TD.shape[0]
    chunk = min(chunk_tokens, num_tokens)
    padding = -num_tokens % chunk
    x_TD = jnp.pad(x_TD, ((0, padding), (0, 0)))
    target_T = jnp.pad(target_T, (0, padding), constant_values=IGNORED)

    def one_chunk(carry, inputs):
        x_TD, target_T = inputs
        objective, nll, tokens, d_head_VD = carry
        logits_TV = soft_cap(jnp.einsum('TD,VD->TV', x_TD, weights_VD, preferred_element_type=jnp.float32), cap)
        own_top_T, own_sum_T = _top_and_sum(logits_TV)
        top_T = collectives.all_reduce_max(own_top_T, 'vocab')
        lse_T = top_T + jnp.log(collectives.all_reduce(own_sum_T * jnp.exp(own_top_T - top_T), 'vocab'))
        is_target_TV = jnp.arange(num_rows_V)[None, :] == (target_T - first_V)[:, None]
        target_logit_T = collectives.all_reduce(_target_logit(logits_TV, target_T - first_V), 'vocab')
        counted_T = (target_T != IGNORED).astype(jnp.float32)
        nll_T = (lse_T - target_logit_T) * counted_T
        objective += jnp.sum(nll_T + z_loss * jnp.square(lse_T) * counted_T)
        nll += jnp.sum(nll_T)
        tokens += jnp.sum(counted_T)
        if not with_gradient:
            return (objective, nll, tokens, d_head_VD), None
        # d objective / d logits = softmax (1 + 2 z lse) - onehot(target).
        share_T = (1 + 2 * z_loss * lse_T)[:, None]
        d_logits_TV = jnp.exp(logits_TV - lse_T[:, None]) * share_T - is_target_TV
        if cap:  # through the tanh, whose value is logits / cap
            d_logits_TV *= 1 - jnp.square(logits_TV / cap)
        d_logits_TV = (d_logits_TV * counted_T[:, None]).astype(dtype)
        d_head_VD += jnp.einsum('TV,TD->VD', d_logits_TV, x_TD, preferred_element_type=jnp.float32)
        d_x_TD = jnp.einsum('TV,VD->TD', d_logits_TV, weights_VD, preferred_element_type=jnp.float32).astype(dtype)
        return (objective, nll, tokens, d_head_VD), d_x_TD

    zero = jnp.zeros((), jnp.float32)
    d_head_VD = jnp.zeros(weights_VD.shape if with_gradient else (), jnp.float32)
    (objective, nll, tokens, d_head_VD), d_x = jax.lax.scan(
        one_chunk, (zero, zero, zero, d_head_VD), (x_TD.reshape(-1, chunk, width_D), target_T.reshape(-1, chunk))
    )
    if not with_gradient:
        return objective, nll, tokens
    d_hidden = d_x.reshape(-1, width_D)[:num_tokens].reshape(hidden.shape)
    return objective, nll, tokens, d_hidden, d_head_VD.astype(head.dtype)


def _target_logit(logits_TV, row_T):
    """The logit of each token's target, 0 where it is not among these rows; a gather, not a pass over the logits."""
    is_here_T = (row_T >= 0) & (row_T < logits_TV.shape[1])
    row_T = jnp.where(is_here_T, row_T, 0)
    return jnp.where(is_here_T, jnp.take_along_axis(logits_TV, row_T[:, None], axis=1)[:, 0], 0.0)


def _top_and_sum(x_TV):
    """The largest of each row, and the sum of exp(x - largest)."""

    def in_two_passes(x_TV):
        top_T = jnp.max(x_TV, axis=-1)
        return top_T, jnp.sum(jnp.exp(x_TV - top_T[:, None]), axis=-1)

    # Memory is what a GPU waits for; a CPU takes longer for a reduction of pairs than for two of numbers.
    return jax.lax.platform_dependent(x_TV, cuda=_top_and_sum_in_one_pass, default=in_two_passes)


def _top_and_sum_in_one_pass(x_TV):
    def combine(left, right):
        (left_top, left_sum), (right_top, right_sum) = left, right
        top = jnp.maximum(left_top, right_top)
        return top, left_sum * jnp.exp(left_top - top) + right_sum * jnp.exp(right_top - top)

    # Finite, because the difference of two infinities is none.
    lowest = jnp.finfo(x_TV.dtype).min
    return jax.lax.reduce((x_TV, jnp.ones_like(x_TV)), (lowest, jnp.zeros_like(lowest)), combine, (1,))
