"""Several runs beside each other: what each was, where recipes differ, paired tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from san_llm.evaluate.compare import compare
from san_llm.evaluate.compare_tables import grids
from san_llm.evaluate.grids import Grid
from san_llm.look.evaluations import Evaluated, metrics_of
from san_llm.look.facts import Missing
from san_llm.look.story import Part
from san_llm.recipe.schema import leaves
from san_llm.runs.record import Question
from san_llm.shown import duration, shown


@dataclass(frozen=True)
class Compared:
    """Evaluations of several runs' adapters on the same rows, with the first of them.

    Attributes:
        about: What was asked, in words.
        grids: Accuracies, and each run's differences from the first.
        notes: What differs, besides the model.
    """

    about: str
    grids: tuple[Grid, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class SideBySide:
    """What several runs have in common, and what not.

    Attributes:
        overview: A line for each run.
        recipes: The keys that differ; None where none does.
        compared: Their adapters' evaluations, by what was asked.
        missing: Why nothing is compared, where nothing is.
    """

    overview: Grid
    recipes: Grid | None
    compared: tuple[Compared, ...]
    missing: tuple[Missing, ...]


def side_by_side(parts: Sequence[Part]) -> SideBySide:
    """Return what runs have in common, and what not."""
    compared = tuple(_compared(parts))
    reason = "No two of the runs were evaluated on the same rows in the same way."
    return SideBySide(
        Grid("The runs", _HEADER, tuple(map(_line, parts))),
        _recipes(parts),
        compared,
        () if compared else (Missing(reason),),
    )


_HEADER = (
    *("run", "method", "base", "status", "trained numbers", "steps"),
    *("best held-out loss", "training time", "size"),
)


def _line(part: Part) -> tuple[str, ...]:
    run, metrics, recipe = part.facts.run, part.facts.metrics, part.facts.recipe
    return (
        *(f"{part.label}: {part.facts.folder.name}", part.facts.method, recipe.base.model),
        *(run.status, "-" if metrics is None else f"{metrics.trained_numbers:,}", f"{run.steps:,}"),
        "-" if run.loss is None else f"{run.loss:.4f}",
        "-" if metrics is None else duration(metrics.seconds),
        decimal(run.bytes),
    )


def _recipes(parts: Sequence[Part]) -> Grid | None:
    recipes = [leaves(part.facts.recipe.model_dump(mode="json")) for part in parts]
    rows = tuple(
        (key, *(shown(recipe[key]) if key in recipe else "-" for recipe in recipes))
        for key in dict.fromkeys(key for recipe in recipes for key in recipe)
        if any(recipe.get(key) != recipes[0].get(key) for recipe in recipes)
    )
    header = ("key", *(part.label for part in parts))
    return Grid("Where the recipes differ", header, rows) if rows else None


def _compared(parts: Sequence[Part]) -> Iterator[Compared]:
    by_question: dict[Question, list[tuple[str, Evaluated]]] = {}
    for part in parts:
        for judgement in part.judgements:
            evaluated = judgement.adapter
            by_question.setdefault(evaluated.question, []).append((part.label, evaluated))
    for question, group in by_question.items():
        if len(group) < 2:
            continue
        folders = [evaluated.stored.folder for _, evaluated in group]
        first = group[0][1].stored
        comparisons = [compare(folders, metric) for metric in metrics_of(first)]
        names = [name for name, _ in group]
        data = Path(first.results.data).name
        yield Compared(
            f"{len(first.rows):,} rows of {data}, protocol {question.protocol}, "
            f"prompts {question.prompt}:",
            tuple(grid for comparison in comparisons for grid in grids(comparison, names)),
            comparisons[0].notes,
        )
