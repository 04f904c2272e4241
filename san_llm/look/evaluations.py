"""A run's evaluations: which are of the base, which of the adapter, and what changed between them.

Two evaluations belong together when they asked the same rows in the same way.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from san_llm.errors import InputError
from san_llm.evaluate.compare import LEVEL, Change, Comparison, compare
from san_llm.evaluate.compare_tables import Grid, p_value, points
from san_llm.evaluate.score import Judged
from san_llm.evaluate.store import Stored, read_evaluation
from san_llm.look.facts import Facts, Missing
from san_llm.shown import with_error

CHANGED = 10  # answers that are shown
VERDICTS = ("now wrong", "now right", "still wrong")
_One = TypeVar("_One")
Of = Literal["base", "adapter", "another model"]


@dataclass(frozen=True)
class Evaluated:
    """A finished evaluation in a run's folder.

    Attributes:
        stored: Its rows, results and manifest.
        of: What was evaluated.
        made: When, as ISO 8601.
        question: What was asked, and how: equal where two can be compared.
        command: What repeats it, of the last run.
    """

    stored: Stored
    of: Of
    made: str
    question: tuple[Any, ...]
    command: str


@dataclass(frozen=True)
class ChangedAnswer:
    """A row that the adapted model answers otherwise than the base."""

    task: str
    row: int
    question: str
    right: str
    base: str | None
    base_output: str
    adapted: str | None
    adapted_output: str
    verdict: str


@dataclass(frozen=True)
class Judgement:
    """The adapter's last evaluation by some questions, beside the base's.

    Attributes:
        adapter: The evaluation.
        base: The base's, or None.
        comparisons: Of both, by each metric; empty without the base's.
        changes: How many rows are answered otherwise.
        verdicts: How many of them for the better, and how many for the worse.
        changed: Some of them.
    """

    adapter: Evaluated
    base: Evaluated | None
    comparisons: tuple[Comparison, ...]
    changes: int
    verdicts: str
    changed: tuple[ChangedAnswer, ...]


def read_evaluations(facts: Facts) -> tuple[list[Evaluated], list[Missing]]:
    """Return a run's evaluations, the oldest first, and what is wrong with those left out."""
    found, wrong = [], []
    for folder in sorted(path for path in facts.folder.glob("eval/*") if path.is_dir()):
        try:
            found.append(_evaluated(read_evaluation(folder), facts))
        except InputError as error:
            wrong.append(Missing(f"An evaluation is left out: {error}."))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            wrong.append(Missing(f"An evaluation is left out: {folder}: not one of san-llm's."))
    return sorted(found, key=lambda one: one.made), wrong


def _evaluated(stored: Stored, facts: Facts) -> Evaluated:
    results, identity = stored.results, stored.manifest["identity"]
    _check(stored.rows, {task: found["rows"] for task, found in identity["data"].items()})
    of: Of = "another model"
    if results["adapter"]:
        known = facts.manifest.sha256.adapter
        if known in (None, identity["adapter"]["adapter_model.safetensors"]):
            of = "adapter"
    elif results["model"] == facts.recipe.base.model:
        of = "base"
    how = identity["protocol"]
    asked = tuple((task, *sorted(rows.items())) for task, rows in sorted(identity["data"].items()))
    return Evaluated(
        stored,
        of,
        str(stored.manifest["made"]),
        (how["name"], how["prompt"], asked),
        shlex.join(["san-llm", "eval", *_options(stored, facts)]),
    )


def _check(rows: Iterable[Judged], counts: Mapping[str, int]) -> None:
    """Raise ValueError for what is not one row for each question; it may be another's file."""
    texts = ("task", "prompt", "output", "answer")
    if sorted((row.task, row.row) for row in rows) != [
        (task, row) for task in sorted(counts) for row in range(counts[task])
    ] or not all(isinstance(getattr(row, text), str) for row in rows for text in texts):
        raise ValueError("not the rows of its questions")


def _options(stored: Stored, facts: Facts) -> list[str]:
    """Return the options of ``san-llm eval`` that differ from what the recipe says anyway."""
    results, identity = stored.results, stored.manifest["identity"]
    recipe, how = facts.recipe, identity["protocol"]
    defaults = recipe.evaluation
    tasks = ",".join(identity["data"])
    pairs = [
        ("--protocol", how["name"], "generate"),
        ("--tasks", tasks, ",".join(defaults.tasks)),
        ("--data", results["data"], defaults.data),
        ("--prompt", how["prompt"], defaults.prompt or recipe.data.prompt),
        ("--limit", results["limit"], defaults.limit),
        ("--dtype", identity["load"]["dtype"], recipe.base.dtype),
        ("--batch-size", stored.manifest["batch_size"], None),
        ("--processes", stored.manifest["processes"], 1),
    ]
    found = [
        word
        for option, value, default in pairs
        if value != default and value is not None
        for word in (option, str(value))
    ]
    flags = [f"--{name.replace('_', '-')}" for name in ("strict", "answers_only") if how.get(name)]
    return [*([] if results["adapter"] else ["--base-only"]), *found, *flags]


def judge(own: Iterable[Evaluated], others: Iterable[Evaluated] = ()) -> list[Judgement]:
    """Return the last evaluation of the adapter by each set of questions, beside the base's.

    Args:
        own: The run's.
        others: Those of other runs over the same base, whose base may have been asked the same.
    """
    own = list(own)
    last = {one.question: one for one in own if one.of == "adapter"}
    bases = {one.question: one for one in [*others, *own] if one.of == "base"}
    return [_judgement(one, bases.get(question)) for question, one in last.items()]


def metrics_of(stored: Stored) -> tuple[str, ...]:
    """Return what an evaluation measured."""
    return ("acc", "acc_norm") if stored.rows[0].choices else ("acc",)


def _judgement(adapter: Evaluated, base: Evaluated | None) -> Judgement:
    if base is None:
        return Judgement(adapter, None, (), 0, "", ())
    paths = [base.stored.folder, adapter.stored.folder]
    comparisons = tuple(compare(paths, metric) for metric in metrics_of(adapter.stored))
    changes = sorted(comparisons[0].runs[1].changes, key=lambda one: VERDICTS.index(_verdict(one)))
    counts = Counter(map(_verdict, changes))
    before, after = (
        {(row.task, row.row): row for row in one.stored.rows} for one in (base, adapter)
    )
    return Judgement(
        adapter,
        base,
        comparisons,
        len(changes),
        ", ".join(f"{counts[verdict]:,} {verdict}" for verdict in VERDICTS),
        tuple(
            _changed(before[one.task, one.row], after[one.task, one.row], _verdict(one))
            for one in evenly(changes, CHANGED)
        ),
    )


def _verdict(change: Change) -> str:
    """Return whether a change was for the better."""
    if change.other == change.answer:
        return "now right"
    return "now wrong" if change.first == change.answer else "still wrong"


def evenly(values: Sequence[_One], count: int) -> list[_One]:
    """Return at most so many values, from the first to the last at even distances."""
    if len(values) <= count:
        return list(values)
    return [values[number * (len(values) - 1) // (count - 1)] for number in range(count)]


def _changed(before: Judged, after: Judged, verdict: str) -> ChangedAnswer:
    return ChangedAnswer(
        *(after.task, after.row, _question(after.prompt), after.answer),
        *(before.parsed, before.output.strip(), after.parsed, after.output.strip()),
        verdict,
    )


def _question(prompt: str) -> str:
    """Return what a prompt asks, without the words of its style; the whole where it has none."""
    found = re.search(r"### Instruction:\n(.*?)\s*### Response:", prompt, re.DOTALL)
    return re.sub(r"(?m)^ +| +$", "", found.group(1) if found else prompt).strip()


def table(judgement: Judgement) -> list[Grid]:
    """Return accuracies in percent with standard errors, beside the base's if it was asked."""
    if not judgement.comparisons:
        results = judgement.adapter.stored.results
        scores = [*((task["task"], task) for task in results["tasks"])]
        total = {
            key: sum(int(task[key]) for task in results["tasks"]) for key in ("n", "unparseable")
        }
        scores.append(("average", results["average"] | total))
        rows = tuple(
            (
                *(str(name), f"{score['n']:,}"),
                *(with_error(score["accuracy"], score["standard_error"]),),
                f"{score['unparseable']:,}",
            )
            for name, score in scores
        )
        return [Grid("Accuracy, percent", ("task", "rows", "adapted", "no answer"), rows)]
    return [_beside(comparison) for comparison in judgement.comparisons]


def _beside(comparison: Comparison) -> Grid:
    base, adapted = comparison.runs
    header = (
        *("task", "rows", "base", "adapted", "difference", f"{LEVEL:.0%} interval"),
        *("only adapted right", "only base right", "p"),
    )
    rows = [
        (
            found.task,
            f"{comparison.rows.get(found.task, sum(comparison.rows.values())):,}",
            *(with_error(*run.accuracies[found.task]) for run in (base, adapted)),
            points(found.difference),
            f"{points(found.low)} to {points(found.high)}",
            *(f"{found.gained:,}", f"{found.lost:,}", p_value(found.p)),
        )
        for found in adapted.differences
    ]
    rows.append(("no answer", "", str(base.unparseable), str(adapted.unparseable), *[""] * 5))
    name = "Accuracy" if comparison.metric == "acc" else "Accuracy by likelihood a character"
    return Grid(f"{name} ({comparison.metric}), percent", header, tuple(rows))


def overview(evaluated: Iterable[Evaluated]) -> Grid:
    """Return every evaluation in a line."""
    rows = []
    for one in evaluated:
        results: Mapping[str, Any] = one.stored.results
        average = results["average"]
        lost = sum(row.parsed is None for row in one.stored.rows)
        rows.append(
            (
                *(one.stored.folder.name, one.of, Path(str(results["data"])).name),
                *(str(one.question[0]), str(one.question[1]), f"{len(one.stored.rows):,}"),
                *(with_error(average["accuracy"], average["standard_error"]), f"{lost:,}"),
                one.made,
            )
        )
    header = (
        *("evaluation", "of", "data", "protocol", "prompt", "rows"),
        *("average", "no answer", "made"),
    )
    return Grid("Every evaluation in the run's folder", header, tuple(rows))
