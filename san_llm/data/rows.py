"""Read training and test rows, and refuse what cannot be learned from, naming file and row.

Three shapes are read, as JSON (a list) or JSONL: LLM-Adapters rows (instruction, input, output,
answer), Alpaca rows (instruction, input, output) and chat rows (messages).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from san_llm.errors import InputError, did_you_mean, nearest_file, not_one_of
from san_llm.protocol.tasks import Task

POCKET = Path(__file__).parent / "pocket"
ROLES = ("system", "user", "assistant", "tool")
KEYS = {"instruction": True, "input": False, "output": True, "answer": False}  # whether needed
LOST = ("system", "history")  # what other tools' Alpaca rows may say besides
# A row is read whole, a list of rows at once: larger than this, neither is what it says it is.
LONGEST_LINE, LONGEST_LIST = 16 * 2**20, 256 * 2**20  # bytes


@dataclass(frozen=True)
class Row:
    """One example. A chat row has ``messages`` and no instruction.

    Attributes:
        instruction: What is asked.
        context: The row's ``input``; empty for none.
        output: The response to learn.
        answer: The label that an evaluation compares with; empty where there is none.
        messages: ``(role, content)`` of each turn of a conversation.
        choices: The answers that an evaluation lets a model choose from, where the row has its own.
        where: File and row, for messages; two rows of the same content are equal.
    """

    instruction: str = ""
    context: str = ""
    output: str = ""
    answer: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    choices: tuple[str, ...] = field(default=(), compare=False)
    where: str = field(default="a row", compare=False)


def training_files(train: str | tuple[str, ...]) -> list[Path]:
    """Return the files behind a recipe's ``data.train``: ``pocket``, a file, or several."""
    names = (train,) if isinstance(train, str) else train
    return [POCKET / "train.json" if name == "pocket" else Path(name) for name in names]


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


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """Return all rows of a file, checked.

    Args:
        path: A ``.json`` file with a list of objects, or a ``.jsonl`` file with one a line.
        limit: Return only the first rows; all are checked.

    Raises:
        InputError: naming the file, the row and what is wrong with it.
    """
    return list(stream_rows(path))[:limit]


def stream_rows(path: Path) -> Iterator[Row]:
    """Give a file's rows one after another, a ``.jsonl``'s in little memory; see `read_rows`."""
    rows = 0
    for where, value in stream_values(path):
        yield read_row(path, where, value)
        rows += 1
    if not rows:
        raise InputError(f"{path}: no rows in it")


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


def stream_values(path: Path) -> Iterator[tuple[str, Any]]:
    """Give what a JSON or JSONL file holds, each with its place: ``row 3`` or ``line 3``.

    Raises:
        InputError: when the file cannot be read, or is not UTF-8, JSON or a list.
    """
    suffix = path.suffix.lower()
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise InputError(f"{path}: a pipe or a device; expected a file")
        with path.open("rb") as file:
            if suffix not in (".json", ".jsonl"):
                table = suffix in (".csv", ".tsv", ".xlsx", ".parquet")
                hint = "; docs/data.md turns tables into one" if table else ""
                raise InputError(f"{path}: expected a .json or .jsonl file{hint}")
            if suffix == ".json" and os.fstat(file.fileno()).st_size > LONGEST_LIST:
                raise InputError(
                    f"{path}: a list of more than {LONGEST_LIST // 2**20} MiB; write it as .jsonl, "
                    "one row a line"
                )
            yield from _lines(path, file) if suffix == ".jsonl" else _list(path, file.read())
    except FileNotFoundError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}{nearest_file(path)}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    number = offset = 0
    while raw := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(raw) > LONGEST_LINE:
            raise InputError(
                f"{path}:{number}: a line of more than {LONGEST_LINE // 2**20} MiB; one row a line "
                "is expected"
            )
        line = _decoded(path, raw, number, offset)
        offset += len(raw)
        if line.strip():
            yield f"line {number}", _json(path, line.rstrip("\r\n"), number)
    if not offset:
        raise InputError(f"{path}: the file is empty")


def _list(path: Path, raw: bytes) -> Iterator[tuple[str, Any]]:
    text = _decoded(path, raw, 1, 0)
    del raw
    if not text.strip():
        raise InputError(f"{path}: the file is empty")
    values = _json(path, text, None)
    if not isinstance(values, list):
        raise InputError(
            f"{path}: expected a list of rows, found {_kind(values)}; one object a line? then name "
            "it .jsonl"
        )
    for number, value in enumerate(values, start=1):
        yield f"row {number}", value


def _decoded(path: Path, raw: bytes, line: int, offset: int) -> str:
    """Return bytes that begin at a line and an offset of a file as text."""
    try:
        return raw.decode("utf-8-sig" if not offset else "utf-8")
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        raise InputError(
            f"{path}:{line}: not UTF-8: byte 0x{error.object[error.start]:02x} at offset "
            f"{offset + error.start}; convert the file first"
        ) from None


def _json(path: Path, text: str, line: int | None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = ""
        if line is None and error.msg == "Extra data":
            hint = "; one object a line? then name it .jsonl"
        elif line == 1 and text.lstrip().startswith("["):
            hint = "; one list of all rows? then name it .json"
        raise InputError(
            f"{path}:{line or error.lineno}: not valid JSON: {error.msg} at column {error.colno}"
            f"{hint}"
        ) from None
    except RecursionError:
        at = f"{path}:{line}" if line else path
        raise InputError(f"{at}: not valid rows: nested too deeply") from None
    except ValueError:
        at = f"{path}:{line}" if line else path
        raise InputError(f"{at}: not valid rows: a number of too many digits") from None


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names[type(value)]


def read_row(path: Path, where: str, value: Any) -> Row:
    """Return a file's value as the row that it is, checked; see :func:`read_rows`."""
    if not isinstance(value, dict):
        listed = isinstance(value, list) and where == "line 1"
        hint = "; one list of all rows? then name the file .json" if listed else ""
        raise InputError(f"{path}: {where}: expected an object, found {_kind(value)}{hint}")
    if "messages" in value:
        messages = _messages(path, where, value["messages"])
        return Row(messages=messages, where=f"{path}: {where}")
    texts = {}
    for key, needed in KEYS.items():
        if key not in value:
            if needed:
                other_keys = [name for name in value if name not in KEYS]
                hint = did_you_mean(key, other_keys)
                raise InputError(
                    f"{path}: {where}: key {key!r} is missing; found "
                    f"{', '.join(map(repr, value)) or 'no keys'}"
                    f"{hint or '; expected instruction and output, or messages'}"
                )
            texts[key] = ""
            continue
        text = value[key]
        if text is None and not needed:
            text = ""
        if not isinstance(text, str):
            raise InputError(f"{path}: {where}: {key!r} is {_kind(text)}, expected a text")
        if needed and not text.strip():
            raise InputError(f"{path}: {where}: {key!r} is empty, so there is nothing to learn")
        _check_text(f"{path}: {where}: {key!r}", text)
        texts[key] = text
    for key in LOST:
        if value.get(key):
            raise InputError(
                f"{path}: {where}: {key!r} has no place in a row with an instruction and would be "
                "lost; write the row as messages"
            )
    return Row(
        texts["instruction"],
        texts["input"],
        texts["output"],
        texts["answer"],
        where=f"{path}: {where}",
    )


def _check_text(where: str, text: str) -> None:
    # JSON can write half of a surrogate pair, which is no character and which no tokenizer takes.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} has half a surrogate pair (\\u{ord(text[error.start]):04x}) at character "
            f"{error.start}"
        ) from None


def _messages(path: Path, where: str, value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{path}: {where}: 'messages' is not a list of turns")
    turns = []
    for number, turn in enumerate(value, start=1):
        at = f"{path}: {where}: message {number}"
        if not isinstance(turn, dict):
            raise InputError(f"{at}: expected an object, found {_kind(turn)}")
        for key in ("role", "content"):
            if not isinstance(turn.get(key), str):
                raise InputError(f"{at}: {key!r} is missing or not a text")
        if turn["role"] not in ROLES:
            raise InputError(f"{at}: role {not_one_of(turn['role'], ROLES)}")
        _check_text(f"{at}: 'content'", turn["content"])
        turns.append((turn["role"], turn["content"]))
    if not any(role == "assistant" and content.strip() for role, content in turns):
        raise InputError(
            f"{path}: {where}: no assistant message with text, so there is nothing to learn"
        )
    return tuple(turns)
