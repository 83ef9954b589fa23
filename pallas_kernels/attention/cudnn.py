"""Causal attention by cuDNN's fused kernels, for NVIDIA GPUs.

Without segment ids the call is the public `jax.nn.dot_product_attention`. With them it uses
cuDNN's packed (THD) layout: the kernel gets the start and the length of every document instead of
a mask, so memory stays linear in L, and the kernel skips the blocks between documents. JAX has the
packed layout only below its public API, so this file binds the two primitives itself; `_private`
raises with a clear message if a release of JAX moves them.

Such a call has room for N documents of T tokens, both static, and its statistics and workspace grow with N T, whatever
the batch holds. `packing` has plans, which sort documents by length into calls; `lax.switch` takes the first plan that fits
this batch's documents, or the blockwise form of `xla.py` if none does, so the result is right for any segment ids.

Shapes: B batch, L length, H heads, G key/value heads, K head width, and those of `packing`: N documents of a call, T their
longest, f rows of the stream's view for a row of the batch, m documents for each row of the view.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap

from pallas_kernels.attention import packing, xla
from pallas_kernels.dispatch import UnsupportedError

# What the two primitives take in jax 0.11, and what a later one takes besides, that may be None.
_TAKEN = {
    *('ctx', 'query', 'key', 'value', 'bias', 'q_seqlen', 'kv_seqlen', 'q_offsets', 'kv_offsets', 'page_table_k'),
    *('page_table_v', 'activation', 'fwd_output', 'grad_output', 'scale', 'seed', 'dropout_rate', 'variadic_args'),
    *('mask_type', 'layout', 'sliding_window_length', 'is_training'),
}
_UNUSED = {'score_mod_name', 'score_mod_jaxpr'}  # a function of the scores, since jax 0.12


def _private():
    """(forward primitive, backward primitive, mask type, layout) of JAX's internals."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo as fused

        if unknown := sorted(_added() - _UNUSED):
            raise AttributeError(f'they take {", ".join(unknown)} besides')
        return (
            fused._dot_product_attention_fwd_p,
            fused._dot_product_attention_bwd_p,
            fused.MaskType.PADDING_CAUSAL,
            fused.AttentionLayout.BTNH.value,
        )
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"implementation='cudnn' with segment_ids uses JAX internals that jax {jax.__version__}"
            f" does not have as they were ({error}); use implementation='xla' or jax 0.11.2"
        ) from error


def _added():
    """Names of what the primitives take besides `_TAKEN`. Called behind `_private`, which explains its errors."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    lowerings = fused._dot_product_attention_fwd_cuda_lowering, fused._dot_product_attention_bwd_cuda_lowering
    return {
        name
        for lowering in lowerings
        for name, one in inspect.signature(lowering).parameters.items()
        if name not in _TAKEN and one.kind is not inspect.Parameter.VAR_POSITIONAL
    }


def _library_problem():
    try:
        from jax._src.cudnn.fused_attention_stablehlo import check_cudnn_version
    except ImportError:
        return None  # JAX moved it; its own message comes with the call
    try:
        version = check_cudnn_version()
    except RuntimeError as error:
        return str(error)
    # 9.6 is the first with the packed layout; JAX wheels of CUDA 12 and 13 bring newer ones.
    return None if version >= 90600 else f'cuDNN 9.6 or newer is needed, got {version}'


def unsupported(q_BLHK, k_BLGK, segment_ids_BL):
    """Why cuDNN cannot serve these arguments, or None.

    The device is checked only where this process has a GPU: lowering for CUDA on a host without
    one relies on the caller.
    """
    B, L, H, K = q_BLHK.shape
    if q_BLHK.dtype not in (jnp.bfloat16, jnp.float16):
        return f'cuDNN attention takes bfloat16 or float16, got {q_BLHK.dtype}'
    if K % 8 or K > 128:
        return f'cuDNN attention takes head widths that are multiples of 8 up to 128, got K={K}'
    capability = None
    if jax.default_backend() == 'gpu':
        device = jax.local_devices()[0]
        if 'nvidia' not in device.device_kind.lower():
            return f'cuDNN needs an NVIDIA GPU, got {device.device_kind}'
        capability = float(device.compute_capability)
        if capability < 8.0:
            return f'cuDNN attention needs compute capability 8.0 or newer, got {capability}'
        reason = _library_problem()
        if reason:
            return reason
    if segment_ids_BL is None:
        return None
    if L == 1:
        return 'packed cuDNN attention takes 2 tokens or more, got L=1'
    if capability is not None and capability < 9.0:
        return f'packed cuDNN attention needs compute capability 9.0 or newer, got {capability}'
    if B * L * H * K >= 2**31:
        # Offsets are int32 and count elements.
        return f'packed cuDNN attention takes fewer than 2**31 elements of q, got {q_BLHK.shape}'
    try:
        _private()
    except UnsupportedError as error:
        return str(error)
    return None


def attention(q_BLHK, k_BLGK, v_BLGK, segment_ids_BL, scale):
    """Fused causal attention.

    Args:
      q_BLHK: [B, L, H, K] bfloat16 or float16, K % 8 == 0, K <= 128.
      k_BLGK, v_BLGK: [B, L, G, K], same dtype, H % G == 0.
      segment_ids_BL: [B, L] int32 or None; every run of equal ids in a row is a document.
      scale: float, factor of the scores.

    Returns:
      [B, L, H, K] in q's dtype.

    Bitwise repeatable forward. The backward adds into dq atomically unless XLA runs with
    `--xla_gpu_deterministic_ops=true` (or `--xla_gpu_exclude_nondeterministic_ops=true`).
    """
    if segment_ids_BL is None:
        # JAX does not differentiate cuDNN attention of odd lengths. Causality hides one more key at the
        # end from every real query.
        L = q_BLHK.shape[1]
        even = [jnp.pad(x, ((0, 0), (0, L % 2), (0, 0), (0, 0))) for x in (q_BLHK, k_BLGK, v_BLGK)]
        try:
            return jax.nn.dot_product_attention(*even, scale=scale, is_causal=True, implementation='cudnn')[:, :L]
        except RuntimeError as error:  # JAX asks for the library while tracing
            raise UnsupportedError(
                f"implementation='cudnn' without segment_ids: {error} Use implementation='xla' or install jax[cuda13]"
            ) from error
    return _packed(q_BLHK, k_BLGK, v_BLGK, segment_ids_BL, scale)


def _packed_operands(q_BLHK, k_BLGK, v_BLGK, documents, call):
    """Operands of the primitives: q, k, v, (no) bias, lengths, offsets, (no) page tables."""
    B, L, H, K = q_BLHK.shape
    G, f, m = k_BLGK.shape[2], call.f, call.m
    starts_N, lengths_N = documents.starts_and_lengths(call)
    # cuDNN reads N + 1 offsets; the primitive learns m from their shape [B f, m + 1].
    end = jnp.full(B * f, B * L, jnp.int32)
    offsets = jnp.concatenate([starts_N, end]).reshape(B * f, m + 1)
    lengths = lengths_N.reshape(B * f, m)
    none = jnp.zeros(0, q_BLHK.dtype)
    return (
        q_BLHK.reshape(B * f, L // f, H, K),
        k_BLGK.reshape(B * f, L // f, G, K),
        v_BLGK.reshape(B * f, L // f, G, K),
        none, lengths, lengths, offsets * (H * K), offsets * (G * K), none, none,
    )  # fmt: skip


def _parameters(scale, mask=None):
    _, _, mask_type, layout = _private()
    if mask is not None:
        mask_type = type(mask_type)[mask]
    return {
        "scale": scale, "seed": 42, "dropout_rate": 0.0, "variadic_args": (False, False),
        "mask_type": mask_type, "layout": layout, "sliding_window_length": None, **dict.fromkeys(_added()),
    }  # fmt: skip


def _statistics_size(B, L, H):
    return B * H * L * max(sum(call.m for call in plan) for plan in packing.plans(B, L))


def _pad_to(x, size):
    return jnp.pad(x.reshape(-1), (0, size - x.size))


def _by_token(statistics_NHT, documents, call, B):
    """Statistics by document -> by token, [B, H, L]; right for tokens of the call's documents."""
    statistics = statistics_NHT[documents.entry(call), :, jnp.minimum(documents.position, call.T - 1)]
    return statistics.reshape(B, -1, statistics_NHT.shape[1]).swapaxes(1, 2)


def _by_document(statistics_BHL, documents, call):
    """The inverse, [N, H, T]; entries past a document's end hold those of the next document."""
    B, H, L = statistics_BHL.shape
    starts_N, _ = documents.starts_and_lengths(call)
    token_NT = jnp.minimum(starts_N[:, None] + jnp.arange(call.T, dtype=jnp.int32), B * L - 1)
    return statistics_BHL.swapaxes(0, 1).reshape(H, B * L)[:, token_NT].swapaxes(0, 1)


def _merge(old, new, documents, call, axis):
    """new where the tokens are the call's, else old; tokens are the batch and the given axis.

    What a call leaves where its documents are not is undefined.
    """
    if old is None:
        return new
    tokens = [1] * new.ndim
    tokens[0], tokens[axis] = new.shape[0], new.shape[axis]
    return jnp.where(documents.those_of(call).reshape(tokens), new, old)


def _forward(scale, q_BLHK, k_BLGK, v_BLGK, segment_ids_BL, by_token=False):
    """(out [B, L, H, K], statistics [_statistics_size] float32, or by_token the logsumexp [B, H, L]).

    The layout of the statistics is private to the branch that writes them. The backward pass takes
    the same branch, because the segment ids alone decide it.
    """
    B, L, H, K = q_BLHK.shape
    size = _statistics_size(B, L, H)
    fwd_p = _private()[0]
    plans, documents = packing.plans(B, L), packing.documents(segment_ids_BL)

    def packed(plan):
        def branch(q, k, v, _, documents):
            out, of_tokens, of_documents = None, None, []
            for call in plan:
                operands = _packed_operands(q, k, v, documents, call)
                mine, statistics = fwd_p.bind(*operands, is_training=True, **_parameters(scale))
                out = _merge(out, mine.reshape(q.shape), documents, call, 1)
                if by_token:
                    of_tokens = _merge(of_tokens, _by_token(statistics, documents, call, B), documents, call, 2)
                else:
                    of_documents.append(statistics.reshape(-1))
            return out, of_tokens if by_token else _pad_to(jnp.concatenate(of_documents), size)

        return branch

    def blockwise(q, k, v, segment_ids, _):
        out, lse_BHL = xla.forward(q, k, v, (segment_ids, segment_ids), scale, xla.DEFAULT_CHUNK)
        return out, lse_BHL if by_token else _pad_to(lse_BHL, size)

    branches = [packed(plan) for plan in plans] + [blockwise]
    return lax.switch(packing.choice(documents, plans), branches, q_BLHK, k_BLGK, v_BLGK, segment_ids_BL, documents)


def _backward(scale, q_BLHK, k_BLGK, v_BLGK, segment_ids_BL, out_BLHK, statistics, dout_BLHK, by_token=False):
    """(dq, dk, dv) in the shapes and dtypes of q, k, v; by_token as in `_forward`."""
    B, L, H, K = q_BLHK.shape
    bwd_p = _private()[1]
    plans, documents = packing.plans(B, L), packing.documents(segment_ids_BL)

    def packed(plan):
        def branch(q, k, v, _, documents, out, statistics, dout):
            merged, begin = (None, None, None), 0
            for call in plan:
                operands = _packed_operands(q, k, v, documents, call)
                view = operands[0].shape
                if by_token:
                    mine = _by_document(statistics, documents, call)
                else:
                    end = begin + call.m * B * H * L
                    mine, begin = statistics[begin:end].reshape(call.N, H, call.T), end
                found = bwd_p.bind(*operands, mine, out.reshape(view), dout.reshape(view), **_parameters(scale))
                found = (x.reshape(to.shape) for x, to in zip(found, (q, k, v), strict=True))
                merged = tuple(_merge(old, x, documents, call, 1) for old, x in zip(merged, found, strict=True))
            return merged

        return branch

    def blockwise(q, k, v, segment_ids, _, out, statistics, dout):
        lse_BHL = statistics if by_token else statistics[: B * H * L].reshape(B, H, L)
        delta_BHL = xla.row_products(out, dout)
        return xla.backward(q, k, v, (segment_ids, segment_ids), scale, xla.DEFAULT_CHUNK, lse_BHL, delta_BHL, dout)

    branches = [packed(plan) for plan in plans] + [blockwise]
    return lax.switch(
        packing.choice(documents, plans), branches,
        q_BLHK, k_BLGK, v_BLGK, segment_ids_BL, documents, out_BLHK, statistics, dout_BLHK,
    )  # fmt: skip


def _merging_vmap(function, statistics_argument=None):
    """`function` with a vmap rule that merges the mapped axis into the batch axis of every array.

    The primitives have no batching rule for the packed layout, and a batched `lax.switch` would
    run every branch. Statistics have no batch axis, they belong to the batch as a whole; merged
    ones fit the merged call that wrote them. Where only cotangents are mapped, the statistics
    are those of an unmerged call, and the calls run one after the other.
    """
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def rule(axis_size, in_batched, *args):
        if statistics_argument is not None and not in_batched[statistics_argument]:
            mine = [x for x, batched in zip(args, in_batched, strict=True) if batched]

            def one(slices):
                slices = iter(slices)
                return mapped(*(next(slices) if b else x for x, b in zip(args, in_batched, strict=True)))

            outs = lax.map(one, mine)
            return outs, tuple(True for _ in outs)
        args = [
            x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, batched in zip(args, in_batched, strict=True)
        ]
        outs = mapped(*(x.reshape(-1, *x.shape[2:]) for x in args))
        split = tuple(x.reshape(axis_size, -1, *x.shape[1:]) for x in outs)
        return split, tuple(True for _ in split)

    return mapped


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _packed(q, k, v, segment_ids, scale):
    return _merging_vmap(functools.partial(_forward, scale))(q, k, v, segment_ids)[0]


def _packed_fwd(q, k, v, segment_ids, scale):
    out, statistics = _merging_vmap(functools.partial(_forward, scale))(q, k, v, segment_ids)
    out = checkpoint_name(out, xla.RESIDUAL_NAME)
    statistics = checkpoint_name(statistics, xla.RESIDUAL_NAME)
    return out, (q, k, v, segment_ids, out, statistics)


def _packed_bwd(scale, residuals, dout):
    backward = _merging_vmap(functools.partial(_backward, scale), statistics_argument=5)
    return *backward(*residuals, dout), None


_packed.defvjp(_packed_fwd, _packed_bwd)


# ---- blocks of a longer sequence ----


def _reach(ids_BL, key_ids_BT):
    """How many of the first queries and how many of the last keys belong to the last key's document, each [B] int32.

    All queries are after all keys and a document is contiguous, so a document that is in both ends the keys and
    begins the queries.
    """
    last = key_ids_BT[:, -1:]
    queries, keys = (
        lax.cummin((ids == last).astype(jnp.int32), axis=1).sum(1, dtype=jnp.int32)
        for ids in (ids_BL, key_ids_BT[:, ::-1])
    )
    return queries, keys


def _rolled(x_BTGK, shift_B):
    return jax.vmap(lambda x, shift: jnp.roll(x, shift, axis=0))(x_BTGK, shift_B)


def _block_operands(q_BLHK, k_BTGK, v_BTGK, lengths):
    none = jnp.zeros(0, q_BLHK.dtype)
    # cuDNN needs a length of at least 1, also for a document that is on one side only; the caller drops its results.
    lengths = (none, none) if lengths is None else (jnp.maximum(x, 1) for x in lengths)
    return q_BLHK, k_BTGK, v_BTGK, none, *lengths, none, none, none, none


def block_forward(q_BLHK, k_BTGK, v_BTGK, segments, scale, causal):
    """A block of attention over a longer sequence: causal with T = L, or all L queries are after all T keys.

    At most one document is in both: a suffix of the keys and a prefix of the queries. The keys are rolled so that it
    is a prefix of both, which cuDNN takes as the lengths of sequences.

    Args:
      q_BLHK, k_BTGK, v_BTGK: bfloat16 or float16.
      segments: None, or the ids [B, L] int32 of the queries and [B, T] of the keys.
      scale: float, factor of the scores.

    Returns:
      [B, L, H, K] in q's dtype, and its logsumexp [B, H, L] float32: 0 and -inf of a query that sees no key.
    """
    if segments is None:
        operands = _block_operands(q_BLHK, k_BTGK, v_BTGK, None)
        mask = 'CAUSAL' if causal else 'NO_MASK'
        return tuple(_private()[0].bind(*operands, is_training=True, **_parameters(scale, mask)))
    if causal:
        return _forward(scale, q_BLHK, k_BTGK, v_BTGK, segments[0], by_token=True)
    queries_B, keys_B = _reach(*segments)
    operands = _block_operands(q_BLHK, _rolled(k_BTGK, keys_B), _rolled(v_BTGK, keys_B), (queries_B, keys_B))
    out, lse = _private()[0].bind(*operands, is_training=True, **_parameters(scale, 'PADDING'))
    sees_BL = jnp.arange(q_BLHK.shape[1], dtype=jnp.int32) < queries_B[:, None]
    return jnp.where(sees_BL[:, :, None, None], out, 0), jnp.where(sees_BL[:, None], lse, -jnp.inf)


def block_backward(q_BLHK, k_BTGK, v_BTGK, segments, scale, causal, lse_BHL, out_BLHK, dout_BLHK):
    """Terms of (dq, dk, dv) from such a block, in q's dtype; lse and out are those of the whole sequence."""
    if segments is None:
        operands = _block_operands(q_BLHK, k_BTGK, v_BTGK, None)
        mask = 'CAUSAL' if causal else 'NO_MASK'
        return tuple(_private()[1].bind(*operands, lse_BHL, out_BLHK, dout_BLHK, **_parameters(scale, mask)))
    if causal:
        return _backward(scale, q_BLHK, k_BTGK, v_BTGK, segments[0], out_BLHK, lse_BHL, dout_BLHK, by_token=True)
    queries_B, keys_B = _reach(*segments)
    operands = _block_operands(q_BLHK, _rolled(k_BTGK, keys_B), _rolled(v_BTGK, keys_B), (queries_B, keys_B))
    sees_BL = jnp.arange(q_BLHK.shape[1], dtype=jnp.int32) < queries_B[:, None]
    # A query that sees no key here: exp(score - lse) is 0 for any score.
    lse_BHL = jnp.where(sees_BL[:, None], lse_BHL, 1e30)
    dq, dk, dv = _private()[1].bind(*operands, lse_BHL, out_BLHK, dout_BLHK, **_parameters(scale, 'PADDING'))
    seen_BT = jnp.arange(k_BTGK.shape[1], dtype=jnp.int32) < jnp.where(queries_B > 0, keys_B, 0)[:, None]
    dk, dv = (_rolled(jnp.where(seen_BT[:, :, None, None], x, 0), -keys_B) for x in (dk, dv))
    return jnp.where(sees_BL[:, :, None, None], dq, 0), dk, dv
