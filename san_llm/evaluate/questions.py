"""The test rows that an evaluation asks, read and checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from san_llm.data.rows import Row, read_task, sha256_of, test_file
from san_llm.data.tasks import Task
from san_llm.errors import InputError

NEARLY = 0.9  # a test file with this share of the published rows was meant to have them all


@dataclass(frozen=True)
class Questions:
    """The test rows of several tasks.

    Attributes:
        rows: The rows of each task.
        sha256: Of each file.
        notes: What a reader of the scores should know of the rows.
    """

    rows: dict[Task, list[Row]]
    sha256: dict[str, str]
    notes: tuple[str, ...] = ()


def read_questions(tasks: Sequence[Task], data: str, limit: int | None) -> Questions:
    """Read the test rows of each task; :func:`read_task` says what is refused.

    Raises:
        InputError: also when a file has nearly all rows of the published test set, but not all.
    """
    files = {task: test_file(data, task) for task in tasks}
    rows = {task: read_task(file, task, limit) for task, file in files.items()}
    notes = []
    for task, file in files.items():
        found, published = len(rows[task]), task.test_rows
        if data == "pocket" or limit is not None or found == published:
            continue
        if NEARLY * published <= found:
            raise InputError(
                f"{file}: {found:,} rows, but the published test set has {published:,}: a part of "
                f"it is missing or too much; --limit {found} takes them as they are"
            )
        notes.append(f"{task.name}: {found:,} rows, not the {published:,} of the published set")
    return Questions(rows, {str(file): sha256_of(file) for file in files.values()}, tuple(notes))
