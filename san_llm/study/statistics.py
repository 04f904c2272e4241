"""How far apart two variants are: between seeds, and for these runs over rows.

Two questions, kept apart. *Would it come out so with other seeds?* The seeds' differences are few
numbers; their paired t interval (Student 1908) answers, and an exact test over their signs where so
many seeds can reach a small p at all. *Are these very runs apart, beyond the luck of the rows?* A
randomization test over rows (Fisher 1935), each row's difference averaged over the seeds, answers
that, for these runs alone. Several comparisons are held to one level by Holm's rule (Holm 1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from san_llm.evaluate.differences import LEVEL, exchanged

if TYPE_CHECKING:
    import numpy as np

ALPHA = 1 - LEVEL
POWER = 0.8


@dataclass(frozen=True)
class Spread:
    """A measure over seeds.

    Attributes:
        mean: The mean.
        deviation: The standard deviation over the seeds; None for one.
        values: The value of each seed.
    """

    mean: float
    deviation: float | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class Apart:
    """How a variant differs from the baseline in one measure.

    Attributes:
        difference: The mean over seeds of variant minus baseline.
        low: The lower end of its paired t interval over seeds; None for one seed.
        high: The upper end.
        p_seeds: The p-value of the exact test over the seeds' signs; None where so many seeds
            cannot reach the level, so that the interval has to do.
        p_rows: The p-value of the randomization test over rows, for these runs; None where the
            measure has no rows.
        p_rows_holm: The same, held to one level over all comparisons of the measure.
        least: The smallest difference that the seeds would have shown four times in five; None for
            one seed.
    """

    difference: float
    low: float | None
    high: float | None
    p_seeds: float | None
    p_rows: float | None
    p_rows_holm: float | None
    least: float | None


def spread(values: Sequence[float]) -> Spread:
    """Return the mean and the deviation of a measure over seeds (at least one)."""
    mean = math.fsum(values) / len(values)
    several = len(values) > 1
    squares = math.fsum((value - mean) ** 2 for value in values)
    deviation = math.sqrt(squares / (len(values) - 1)) if several else None
    return Spread(mean, deviation, tuple(values))


def smallest_p(seeds: int) -> float:
    """Return the smallest p that the exact test over the signs of so many seeds can reach."""
    return 2.0 ** (1 - seeds)


def t_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Return the paired t interval of the mean difference over seeds; None for one seed."""
    from scipy import stats

    told = spread(differences)
    if told.deviation is None:
        return None
    count = len(differences)
    reach = stats.t.ppf(1 - ALPHA / 2, count - 1) * told.deviation / math.sqrt(count)
    return told.mean - reach, told.mean + reach


def least_seen(differences: Sequence[float]) -> float | None:
    """Return the difference that the t interval would exclude from 0 in ``POWER`` of all studies.

    By the usual approximation: the two quantiles of t together, times the standard error.
    """
    from scipy import stats

    told = spread(differences)
    if told.deviation is None:
        return None
    free = len(differences) - 1
    quantiles = stats.t.ppf(1 - ALPHA / 2, free) + stats.t.ppf(POWER, free)
    return float(quantiles * told.deviation / math.sqrt(len(differences)))


def sign_test(differences: Sequence[float]) -> float:
    """Return the two-sided p of all ways to turn the signs of the seeds' differences."""
    return exchanged(differences, 2 ** len(differences))


def row_test(differences: Sequence[float] | np.ndarray) -> float:
    """Return the two-sided p of turning rows' differences at random, 9,999 times.

    Each row is turned as often as not where the variants do not differ. The observed way counts
    as one, so that p is never 0 (Phipson and Smyth 2010).
    """
    return exchanged(differences)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values held to one level together, each in its place."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    held, largest = [0.0] * len(p_values), 0.0
    for passed, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - passed) * p_values[place]))
        held[place] = largest
    return held


def apart(
    variants: Sequence[tuple[Sequence[float], Sequence[float] | np.ndarray | None]],
) -> list[Apart]:
    """Return how variants differ from a baseline in one measure, held to one level together.

    Args:
        variants: For each: the differences from the baseline by seed; and by row, averaged over
            the seeds, or None where the measure has no rows.
    """
    by_row = [None if rows is None else row_test(rows) for _, rows in variants]
    held = iter(holm([p for p in by_row if p is not None]))
    results = []
    for (by_seed, _), p in zip(variants, by_row, strict=True):
        interval = t_interval(by_seed) or (None, None)
        reachable = smallest_p(len(by_seed)) * len(variants) <= ALPHA
        results.append(
            Apart(
                difference=spread(by_seed).mean,
                low=interval[0],
                high=interval[1],
                p_seeds=sign_test(by_seed) if reachable else None,
                p_rows=p,
                p_rows_holm=None if p is None else next(held),
                least=least_seen(by_seed),
            )
        )
    return results
