"""From generated text to accuracy: the protocol's answer extraction, counts, standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from san_llm.data.tasks import Task


@dataclass(frozen=True)
class Judged:
    """One answered row.

    Attributes:
        task: The task's name.
        row: Its number in the task's file, from 0.
        prompt: What the model was given.
        output: What it went on with.
        parsed: The first answer in the output, or None.
        answer: The right one.
        correct: Whether they are the same.
    """

    task: str
    row: int
    prompt: str
    output: str
    parsed: str | None
    answer: str
    correct: bool


@dataclass(frozen=True)
class TaskScore:
    """A task's result.

    Attributes:
        task: Its name.
        n: Rows answered.
        correct: Rows answered right.
        unparseable: Rows without any answer in the output; they count as wrong.
        accuracy: ``correct / n``.
        standard_error: Of the accuracy, ``sqrt(p (1 - p) / (n - 1))``; None for one row.
    """

    task: str
    n: int
    correct: int
    unparseable: int
    accuracy: float
    standard_error: float | None


def parse_answer(task: Task, output: str) -> str | None:
    """Return the first answer of the task that occurs in a generated text, or None.

    As the published evaluation does: only the text up to a next "### Response:" is read, and the
    match is case-sensitive.
    """
    match = task.pattern.search(output.split("### Response:")[0].strip())
    return match.group() if match else None


def score(task: Task, rows: Sequence[Judged]) -> TaskScore:
    """Return a task's score over its judged rows (at least one)."""
    n, correct = len(rows), sum(row.correct for row in rows)
    accuracy = correct / n
    return TaskScore(
        task=task.name,
        n=n,
        correct=correct,
        unparseable=sum(row.parsed is None for row in rows),
        accuracy=accuracy,
        standard_error=math.sqrt(accuracy * (1 - accuracy) / (n - 1)) if n > 1 else None,
    )


def average(scores: Sequence[TaskScore]) -> tuple[float, float | None]:
    """Return the mean accuracy over tasks and its standard error (None if a task has none)."""
    mean = sum(score.accuracy for score in scores) / len(scores)
    errors = [score.standard_error for score in scores if score.standard_error is not None]
    if len(errors) < len(scores):
        return mean, None
    return mean, math.sqrt(sum(error**2 for error in errors)) / len(scores)
