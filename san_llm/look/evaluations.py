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
from typing import Literal, TypeVar

from san_llm.errors import InputError
from san_llm.evaluate.compare import LEVEL, Change, Comparison, compare
from san_llm.evaluate.compare_tables import Grid, p_value, points
from san_llm.evaluate.score import Judged
from san_llm.evaluate.store import Stored, read_evaluation
from san_llm.look.facts import Facts, Missing
from san_llm.runs.record import ADAPTER_WEIGHTS, Accuracy, Question
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
        question: What was asked, and how: equal where two can be compared.
        command: What repeats it, of the last run.
    """

    stored: Stored
    of: Of
    question: Question
    command: str

    @property
    def made(self) -> str:
        """When, as ISO 8601."""
        return self.stored.manifest.made


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
    whole, wrong = [], []
    for folder in sorted(path for path in facts.folder.glob("eval/*") if path.is_dir()):
        try:
            whole.append(_evaluated(read_evaluation(folder), facts))
        except InputError as error:
            wrong.append(Missing(f"An evaluation is left out: {error}."))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            wrong.append(Missing(f"An evaluation is left out: {folder}: not one of san-llm's."))
    return sorted(whole, key=lambda evaluated: evaluated.made), wrong


def _evaluated(stored: Stored, facts: Facts) -> Evaluated:
    results, manifest = stored.results, stored.manifest
    if not (results.model and results.data and manifest.made):
        raise ValueError("does not say of what it is")
    _check(stored.rows, {task: asked.rows for task, asked in manifest.identity.data.items()})
    of: Of = "another model"
    if results.adapter:
        known = facts.manifest.sha256.adapter
        if known in (None, (manifest.identity.adapter or {})[ADAPTER_WEIGHTS]):
            of = "adapter"
    elif results.model == facts.recipe.base.model:
        of = "base"
    command = shlex.join(["san-llm", "eval", *_options(stored, facts)])
    return Evaluated(stored, of, manifest.question, command)


def _check(rows: Iterable[Judged], counts: Mapping[str, int]) -> None:
    """Raise ValueError for what is not one row for each question; it may be another's file."""
    texts = ("task", "prompt", "output", "answer")
    if sorted((row.task, row.row) for row in rows) != [
        (task, row) for task in sorted(counts) for row in range(counts[task])
    ] or not all(isinstance(getattr(row, text), str) for row in rows for text in texts):
        raise ValueError("not the rows of its questions")


def _options(stored: Stored, facts: Facts) -> list[str]:
    """Return the options of ``san-llm eval`` that differ from what the recipe says anyway."""
    results, manifest = stored.results, stored.manifest
    identity, recipe = manifest.identity, facts.recipe
    asking, defaults = identity.protocol, recipe.evaluation
    tasks = ",".join(identity.data)
    pairs = [
        ("--protocol", asking.name, "generate"),
        ("--tasks", tasks, ",".join(defaults.tasks)),
        ("--data", results.data, defaults.data),
        ("--prompt", asking.prompt, defaults.prompt or recipe.data.prompt),
        ("--limit", results.limit, defaults.limit),
        ("--dtype", identity.load.dtype, recipe.base.dtype),
        ("--batch-size", manifest.batch_size, None),
        ("--processes", manifest.processes, 1),
    ]
    options = [
        word
        for option, value, default in pairs
        if value != default and value is not None
        for word in (option, str(value))
    ]
    flags = [("--strict", asking.strict), ("--answers-only", asking.answers_only)]
    options += [flag for flag, given in flags if given]
    return [*([] if results.adapter else ["--base-only"]), *options]


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
        asked = sum(task.n for task in results.tasks)
        lost = sum(task.unparseable for task in results.tasks)
        rows = (
            *(_line(task.task, task, task.n, task.unparseable) for task in results.tasks),
            _line("average", results.average, asked, lost),
        )
        return [Grid("Accuracy, percent", ("task", "rows", "adapted", "no answer"), rows)]
    return [_beside(comparison) for comparison in judgement.comparisons]


def _line(name: str, score: Accuracy, asked: int, lost: int) -> tuple[str, ...]:
    return name, f"{asked:,}", with_error(score.accuracy, score.standard_error), f"{lost:,}"


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
    for evaluation in evaluated:
        stored, question = evaluation.stored, evaluation.question
        average = stored.results.average
        lost = sum(row.parsed is None for row in stored.rows)
        rows.append(
            (
                *(stored.folder.name, evaluation.of, Path(stored.results.data).name),
                *(question.protocol, question.prompt, f"{len(stored.rows):,}"),
                *(with_error(average.accuracy, average.standard_error), f"{lost:,}"),
                evaluation.made,
            )
        )
    header = (
        *("evaluation", "of", "data", "protocol", "prompt", "rows"),
        *("average", "no answer", "made"),
    )
    return Grid("Every evaluation in the run's folder", header, tuple(rows))
