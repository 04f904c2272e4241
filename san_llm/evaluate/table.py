"""Scores as a table for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from san_llm.evaluate.questions import Settings
from san_llm.evaluate.score import (
    Judged,
    TaskScore,
    average,
    average_norm,
    averaged,
)
from san_llm.evaluate.store import ROWS
from san_llm.recipe.task_file import GRADED
from san_llm.runs.record import (
    Accuracy,
    EvaluationResults,
    Forgetting,
    TaskAccuracy,
    TaskLoss,
    UnparseableExample,
)
from san_llm.shown import percent

EXAMPLES = 3  # outputs without an answer that are shown
SHOWN = 70  # characters of such an output


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation came to.

    Attributes:
        scores: The score of each task that is answered.
        settings: How the rows were asked.
        output: The evaluation's folder.
        about: What was evaluated: model, adapter, data, limit.
        unparseable: The rows without an answer.
        notes: What a reader of the scores should know.
        losses: The loss of each task that is judged by it.
        forgetting: What training made the model forget; None where that was not asked.
    """

    scores: tuple[TaskScore, ...]
    settings: Settings
    output: str
    about: Mapping[str, Any]
    unparseable: tuple[Judged, ...] = ()
    notes: tuple[str, ...] = ()
    losses: tuple[TaskLoss, ...] = ()
    forgetting: Forgetting | None = None

    @property
    def rows(self) -> str:
        """The file with every row."""
        return f"{self.output}/{ROWS}"

    @property
    def results(self) -> EvaluationResults:
        """What is written down of the evaluation."""
        results = EvaluationResults(
            **self.about,
            protocol=self.settings.protocol,
            prompt=self.settings.prompt,
            strict=self.settings.strict,
            output=self.output,
            tasks=tuple(map(_recorded, self.scores)),
            average=_average(self.scores),
            unparseable_examples=tuple(
                UnparseableExample(task=row.task, row=row.row, output=row.output)
                for row in self.unparseable[:EXAMPLES]
            ),
            notes=self.notes,
        )
        own: dict[str, Any] = {
            "losses": self.losses,
            "forgetting": self.forgetting,
        }
        return results.model_copy(update={name: found for name, found in own.items() if found})

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values; accuracies are fractions of 1."""
        return self.results.written


def _recorded(score: TaskScore) -> TaskAccuracy:
    """Return a score as it is written: what only a task of one's own has is not there else."""
    values = asdict(score)
    own = ("judge", "guessing")
    return TaskAccuracy(**{k: v for k, v in values.items() if k not in own or v is not None})


def _average(scores: Sequence[TaskScore]) -> Accuracy | None:
    if not averaged(scores):
        return None
    mean, error = average(scores)
    mean_norm, error_norm = average_norm(scores) or (None, None)
    return Accuracy(
        accuracy=mean,
        standard_error=error,
        accuracy_norm=mean_norm,
        standard_error_norm=error_norm,
    )


def tables(result: EvalResult) -> list[Table]:
    """Return the scores as tables for the terminal: of accuracies, and of losses."""
    title = escape(str(result.about.get("title", "")))
    found = [table(result)] if result.scores else []
    if result.losses:
        drawn = Table(title=None if found else title or None, title_justify="left")
        drawn.add_column("task")
        for column in ("loss, nats a token", "std error", "tokens", "rows"):
            drawn.add_column(column, justify="right")
        for loss in result.losses:
            error = "-" if loss.standard_error is None else f"{loss.standard_error:.4f}"
            drawn.add_row(loss.task, f"{loss.loss:.4f}", error, str(loss.tokens), str(loss.n))
        found.append(drawn)
    return found


def table(result: EvalResult) -> Table:
    """Return the scores as a table for the terminal; accuracies in percent."""
    drawn = Table(title=escape(str(result.about.get("title", ""))) or None, title_justify="left")
    drawn.add_column("task")
    counted = averaged(result.scores)
    norm = average_norm(result.scores) if counted else None
    by_norm = any(score.accuracy_norm is not None for score in result.scores)
    columns = ["accuracy %", "std error", "rows", "no answer"]
    if by_norm:
        columns = ["acc %", "std error", "acc_norm %", "std error", "rows"]
        columns += ["no answer"] if norm is None else []
    for column in columns:
        drawn.add_column(column, justify="right")

    def cells(
        accuracy: tuple[float, float | None],
        accuracy_norm: tuple[float | None, float | None],
        n: int,
        unparseable: int,
    ) -> list[str]:
        shown = [*map(percent, accuracy), *(map(percent, accuracy_norm) if by_norm else ()), str(n)]
        return shown if norm is not None else [*shown, str(unparseable)]

    for score in result.scores:
        drawn.add_row(
            f"{score.task}, {score.judge}" if score.judge in GRADED else score.task,
            *cells(
                (score.accuracy, score.standard_error),
                (score.accuracy_norm, score.standard_error_norm),
                score.n,
                score.unparseable,
            ),
        )
    if counted:
        drawn.add_section()
        drawn.add_row(
            "average",
            *cells(
                average(counted),
                norm or (None, None),
                sum(score.n for score in counted),
                sum(score.unparseable for score in counted),
            ),
            style="bold",
        )
    return drawn


def remarks(result: EvalResult) -> list[str]:
    """Return what belongs beside the table: rows without an answer, with examples, and notes."""
    lines = []
    if result.unparseable:
        total = sum(score.n for score in result.scores)
        lines.append(f"no answer in {len(result.unparseable)} of {total} outputs, which are wrong:")
        for row in result.unparseable[:EXAMPLES]:
            text = row.output if len(row.output) <= SHOWN else row.output[:SHOWN] + "..."
            lines.append(f"  {row.task} row {row.row}: {text!r}")
    counted = averaged(result.scores)
    apart = len(result.scores) - len(counted) + len(result.losses)
    if apart and counted:
        lines.append(
            f"average: over {', '.join(score.task for score in counted)}, whose answers are right "
            "or wrong"
        )
    if result.forgetting is not None:
        lines.append(f"forgetting: {result.forgetting}")
    return [*lines, *(f"note: {note}" for note in result.notes)]
