"""Test rows: of the eight tasks, and of tasks of one's own, by columns or in training's shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from string import Formatter
from typing import Any

from san_llm.data.rows import Row
from san_llm.data.shapes import read_row
from san_llm.data.sources import POCKET, read_rows
from san_llm.data.values import stream_values
from san_llm.errors import InputError, did_you_mean, first_line, nearest_file
from san_llm.protocol.neutral import chunks
from san_llm.protocol.tasks import TASKS, Task
from san_llm.recipe.task_file import TEXT, OwnTask, places
from san_llm.runs.record import RowKind


def test_file(data: str, task: Task) -> Path:
    """Return the file with a task's test rows in ``data``: ``pocket`` or a directory.

    Raises:
        InputError: when the directory or the task's file is not there.
    """
    folder = POCKET if data == "pocket" else Path(data)
    if not folder.is_dir():
        raise InputError(
            f"{data}: no such directory; expected 'pocket' or one with <task>/test.json"
        )
    for name in (task.name, *task.aliases):
        path = folder / name / "test.json"
        if path.is_file():
            return path
    have = sorted(path.parent.name for path in folder.glob("*/test.json"))
    raise InputError(
        f"{folder / task.name / 'test.json'}: no such file; "
        f"{data} has {', '.join(have) if have else 'no <task>/test.json at all'}"
    )


def read_task(path: Path, task: Task, limit: int | None = None) -> list[Row]:
    """Return a task's test rows: every answer must be one that the task can have.

    Raises:
        InputError: as :func:`read_rows`, and for a missing or impossible answer.
    """
    rows = read_rows(path, limit)
    for number, row in enumerate(rows, start=1):
        if row.messages:
            raise InputError(f"{path}: row {number}: a conversation; {task.name} has instructions")
        if row.answer not in task.answers:
            answer = repr(row.answer) if row.answer else "no 'answer'"
            raise InputError(
                f"{path}: row {number}: found {answer}, expected one of {', '.join(task.answers)}"
            )
    return rows


def kind_of(rows: Sequence[Row]) -> RowKind:
    """Return what rows are: all of the eight tasks, all of them texts, or somebody's own."""
    if all(row.text for row in rows):
        return "texts"
    return "tasks" if all(map(_of_the_eight, rows)) else "own"


def _of_the_eight(row: Row) -> bool:
    """Whether a row says what the published rows say: its answer is one of those that it offers."""
    offered = row.instruction.rpartition("Answer format: ")[2].strip().split("/")
    said = row.output.strip() == f"the correct answer is {row.answer}"
    return (
        said
        and row.answer in offered
        and any(set(offered) <= set(task.answers) for task in TASKS.values())
    )


def read_own_rows(task: OwnTask) -> list[Row]:
    """Return a task's rows, checked: what is asked, what is right, what may be chosen.

    Where the task names no columns, a row is one that training reads. What is right is then its
    ``answer``, if it has one, else its ``output``; for the judge ``loss``, which has the model say
    all of it, always the latter. A ``.txt`` is a plain text: its chunks answer nothing.

    Raises:
        InputError: naming the file, the row and what is wrong with it.
    """
    if task.rows.suffix.lower() == TEXT:
        return _chunks(task)
    says, rows = task.says, []
    columns = says.question, says.answer, says.template
    for where, value in stream_values(task.rows):
        at = f"{task.rows}: {where}"
        if columns == (None, None, None):
            row = read_row(task.rows, where, value, None)
        else:
            row = _by_columns(task, at, value)
        rows.append(_with_choices(task, at, _with_answer(task, row), value))
    if not rows:
        raise InputError(f"{task.rows}: no rows in it")
    return rows[: says.limit]


def _chunks(task: OwnTask) -> list[Row]:
    """Return a plain text as rows that answer nothing."""
    try:
        text = task.rows.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        near = nearest_file(task.rows)
        raise InputError(f"{task.rows}: cannot be read: {error.strerror}{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{task.rows}: cannot be read as UTF-8: {first_line(error)}") from None
    rows = [
        Row(output=chunk, answer=chunk, where=f"{task.rows}: chunk {number}")
        for number, chunk in enumerate(chunks(text), start=1)
    ]
    if not rows:
        raise InputError(f"{task.rows}: the file is empty")
    return rows[: task.says.limit]


def _with_answer(task: OwnTask, row: Row) -> Row:
    """Return a row whose answer is what is right."""
    if task.says.judge == "loss":
        return replace(row, answer=row.output)
    if row.messages:
        raise InputError(f"{row.where}: a conversation; of the judges only loss reads one")
    return replace(row, answer=row.answer or row.output)


def _by_columns(task: OwnTask, where: str, value: Any) -> Row:
    says = task.says
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: expected an object with columns, found {value!r:.40}")
    context = ""
    if says.template is not None:
        values = {name: _text(value, name, where) for name in places(says.template)}
        question = Formatter().vformat(says.template, (), values)
    else:
        question = _text(value, says.question or "instruction", where)
        if says.question is None and value.get("input") is not None:
            context = _text(value, "input", where)
    answer = says.answer
    if answer is None:
        has = value.get("answer") not in (None, "") and says.judge != "loss"
        answer = "answer" if has else "output"
    right = _text(value, answer, where)
    if not right.strip():
        raise InputError(
            f"{where}: column {answer!r} is empty, so there is nothing to compare with"
        )
    return Row(question, context, right, right, where=where)


def _text(value: Mapping[str, Any], column: str, where: str) -> str:
    """Return what a row has in a column; a number as it is written."""
    if column not in value:
        have = ", ".join(map(repr, value)) or "none"
        raise InputError(
            f"{where}: no column {column!r}; its columns are {have}{did_you_mean(column, value)}"
        )
    found = value[column]
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        raise InputError(
            f"{where}: column {column!r}: expected a text or a number, found {found!r}"
        )
    return str(found)


def _with_choices(task: OwnTask, where: str, row: Row, value: Any) -> Row:
    choices = task.says.choices
    if choices is None:
        return row
    if isinstance(choices, str):
        found = value.get(choices)
        if choices not in value:
            _text(value, choices, where)
        if (
            not isinstance(found, list)
            or len(found) < 2
            or not all(isinstance(text, str) and text for text in found)
        ):
            raise InputError(f"{where}: column {choices!r}: expected a list of two texts or more")
        choices = tuple(found)
    if row.answer not in choices:
        raise InputError(
            f"{where}: its answer {row.answer!r} is not among the choices "
            f"{', '.join(map(repr, choices))}{did_you_mean(row.answer, choices)}"
        )
    return replace(row, choices=choices)
