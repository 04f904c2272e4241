"""Scores as a table for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from san_llm.evaluate.questions import Settings
from san_llm.evaluate.score import Judged, TaskScore, average, average_norm
from san_llm.evaluate.store import ROWS
from san_llm.runs.record import Accuracy, EvaluationResults, TaskAccuracy, UnparseableExample
from san_llm.shown import percent

EXAMPLES = 3  # outputs without an answer that are shown
SHOWN = 70  # characters of such an output


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation came to.

    Attributes:
        scores: The score of each task.
        settings: How the rows were asked.
        output: The evaluation's folder.
        about: What was evaluated: model, adapter, data, limit.
        unparseable: The rows without an answer.
        notes: What a reader of the scores should know.
    """

    scores: tuple[TaskScore, ...]
    settings: Settings
    output: str
    about: Mapping[str, Any]
    unparseable: tuple[Judged, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> str:
        """The file with every row."""
        return f"{self.output}/{ROWS}"

    @property
    def results(self) -> EvaluationResults:
        """What is written down of the evaluation."""
        mean, error = average(self.scores)
        mean_norm, error_norm = average_norm(self.scores) or (None, None)
        return EvaluationResults(
            **self.about,
            protocol=self.settings.protocol,
            prompt=self.settings.prompt,
            strict=self.settings.strict,
            output=self.output,
            tasks=tuple(TaskAccuracy(**asdict(score)) for score in self.scores),
            average=Accuracy(
                accuracy=mean,
                standard_error=error,
                accuracy_norm=mean_norm,
                standard_error_norm=error_norm,
            ),
            unparseable_examples=tuple(
                UnparseableExample(task=row.task, row=row.row, output=row.output)
                for row in self.unparseable[:EXAMPLES]
            ),
            notes=self.notes,
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values; accuracies are fractions of 1."""
        return self.results.written


def table(result: EvalResult) -> Table:
    """Return the scores as a table for the terminal; accuracies in percent."""
    drawn = Table(title=escape(str(result.about.get("title", ""))) or None, title_justify="left")
    drawn.add_column("task")
    norm = average_norm(result.scores)
    columns = ["accuracy %", "std error", "rows", "no answer"]
    if norm is not None:
        columns = ["acc %", "std error", "acc_norm %", "std error", "rows"]
    for column in columns:
        drawn.add_column(column, justify="right")

    def cells(
        accuracy: tuple[float, float | None],
        accuracy_norm: tuple[float | None, float | None],
        n: int,
        unparseable: int,
    ) -> list[str]:
        shown = [*map(percent, accuracy)]
        if norm is not None:
            return [*shown, *map(percent, accuracy_norm), str(n)]
        return [*shown, str(n), str(unparseable)]

    for score in result.scores:
        drawn.add_row(
            score.task,
            *cells(
                (score.accuracy, score.standard_error),
                (score.accuracy_norm, score.standard_error_norm),
                score.n,
                score.unparseable,
            ),
        )
    drawn.add_section()
    drawn.add_row(
        "average",
        *cells(
            average(result.scores),
            norm or (None, None),
            sum(score.n for score in result.scores),
            sum(score.unparseable for score in result.scores),
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
    return [*lines, *(f"note: {note}" for note in result.notes)]
