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
from san_llm.evaluate.compare import Comparison, compare
from san_llm.evaluate.compare_tables import loss_cells, p_value, points
from san_llm.evaluate.differences import LEVEL
from san_llm.evaluate.grids import Grid
from san_llm.evaluate.score import Judged
from san_llm.evaluate.store import Stored, read_evaluation
from san_llm.look.facts import Facts, Missing
from san_llm.recipe.task_file import FORGETTING
from san_llm.runs.folder import is_its_model
from san_llm.runs.record import (
    ADAPTER_WEIGHTS,
    Accuracy,
    Question,
    TaskAccuracy,
    TaskLoss,
    by_chance,
)
from san_llm.shown import nats, with_error

CHANGED = 10  # answers that are shown
VERDICTS = ("now wrong", "now right", "still wrong")
GRADED_VERDICTS = ("now worse", "now better", "as good")  # of answers that may be right in part
_Value = TypeVar("_Value")
Of = Literal["base", "adapter", "another model"]


@dataclass(frozen=True)
class Evaluated:
    """A finished evaluation in a run's folder.

    Attributes:
        stored: The evaluation's rows, results and manifest.
        of: What was evaluated.
        question: What was asked, and how: equal where two can be compared.
        command: The command that repeats it, over the last run.
    """

    stored: Stored
    of: Of
    question: Question
    command: str

    @property
    def made(self) -> str:
        """When the evaluation was made, as ISO 8601."""
        return self.stored.manifest.made


@dataclass(frozen=True)
class ChangedAnswer:
    """A row that the adapted model answers otherwise than the base.

    Attributes:
        task: The task's name.
        row: The row's number in the task's file, from 0.
        question: What the row asks.
        right: The right answer.
        base: The base's answer, or None.
        base_output: What the base said.
        adapted: The adapted model's answer, or None.
        adapted_output: What the adapted model said.
        verdict: Whether the change is for the better: one of ``VERDICTS``.
    """

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
        adapter: The adapter's evaluation.
        base: The base's, or None.
        comparisons: The comparison of both by each metric; empty without the base's.
        changes: How many rows the adapter answers otherwise.
        verdicts: How many of these rows have each verdict, in words.
        changed: Some of these rows.
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
    _check(stored.rows, {task: data.rows for task, data in manifest.identity.data.items()})
    of: Of = "another model"
    if results.adapter:
        known = facts.manifest.sha256.adapter
        if known in (None, (manifest.identity.adapter or {})[ADAPTER_WEIGHTS]):
            of = "adapter"
    elif is_its_model(results.model, facts.folder):
        of = "adapter"
    elif results.model == facts.recipe.base.model:
        of = "base"
    command = shlex.join(["san-llm", "eval", *_options(stored, facts)])
    return Evaluated(stored, of, manifest.question, command)


def _check(rows: Iterable[Judged], counts: Mapping[str, int]) -> None:
    """Raise ValueError where rows are not one for each question: the file may be another's."""
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
    neutral = FORGETTING in identity.data
    asked = [task for task in identity.data if task != FORGETTING] or [FORGETTING]
    tasks = ",".join(dict.fromkeys(results.task_files.get(task, task) for task in asked))
    of_the_eight = results.data if set(asked) - results.task_files.keys() else None
    pairs = [
        ("--protocol", asking.name, "generate"),
        ("--tasks", tasks, ",".join(defaults.tasks)),
        ("--data", of_the_eight, defaults.data),
        ("--prompt", asking.prompt, defaults.prompt or recipe.data.prompt),
        ("--date", asking.date, recipe.data.date),
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
    if neutral != defaults.forgetting and asked != [FORGETTING]:
        options.append("--forgetting" if neutral else "--no-forgetting")
    trained = results.adapter or is_its_model(results.model, facts.folder)
    return [*([] if trained else ["--base-only"]), *options]


def judge(own: Iterable[Evaluated], others: Iterable[Evaluated] = ()) -> list[Judgement]:
    """Return the last evaluation of the adapter by each set of questions, beside the base's.

    Args:
        own: The run's evaluations.
        others: Those of other runs over the same base, whose base may have been asked the same.
    """
    own = list(own)
    adapters = {evaluated.question: evaluated for evaluated in own if evaluated.of == "adapter"}
    bases = {
        evaluated.question: evaluated for evaluated in [*others, *own] if evaluated.of == "base"
    }
    return [_judgement(adapter, bases.get(question)) for question, adapter in adapters.items()]


def metrics_of(stored: Stored) -> tuple[str, ...]:
    """Return the metrics that an evaluation measured."""
    return ("acc", "acc_norm") if any(row.choices for row in stored.rows) else ("acc",)


def _judgement(adapter: Evaluated, base: Evaluated | None) -> Judgement:
    if base is None:
        return Judgement(adapter, None, (), 0, "", ())
    paths = [base.stored.folder, adapter.stored.folder]
    comparisons = tuple(compare(paths, metric) for metric in metrics_of(adapter.stored))
    before, after = (
        {(row.task, row.row): row for row in evaluated.stored.rows} for evaluated in (base, adapter)
    )
    verdicts = (*VERDICTS, *GRADED_VERDICTS)
    changes = sorted(
        (
            (_verdict(*both), *both)
            for change in comparisons[0].runs[1].changes
            for both in [(before[change.task, change.row], after[change.task, change.row])]
        ),
        key=lambda change: verdicts.index(change[0]),
    )
    counts = Counter(verdict for verdict, _, _ in changes)
    return Judgement(
        adapter,
        base,
        comparisons,
        len(changes),
        ", ".join(f"{counts[v]:,} {v}" for v in verdicts if v in VERDICTS or counts[v]),
        tuple(_changed(old, new, verdict) for verdict, old, new in evenly(changes, CHANGED)),
    )


def _verdict(before: Judged, after: Judged) -> str:
    """Return whether a change was for the better."""
    if after.score is not None:
        if after.value == before.value:
            return "as good"
        return "now better" if after.value > before.value else "now worse"
    if after.correct:
        return "now right"
    return "now wrong" if before.correct else "still wrong"


def evenly(values: Sequence[_Value], count: int) -> list[_Value]:
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
    instruction = re.search(r"### Instruction:\n(.*?)\s*### Response:", prompt, re.DOTALL)
    return re.sub(r"(?m)^ +| +$", "", instruction.group(1) if instruction else prompt).strip()


def table(judgement: Judgement) -> list[Grid]:
    """Return accuracies in percent and losses, with standard errors, beside the base's if any."""
    results = judgement.adapter.stored.results
    if judgement.comparisons:
        grids = [
            _beside(comparison, results.tasks)
            for comparison in judgement.comparisons
            if comparison.rows
        ]
        return grids + _losses_beside(judgement.comparisons[0], results.losses)
    counted = [task for task in results.tasks if not task.graded]
    rows = [_line(_named(task), [task], task, task.n, task.unparseable) for task in results.tasks]
    if results.average is not None:
        count, lost = sum(task.n for task in counted), sum(task.unparseable for task in counted)
        rows.append(_line("average", counted, results.average, count, lost))
    header = ("task", "rows", "guessing", "adapted", "no answer")
    grids = [Grid("Accuracy, percent", header, tuple(rows))] if rows else []
    if results.losses:
        losses = tuple(
            (of_task.task, f"{of_task.n:,}", nats(of_task.loss, of_task.standard_error))
            for of_task in results.losses
        )
        grids.append(Grid(LOSS, ("task", "rows", "adapted"), losses))
    return grids


LOSS = "Loss, nats a token; less is better"


def _named(task: TaskAccuracy) -> str:
    """Return a task's name, and what stands in place of accuracy."""
    return f"{task.task}, {task.judge}" if task.graded else task.task


def _line(
    name: str, tasks: Sequence[TaskAccuracy], score: Accuracy, count: int, lost: int
) -> tuple[str, ...]:
    accuracy = with_error(score.accuracy, score.standard_error)
    return name, f"{count:,}", _by_chance(tasks), accuracy, f"{lost:,}"


def _by_chance(tasks: Sequence[TaskAccuracy]) -> str:
    share = by_chance(tasks)
    return "" if share is None else f"{100 * share:.1f}"


def _beside(comparison: Comparison, tasks: Sequence[TaskAccuracy]) -> Grid:
    base, adapted = comparison.runs
    known = {task.task: task for task in tasks}
    header = (
        *("task", "rows", "guessing", "base", "adapted", "difference", f"{LEVEL:.0%} interval"),
        *("only adapted right", "only base right", "p"),
    )
    rows = []
    for change in adapted.differences:
        of = [change.task] if change.task in comparison.rows else comparison.averaged
        exact = ("-" if n is None else f"{n:,}" for n in (change.gained, change.lost))
        rows.append(
            (
                _named(known[change.task]) if change.task in known else change.task,
                f"{sum(comparison.rows[task] for task in of):,}",
                _by_chance([known[task] for task in of]),
                *(with_error(*run.accuracies[change.task]) for run in (base, adapted)),
                points(change.difference),
                f"{points(change.low)} to {points(change.high)}",
                *(*exact, p_value(change.p)),
            )
        )
    rows.append(("no answer", "", "", str(base.unparseable), str(adapted.unparseable), *[""] * 5))
    name = "Accuracy" if comparison.metric == "acc" else "Accuracy by likelihood a character"
    return Grid(f"{name} ({comparison.metric}), percent", header, tuple(rows))


def _losses_beside(comparison: Comparison, losses: Sequence[TaskLoss]) -> list[Grid]:
    base, adapted = comparison.runs
    apart = {change.task: loss_cells(change)[1:] for change in adapted.loss_differences}
    rows = tuple(
        (
            *(loss.task, f"{loss.n:,}"),
            *(nats(*run.losses[loss.task]) for run in (base, adapted)),
            *apart.get(loss.task, ("", "", "")),
        )
        for loss in losses
    )
    header = ("task", "rows", "base", "adapted", "difference", f"{LEVEL:.0%} interval", "p")
    return [Grid(LOSS, header, rows)] if rows else []


def overview(evaluated: Iterable[Evaluated]) -> Grid:
    """Return a table with a line for every evaluation."""
    rows = []
    for evaluation in evaluated:
        stored, question = evaluation.stored, evaluation.question
        average = stored.results.average
        lost = sum(row.unanswered for row in stored.rows)
        rows.append(
            (
                *(stored.folder.name, evaluation.of, Path(stored.results.data).name),
                *(question.protocol, question.prompt, f"{len(stored.rows):,}"),
                with_error(average.accuracy, average.standard_error) if average else "-",
                f"{lost:,}",
                evaluation.made,
            )
        )
    header = (
        *("evaluation", "of", "data", "protocol", "prompt", "rows"),
        *("average", "no answer", "made"),
    )
    return Grid("Every evaluation in the run's folder", header, tuple(rows))
