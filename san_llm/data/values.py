"""What files hold, row after row, before anybody asks what it says."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from san_llm.errors import InputError, first_line, nearest_file
from san_llm.recipe.schema import ROW_FILES

# A row is read whole, a list of rows at once: larger than this, neither is what it says it is.
LONGEST_LINE, LONGEST_LIST = 16 * 2**20, 256 * 2**20  # bytes


def stream_values(path: Path) -> Iterator[tuple[str, Any]]:
    """Give what a file holds, row after row, each with its place: ``row 3`` or ``line 3``.

    JSON (a list), JSONL (one a line), CSV and TSV (the first line names the columns), parquet and
    arrow.

    Raises:
        InputError: when the file cannot be read, or is not what its name says.
    """
    suffix = path.suffix.lower()
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise InputError(f"{path}: a pipe or a device; expected a file")
        with path.open("rb") as file:
            if suffix not in ROW_FILES:
                raise InputError(f"{path}: expected a file of rows: {', '.join(ROW_FILES)}")
            if suffix == ".json" and os.fstat(file.fileno()).st_size > LONGEST_LIST:
                raise InputError(
                    f"{path}: a list of more than {LONGEST_LIST // 2**20} MiB; write it as .jsonl, "
                    "one row a line"
                )
            if suffix == ".jsonl":
                yield from _lines(path, file)
            elif suffix == ".json":
                yield from _list(path, file.read())
        if suffix in _TABLES:
            yield from _TABLES[suffix](path)
    except FileNotFoundError as error:
        hint = nearest_file(path)
        if not hint and not suffix and str(path).count("/") == 1:
            hint = f"; a data set of the hub is named {{hub: {path}}}"
        raise InputError(f"{path}: cannot be read: {error.strerror}{hint}") from None
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
            f"{path}: expected a list of rows, found {kind(values)}; one object a line? then name "
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


def _parquet_values(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from _batches(file.iter_batches())
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file: {first_line(error)}") from None


def _arrow_values(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file:
            try:
                reader: Any = pa.ipc.open_stream(file)  # as `datasets` writes it
                yield from _batches(reader)
            except pa.ArrowInvalid:
                reader = pa.ipc.open_file(file)
                yield from _batches(map(reader.get_batch, range(reader.num_record_batches)))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable arrow file: {first_line(error)}") from None


def _batches(batches: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    number = 0
    for batch in batches:
        for value in batch.to_pylist():
            number += 1
            yield f"row {number}", value


class _Tabs(csv.excel_tab):
    quoting = csv.QUOTE_NONE


def _table_values(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(
                file, dialect=_Tabs if path.suffix.lower() == ".tsv" else "excel"
            )
            for row in reader:
                if None in row or None in row.values():
                    raise InputError(
                        f"{path}: line {reader.line_num}: not {len(reader.fieldnames or ())} "
                        "columns, as the first line has"
                    )
                yield f"line {reader.line_num}", dict(row)
    except (csv.Error, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {first_line(error)}") from None


_TABLES = {
    ".parquet": _parquet_values,
    ".arrow": _arrow_values,
    ".csv": _table_values,
    ".tsv": _table_values,
}


def kind(value: object) -> str:
    """Return what a value of JSON is, for messages."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")
