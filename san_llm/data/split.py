"""The rows of a recipe: those that are learned from, and those that are held out."""

from __future__ import annotations

import random
from itertools import chain
from pathlib import Path

from san_llm.data.rows import Row, read_rows, stream_rows, training_files
from san_llm.errors import InputError
from san_llm.files import sha256_of
from san_llm.recipe.schema import Data, Recipe


def check_held_out(held_out: int, rows: int) -> None:
    """Refuse to take more of the training rows out than leave one.

    Raises:
        InputError: naming how many there may be.
    """
    if held_out >= rows:
        raise InputError(
            f"data.held_out: {held_out} of {rows} rows leave none to train on; "
            f"expected 0 to {rows - 1}, or a file"
        )


def refuse_no_rows(data: Data) -> None:
    """Refuse training rows that are not there or do not begin with one, and wrong held-out rows.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    for file in training_files(data.train):
        next(stream_rows(file))
    _refuse_no_held_out(data)


def count_rows(data: Data) -> tuple[int | None, str | None]:
    """Return the rows that are trained on, or the file of them that is not here to be counted.

    Raises:
        InputError: when a row is wrong, or the rows that are here cannot be held out as asked.
    """
    files = training_files(data.train)
    for file in files:
        if not file.exists():
            return None, str(file)
    rows = sum(1 for _ in chain.from_iterable(map(stream_rows, files)))
    rows = min(rows, data.limit or rows)
    if isinstance(data.held_out, int):
        check_held_out(data.held_out, rows)
        rows -= data.held_out
    _refuse_no_held_out(data)
    return rows, None


def _refuse_no_held_out(data: Data) -> None:
    if isinstance(data.held_out, str):
        try:
            for _ in stream_rows(Path(data.held_out)):
                pass
        except InputError as error:
            raise InputError(f"data.held_out: {error}") from None


def split_held_out(recipe: Recipe) -> tuple[list[Row], list[Row], dict[str, str]]:
    """Return training rows, held-out rows, and the sha256 of each file they came from.

    Raises:
        InputError: when a file is wrong, or has no rows left to train on.
    """
    data = recipe.data
    rows = [row for file in training_files(data.train) for row in read_rows(file)][: data.limit]
    if isinstance(data.held_out, str):
        held_out = read_rows(Path(data.held_out))
    else:
        check_held_out(data.held_out, len(rows))
        chosen = set(random.Random(recipe.training.seed).sample(range(len(rows)), data.held_out))
        held_out = [row for number, row in enumerate(rows) if number in chosen]
        rows = [row for number, row in enumerate(rows) if number not in chosen]
    return rows, held_out, rows_sha256(data)


def row_files(data: Data) -> list[Path]:
    """Return the files of a recipe's rows: those that are learned from, then the held-out ones."""
    held_out = [Path(data.held_out)] if isinstance(data.held_out, str) else []
    return training_files(data.train) + held_out


def rows_sha256(data: Data) -> dict[str, str]:
    """Return the sha256 of each of ``row_files``, by its name."""
    return {str(file): sha256_of(file) for file in row_files(data)}
