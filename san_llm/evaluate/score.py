"""From what a model said to accuracy: the protocol's answer extraction, counts, standard error."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from san_llm.protocol.tasks import Task

# What a model is trained to answer. The published rows' outputs all read so.
ANSWER_TEXT = "the correct answer is {}"


@dataclass(frozen=True)
class Choice:
    """One of the answers of a row that was scored by likelihood.

    Attributes:
        answer: The answer: ``solution2``.
        text: The text that was scored.
        logprob: The sum of the text's tokens' log-probabilities.
        greedy: Whether each of these tokens was the most likely.
        length: The number of the text's characters, by which ``acc_norm`` divides.
    """

    answer: str
    text: str
    logprob: float
    greedy: bool
    length: int


@dataclass(frozen=True)
class Judged:
    """One answered row.

    Attributes:
        task: The task's name.
        row: The row's number in the task's file, from 0.
        prompt: What the model was given.
        output: What the model went on with; by likelihood: the most likely choice's text.
        parsed: The first answer in the output, or None.
        answer: The right answer.
        correct: Whether ``parsed`` is ``answer``.
        parsed_norm: By likelihood: the answer of the choice that is most likely a character.
        correct_norm: Whether ``parsed_norm`` is ``answer``.
        choices: By likelihood: every choice.
    """

    task: str
    row: int
    prompt: str
    output: str
    parsed: str | None
    answer: str
    correct: bool
    parsed_norm: str | None = None
    correct_norm: bool | None = None
    choices: tuple[Choice, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain values; only one judged by likelihood has what that gives."""
        values = asdict(self)
        if not self.choices:
            for name in ("parsed_norm", "correct_norm", "choices"):
                del values[name]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Judged:
        """Return what :meth:`to_json` wrote; TypeError for anything else."""
        choices = tuple(Choice(**choice) for choice in values.get("choices", ()))
        return cls(**{**values, "choices": choices})


@dataclass(frozen=True)
class TaskScore:
    """A task's result.

    Attributes:
        task: The task's name.
        n: Rows answered.
        correct: Rows answered right.
        unparseable: Rows without any answer in the output; they count as wrong.
        accuracy: ``correct / n``.
        standard_error: The standard error of ``accuracy``, ``sqrt(p (1 - p) / (n - 1))``; None for
            one row.
        accuracy_norm: By likelihood: ``acc_norm``.
        standard_error_norm: The standard error of ``accuracy_norm``.
    """

    task: str
    n: int
    correct: int
    unparseable: int
    accuracy: float
    standard_error: float | None
    accuracy_norm: float | None = None
    standard_error_norm: float | None = None


def parse_answer(task: Task, output: str) -> str | None:
    """Return the first answer of the task that occurs in a generated text, or None.

    As the published evaluation does: only the text up to a next "### Response:" is read, and the
    match is case-sensitive.
    """
    match = task.pattern.search(output.split("### Response:")[0].strip())
    return match.group() if match else None


def offered(task: Task, instruction: str, answer: str) -> tuple[str, ...]:
    """Return the answers that a row offers: those that its "Answer format:" names.

    All of the task's where it names none, or where the right one is not among them.
    """
    named = re.search(r"Answer format:\s*(\S+)\s*$", instruction)
    answers = (
        tuple(word for word in named.group(1).split("/") if word in task.answers) if named else ()
    )
    return answers if answer in answers else task.answers


def judge_text(task: Task, row: int, prompt: str, output: str, answer: str) -> Judged:
    """Return a row, judged by a generated text."""
    parsed = parse_answer(task, output)
    return Judged(task.name, row, prompt, output, parsed, answer, parsed == answer)


def judge_choices(
    task: Task, row: int, prompt: str, choices: Sequence[Choice], answer: str
) -> Judged:
    """Return a row, judged by likelihood, as lm-evaluation-harness does: the first of equals."""
    best = max(choices, key=lambda choice: choice.logprob)
    best_norm = max(choices, key=lambda choice: choice.logprob / choice.length)
    return Judged(
        task=task.name,
        row=row,
        prompt=prompt,
        output=best.text,
        parsed=best.answer,
        answer=answer,
        correct=best.answer == answer,
        parsed_norm=best_norm.answer,
        correct_norm=best_norm.answer == answer,
        choices=tuple(choices),
    )


def standard_error(accuracy: float, n: int) -> float | None:
    """Return the standard error of a share of n rows; None for one row."""
    return math.sqrt(accuracy * (1 - accuracy) / (n - 1)) if n > 1 else None


def score(task: Task, rows: Sequence[Judged]) -> TaskScore:
    """Return a task's score over its judged rows (at least one)."""
    n, correct = len(rows), sum(row.correct for row in rows)
    accuracy = correct / n
    norm = sum(bool(row.correct_norm) for row in rows) / n if rows[0].choices else None
    return TaskScore(
        task=task.name,
        n=n,
        correct=correct,
        unparseable=sum(row.parsed is None for row in rows),
        accuracy=accuracy,
        standard_error=standard_error(accuracy, n),
        accuracy_norm=norm,
        standard_error_norm=None if norm is None else standard_error(norm, n),
    )


def average(scores: Sequence[TaskScore]) -> tuple[float, float | None]:
    """Return the mean accuracy over tasks and its standard error (None if a task has none)."""
    return mean_of([(score.accuracy, score.standard_error) for score in scores])


def average_norm(scores: Sequence[TaskScore]) -> tuple[float, float | None] | None:
    """Return the mean ``acc_norm`` and its standard error; None where it was not measured."""
    pairs = [
        (score.accuracy_norm, score.standard_error_norm)
        for score in scores
        if score.accuracy_norm is not None
    ]
    return mean_of(pairs) if len(pairs) == len(scores) else None


def mean_of(pairs: Sequence[tuple[float, float | None]]) -> tuple[float, float | None]:
    """Return the mean of independent values with their standard errors, and its own."""
    mean = sum(value for value, _ in pairs) / len(pairs)
    errors = [error for _, error in pairs if error is not None]
    if len(errors) < len(pairs):
        return mean, None
    return mean, math.sqrt(sum(error**2 for error in errors)) / len(pairs)
