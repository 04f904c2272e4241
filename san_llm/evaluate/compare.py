"""Finished evaluations side by side, row by row: is one better than another, or was it luck?

Both answered the same rows, so that they are compared in pairs. McNemar's exact test (McNemar 1947)
asks whether the rows that only one has right fall evenly to both. The difference's interval is a
paired bootstrap (Efron 1979) that draws rows again within each task, as the average is over tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from san_llm.errors import InputError
from san_llm.evaluate.score import Judged, mean_of, standard_error
from san_llm.evaluate.store import Stored, read_evaluation
from san_llm.protocol.published import QUOTED, Learned, Quoted
from san_llm.runs.folder import recipe_of, run_of
from san_llm.runs.record import MANIFEST

RESAMPLES = 9999
LEVEL = 0.95
AT_ONCE = 100  # resamples held in memory together

METRICS = ("acc", "acc_norm")


@dataclass(frozen=True)
class Difference:
    """How another run differs from the first, over a task's rows or over all.

    Attributes:
        task: The task, or ``average``.
        difference: Accuracy of the other minus that of the first; over all: the mean of the tasks'.
        low: The lower end of its bootstrap interval.
        high: The upper end.
        gained: Rows that only the other has right.
        lost: Rows that only the first has right.
        p: The p-value of McNemar's exact test, two-sided; over all: on all rows together.
    """

    task: str
    difference: float
    low: float
    high: float
    gained: int
    lost: int
    p: float


@dataclass(frozen=True)
class Change:
    """A row that two runs answered differently.

    Attributes:
        task: The task.
        row: The row's number in the task's file, from 0.
        answer: The right answer.
        first: The first run's answer, or None.
        other: The other run's.
    """

    task: str
    row: int
    answer: str
    first: str | None
    other: str | None


@dataclass(frozen=True)
class Run:
    """One evaluation's accuracies.

    Attributes:
        name: The evaluation's folder.
        about: What was evaluated.
        protocol: The protocol by which rows were asked.
        prompt: The prompt style.
        accuracies: ``(accuracy, standard error)`` by task, and ``average``.
        unparseable: Rows without an answer.
        differences: The differences from the first run, by task and over all; of the first: none.
        changes: Rows whose answer is not the first run's.
        notes: What differs from the first run, besides the model.
        learned: What of a training row the adapter's loss was on; None where no run is known.
        epochs: For how many epochs; None where no run is known, or one that steps ended.
    """

    name: str
    about: str
    protocol: str
    prompt: str
    accuracies: dict[str, tuple[float, float | None]]
    unparseable: int
    differences: tuple[Difference, ...] = ()
    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()
    learned: Learned | None = None
    epochs: float | None = None


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` returns.

    Attributes:
        metric: ``acc`` or ``acc_norm``.
        rows: Rows of each task.
        runs: The first is what the others are compared with.
        notes: The runs' notes, with their names.
        quoted: Published numbers, for context.
    """

    metric: str
    rows: dict[str, int]
    runs: tuple[Run, ...]
    notes: tuple[str, ...]
    quoted: tuple[Quoted, ...] = ()


def evaluation_folder(path: Path) -> Path:
    """Return the folder of a finished evaluation: ``path``, or the only one of that run's adapter.

    Raises:
        InputError: when there is none, or there are several.
    """
    if (path / MANIFEST).is_file() and not (path / "recipe.yaml").is_file():
        return path
    folders = sorted(file.parent for file in path.glob(f"eval/*/{MANIFEST}"))
    of_adapter = [folder for folder in folders if folder.name.endswith("-adapter")]
    for candidates in (folders, of_adapter):
        if len(candidates) == 1:
            return candidates[0]
    if folders:
        raise InputError(f"{path}: has {len(folders)} evaluations: name one, such as {folders[-1]}")
    if not path.is_dir():
        raise InputError(f"{path}: no such folder")
    options = f" --adapter {path}" if (path / "recipe.yaml").is_file() else ""
    raise InputError(f"{path}: no finished evaluation in it; `san-llm eval{options}` makes one")


def compare(
    paths: Sequence[Path], metric: str = "acc", across: bool = False, quote: bool = False
) -> Comparison:
    """Return a comparison of evaluations with the first of them.

    Args:
        paths: Folders of evaluations, or of runs that have one each; two at least.
        metric: ``acc``, or ``acc_norm`` where answers were chosen by likelihood.
        across: Compare other protocols and prompt styles, too.
        quote: Add published numbers.

    Raises:
        InputError: when a folder has no finished evaluation, or the rows are not the same.
    """
    if len(paths) < 2:
        raise InputError("two evaluations at least are needed for a comparison")
    stored = [read_evaluation(evaluation_folder(path)) for path in paths]
    first = stored[0]
    for evaluation in stored:
        if metric == "acc_norm" and not evaluation.rows[0].choices:
            raise InputError(f"{evaluation.folder}: protocol generate has no acc_norm")
        if evaluation is not first:
            _check_same(first, evaluation, across)
    rows: dict[str, int] = {}
    for row in first.rows:
        rows[row.task] = rows.get(row.task, 0) + 1
    runs = tuple(_run(first, evaluation, metric) for evaluation in stored)
    return Comparison(
        metric=metric,
        rows=rows,
        runs=runs,
        notes=tuple(f"{run.name}: {note}" for run in runs for note in run.notes),
        quoted=QUOTED if quote else (),
    )


def _check_same(first: Stored, other: Stored, across: bool) -> None:
    """Refuse a pair that was not asked the same question, and say where the two differ."""
    question, other_question = first.manifest.question, other.manifest.question
    pair = f"{first.folder} and {other.folder}"
    for name, value, other_value in (
        ("protocol", question.protocol, other_question.protocol),
        ("prompt", question.prompt, other_question.prompt),
    ):
        if value != other_value and not across:
            raise InputError(
                f"{pair}: not the same {name}: {value} and {other_value}; "
                "--across compares them still"
            )
    if question.rows == other_question.rows:
        return
    data, other_data = first.manifest.identity.data, other.manifest.identity.data
    if data.keys() != other_data.keys():
        raise InputError(f"{pair}: not the same tasks: {', '.join(data)}; {', '.join(other_data)}")
    for task, rows in data.items():
        if rows.sha256 != other_data[task].sha256:
            raise InputError(f"{pair}: not the same rows: {task} has another test file")
        if rows.rows != other_data[task].rows:
            counts = f"({rows.rows:,} and {other_data[task].rows:,})"
            raise InputError(
                f"{pair}: not the same rows: {task} has another number of rows {counts}"
            )


def _notes(first: Stored, other: Stored) -> list[str]:
    """Return what the two differ in that may change an answer, besides model and adapter."""
    identity, other_identity = first.manifest.identity, other.manifest.identity
    notes = []
    for values, other_values in (
        (identity.protocol.written, other_identity.protocol.written),
        (identity.load.written, other_identity.load.written),
        (identity.versions, other_identity.versions),
    ):
        for name in values | other_values:
            pair = values.get(name, "absent"), other_values.get(name, "absent")
            if pair[0] != pair[1] and name not in ("name", "prompt"):  # the legend says these
                notes.append(f"{name} {pair[1]}, not {pair[0]}")
    shared = identity.model_fields_set & other_identity.model_fields_set
    for key in ("batch_size", "processes"):  # there where they can change a last bit
        pair = getattr(identity, key), getattr(other_identity, key)
        if key in shared and pair[0] != pair[1]:
            words = ["chosen by memory" if count is None else count for count in pair]
            notes.append(f"{key.replace('_', ' ')} {words[1]}, not {words[0]}")
    if identity.device != other_identity.device:
        notes.append(f"on {other_identity.device}, not {identity.device}")
    if identity.code != other_identity.code:
        notes.append("measured by another state of san-llm's code")
    return notes


def _run(first: Stored, evaluation: Stored, metric: str) -> Run:
    """Return an evaluation's accuracies, and its differences from the first if it is another."""
    corrects = _corrects(evaluation.rows, metric)
    accuracies: dict[str, tuple[float, float | None]] = {}
    for task, of_task in corrects.items():
        accuracy = sum(of_task) / len(of_task)
        accuracies[task] = accuracy, standard_error(accuracy, len(of_task))
    accuracies["average"] = mean_of(list(accuracies.values()))
    same = evaluation is first
    learned, epochs = _training(evaluation)
    return Run(
        name=str(evaluation.folder),
        about=evaluation.results.title,
        protocol=evaluation.results.protocol,
        prompt=evaluation.results.prompt,
        accuracies=accuracies,
        unparseable=sum(row.parsed is None for row in evaluation.rows),
        differences=() if same else _differences(_corrects(first.rows, metric), corrects),
        changes=() if same else _changes(first.rows, evaluation.rows, metric),
        notes=() if same else tuple(_notes(first, evaluation)),
        learned=learned,
        epochs=epochs,
    )


def _training(evaluation: Stored) -> tuple[Learned | None, float | None]:
    """Return what the run of an evaluation's adapter learned, and for how many epochs."""
    adapter = evaluation.results.adapter
    run = run_of(Path(adapter)) if adapter else None
    if run is None:
        return None, None
    try:
        recipe = recipe_of(run)
    except InputError:  # another version's: what it says is only shown beside the numbers
        return None, None
    steps = recipe.training.max_steps
    learned: Learned = "response" if recipe.data.loss == "response" else "whole text"
    return learned, recipe.training.epochs if steps is None else None


def _corrects(rows: Sequence[Judged], metric: str) -> dict[str, list[bool]]:
    """Return whether each row of each task was answered right, in the order of the task's file."""
    corrects: dict[str, list[bool]] = {}
    for row in sorted(rows, key=lambda row: row.row):
        correct = row.correct if metric == "acc" else bool(row.correct_norm)
        corrects.setdefault(row.task, []).append(correct)
    return corrects


def _answer(row: Judged, metric: str) -> str | None:
    return row.parsed if metric == "acc" else row.parsed_norm


def _changes(first: Sequence[Judged], other: Sequence[Judged], metric: str) -> tuple[Change, ...]:
    other_rows = {(row.task, row.row): row for row in other}
    changes = []
    for row in first:
        answer, other_answer = (
            _answer(judged, metric) for judged in (row, other_rows[row.task, row.row])
        )
        if answer != other_answer:
            changes.append(Change(row.task, row.row, row.answer, answer, other_answer))
    return tuple(changes)


def _differences(
    first: dict[str, list[bool]], other: dict[str, list[bool]]
) -> tuple[Difference, ...]:
    by_task = (_difference(task, {task: first[task]}, {task: other[task]}) for task in first)
    return (*by_task, _difference("average", first, other))


def _difference(
    name: str, first: dict[str, list[bool]], other: dict[str, list[bool]]
) -> Difference:
    """Return how the answers to some tasks differ, each task with the same weight."""
    import numpy as np
    from scipy.stats import binomtest, bootstrap

    pairs = [
        np.array(other[task], dtype=np.int8) - np.array(corrects, dtype=np.int8)
        for task, corrects in first.items()
    ]
    gained = sum(int((pair > 0).sum()) for pair in pairs)
    lost = sum(int((pair < 0).sum()) for pair in pairs)

    def mean(*samples: Any, axis: int) -> Any:
        return sum(sample.mean(axis=axis) for sample in samples) / len(samples)

    difference = float(mean(*pairs, axis=-1))
    low = high = difference
    if gained or lost:
        interval = bootstrap(
            # scipy wants two rows at least: one row, drawn twice, has the same mean.
            tuple(pair if len(pair) > 1 else pair.repeat(2) for pair in pairs),
            mean,
            n_resamples=RESAMPLES,
            batch=AT_ONCE,
            vectorized=True,
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(0),  # the same runs, the same interval
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return Difference(name, difference, low, high, gained, lost, p)
