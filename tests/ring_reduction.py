"""Relative error of a sum of gradients around a ring, in bfloat16 and in float32, by the number of its members.

    python tests/ring_reduction.py

A ring reduces a piece of an array by adding one member's share after another, and what it sends on is rounded to the dtype
of the sum at every member. Gradients are random numbers around a mean, which all members share as they share the loss:
`signal` is that mean over their standard deviation. The members' gradients are rounded to bfloat16 before, as they leave
their layer; the error is that of the sum alone. docs/numerics.md has the table.
"""

import ml_dtypes
import numpy as np

MEMBERS = (2, 4, 8, 16, 32, 64, 256, 1024)
SIGNALS = (0.0, 1.0)


def ring_error(members: int, dtype: str, signal: float = 0.0, size: int = 1 << 14, seed: int = 0) -> float:
    """||ring sum - exact sum|| / ||exact sum|| of `members` bfloat16 arrays, the result rounded to `dtype`."""
    rng = np.random.default_rng(seed)
    total, exact = np.zeros(size, np.float32), np.zeros(size)
    for _ in range(members):
        share = (signal + rng.standard_normal(size)).astype(ml_dtypes.bfloat16)
        total = (total + share.astype(np.float32)).astype(dtype).astype(np.float32)
        exact += share.astype(np.float64)
    return float(np.linalg.norm(total - exact) / np.linalg.norm(exact))


if __name__ == '__main__':
    print(f'{"members":>8} {"dtype":>9}' + ''.join(f'{f"signal {signal:g}":>12}' for signal in SIGNALS))
    for members in MEMBERS:
        for dtype in ('bfloat16', 'float32'):
            errors = [ring_error(members, dtype, signal) for signal in SIGNALS]
            print(f'{members:8} {dtype:>9}' + ''.join(f'{error:12.1e}' for error in errors))
