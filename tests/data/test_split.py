"""Which rows are held out."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from tiny import rows, write_recipe, write_rows

from san_llm.data.split import check_held_out, split_held_out
from san_llm.errors import InputError
from san_llm.recipe.read import load_recipe


def split(here: Path, *how: str) -> Any:
    recipe = write_recipe(here / "r.yaml", here / "base", here / "rows.json")
    return split_held_out(load_recipe(recipe, list(how)))


def test_every_row_is_learned_or_held_out_in_the_files_order(here):
    path = write_rows(here / "rows.json", rows(20))
    train, held_out, hashes = split(here, "data.held_out=6")
    assert (len(train), len(held_out)) == (14, 6)
    order = [row["instruction"] for row in rows(20)]
    for part in (train, held_out):
        places = [order.index(row.instruction) for row in part]
        assert places == sorted(places)
    assert {row.instruction for row in [*train, *held_out]} == set(order)
    assert hashes == {str(path): sha256(path.read_bytes()).hexdigest()}
    assert split(here, "data.held_out=6") == (train, held_out, hashes)
    assert split(here, "data.held_out=6", "training.seed=2")[1] != held_out
    assert [len(part) for part in split(here, "data.held_out=0")[:2]] == [20, 0]


def test_a_limit_comes_before_the_rows_are_parted(here):
    write_rows(here / "rows.json", rows(20))
    train, held_out, _ = split(here, "data.held_out=3", "data.limit=5")
    first = {row["instruction"] for row in rows(5)}
    assert {row.instruction for row in [*train, *held_out]} == first
    assert len(held_out) == 3


def test_a_file_is_held_out_whole_and_hashed(here):
    write_rows(here / "rows.json", rows(4))
    other = write_rows(here / "other.json", rows(9)[4:])
    train, held_out, hashes = split(here, f"data.held_out={other}", "data.limit=2")
    assert [len(train), len(held_out)] == [2, 5]
    assert [row.output for row in held_out] == [row["output"] for row in rows(9)[4:]]
    assert list(hashes) == [str(here / "rows.json"), str(other)]
    assert hashes[str(other)] == sha256(other.read_bytes()).hexdigest()
    assert json.loads(other.read_text())


def test_one_row_is_left_at_least():
    check_held_out(3, 4)
    for held_out in (4, 5):
        with pytest.raises(InputError, match=f"held_out: {held_out} of 4 rows .*expected 0 to 3,"):
            check_held_out(held_out, 4)
