"""How far apart two variants are, against scipy's own tests and against all ways counted out."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from san_llm.study.statistics import (
    apart,
    holm,
    least_seen,
    row_test,
    sign_test,
    smallest_p,
    spread,
    t_interval,
)

numbers = st.floats(-5, 5, allow_nan=False).map(lambda x: round(x, 3))


@settings(max_examples=50, deadline=None)
@given(values=st.lists(numbers, min_size=2, max_size=8))
def test_the_interval_is_that_of_scipys_paired_t_test(values):
    low, high = t_interval(values)
    if len(set(values)) == 1:
        assert low == pytest.approx(high)
        return
    wanted = stats.ttest_rel(values, [0.0] * len(values)).confidence_interval(0.95)
    assert (low, high) == pytest.approx((wanted.low, wanted.high))


def test_one_seed_has_no_interval():
    told = spread([2.0])
    assert (told.mean, told.deviation, told.values) == (2.0, None, (2.0,))
    assert t_interval([2.0]) is None
    assert least_seen([2.0]) is None


@settings(max_examples=30, deadline=None)
@given(values=st.lists(numbers, min_size=1, max_size=7))
def test_the_test_over_signs_counts_all_of_them(values):
    observed = abs(sum(values))
    ways = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    wanted = sum(way >= observed * (1 - 1e-9) - 1e-12 for way in ways) / len(ways)
    assert sign_test(values) == pytest.approx(wanted)
    assert sign_test([1.0] * 5) == pytest.approx(smallest_p(5)) == 1 / 16


def test_the_test_over_rows_is_near_the_t_test_where_that_holds_and_is_never_zero():
    drawn = np.random.default_rng(3).normal(0.12, 1.0, 600)
    assert row_test(drawn) == pytest.approx(stats.ttest_1samp(drawn, 0).pvalue, abs=0.01)
    assert row_test(np.full(100, 0.3)) == pytest.approx(2 / 10_000, rel=0.01)
    assert row_test(np.zeros(10)) == 1.0
    assert row_test(drawn) == row_test(drawn)


def test_holms_rule_on_the_numbers_of_a_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_least_difference_is_seen_in_four_studies_of_five():
    rng = np.random.default_rng(0)
    seeds, deviation = 8, 0.4
    drawn = rng.normal(0, deviation, seeds)
    drawn *= deviation / drawn.std(ddof=1)
    truth = least_seen(drawn)
    studies = rng.normal(truth, deviation, (4000, seeds))
    seen = (stats.ttest_1samp(studies, 0, axis=1).pvalue < 0.05).mean()
    assert seen == pytest.approx(0.8, abs=0.04)


def test_few_seeds_give_intervals_only_and_more_give_their_exact_test():
    rows = np.random.default_rng(1).normal(0.5, 1, 300)
    three = apart([([0.1, 0.2, 0.3], rows), ([0.1, -0.2, 0.3], rows - rows.mean() + 0.05)])
    assert [one.p_seeds for one in three] == [None, None]
    assert three[0].difference == pytest.approx(0.2)
    assert three[0].low < 0.2 < three[0].high
    assert three[0].p_rows_holm == pytest.approx(2 * three[0].p_rows)
    assert three[1].p_rows_holm == pytest.approx(three[1].p_rows)
    seven = apart([([0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.2], None)])
    assert seven[0].p_seeds == pytest.approx(2**-6)
    assert seven[0].p_rows is None is seven[0].p_rows_holm
