"""Time the implementations of causal attention on this device.

    python -m pallas_kernels.attention.bench [--repeats 20] [--implementations cudnn xla]
        [--shapes 8x4096x32x32x64 2x16384x32x32x64] [--plans]

One row per implementation and kind of segments: median forward and forward + backward in
milliseconds, TFLOP/s of forward + backward as 3.5 times the causal forward matmuls without
segments (so documents show as a gain), temporary memory of forward + backward as XLA planned it,
and ||out - reference|| / ||reference|| of the output and the worst gradient at a smaller shape
against the dense float32 reference. Inputs rotate among a few sets so that no run finds its own
in cache. What fails prints its error in its row.

`--plans` also times cuDNN's packed form with each plan of `packing.plans` alone, which tells what its
static room and its calls cost.

Shapes: B batch, L length, H heads, G key/value heads, K head width.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import causal_attention, packing

SEGMENTS = {'none': None, '~1000': 1000, '~300': 300}
SETS = 3
SMALL = (2, 1024, 8, 64)  # B, L, H, K of the accuracy check


def inputs(B, L, H, G, K, mean_tokens, seed, dtype=jnp.bfloat16):
    """(q, k, v, dout, segment ids or None), on the device."""
    rng = np.random.default_rng(seed)
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = ((B, L, H, K), (B, L, G, K), (B, L, G, K), (B, L, H, K))
    arrays = [jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes, strict=True)]
    ids = None
    if mean_tokens:
        ids = jnp.asarray(np.cumsum(rng.random((B, L)) < 1 / mean_tokens, axis=1), jnp.int32)
    return jax.block_until_ready((*arrays, ids))


def functions(implementation):
    """(forward, forward + backward), both of (q, k, v, dout, segment ids)."""

    def forward(q, k, v, dout, ids):
        return causal_attention(q, k, v, segment_ids=ids, implementation=implementation)

    def both(q, k, v, dout, ids):
        out, pull = jax.vjp(lambda q, k, v: forward(q, k, v, dout, ids), q, k, v)
        return out, *pull(dout)

    return forward, both


def median_ms(f, sets, repeats):
    jax.block_until_ready([f(*s) for s in sets])
    times = []
    for n in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(f(*sets[n % len(sets)]))
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def errors(implementation, G, H, mean_tokens):
    """(output, worst gradient) relative to the dense float32 reference at SMALL."""
    B, L, heads, K = SMALL
    groups = max(1, heads * G // H)
    arguments = inputs(B, L, heads, groups, K, mean_tokens and mean_tokens // 4, seed=9)
    wide = [x.astype(jnp.float32) for x in arguments[:4]]
    want = jax.jit(functions('reference')[1])(*wide, arguments[4])
    got = jax.jit(functions(implementation)[1])(*arguments)

    def error(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return np.linalg.norm(a - b) / np.linalg.norm(b)

    out, *grads = (error(a, b) for a, b in zip(got, want, strict=True))
    return out, max(grads)


def row(implementation, shape, mean_tokens, repeats):
    B, L, H, G, K = shape
    # Compiled anew for every row: the plans may have changed.
    jax.clear_caches()
    forward, both = map(jax.jit, functions(implementation))
    sets = [inputs(*shape, mean_tokens, seed) for seed in range(SETS)]
    compiled = both.lower(*sets[0]).compile()
    memory = compiled.memory_analysis()
    forward_ms = median_ms(forward, sets, repeats)
    both_ms = median_ms(both, sets, repeats)
    flops = 3.5 * 2 * B * H * L * L * K  # 2 matmuls forward and 5 backward, half of them masked
    gib = memory.temp_size_in_bytes / 2**30 if memory else float('nan')
    out, grad = errors(implementation, G, H, mean_tokens)
    return f'{forward_ms:9.2f} {both_ms:9.2f} {flops / both_ms / 1e9:8.1f} {gib:9.2f} {out:9.1e} {grad:9.1e}'


def guarded_row(label, *arguments):
    try:
        text = row(*arguments)
    except Exception as error:  # one broken implementation must not hide the others
        lines = str(error).strip().splitlines() or ['']
        text = f'{type(error).__name__}: {lines[0][:160]}'
    print(f'{label} {text}', flush=True)


def rows_of_plans(text, shape, repeats):
    plans_of = packing.plans
    for n, _ in enumerate(plans_of(*shape[:2])):
        packing.plans = lambda B, L, n=n: plans_of(B, L)[n : n + 1]
        for name, mean_tokens in list(SEGMENTS.items())[1:]:
            guarded_row(f'{text:18} {f"cudnn, plan {n}":14} {name:8}', 'cudnn', shape, mean_tokens, repeats)
    packing.plans = plans_of


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--implementations', nargs='+', default=None)
    parser.add_argument('--shapes', nargs='+', default=['8x4096x32x32x64', '2x16384x32x32x64'])
    parser.add_argument('--repeats', type=int, default=20)
    parser.add_argument('--plans', action='store_true')
    arguments = parser.parse_args()
    fused = {'gpu': ['cudnn'], 'tpu': ['splash']}.get(jax.default_backend(), [])
    implementations = arguments.implementations or [*fused, 'xla']

    device = jax.devices()[0]
    print(f'{device.platform} {device.device_kind}, jax {jax.__version__}, bfloat16')
    print(
        f'{"B x L x H x G x K":18} {"implementation":14} {"segments":8} {"fwd ms":>9}'
        f' {"f+b ms":>9} {"TFLOP/s":>8} {"temp GiB":>9} {"err out":>9} {"err grad":>9}'
    )
    for text in arguments.shapes:
        shape = tuple(int(n) for n in text.split('x'))
        for implementation in implementations:
            for name, mean_tokens in SEGMENTS.items():
                label = f'{text:18} {implementation:14} {name:8}'
                guarded_row(label, implementation, shape, mean_tokens, arguments.repeats)
        if arguments.plans and 'cudnn' in implementations:
            rows_of_plans(text, shape, arguments.repeats)


if __name__ == '__main__':
    main()
