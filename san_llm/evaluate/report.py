"""Scores as a table for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from san_llm.evaluate.score import TaskScore, average


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation came to.

    Attributes:
        scores: One a task.
        prompt: The prompt style.
        output: The folder with ``rows.jsonl`` and ``results.json``.
        about: What was evaluated: model, adapter, data, limit.
    """

    scores: tuple[TaskScore, ...]
    prompt: str
    output: str
    about: Mapping[str, object]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values; accuracies are fractions of 1."""
        mean, error = average(self.scores)
        return {
            **self.about,
            "prompt": self.prompt,
            "output": self.output,
            "tasks": [asdict(score) for score in self.scores],
            "average": {"accuracy": mean, "standard_error": error},
        }


def percent(fraction: float | None) -> str:
    """Return a fraction as percent with one decimal; a dash where there is none."""
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def table(result: EvalResult) -> Table:
    """Return the scores as a table for the terminal; accuracies in percent."""
    drawn = Table(title=escape(str(result.about.get("title", ""))) or None, title_justify="left")
    drawn.add_column("task")
    for column in ("accuracy", "std error", "n", "unparseable"):
        drawn.add_column(column, justify="right")
    for score in result.scores:
        drawn.add_row(
            score.task,
            percent(score.accuracy),
            percent(score.standard_error),
            str(score.n),
            str(score.unparseable),
        )
    mean, error = average(result.scores)
    drawn.add_section()
    drawn.add_row(
        "average",
        percent(mean),
        percent(error),
        str(sum(score.n for score in result.scores)),
        str(sum(score.unparseable for score in result.scores)),
        style="bold",
    )
    return drawn
