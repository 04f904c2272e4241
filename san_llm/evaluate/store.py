"""Answered rows on disk: those of an evaluation that runs, and those of one that is finished.

While it runs, rows are appended to files in the cache, in a folder named by the evaluation's key,
which is the hash of all that its answers depend on. So whatever stops it, the same evaluation goes
on there, and any other does not see them. A finished one is the user's folder, which appears whole:
``rows.jsonl``, one line a row, with the exact prompt, output, answers and scores; and the results
and the manifest, with the sha256 of the rows, that ``runs.record`` writes. The cache then only
remembers where that folder is.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4

from filelock import FileLock, Timeout

from san_llm.errors import InputError
from san_llm.evaluate.score import Judged
from san_llm.files import cache_folder, key_of, read_json, sha256_of, write_json
from san_llm.progress import say
from san_llm.runs.record import (
    EvaluationManifest,
    EvaluationResults,
    read_evaluation_manifest,
    read_results,
    write_evaluation_manifest,
    write_results,
)

ROWS = "rows.jsonl"
_FINISHED, _IDENTITY = "finished.json", "identity.json"


@dataclass(frozen=True)
class Stored:
    """A finished evaluation.

    Attributes:
        folder: Where it is.
        rows: All rows, in the order of tasks and files.
        results: What it came to.
        manifest: What it is made of.
    """

    folder: Path
    rows: tuple[Judged, ...]
    results: EvaluationResults
    manifest: EvaluationManifest


def write_evaluation(
    folder: Path, rows: Sequence[Judged], results: EvaluationResults, facts: Mapping[str, Any]
) -> str:
    """Write an evaluation's three files and return the sha256 of its rows.

    Args:
        folder: The folder to write into; it exists.
        rows: All rows, in the order of tasks and files.
        results: What they come to.
        facts: What the manifest says besides.
    """
    with (folder / ROWS).open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows)
    digest = sha256_of(folder / ROWS)
    write_results(folder, results)
    write_evaluation_manifest(folder, {**facts, "rows": len(rows), "rows_sha256": digest})
    return digest


def read_evaluation(folder: Path) -> Stored:
    """Return a finished evaluation, read from its folder.

    Raises:
        InputError: when the folder holds none, or its rows are not those that were written.
    """
    manifest, results = read_evaluation_manifest(folder), read_results(folder)
    path = folder / ROWS
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if sha256_of(path) != manifest.rows_sha256:
        raise InputError(f"{path}: not the rows that were written: its sha256 is another")
    try:
        # Not splitlines(): a text may hold other line ends than the one between rows.
        lines = text.decode().removesuffix("\n").split("\n") if text else []
        rows = tuple(Judged.from_json(json.loads(line)) for line in lines)
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path}: not rows of an evaluation") from None
    return Stored(folder, rows, results, manifest)


class Progress:
    """The rows of one evaluation that were answered so far, by row index."""

    def __init__(self, folder: Path) -> None:
        """Use a folder in the cache, which only evaluations of one key share."""
        self.folder = folder

    def rows(self) -> dict[int, Judged]:
        """Return the answered rows. A line that a kill has cut short is not counted."""
        rows: dict[int, Judged] = {}
        for path in sorted(self.folder.glob("part-*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
                try:
                    index, row = json.loads(line)
                    rows[int(index)] = Judged.from_json(row)
                except (ValueError, TypeError):
                    break
        return rows

    def part(self) -> Part:
        """Return a new file for rows, of this process alone."""
        return Part(self.folder / f"part-{uuid4().hex}.jsonl")

    def finished(self) -> Stored | None:
        """Return the finished evaluation of this key, if it is still what it was."""
        try:
            note = read_json(self.folder / _FINISHED)
            stored = read_evaluation(Path(note["folder"]))
        except (InputError, KeyError, TypeError, ValueError):
            return None
        manifest = stored.manifest
        same = manifest.key == self.folder.name
        return stored if same and manifest.rows_sha256 == note.get("rows_sha256") else None

    def finish(self, folder: Path, rows_sha256: str) -> None:
        """Remember where the finished evaluation is, and forget the rows here."""
        write_json(
            self.folder / _FINISHED, {"folder": str(folder.resolve()), "rows_sha256": rows_sha256}
        )
        self.forget()

    def forget(self) -> None:
        """Delete the rows."""
        for path in self.folder.glob("part-*.jsonl"):
            path.unlink(missing_ok=True)


class Part:
    """A file that rows are appended to; it appears with the first of them."""

    def __init__(self, path: Path) -> None:
        """Write to ``path``."""
        self._path = path
        self._file: TextIO | None = None

    def append(self, rows: Mapping[int, Judged]) -> None:
        """Add rows; they outlive a kill of the process from here on."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w", encoding="utf-8", newline="\n")
        self._file.write(
            "".join(
                json.dumps([index, row.to_json()], ensure_ascii=False) + "\n"
                for index, row in rows.items()
            )
        )
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


@contextmanager
def progress_of(identity: Mapping[str, Any]) -> Iterator[Progress]:
    """Give the progress of the evaluation with this identity, to one process at a time.

    The lock goes with the process that holds it, however that ends.
    """
    folder = cache_folder("evaluations") / key_of(identity)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say("the same evaluation is running in another process: waiting for it")
        lock.acquire()
    try:
        folder.mkdir(exist_ok=True)
        if not (folder / _IDENTITY).is_file():
            write_json(folder / _IDENTITY, identity)  # for a reader: why another is not this one
        yield Progress(folder)
    finally:
        if os.listdir(folder) == [_IDENTITY]:
            shutil.rmtree(folder, ignore_errors=True)
        lock.release()
