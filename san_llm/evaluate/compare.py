"""Finished evaluations side by side, row by row: is one better than another, or was it luck?

Both answered the same rows, so that they are compared in pairs, see ``evaluate.differences``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from san_llm.errors import InputError
from san_llm.evaluate.differences import (
    Difference,
    alike_losses,
    differences,
    graded,
    loss_difference,
    losses_of,
)
from san_llm.evaluate.score import Judged, mean_of, mean_value, ratio_of_sums
from san_llm.evaluate.store import Stored, read_evaluation
from san_llm.protocol.published import QUOTED, Learned, Quoted
from san_llm.runs.folder import recipe_of, run_of
from san_llm.runs.record import MANIFEST, TaskRows

METRICS = ("acc", "acc_norm")


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
        losses: ``(nats a token, standard error)`` of each task that is judged by loss.
        loss_differences: The differences of these from the first run's; below 0 is better.
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
    losses: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    loss_differences: tuple[Difference, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` returns.

    Attributes:
        metric: ``acc`` or ``acc_norm``.
        rows: Rows of each task that is answered, by this metric.
        averaged: Those of them that the average is over: their answers are right or wrong.
        runs: The first is what the others are compared with.
        notes: The runs' notes, with their names.
        quoted: Published numbers, for context.
    """

    metric: str
    rows: dict[str, int]
    averaged: tuple[str, ...]
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
    of_adapter = [folder for folder in folders if folder.name.endswith(("-adapter", "-trained"))]
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
        if metric == "acc_norm" and all(row.correct_norm is None for row in evaluation.rows):
            raise InputError(f"{evaluation.folder}: its rows have no acc_norm")
        if evaluation is not first:
            _check_same(first, evaluation, across)
    answered = _answered(first.rows, metric)
    runs = tuple(_run(first, evaluation, metric) for evaluation in stored)
    return Comparison(
        metric=metric,
        rows={task: len(rows) for task, rows in answered.items()},
        averaged=tuple(task for task, rows in answered.items() if not graded(rows)),
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
    _check_asked(pair, data, other_data, across)
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


def _check_asked(
    pair: str, data: dict[str, TaskRows], other_data: dict[str, TaskRows], across: bool
) -> None:
    for task in sorted(data.keys() & other_data.keys()):
        asked, other_asked = data[task].asked or {}, other_data[task].asked or {}
        for key in sorted(asked.keys() | other_asked.keys()):
            values = asked.get(key, "none"), other_asked.get(key, "none")
            if values[0] != values[1] and not (key == "prompt" and across):
                hint = "; --across compares them still" if key == "prompt" else ""
                raise InputError(
                    f"{pair}: {task} is not asked the same: {key} {values[0]!r} and {values[1]!r}"
                    f"{hint}"
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
    answered = _answered(evaluation.rows, metric)
    accuracies = {task: mean_value(rows) for task, rows in answered.items()}
    counted = [accuracies[task] for task, rows in answered.items() if not graded(rows)]
    if counted:
        accuracies["average"] = mean_of(counted)
    same = evaluation is first
    learned, epochs = _training(evaluation)
    losses, of_first = (
        losses_of(stored.rows) if metric == "acc" else {} for stored in (evaluation, first)
    )
    alike, unlike = alike_losses(of_first, losses)
    return Run(
        name=str(evaluation.folder),
        about=evaluation.results.title,
        protocol=evaluation.results.protocol,
        prompt=evaluation.results.prompt,
        accuracies=accuracies,
        unparseable=sum(row.unanswered for row in evaluation.rows),
        differences=() if same else differences(_answered(first.rows, metric), answered),
        changes=() if same else _changes(first.rows, evaluation.rows, metric),
        notes=() if same else (*_notes(first, evaluation), *unlike),
        losses={task: ratio_of_sums(pairs)[1:] for task, pairs in losses.items()},
        loss_differences=() if same else tuple(loss_difference(*of_task) for of_task in alike),
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


def _answered(rows: Sequence[Judged], metric: str) -> dict[str, list[Judged]]:
    """Return each task's rows that are answered, in the order of its file, as a metric has them."""
    answered: dict[str, list[Judged]] = {}
    for row in sorted(rows, key=lambda row: row.row):
        if row.loss is None and (metric == "acc" or row.correct_norm is not None):
            by_length = replace(row, correct=bool(row.correct_norm))
            answered.setdefault(row.task, []).append(row if metric == "acc" else by_length)
    return answered


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
