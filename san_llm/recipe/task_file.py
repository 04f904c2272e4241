"""A task of one's own: one YAML file that says what is asked, and how an answer is judged.

It is checked as a recipe is, without torch. The rows it names lie beside it; ``data.task_rows``
reads them, and ``evaluate.judges`` judges by them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from san_llm.errors import InputError, nearest_file
from san_llm.protocol.neutral import NEUTRAL
from san_llm.protocol.prompts import Frame
from san_llm.protocol.tasks import TASKS, Task, find_tasks, is_task_file
from san_llm.recipe.mistakes import Source
from san_llm.recipe.read import checked, parse_yaml, text_of
from san_llm.recipe.schema import MOST, Section
from san_llm.recipe.shipped import SHIPPED

Judge = Literal["choice", "pattern", "exact", "contains", "number", "f1", "rouge-l", "loss"]
JUDGES: tuple[Judge, ...] = get_args(Judge)
APART = "score"  # a metric that stands beside a task of lm_eval's, or is of parts
# An answer is right in part, or counts apart: in no average over shares of right ones.
GRADED: tuple[str, ...] = ("f1", "rouge-l", APART)

_GENERATED = frozenset({"new_tokens", "guessing"})
# The keys that are a judge's own.
USED: dict[Judge, frozenset[str]] = {
    "choice": frozenset({"choices", "guessing"}),
    "pattern": frozenset({"pattern", *_GENERATED}),
    "exact": _GENERATED,
    "contains": _GENERATED,
    "number": _GENERATED,
    "f1": frozenset({"new_tokens"}),
    "rouge-l": frozenset({"new_tokens"}),
    "loss": frozenset(),
}
NEEDED: dict[Judge, str] = {"choice": "choices", "pattern": "pattern"}
FORGETTING = "forgetting"  # the task that comes along: the loss of the neutral text
TEXT = ".txt"  # rows that are no rows: a plain text, whose loss is taken in chunks


class TaskFile(Section):
    """What a task's file says; None stands for what the rows or the judge have."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="what scores call it: the file's stem"
    )
    rows: str = Field(
        min_length=1, description="a JSON or JSONL file, from this file's folder on, or a .txt"
    )
    judge: Judge = Field(description="how an answer is judged")
    question: str | None = Field(
        default=None, min_length=1, description="the column that asks: instruction, with its input"
    )
    answer: str | None = Field(
        default=None,
        min_length=1,
        description="the column with what is right: answer, or where there is none output",
    )
    template: str | None = Field(
        default=None, description="the question's text, with {column} for what a row has there"
    )
    prompt: Frame | None = Field(
        default=None, description="the text around a question: as the evaluation's; none: nothing"
    )
    choices: str | tuple[str, ...] | None = Field(
        default=None, description="of judge choice: the answers, or the column with a list of them"
    )
    pattern: str | None = Field(
        default=None,
        description="of judge pattern: a regular expression, whose first match is the answer; with "
        "a group, what that has",
    )
    new_tokens: int | None = Field(
        default=None, ge=1, le=2**16, description="of a generated answer, at most: 32"
    )
    limit: int | None = Field(default=None, ge=1, le=MOST, description="ask the first rows only")
    guessing: float | None = Field(
        default=None, ge=0, lt=1, description="the accuracy of guessing, where it is known"
    )

    @field_validator("pattern")
    @classmethod
    def _expression(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"{value!r} is not a regular expression: {error}") from None
        return value

    @field_validator("template")
    @classmethod
    def _places(cls, value: str | None) -> str | None:
        places(value or "")
        return value

    @field_validator("choices")
    @classmethod
    def _several(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if (
            value is not None
            and not isinstance(value, str)
            and len(set(value)) < max(2, len(value))
        ):
            raise ValueError(f"expected two texts or more, none of them twice, found {[*value]}")
        if not all(value or ()) or value == "":
            raise ValueError("a choice is empty")
        return value

    @model_validator(mode="after")
    def _one_question(self) -> TaskFile:
        if self.question is not None and self.template is not None:
            raise ValueError("question and template say the same: take one of them out")
        return self


def places(template: str) -> list[str]:
    """Return the columns that a template has places for.

    Raises:
        ValueError: when its braces are not places with a column's name.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{error}; a brace of the text is written twice") from None
    for _, name, form, conversion in parts:
        if name is not None and (not name or form or conversion or set(name) & set(".[]")):
            shown = name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise ValueError(
                f"{{{shown}}} is no place: expected a column's name in braces, such as {{question}}"
            )
    return [name for _, name, _, _ in parts if name is not None]


@dataclass(frozen=True)
class OwnTask:
    """A task of one's own.

    Attributes:
        file: Its file.
        rows: The file with its rows.
        says: What its file says.
    """

    file: Path
    rows: Path
    says: TaskFile

    @property
    def name(self) -> str:
        """What scores call it."""
        return self.says.name


AnyTask = Task | OwnTask


def neutral_task() -> OwnTask:
    """Return the task that is judged by the loss of the neutral text."""
    says = TaskFile(name=FORGETTING, rows=NEUTRAL.name, judge="loss", prompt="none")
    return OwnTask(Path(FORGETTING), NEUTRAL, says)


def find_any(names: Iterable[str]) -> list[AnyTask]:
    """Return the tasks named, of the eight or by their files, in the order given, each once.

    Raises:
        InputError: when one is not known, a file has a mistake, or two have the same name.
    """
    chosen: dict[str, AnyTask] = {}
    for name in names:
        task = _own(name)
        found: AnyTask = task or find_tasks([name])[0]
        before = chosen.setdefault(found.name, found)
        reserved = is_task_file(name) and found.name in (*TASKS, FORGETTING)
        if before != found or reserved:
            raise InputError(
                f"{name.strip()}: another task is called {found.name}, too; give it another 'name'"
            )
    return list(chosen.values()) or list(find_tasks([]))


def _own(name: str) -> OwnTask | None:
    if name.strip().lower() == FORGETTING:
        return neutral_task()
    return load_task(Path(os.path.expanduser(name.strip()))) if is_task_file(name) else None


def load_task(path: Path) -> OwnTask:
    """Return a task of one's own, read from its file and checked; its rows are not read yet.

    Raises:
        InputError: with one line for each mistake: where, what was found, what would be right.
    """
    file = _found(path)
    source = Source(str(file), model=TaskFile, kind="a task file", kept="\n\t")
    raw = parse_yaml(text_of(file, source.kind), source)
    if not isinstance(raw, dict):
        raise InputError(
            f"{file}: expected a mapping with the keys rows, judge and others"
            f"{'; rows belong in a file of their own' if isinstance(raw, list) else ''}"
        )
    says = checked(TaskFile, raw, source, _of_the_judge(raw, source))
    return OwnTask(file, file.parent / os.path.expanduser(says.rows), says)


def _found(path: Path) -> Path:
    if path.exists():
        return path
    shipped = SHIPPED / path.name
    # `recipes/task_NAME.yaml` works outside a clone, too.
    if shipped.is_file() and path.parts[-2:-1] == ("recipes",):
        return shipped
    raise InputError(f"{path}: no such task file{nearest_file(path)}")


def _of_the_judge(raw: dict[str, Any], source: Source) -> list[str]:
    """Return what is wrong with keys that belong to one judge or another, a line each."""
    judge = raw.get("judge")
    if judge not in JUDGES:
        return []
    lines: list[str] = []
    asks = {"question", "answer", "template", "prompt"}
    if str(raw.get("rows")).lower().endswith(TEXT):
        lines += [
            f"{source.of((key,))}: {key}: a text as rows has no use for it"
            for key in raw
            if key in asks
        ]
        if judge != "loss":
            lines.append(f"{source.of(('judge',))}: judge: of a text as rows only loss is told")
    own: frozenset[str] = frozenset().union(*USED.values())
    lines += [
        f"{source.of((key,))}: {key}: judge {judge} has no use for it; it belongs to "
        f"{', '.join(name for name in JUDGES if key in USED[name])}"
        for key in raw
        if key in own - USED[judge]
    ]
    needed = NEEDED.get(judge)
    if needed and raw.get(needed) is None:
        lines.append(f"{source.of((needed,))}: {needed}: missing; judge {judge} needs it")
    return lines
