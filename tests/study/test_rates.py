"""The rule by which a variant's learning rate is chosen, played through on known curves."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from san_llm.study.rates import best_rate, next_rates
from san_llm.study.schema import Sweep

GIVEN = (1e-3, 3e-3, 9e-3)


def play(given, sweep, curve):
    """Try what the rule asks for until it asks for nothing; return what was tried, in order."""
    losses, order = {}, []
    while asked := next_rates(given, sweep, losses):
        assert not set(asked) & losses.keys()
        for rate in asked:
            losses[rate] = curve(rate)
            order.append(rate)
        assert len(order) < 50
    return order, losses


def valley(bottom):
    """Return a loss that is least at a rate, and rises alike to both sides of it."""
    return lambda rate: abs(math.log(rate / bottom))


def test_between_the_given_rates_it_looks_closer_on_both_sides_of_the_best():
    order, losses = play(GIVEN, Sweep(), valley(2.2e-3))
    assert order == [1e-3, 3e-3, 9e-3, 1.8e-3, 5.1e-3]
    assert best_rate(losses) == 1.8e-3


def test_a_best_at_an_edge_is_looked_beyond_once_then_closer():
    order, losses = play(GIVEN, Sweep(), valley(4e-2))
    assert order == [1e-3, 3e-3, 9e-3, 2.7e-2, 1.6e-2, 4.6e-2]
    assert best_rate(losses) == 4.6e-2
    order, _ = play(GIVEN, Sweep(widen=3), valley(1e-5))
    assert order[3:] == [3.3e-4, 1.1e-4, 3.7e-5, 2.2e-5, 6.3e-5]
    order, _ = play(GIVEN, Sweep(widen=0, refine=None), valley(1e-5))
    assert order == list(GIVEN)


def test_a_rate_that_diverged_is_never_the_best_and_none_is_asked_for_above_one():
    _, losses = play(GIVEN, Sweep(), lambda rate: math.inf if rate > 2e-3 else 1 - rate)
    assert best_rate(losses) == 1.7e-3
    order, _ = play((0.2, 0.6), Sweep(widen=2), valley(5.0))
    assert max(order) == 0.6


def test_what_was_tried_under_nearly_the_same_number_is_not_tried_again():
    assert next_rates((1e-3, 3e-3), Sweep(widen=0, refine=None), {1e-3 + 1e-16: 1, 3e-3: 2}) == []


@settings(max_examples=100, deadline=None)
@given(
    rates=st.lists(st.floats(1e-6, 0.5), min_size=2, max_size=5, unique=True).map(sorted),
    bottom=st.floats(1e-7, 0.9),
    widen=st.integers(0, 3),
)
def test_it_ends_and_never_chooses_worse_than_what_was_given(rates, bottom, widen):
    order, losses = play(rates, Sweep(widen=widen), valley(bottom))
    assert losses[best_rate(losses)] <= min(losses[rate] for rate in rates)
    assert all(0 < rate < 1 for rate in order)


@pytest.mark.parametrize("losses", [{2e-3: 1.0, 1e-3: 1.0}, {1e-3: 1.0, 2e-3: 1.0}])
def test_of_equal_losses_the_lower_rate_is_taken(losses):
    assert best_rate(losses) == 1e-3
