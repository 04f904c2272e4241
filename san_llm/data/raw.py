"""The public data sets' own files: which of a folder's are which, and what rows they hold.

A file's task, split and (for WinoGrande) size are read from its name and the folders it lies in:
unpacked archives, a hub snapshot and flat names such as ``boolq_train.jsonl`` all do. Where a set
comes in several formats, the first of ``FORMATS`` is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from san_llm.data.values import stream_values
from san_llm.errors import InputError, first_line
from san_llm.protocol.tasks import TASKS, Task

FORMATS = (".jsonl", ".json", ".parquet", ".tsv", ".csv")
SPLITS = {
    **dict.fromkeys(("train", "trn"), "train"),
    **dict.fromkeys(("dev", "val", "valid", "validation"), "dev"),
    **dict.fromkeys(("test", "tests", "tst"), "test"),
}
# Of these the test answers are public; of the others the protocol tests on the validation split.
TESTED_ON_TEST = ("ARC-Easy", "ARC-Challenge", "openbookqa")
# The published mix holds WinoGrande's training sets of every size, one after another: 63,238 rows.
SIZES = ("xs", "s", "m", "l", "xl", "debiased")
# How a folder or file names a task, less all but its letters and digits.
NAMES = {
    "boolq": ("boolq",),
    "piqa": ("piqa", "physicaliqa"),
    "social_i_qa": ("socialiqa", "siqa", "socialiwa"),
    "hellaswag": ("hellaswag",),
    "winogrande": ("winogrande",),
    "ARC-Easy": ("arceasy",),
    "ARC-Challenge": ("arcchallenge",),
    "openbookqa": ("openbookqa", "obqa"),
}


@dataclass(frozen=True)
class RawSplit:
    """The files that one split of a task is made of, in their order."""

    task: Task
    split: str
    files: tuple[Path, ...]


def find_raw(folder: Path, only: str | None = None) -> list[RawSplit]:
    """Return the splits that a folder has raw files of: ``train`` and ``test``, in tasks' order.

    Args:
        folder: Searched with all folders in it.
        only: The task wanted, which a file is of if no name tells another.

    Raises:
        InputError: when there is no such folder, nothing in it, or two files for the same rows.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one with the raw data sets")
    placed: dict[tuple[str, str, str], list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        place = _place(path.relative_to(folder), only or "")
        if place is not None and path.is_file():
            placed.setdefault(place, []).append(path)
    splits = []
    for name, task in TASKS.items():
        if only not in (None, name):
            continue
        train = [
            file
            for size in ("", *SIZES)
            for file in _one_set(placed.get((name, "train", size), []))
        ]
        # Every size of WinoGrande has the same validation rows: the largest one's are taken.
        tests = [
            _one_set(placed[name, split, size])
            for split in (("test",) if name in TESTED_ON_TEST else ("dev", "test"))
            for size in ("", "xl", "l", "m", "s", "xs", "debiased")
            if (name, split, size) in placed
        ]
        for split, files in (("train", train), ("test", tests[0] if tests else [])):
            if files:
                splits.append(RawSplit(task, split, tuple(files)))
    if not splits:
        raise InputError(
            f"{folder}: no raw data set found; expected files such as boolq/train.jsonl or "
            f"piqa/valid.jsonl, of {', '.join(TASKS)}"
        )
    return splits


def read_raw(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give a raw file's rows, each with its file and place; labels from a ``.lst`` file are added.

    Raises:
        InputError: for a row that is no object, or labels that are not as many as the rows.
    """
    labels_file = path.with_name(f"{path.stem}-labels.lst")
    labels = None
    if labels_file.is_file():
        try:
            labels = labels_file.read_text(encoding="utf-8-sig").split()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{labels_file}: cannot be read: {first_line(error)}") from None
    number, values = 0, _values(path)
    for number, (place, value) in enumerate(values, start=1):
        where = f"{path}: {place}"
        if labels is not None and number > len(labels):
            number += sum(1 for _ in values)
            break
        if not isinstance(value, dict):
            raise InputError(f"{where}: expected an object, found {type(value).__name__}")
        if labels is not None:
            value.setdefault("label", labels[number - 1])
        yield where, value
    if labels is not None and number != len(labels):
        raise InputError(
            f"{labels_file}: {len(labels)} labels for the {number} rows of {path.name}"
        )


def _place(path: Path, default: str) -> tuple[str, str, str] | None:
    """Return a file's task, split and size, from its own name first and then its folders'."""
    folders = {segment.lower() for segment in path.parts[:-1]}
    # Those that begin with a dot or two low lines are archives' and caches' own.
    hidden = any(segment.startswith((".", "__")) for segment in path.parts)
    if path.suffix.lower() not in FORMATS or "additional" in folders or hidden:
        return None
    segments = [path.name.removesuffix(path.suffix), *reversed(path.parent.parts)]
    task = split = size = ""
    for segment in segments:
        words = [word for word in re.split(r"[^a-z0-9]+", segment.lower()) if word]
        joined = "".join(words)
        named = [name for name, keys in NAMES.items() if any(key in joined for key in keys)]
        task = task or (named[0] if len(named) == 1 else "")
        splits = {SPLITS[word] for word in words if word in SPLITS}
        split = split or (splits.pop() if len(splits) == 1 else "")
        sizes = [word for word in words if word in SIZES]
        size = size or (sizes[0] if len(sizes) == 1 else "")
    task = task or default
    if not (task and split):
        return None
    return task, split, size if task == "winogrande" else ""


def _one_set(files: list[Path]) -> list[Path]:
    """Return the files of one format; several are the shards of one set or a mistake."""
    for suffix in FORMATS:
        chosen = [file for file in files if file.suffix.lower() == suffix]
        if not chosen:
            continue
        sharded = all(re.search(r"\d{4,}", file.stem) for file in chosen)
        if len(chosen) > 1 and not (sharded and len({file.parent for file in chosen}) == 1):
            raise InputError(
                f"{chosen[0]} and {chosen[1]}: both seem to hold the same rows; leave one of them"
            )
        return chosen
    return []


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    table = path.suffix.lower() in (".tsv", ".csv")
    for where, value in stream_values(path):
        yield where, _from_openbookqa(value) if table else value


def _from_openbookqa(row: dict[str, str]) -> dict[str, Any]:
    """Return a row as it is, or OpenBookQA's tab-separated one under the names of its JSONL."""
    if "Question Stem" not in row or "Choices" not in row:
        return dict(row)
    # (A) puppies learning new tricks (B) children growing up (C) ...
    pieces = re.split(r"(?:^|\s)\(([A-E])\)\s", row["Choices"])
    choices = {"label": pieces[1::2], "text": pieces[2::2]}
    return {
        "question_stem": row["Question Stem"],
        "choices": choices,
        "answerKey": row.get("Answer Key"),
    }
