"""The test rows that an evaluation asks, read and checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from san_llm.data.rows import Row, read_task, test_file
from san_llm.errors import InputError, not_one_of
from san_llm.files import sha256_of
from san_llm.protocol.prompts import PromptStyle
from san_llm.protocol.tasks import Task

NEARLY = 0.9  # a test file with this share of the published rows was meant to have them all


@dataclass(frozen=True)
class Questions:
    """The test rows of several tasks.

    Attributes:
        rows: The rows of each task.
        sha256: The sha256 of each test file, by its path.
        notes: What a reader of the scores should know of the rows.
    """

    rows: dict[Task, list[Row]]
    sha256: dict[str, str]
    notes: tuple[str, ...] = ()


def read_questions(tasks: Sequence[Task], data: str, limit: int | None) -> Questions:
    """Return the test rows of each task; ``data.rows.read_task`` says what is refused.

    Raises:
        InputError: also when a file has nearly all rows of the published test set, but not all.
    """
    files = {task: test_file(data, task) for task in tasks}
    rows = {task: read_task(file, task, limit) for task, file in files.items()}
    notes = []
    for task, file in files.items():
        count, published = len(rows[task]), task.test_rows
        if data == "pocket" or limit is not None or count == published:
            continue
        if NEARLY * published <= count:
            raise InputError(
                f"{file}: {count:,} rows, but the published test set has {published:,}: a part of "
                f"it is missing or too much; --limit {count} takes them as they are"
            )
        notes.append(f"{task.name}: {count:,} rows, not the {published:,} of the published set")
    return Questions(rows, {str(file): sha256_of(file) for file in files.values()}, tuple(notes))


Protocol = Literal["generate", "loglik", "lm-eval"]

PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)


@dataclass(frozen=True)
class Settings:
    """One way to ask.

    Attributes:
        protocol: ``generate``: the published one, an answer is read from generated text.
            ``loglik``: the most likely of the row's answers. ``lm-eval``: the same, measured by
            lm-evaluation-harness.
        prompt: The prompt style.
        batch_size: Rows at once; None: chosen by memory.
        strict: Compute each row alone, so that its answer depends on nothing else, in any dtype.
        answers_only: Generate no further than an answer is certain.
        date: What a chat template writes as today's date; None: one that does so is refused.
    """

    protocol: Protocol = "generate"
    prompt: PromptStyle = "llm-adapters"
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
