"""Documents sorted into the calls of a packed attention kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import packing


def ids_of(rows):
    """[B, L] int32, a document for every length."""
    return jnp.asarray([np.repeat(np.arange(len(row)), row) for row in rows], jnp.int32)


def random_lengths(rng, L, mean):
    """Lengths of one row that sum up to L, some very long, many short."""
    lengths = []
    while (rest := L - sum(lengths)) > 0:
        lengths.append(min(rest, 1 + int(rng.exponential(mean) * rng.choice([0.1, 1, 4]))))
    return lengths


@pytest.mark.parametrize('L', [1, 7, 48, 100, 256, 1024])
@pytest.mark.parametrize('mean', [2, 20, 200])
def test_every_document_is_in_one_call_that_has_room(L, mean):
    rng = np.random.default_rng(L + mean)
    rows = [random_lengths(rng, L, mean) for _ in range(3)]
    plans = packing.plans(len(rows), L)
    found = packing.documents(ids_of(rows))
    chosen = int(packing.choice(found, plans))
    wanted, start = set(), 0
    for length in sum(rows, []):
        wanted.add((start, length))
        start += length
    if chosen == len(plans):
        assert any(sum(call.shortest <= n <= call.T for _, n in wanted) > call.N for call in plans[-1])
        return
    seen = []
    for call in plans[chosen]:
        assert (3 * call.f * call.m, L // call.f) == (call.N, call.T)
        starts, lengths = (np.asarray(x) for x in found.starts_and_lengths(call))
        assert starts.shape == lengths.shape == (call.N,)
        used = lengths > 0
        assert (np.diff(starts) >= 0).all() and (starts[~used] == 3 * L).all() and (lengths <= call.T).all()
        seen += zip(starts[used].tolist(), lengths[used].tolist(), strict=True)
        here, entry = np.asarray(found.those_of(call)), np.asarray(found.entry(call))
        for n, (begin, length) in enumerate(zip(starts[used], lengths[used], strict=True)):
            assert here[begin : begin + length].all() and (entry[begin : begin + length] == n).all()
            assert (np.asarray(found.position)[begin : begin + length] == np.arange(length)).all()
        assert here.sum() == lengths.sum()
    assert len(seen) == len(wanted) and set(seen) == wanted


@pytest.mark.parametrize(
    'rows, index',
    [
        ([[256], [256]], 0),
        ([[255, 1], [100, 156]], 0),
        ([[200, 56], [100, 100, 56]], 1),
        ([[32] * 8, [32] * 8], 1),
        ([[32] * 8, [32] * 7 + [31, 1]], 2),
        ([[4] * 64, [4] * 64], 2),
        ([[4] * 64, [4] * 63 + [3, 1]], 3),
    ],
)
def test_the_cheapest_plan_with_room_is_chosen(rows, index):
    found = packing.documents(ids_of(rows))
    assert packing.choice(found, packing.plans(2, 256)) == index


@pytest.mark.parametrize('L, mean', [(4096, 8), (16384, 8), (65536, 16), (262144, 8)])
def test_rows_of_short_documents_have_a_plan(L, mean):
    """A thousand tokens a document in rows of 65,536 had none, and took 250 times as long without it."""
    rows = [[L // 2, *[mean] * (L // mean // 2)]]
    plans = packing.plans(1, L)
    assert packing.choice(packing.documents(ids_of(rows)), plans) == len(plans) - 1


@pytest.mark.parametrize('L', [4096, 65536])
def test_room_is_a_fraction_of_what_one_call_for_any_batch_needs(L):
    """32 documents a row in one call that also takes a whole row: 17 GB of workspace at 65,536 tokens and 32 heads of 64."""
    rooms = [call.N * call.T for plan in packing.plans(8, L) for call in plan]
    assert max(rooms) == 8 * 8 * L


def test_it_is_traced():
    plans = packing.plans(2, 64)
    chosen = jax.jit(lambda ids: packing.choice(packing.documents(ids), plans))(ids_of([[64], [60, 4]]))
    assert chosen == 0
