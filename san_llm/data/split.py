"""The rows of a recipe: those that are learned from, and those that are held out."""

from __future__ import annotations

import random
from pathlib import Path

from san_llm.data.rows import Row, read_rows, training_files
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
