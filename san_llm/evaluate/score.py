"""From what a model said to accuracy: the protocol's answer extraction, counts, standard error."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from san_llm.evaluate.harness import Asked, HarnessTask
from san_llm.evaluate.judges import judged
from san_llm.protocol.tasks import Task
from san_llm.recipe.task_file import GRADED, OwnTask
from san_llm.runs.record import TaskLoss

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


_ANSWERED = ["output", "parsed", "correct"]


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
        score: Where an answer may be right in part: how much of it is, from 0 to 1.
        loss: By loss: the negative log-likelihood of the answer and its end, in nats; the fields
            of an answer that was given then say nothing.
        tokens: By loss: how many tokens these are.
        base_loss: Of the neutral text: the loss without training.
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
    score: float | None = None
    loss: float | None = None
    tokens: int | None = None
    base_loss: float | None = None

    @property
    def value(self) -> float:
        """What an answer counts, from 0 to 1."""
        return float(self.correct) if self.score is None else self.score

    @property
    def unanswered(self) -> bool:
        """Whether an answer was asked for and none was found."""
        return self.parsed is None and self.loss is None

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain values; it has only what its judge gives."""
        values = asdict(self)
        absent = [] if self.choices else ["parsed_norm", "correct_norm", "choices"]
        absent += ["loss", "tokens"] if self.loss is None else _ANSWERED
        absent += [name for name in ("score", "base_loss") if values[name] is None]
        return {name: value for name, value in values.items() if name not in absent}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Judged:
        """Return what :meth:`to_json` wrote; TypeError for anything else."""
        choices = tuple(Choice(**choice) for choice in values.get("choices", ()))
        absent = dict(zip(_ANSWERED, ("", None, False), strict=True)) if "loss" in values else {}
        return cls(**{**absent, **values, "choices": choices})


@dataclass(frozen=True)
class TaskScore:
    """A task's result.

    Attributes:
        task: The task's name.
        n: Rows answered.
        correct: Rows answered right.
        unparseable: Rows without any answer in the output; they count as wrong.
        accuracy: ``correct / n``; where answers may be right in part, the mean of their scores.
        standard_error: The standard error of ``accuracy``, ``sqrt(p (1 - p) / (n - 1))``, or that
            of a mean of scores; None for one row.
        accuracy_norm: By likelihood: ``acc_norm``.
        standard_error_norm: The standard error of ``accuracy_norm``.
        judge: Of a task of one's own or lm_eval's: how its answers are judged.
        guessing: Of a task of one's own: the accuracy of guessing, where it is known.
    """

    task: str
    n: int
    correct: int
    unparseable: int
    accuracy: float
    standard_error: float | None
    accuracy_norm: float | None = None
    standard_error_norm: float | None = None
    judge: str | None = None
    guessing: float | None = None


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


def judge_text(task: Asked, row: int, prompt: str, output: str, answer: str) -> Judged:
    """Return a row, judged by a generated text."""
    if isinstance(task, OwnTask):
        parsed, value = judged(task.says, output, answer)
        found = Judged(task.name, row, prompt, output, parsed, answer, value == 1)
        return replace(found, score=value) if task.says.judge in GRADED else found
    assert isinstance(task, Task)
    parsed = parse_answer(task, output)
    return Judged(task.name, row, prompt, output, parsed, answer, parsed == answer)


def judge_choices(
    task: Asked, row: int, prompt: str, choices: Sequence[Choice], answer: str
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


def judge_sample(task: HarnessTask, number: int, sample: Mapping[str, Any]) -> Judged:
    """Return a row of lm_eval's as it has judged it."""
    value = float(sample[task.metric])
    prompt, right = sample["arguments"][0][0], value == 1
    score = value if task.apart or value not in (0, 1) else None
    if task.made.OUTPUT_TYPE == "multiple_choice":
        return _chosen(task, number, sample, score)
    if task.made.OUTPUT_TYPE == "loglikelihood":
        (_, greedy), text = sample["filtered_resps"][0], sample["arguments"][0][1]
        parsed = text if greedy else "something else"
        return Judged(task.name, number, prompt, parsed, parsed, text, right, score=score)
    output, parsed = sample["resps"][0][0], sample["filtered_resps"][0]
    found = None if parsed == "[invalid]" else str(parsed)  # what its filters call no match
    answer = str(sample["target"])
    return Judged(task.name, number, prompt, output, found, answer, right, score=score)


def _chosen(
    task: HarnessTask, number: int, sample: Mapping[str, Any], score: float | None
) -> Judged:
    """Return a row of which one choice is the likeliest."""
    texts = [str(choice) for choice in task.made.doc_to_choice(sample["doc"])]
    names = texts if len(set(texts)) == len(texts) else [f"{n}: {t}" for n, t in enumerate(texts)]
    told = zip(names, sample["arguments"], sample["filtered_resps"], texts, strict=False)
    choices = tuple(
        Choice(name, argument[1], logprob, bool(greedy), max(1, len(text)))
        for name, argument, (logprob, greedy), text in told
    )
    target = sample["target"]
    target = target[0] if isinstance(target, list) and target else target
    answer = names[target] if isinstance(target, int) else str(target)
    found = judge_choices(task, number, sample["arguments"][0][0], choices, answer)
    norm = sample.get("acc_norm")
    return replace(
        found,
        correct=sample[task.metric] == 1,
        parsed_norm=None if norm is None else found.parsed_norm,
        correct_norm=None if norm is None else bool(norm),
        score=score,
    )


def standard_error(accuracy: float, n: int) -> float | None:
    """Return the standard error of a share of n rows; None for one row."""
    return math.sqrt(accuracy * (1 - accuracy) / (n - 1)) if n > 1 else None


def mean_value(rows: Sequence[Judged]) -> tuple[float, float | None]:
    """Return the share of rows that are right, or the mean of their scores; its standard error."""
    n = len(rows)
    mean = sum(row.value for row in rows) / n
    if n < 2 or all(row.score is None for row in rows):
        return mean, standard_error(mean, n)
    return mean, math.sqrt(sum((row.value - mean) ** 2 for row in rows) / (n - 1) / n)


def score(task: Asked, rows: Sequence[Judged]) -> TaskScore:
    """Return a task's score over its judged rows (at least one)."""
    own = task if isinstance(task, OwnTask) else None
    n, correct = len(rows), sum(row.correct for row in rows)
    accuracy, error = mean_value(rows)
    by_length = rows[0].correct_norm is not None
    norm = sum(bool(row.correct_norm) for row in rows) / n if by_length else None
    return TaskScore(
        task=task.name,
        n=n,
        correct=correct,
        unparseable=sum(row.unanswered for row in rows),
        accuracy=accuracy,
        standard_error=error,
        accuracy_norm=norm,
        standard_error_norm=None if norm is None else standard_error(norm, n),
        judge=_judge(task),
        guessing=_guessing(own, rows) if own else None,
    )


def _judge(task: Asked) -> str | None:
    if isinstance(task, HarnessTask):
        return task.judge
    return task.says.judge if isinstance(task, OwnTask) else None


def _guessing(task: OwnTask, rows: Sequence[Judged]) -> float | None:
    """Return the accuracy of guessing: as the task says, or by the choices of its rows."""
    if task.says.guessing is not None or task.says.judge != "choice":
        return task.says.guessing
    return fmean(1 / len(row.choices) for row in rows)


def loss_score(task: Asked, rows: Sequence[Judged]) -> TaskLoss:
    """Return the loss of a task's rows (at least one), each token with the same weight."""
    pairs = [(row.loss or 0.0, row.tokens or 0) for row in rows]
    tokens, loss, error = ratio_of_sums(pairs)
    return TaskLoss(task=task.name, n=len(pairs), tokens=tokens, loss=loss, standard_error=error)


def ratio_of_sums(pairs: Sequence[tuple[float, int]]) -> tuple[int, float, float | None]:
    """Return all tokens, the loss a token, and its standard error; None for one row.

    The error is that of a ratio of two sums over rows, by linearization (Cochran 1977, Sampling
    Techniques, section 2.11): of how far each row's loss is from its tokens times the ratio.

    Args:
        pairs: ``(loss, tokens)`` of each row.
    """
    n, tokens = len(pairs), sum(count for _, count in pairs)
    ratio = sum(loss for loss, _ in pairs) / tokens
    apart = sum((loss - ratio * count) ** 2 for loss, count in pairs)
    return tokens, ratio, math.sqrt(apart * n / (n - 1)) / tokens if n > 1 else None


def averaged(scores: Sequence[TaskScore]) -> list[TaskScore]:
    """Return the scores that are shares of right answers, which an average is over."""
    return [score for score in scores if score.judge not in GRADED]


def average(scores: Sequence[TaskScore]) -> tuple[float, float | None]:
    """Return the mean accuracy over tasks and its standard error (None if a task has none).

    It is over shares of right answers: tasks whose answers may be right in part are left out.
    """
    scores = averaged(scores)
    return mean_of([(score.accuracy, score.standard_error) for score in scores])


def average_norm(scores: Sequence[TaskScore]) -> tuple[float, float | None] | None:
    """Return the mean ``acc_norm`` and its standard error; None where it was not measured."""
    scores = averaged(scores)
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
