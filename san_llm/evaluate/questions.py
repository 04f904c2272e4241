"""The test rows that an evaluation asks, read and checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from san_llm.data.rows import Row
from san_llm.data.task_rows import read_own_rows, read_task, test_file
from san_llm.errors import InputError, not_one_of
from san_llm.evaluate.harness import Asked, HarnessTask
from san_llm.evaluate.judges import refuse_no_rouge, refuse_unreadable
from san_llm.files import sha256_of
from san_llm.protocol.prompts import Frame
from san_llm.protocol.tasks import Task, is_task_file
from san_llm.recipe.schema import Evaluation
from san_llm.recipe.task_file import OwnTask, find_any

NEARLY = 0.9  # a test file with this share of the published rows was meant to have them all


@dataclass(frozen=True)
class Questions:
    """The test rows of several tasks.

    Attributes:
        rows: The rows of each task.
        sha256: The sha256 of each test file, by its path.
        notes: What a reader of the scores should know of the rows.
        files: The test file of each task, by the task's name.
    """

    rows: dict[Asked, list[Row]]
    sha256: dict[str, str]
    notes: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)


def read_questions(tasks: Sequence[Asked], data: str, limit: int | None) -> Questions:
    """Return the test rows of each task; ``read_task`` and ``read_own_rows`` say what is refused.

    Raises:
        InputError: also when a file has nearly all rows of the published test set, but not all.
    """
    files: dict[str, str] = {}
    rows: dict[Asked, list[Row]] = {}
    hashes: dict[str, str] = {}
    notes = []
    for task in tasks:
        if isinstance(task, OwnTask):
            files[task.name], rows[task] = str(task.rows), _own_rows(task, limit)
            continue
        if isinstance(task, HarnessTask):
            file_name = f"lm_eval: {task.source}"
            files[task.name], rows[task] = file_name, _theirs(task, limit)
            hashes[file_name] = hashes.get(file_name) or task.sha256()
            continue
        file = test_file(data, task)
        files[task.name], rows[task] = str(file), read_task(file, task, limit)
        count, published = len(rows[task]), task.test_rows
        if data == "pocket" or limit is not None or count == published:
            continue
        if NEARLY * published <= count:
            raise InputError(
                f"{file}: {count:,} rows, but the published test set has {published:,}: a part of "
                f"it is missing or too much; --limit {count} takes them as they are"
            )
        notes.append(f"{task.name}: {count:,} rows, not the {published:,} of the published set")
    named = [file for file in files.values() if file not in hashes]
    hashes |= {file: sha256_of(Path(file)) for file in named}
    return Questions(rows, hashes, tuple(notes), files)


def rows_asked(questions: Questions) -> dict[str, dict[str, Any]]:
    """Return which rows each task asks, and of one's own how it asks and judges them."""
    return {
        task.name: {"sha256": questions.sha256[questions.files[task.name]], "rows": len(rows)}
        | ({} if isinstance(task, Task) else {"asked": _own(task)})
        for task, rows in questions.rows.items()
    }


def _own(task: OwnTask | HarnessTask) -> dict[str, Any]:
    if isinstance(task, HarnessTask):
        return {"lm_eval": task.says, "metric": task.metric, "filter": task.filter}
    beside = {"name", "rows", "limit", "guessing"}  # they change no answer of these rows
    return task.says.model_dump(mode="json", exclude=beside, exclude_none=True)


def refuse_wrong_tasks(evaluation: Evaluation) -> None:
    """Refuse a recipe's tasks of one's own whose files or rows are wrong.

    Raises:
        InputError: naming the key besides.
    """
    own = [name for name in evaluation.tasks if is_task_file(name)]
    try:
        read_questions(find_any(own) if own else (), evaluation.data, evaluation.limit)
    except InputError as error:
        raise InputError(f"evaluation.tasks: {error}") from None


def _theirs(task: HarnessTask, limit: int | None) -> list[Row]:
    """Return rows of lm_eval's, of which it alone knows what they say."""
    numbers = range(1, 1 + len(task.rows(limit)))
    return [Row(where=f"{task.source}: row {number}") for number in numbers]


def _own_rows(task: OwnTask, limit: int | None) -> list[Row]:
    refuse_no_rouge(task.says)
    rows = read_own_rows(task)[:limit]
    for row in rows:
        refuse_unreadable(task.says, row.answer, row.where)
    return rows


Protocol = Literal["generate", "loglik", "lm-eval"]

PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)


@dataclass(frozen=True)
class Settings:
    """One way to ask.

    Attributes:
        protocol: ``generate``: the published one, an answer is read from generated text.
            ``loglik``: the most likely of the row's answers. ``lm-eval``: the same, measured by
            lm-evaluation-harness.
        prompt: The prompt style; of lm_eval's own tasks ``none``, too.
        batch_size: Rows at once; None: chosen by memory.
        strict: Compute each row alone, so that its answer depends on nothing else, in any dtype.
        answers_only: Generate no further than an answer is certain.
        date: What a chat template writes as today's date; None: one that does so is refused.
    """

    protocol: Protocol = "generate"
    prompt: Frame = "llm-adapters"
    batch_size: int | None = None
    strict: bool = False
    answers_only: bool = False
    date: str | None = None


def find_protocol(name: str) -> Protocol:
    """Return the protocol of that name.

    Raises:
        InputError: listing the protocols and the nearest spelling.
    """
    for protocol in PROTOCOLS:
        if protocol == name:
            return protocol
    raise InputError(f"protocol {not_one_of(name, PROTOCOLS)}")
