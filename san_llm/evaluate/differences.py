"""How two runs' scores of the same rows differ: differences, their intervals and tests.

McNemar's exact test (McNemar 1947) asks whether the rows that only one has right fall evenly to
both. The difference's interval is a paired bootstrap (Efron 1979) that draws rows again within each
task, as the average is over tasks. Where a row has a loss, or may be right in part, the test is by
permutation of the two within each row (Fisher 1935).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from san_llm.evaluate.score import Judged

RESAMPLES = 9999
LEVEL = 0.95
AT_ONCE = 100  # resamples held in memory together


@dataclass(frozen=True)
class Difference:
    """How another run differs from the first, over a task's rows or over all.

    Attributes:
        task: The task, or ``average``.
        difference: Accuracy of the other minus that of the first; over all: the mean of the tasks'.
        low: The lower end of its bootstrap interval.
        high: The upper end.
        gained: Rows that only the other has right; None where rows are not right or wrong.
        lost: Rows that only the first has right; likewise.
        p: The p-value of McNemar's exact test, two-sided; over all: on all rows together. Of
            losses, and of answers that may be right in part: of a permutation test.
    """

    task: str
    difference: float
    low: float
    high: float
    gained: int | None
    lost: int | None
    p: float


def graded(rows: Sequence[Judged]) -> bool:
    """Return whether the answers of a task may be right in part."""
    return any(row.score is not None for row in rows)


def differences(
    first: dict[str, list[Judged]], other: dict[str, list[Judged]]
) -> tuple[Difference, ...]:
    """Return how much better the other's answers are, by task and over those right or wrong."""
    by_task = [_difference(task, [first[task]], [other[task]]) for task in first]
    counted = [task for task, rows in first.items() if not graded(rows)]
    if counted:
        pairs = ([rows[task] for task in counted] for rows in (first, other))
        by_task.append(_difference("average", *pairs))
    return tuple(by_task)


def _difference(
    name: str, first: Sequence[list[Judged]], other: Sequence[list[Judged]]
) -> Difference:
    """Return how the answers to some tasks differ, each task with the same weight."""
    import numpy as np
    from scipy.stats import binomtest, bootstrap

    pairs = [
        np.array([b.value - a.value for a, b in zip(of_first, of_other, strict=True)])
        for of_first, of_other in zip(first, other, strict=True)
    ]
    gained = sum(int((pair > 0).sum()) for pair in pairs)
    lost = sum(int((pair < 0).sum()) for pair in pairs)

    def mean(*samples: Any, axis: int) -> Any:
        return sum(sample.mean(axis=axis) for sample in samples) / len(samples)

    difference = float(mean(*pairs, axis=-1))
    low = high = difference
    if gained or lost:
        interval = bootstrap(
            # scipy wants two rows at least: one row, drawn twice, has the same mean.
            tuple(pair if len(pair) > 1 else pair.repeat(2) for pair in pairs),
            mean,
            n_resamples=RESAMPLES,
            batch=AT_ONCE,
            vectorized=True,
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(0),  # the same runs, the same interval
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    if graded(first[0]):
        return Difference(name, difference, low, high, None, None, exchanged(pairs[0]))
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return Difference(name, difference, low, high, gained, lost, p)


Losses = list[tuple[float, int]]  # of each row its loss, and the tokens of it


def losses_of(rows: Sequence[Judged]) -> dict[str, Losses]:
    """Return the losses of each task that has them, in the order of the task's file."""
    found: dict[str, Losses] = {}
    for row in sorted(rows, key=lambda row: row.row):
        if row.loss is not None:
            found.setdefault(row.task, []).append((row.loss, row.tokens or 0))
    return found


def alike_losses(
    first: dict[str, Losses], other: dict[str, Losses]
) -> tuple[list[tuple[str, Losses, Losses]], list[str]]:
    """Return the tasks whose losses can be compared a token, and why others cannot."""
    alike, unlike = [], []
    for task, losses in first.items():
        if [tokens for _, tokens in losses] == [tokens for _, tokens in other[task]]:
            alike.append((task, losses, other[task]))
        else:
            unlike.append(
                f"{task}: its tokens are others, so that losses a token do not compare (another "
                "tokenizer or prompt)"
            )
    return alike, unlike


def loss_difference(task: str, first: Losses, other: Losses) -> Difference:
    """Return how much more a token costs than at first, each token with the same weight."""
    import numpy as np
    from scipy.stats import bootstrap

    tokens = np.array([count for _, count in first])
    apart = np.array([b - a for (a, _), (b, _) in zip(first, other, strict=True)])
    difference = float(apart.sum() / tokens.sum())
    if not apart.any():
        return Difference(task, 0.0, 0.0, 0.0, None, None, 1.0)

    def a_token(losses: Any, counts: Any, axis: int) -> Any:
        return losses.sum(axis=axis) / counts.sum(axis=axis)

    low = high = difference
    if len(apart) > 1:
        interval = bootstrap(
            (apart, tokens),
            a_token,
            paired=True,
            n_resamples=RESAMPLES,
            batch=AT_ONCE,
            vectorized=True,
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return Difference(task, difference, low, high, None, None, exchanged(apart))


def exchanged(apart: Any, resamples: int = RESAMPLES) -> float:
    """Return the two-sided p of what rows are apart, (n,): in each the runs are exchanged, or not.

    All ways are counted where there are no more than ``resamples``; else so many are drawn, and
    the observed one counts as one of them, so that p is never 0 (Phipson and Smyth 2010).
    """
    import numpy as np
    from scipy.stats import permutation_test

    # Scipy wants two rows at least; one row, exchanged, is as far apart.
    if len(apart) < 2 or not np.any(apart):
        return 1.0
    found = permutation_test(
        (np.asarray(apart, dtype=np.float64),),
        lambda differences, axis: differences.mean(axis=axis),
        permutation_type="samples",
        n_resamples=resamples,
        batch=AT_ONCE,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)
