"""Which learning rate a variant takes: a coarse look, one step beyond an edge, a closer look.

A curve of loss over rate falls and rises by more within a factor of three than methods differ, so
that each variant is compared at its own best rate, found by one rule for all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from san_llm.study.schema import Sweep

SAME = 1e-6  # rates this near, relative to each other, are one


def best_rate(losses: Mapping[float, float]) -> float:
    """Return the rate of the lowest loss; of equal ones the lowest rate."""
    return min(sorted(losses), key=lambda rate: losses[rate])


def next_rates(given: Sequence[float], sweep: Sweep, losses: Mapping[float, float]) -> list[float]:
    """Return the rates that are to be tried next; none where the choice is made.

    Args:
        given: The rates of the file, rising.
        sweep: How far to look beyond and between them.
        losses: The held-out loss a token by rate, of those tried; infinite where a run failed.
    """
    missing = [rate for rate in given if _known(rate, losses) is None]
    if missing:
        return missing
    tried = list(given)
    for _ in range(sweep.widen):
        best = best_rate({rate: _loss(rate, losses) for rate in tried})
        beyond = _beyond(tried, best)
        if beyond is None:
            break
        if _known(beyond, losses) is None:
            return [beyond]
        tried = sorted([*tried, beyond])
    if sweep.refine is None:
        return []
    best = best_rate({rate: _loss(rate, losses) for rate in tried})
    closer = [_rounded(best / sweep.refine), _rounded(best * sweep.refine)]
    return [rate for rate in closer if rate < 1 and _known(rate, losses) is None]


def _beyond(tried: Sequence[float], best: float) -> float | None:
    """Return the rate a step beyond the best, where that is an outermost one."""
    if best == tried[0]:
        return _rounded(best * tried[0] / tried[1])
    if best == tried[-1]:
        rate = _rounded(best * tried[-1] / tried[-2])
        return rate if rate < 1 else None
    return None


def _rounded(rate: float) -> float:
    """Return a rate as a person would write it: to two digits."""
    return float(f"{rate:.2g}")


def _known(rate: float, losses: Mapping[float, float]) -> float | None:
    return next((tried for tried in losses if math.isclose(tried, rate, rel_tol=SAME)), None)


def _loss(rate: float, losses: Mapping[float, float]) -> float:
    known = _known(rate, losses)
    return math.inf if known is None else losses[known]
