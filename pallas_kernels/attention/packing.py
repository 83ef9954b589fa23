"""Documents of a batch as the calls of a fused kernel that takes at most N documents of at most T tokens.

Rooms are static and documents are not. A call's room grows with N T, so that one call for any batch needs a multiple of
what the batch holds: L tokens for each of its documents, also the short ones. A plan therefore sorts documents by length
into calls. A row has few long documents, and short ones need little room.

The whole batch is one stream of B L tokens, seen as [B f, L / f]: documents may straddle the rows of that view.

Legend: B batch, L length of a row, N documents of a call, T their longest, f rows of the view for a row of the batch,
m documents for each row of the view: N = B f m, T = L / f.
"""

import typing

import jax.numpy as jnp
from jax import lax

# Between the longest documents of one call and of the next: with less there are more calls, with more they need more room.
# On an H100, 8 x 4096 tokens in documents of 300, two calls with 8 take 4.2 ms, and four with 4 take 6.3.
FACTOR = 8
SHORTEST = 32  # T of the last call, at least


class Call(typing.NamedTuple):
    """The documents of `shortest` to T tokens, at most N."""

    f: int
    m: int
    N: int
    T: int
    shortest: int


def plans(B: int, L: int) -> list[tuple[Call, ...]]:
    """The plans of a batch, cheapest first; each is its calls, the longest documents first.

    Two plans take documents of any length in one call. The others sort them: no more than FACTOR documents of a row are
    longer than L / FACTOR, no more than FACTOR^2 longer than L / FACTOR^2, and so on, so that all but the last call have
    room for every batch.
    """
    fs = [1]
    while L % (f := fs[-1] * FACTOR) == 0 and L // f >= SHORTEST:
        fs.append(f)
    if len(fs) == 1:  # rows that are short, or cannot be cut
        return [_calls(((1, m),), B, L) for m in (2, FACTOR, 32)]
    sorts = [fs[:2], fs] if len(fs) > 2 else [fs]
    # FACTOR documents of more than L / FACTOR tokens would be more than a row.
    sorts = [((1, FACTOR - 1), *((f, FACTOR) for f in chosen[1:])) for chosen in sorts]
    return [_calls(plan, B, L) for plan in (((1, 2),), ((1, FACTOR),), *sorts)]


def _calls(plan, B, L):
    longest = [L // f for f, _ in plan]
    shortest = [T + 1 for T in longest[1:]] + [1]
    return tuple(Call(f, m, B * f * m, T, least) for (f, m), T, least in zip(plan, longest, shortest, strict=True))


class Documents(typing.NamedTuple):
    """Of each token of a stream: whether it is the first of its document, how far it is into it, how long that is."""

    first: jnp.ndarray  # [B L] bool
    position: jnp.ndarray  # [B L] int32
    length: jnp.ndarray  # [B L] int32

    def those_of(self, call: Call) -> jnp.ndarray:
        """[B L] bool, whether a token's document belongs to the call."""
        return (call.shortest <= self.length) & (self.length <= call.T)

    def number(self, call: Call) -> jnp.ndarray:
        return jnp.sum(self.first & self.those_of(call), dtype=jnp.int32)

    def starts_and_lengths(self, call: Call) -> tuple[jnp.ndarray, jnp.ndarray]:
        """int32 [N] each, for a batch that fits the plan; unused entries start at the end of the stream, of length 0."""
        total = self.first.size
        starts = jnp.nonzero(self.first & self.those_of(call), size=call.N, fill_value=total)[0].astype(jnp.int32)
        return starts, jnp.append(self.length, 0)[starts]

    def entry(self, call: Call) -> jnp.ndarray:
        """[B L] int32, the place of a token's document among those of the call."""
        return jnp.cumsum(self.first & self.those_of(call), dtype=jnp.int32) - 1


def documents(segment_ids_BL) -> Documents:
    """Every run of equal ids in a row is a document."""
    change = segment_ids_BL[:, 1:] != segment_ids_BL[:, :-1]
    first = jnp.pad(change, [(0, 0), (1, 0)], constant_values=True).reshape(-1)
    token = jnp.arange(first.size, dtype=jnp.int32)
    begin = lax.cummax(jnp.where(first, token, 0))
    following = jnp.where(jnp.append(first[1:], True), token + 1, first.size)
    end = lax.cummin(following, reverse=True)
    return Documents(first, token - begin, end - begin)


def choice(found: Documents, candidates: list[tuple[Call, ...]]) -> jnp.ndarray:
    """Index of the first plan that all documents fit, or the number of plans; int32 scalar."""
    count = jnp.sum(found.first, dtype=jnp.int32)
    fits = []
    for plan in candidates:
        numbers = [found.number(call) for call in plan]
        enough = [number <= call.N for number, call in zip(numbers, plan, strict=True)]
        fits.append(jnp.stack([*enough, sum(numbers) == count]).all())
    return jnp.argmax(jnp.stack([*fits, jnp.array(True)])).astype(jnp.int32)
