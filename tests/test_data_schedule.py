"""Rows of each source by step: shares over any stretch, nothing before a change moves, caps end a source."""

import random
from fractions import Fraction

import numpy as np
import pytest

from transxssm_jax.data.manifest import DataError
from transxssm_jax.data.schedule import Point, Schedule, parse_epochs, parse_weights

ROWS = 16


def schedule(weights, sources, most=None, rows=ROWS):
    return Schedule(parse_weights(weights, sources), rows, most or [0] * sources)


def due(points, step, sources):
    """Rows that each source is due before a step, exactly: the sum of its shares of each step."""
    total = [Fraction(0)] * sources
    for t in range(step):
        after = [i for i, point in enumerate(points) if point.step > t]
        i = (after[0] if after else len(points)) - 1
        point, goal = points[max(i, 0)], points[after[0]] if after else None
        weights = [w / sum(point.weights) for w in point.weights]
        if goal and goal.is_line and i >= 0:
            walked = Fraction(t - (point.step if i else 0), goal.step - (point.step if i else 0))
            there = [w / sum(goal.weights) for w in goal.weights]
            weights = [w + (g - w) * walked for w, g in zip(weights, there)]
        total = [have + ROWS * w for have, w in zip(total, weights)]
    return total


TEXTS = {
    'constant': ('0.3, 0.7', 2),
    'one source': ('1', 1),
    'a jump': ('0: 0.8, 0.2; 37: 0.1, 0.9', 2),
    'a line': ('0: 0.8, 0.2; to 60: 0.1, 0.9', 2),
    'a line, a rest and a jump': ('0: 1, 0, 3; 10: 1, 1, 1; to 40: 0, 1, 5; 70: 2, 1, 0', 3),
    'sources that come and go': ('0: 1, 0, 0, 0; 20: 0, 1, 0, 0; to 50: 0, 0, .5, .25; 60: 1, 0, 0, 1', 4),
}


@pytest.mark.parametrize('text, sources', TEXTS.values(), ids=TEXTS)
def test_every_step_is_full_and_shares_hold_over_any_number_of_steps(text, sources):
    made, points = schedule(text, sources), parse_weights(text, sources)
    counts = np.array([made.counts(step) for step in range(101)])
    assert (np.diff(counts, axis=0) >= 0).all()
    assert (np.diff(counts.sum(axis=1)) == ROWS).all() and not counts[0].any()
    for step in (1, 7, 36, 38, 55, 100):
        assert np.abs(counts[step] - np.array(due(points, step, sources), float)).max() < sources


def test_a_share_is_kept_over_millions_of_steps():
    made = schedule('0.3, 0.7', 2, rows=1000)
    for step in (1, 10**4, 10**7, 10**10):
        first, second = made.counts(step)
        assert first + second == 1000 * step
        assert abs(first / (1000 * step) - 0.3) < 1e-7 + 1 / (1000 * step)


def test_a_source_of_weight_0_gets_no_row_while_it_lasts():
    made = schedule('0: 1, 0, 3; 10: 0, 5, 0; 20: 1, 1, 1', 3)
    assert made.counts(10)[1] == 0
    assert [b - a for a, b in zip(made.counts(10), made.counts(20))] == [0, 160, 0]


@pytest.mark.parametrize('seed', range(5))
def test_another_weight_from_a_step_on_changes_nothing_before_it(seed):
    rng = random.Random(seed)
    text = f'0: {rng.random():.3f}, {rng.random():.3f}, 1; to 30: 1, {rng.random():.3f}, 0.5; 50: 1, 1, 1'
    plain = schedule(text, 3)
    changed = schedule(f'{text}; 77: 0, 1, 9; to 90: 5, 1, 1', 3)
    assert all(plain.counts(step) == changed.counts(step) for step in range(78))
    assert plain.counts(85) != changed.counts(85)


def test_the_same_weights_given_again_change_nothing():
    plain, again = (
        schedule('0.123, 0.6, 0.3', 3),
        schedule('0: 0.123, 0.6, 0.3; 13: 1.23, 6, 3; 40: 0.123, 0.6, 0.3', 3),
    )
    assert all(plain.counts(step) == again.counts(step) for step in range(100))


def test_a_new_source_at_the_end_changes_nothing_before_it_comes():
    plain, more = schedule('0.3, 0.7', 2), schedule('0: 0.3, 0.7, 0; 25: 1, 1, 1', 3)
    assert all([*plain.counts(step), 0] == more.counts(step) for step in range(26))


# ---- caps ----------------------------------------------------------------------


@pytest.mark.parametrize('text', ['1, 1, 2', '0: 1, 1, 2; to 60: 3, 1, 1'])
def test_a_source_ends_before_it_gives_more_than_its_rows_and_the_others_share_its_part(text):
    free, capped = schedule(text, 3), schedule(text, 3, [100, 0, 300])
    [(first, source), (second, other)] = capped.ended
    assert first < second and {source, other} == {0, 2} and capped.end_step is None
    assert all(free.counts(step) == capped.counts(step) for step in range(first + 1))
    for step in (first, first + 1, second, 10**6):
        counts = capped.counts(step)
        assert sum(counts) == ROWS * step and counts[0] <= 100 and counts[2] <= 300
    assert min(100 - capped.counts(10**6)[0], 300 - capped.counts(10**6)[2]) < ROWS
    stays = [capped.counts(step)[source] for step in (first, first + 1, 10**6)]
    assert len(set(stays)) == 1
    # The next step would have been too much.
    assert free.counts(first + 1)[source] > [100, 0, 300][source]


def test_data_ends_where_no_source_is_left():
    made = schedule('1, 1', 2, [100, 200])
    assert made.ended == [(12, 0), (18, 1)] and made.end_step == 18
    assert made.counts(18) == [96, 192]
    assert schedule('0: 1, 0; 30: 0, 1', 2, [100, 0]).end_step == 6  # the other has no weight yet
    assert schedule('0: 1, 0; to 30: 0, 1', 2, [100, 0]).end_step is None


def test_sources_that_end_at_one_step():
    made = schedule('1, 1, 1', 3, [50, 50, 0], rows=15)
    assert made.ended == [(10, 0), (10, 1)]
    assert made.counts(11) == [50, 50, 65]


def test_counts_of_a_long_line_do_not_overflow():
    for steps, rows in ((1 << 20, 1 << 20), (1 << 30, 1)):
        points = [Point(0, (Fraction(1), Fraction(0))), Point(steps, (Fraction(0), Fraction(1)), True)]
        with pytest.raises(DataError, match='is too long; give points on the way'):
            Schedule(points, rows, [0, 0])


# ---- text ----------------------------------------------------------------------


def test_weights_are_read():
    assert parse_weights(' 1, .5 ', 2) == [Point(0, (Fraction(1), Fraction(1, 2)))]
    assert parse_weights('0: 1, 2; to 1_000: 2, 1;', 2)[1] == Point(1000, (Fraction(2), Fraction(1)), True)
    assert parse_weights('', 2) == []
    assert parse_epochs('', 2) == [0, 0] and parse_epochs('0.5, 4', 2) == [Fraction(1, 2), 4]


@pytest.mark.parametrize(
    'text, expected',
    [
        ('1', 'has 1 weights for 2 data.sources'),
        ('0: 1, 2; 1, 2', 'must be'),
        ('1, 2; 10: 1, 2', 'must be'),
        ('1, -2', 'decimal numbers of at least 0'),
        ('1, x', 'decimal numbers of at least 0'),
        ('1, 1e3', 'decimal numbers of at least 0'),
        ('0: 0, 0', 'gives no source a weight'),
        ('5: 1, 1; 5: 1, 2', 'step 5 must be after step 5'),
        ('to 5: 1, 1', 'has no point before it'),
        ('from 5: 1, 1', 'must be'),
        ('1: 2: 3', 'must be'),
        ('1__0: 1, 1', 'must be'),
        (f'{1 << 31}: 1, 1', 'must be at most 2147483647'),
        ('9' * 5000 + ': 1, 1', 'must be at most 2147483647'),
        ('1, ' + '9' * 5000, 'decimal numbers of at least 0'),
    ],
)
def test_wrong_weights_are_refused_in_one_line(text, expected):
    with pytest.raises(DataError, match=expected) as error:
        parse_weights(text, 2)
    assert '\n' not in str(error.value) and 'data.weights' in str(error.value)


@pytest.mark.parametrize('text', ['1', '1, 2, 3', '1, -1', 'a, b', '1,', '1, ' + '9' * 5000])
def test_wrong_epochs_are_refused(text):
    with pytest.raises(DataError, match='data.max_epochs=.* must be 2 numbers'):
        parse_epochs(text, 2)
