"""Where rows come from: files here and data sets of the hub, as a recipe's ``data`` names them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from san_llm.data.rows import Row
from san_llm.data.shapes import read_asked, read_row
from san_llm.data.values import stream_values
from san_llm.errors import InputError, SanError, first_line
from san_llm.files import sha256_of
from san_llm.recipe.schema import Source

POCKET = Path(__file__).parent / "pocket"


def file_of(source: Source) -> Path | None:
    """Return the file of a source; None of one that is on the hub."""
    if source.path is None:
        return None
    return POCKET / "train.json" if source.path == "pocket" else Path(source.path)


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """Return all rows of a file, checked.

    Args:
        path: A file of rows.
        limit: Return only the first rows; all are checked.

    Raises:
        InputError: naming the file, the row and what is wrong with it.
    """
    return list(stream_source(Source(path=str(path))))[:limit]


def stream_source(source: Source) -> Iterator[Row]:
    """Give a source's rows one after another, of most files in little memory.

    Raises:
        InputError: naming the file, the row and what is wrong with it; when there is none.
        SanError: when the hub cannot be reached.
    """
    return (row for _, row in _read(source, read_row))


def stream_asked(source: Source) -> Iterator[tuple[dict[str, Any], Row]]:
    """Give a source's rows as they are asked, each behind the object that stands there.

    Raises:
        InputError: naming the file, the row and what is wrong with it; when there is none.
    """
    return _read(source, read_asked)


def _read(
    source: Source, reader: Callable[[str, str, Any, Mapping[str, str] | None], Row]
) -> Iterator[tuple[dict[str, Any], Row]]:
    columns = None if source.columns is None else source.columns.named
    rows = 0
    for where, value in _values(source):
        yield value, reader(source.label, where, value, columns)
        rows += 1
        if rows == source.limit:
            return
    if not rows:
        raise InputError(f"{source.label}: no rows in it")


def source_sha256(source: Source) -> dict[str, str]:
    """Return the sha256 of a source's file, or of those that the hub's data set is kept in."""
    file = file_of(source)
    if file is not None:
        return {str(file): sha256_of(file)}
    kept = [Path(entry["filename"]) for entry in _from_hub(source).cache_files]
    return {f"{source.label} {number}": sha256_of(path) for number, path in enumerate(kept)}


def _values(source: Source) -> Iterator[tuple[str, Any]]:
    file = file_of(source)
    if file is not None:
        yield from stream_values(file)
        return
    for number, value in enumerate(_from_hub(source), start=1):
        yield f"row {number}", value


@lru_cache(maxsize=8)
def _loaded(hub: str, name: str | None, split: str, revision: str | None) -> Any:
    import datasets

    return datasets.load_dataset(hub, name, split=split, revision=revision)


def _from_hub(source: Source) -> Any:
    """Return a data set of the hub, or a folder of one, as `datasets` reads it: a table.

    Raises:
        InputError: when it has no such configuration, split or revision.
        SanError: when it is not there, or the hub cannot be reached.
    """
    import datasets

    assert source.hub is not None
    datasets.disable_progress_bars()
    try:
        return _loaded(source.hub, source.name, source.split, source.revision)
    except ValueError as error:  # what it has is in the message
        raise InputError(f"{source.label}: {first_line(error)}") from None
    except Exception as error:  # of several HTTP libraries, by the hub client's version
        why = first_line(error)
        if isinstance(error, ConnectionError) or "offline" in why.lower():
            why = "the hub cannot be reached, and it is not in the cache"
        raise SanError(f"{source.label}: cannot be read: {why}") from None
