"""Which rows are learned from and which are held out: files, shares, mixes, doubles and twins."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from tiny import rows, write_recipe, write_rows

from san_llm.data.rows import Row
from san_llm.data.shapes import unread_line
from san_llm.data.sources import POCKET, read_rows
from san_llm.data.split import Taken, count_rows, split_held_out, stream_training, unread_of
from san_llm.data.task_rows import kind_of
from san_llm.errors import InputError
from san_llm.recipe.read import load_recipe


def split(here: Path, *how: str) -> Any:
    recipe = write_recipe(here / "r.yaml", here / "base", here / "rows.json")
    return split_held_out(load_recipe(recipe, list(how)))


def test_every_row_is_learned_or_held_out_in_the_files_order(here):
    path = write_rows(here / "rows.json", rows(20))
    found = split(here, "data.held_out=6")
    assert (len(found.train), len(found.held_out)) == (14, 6)
    order = [row["instruction"] for row in rows(20)]
    for part in (found.train, found.held_out):
        places = [order.index(row.instruction) for row in part]
        assert places == sorted(places)
    assert {row.instruction for row in [*found.train, *found.held_out]} == set(order)
    assert found.sha256 == {str(path): sha256(path.read_bytes()).hexdigest()}
    assert split(here, "data.held_out=6") == found
    assert split(here, "data.held_out=6", "training.seed=2").held_out != found.held_out
    assert (len(split(here, "data.held_out=0").train)) == 20


def test_a_limit_comes_before_the_rows_are_parted(here):
    write_rows(here / "rows.json", rows(20))
    found = split(here, "data.held_out=3", "data.limit=5")
    first = {row["instruction"] for row in rows(5)}
    assert {row.instruction for row in [*found.train, *found.held_out]} == first
    assert len(found.held_out) == 3


def test_files_are_held_out_whole_and_hashed(here):
    write_rows(here / "rows.json", rows(4))
    other = write_rows(here / "other.json", rows(9)[4:])
    found = split(here, f"data.held_out={other}", "data.limit=2")
    assert [len(found.train), len(found.held_out)] == [2, 5]
    assert [row.output for row in found.held_out] == [row["output"] for row in rows(9)[4:]]
    assert list(found.sha256) == [str(here / "rows.json"), str(other)]
    assert found.sha256[str(other)] == sha256(other.read_bytes()).hexdigest()
    third = write_rows(here / "third.json", rows(12)[9:])
    found = split(here, f"data.held_out=[{other}, {third}]")
    assert found.parts == {str(other): 5, str(third): 3}
    assert len(found.held_out) == 8


@pytest.mark.parametrize(
    ("wanted", "of", "held_out"),
    [("0.25", 20, 5), ("0.01", 20, 1), ("null", 20, 2), ("null", 1300, 120), ("null", 5, 0)],
)
def test_a_share_is_held_out_and_of_few_rows_a_tenth(here, wanted, of, held_out):
    write_rows(here / "rows.json", rows(of))
    found = split(here, f"data.held_out={wanted}")
    assert (len(found.train), len(found.held_out)) == (of - held_out, held_out)


def test_one_row_is_left_at_least(here):
    write_rows(here / "rows.json", rows(4))
    assert len(split(here, "data.held_out=3").train) == 1
    for held_out in (4, 5):
        with pytest.raises(InputError, match=f"held_out: {held_out} of 4 rows .*expected 0 to 3,"):
            split(here, f"data.held_out={held_out}")


def mix(here: Path, *sources: dict[str, Any], **more: Any) -> Any:
    recipe = write_recipe(here / "r.yaml", here / "base", here / "rows.json")
    changed = [f"data.train={json.dumps(sources)}", "data.held_out=0"]
    changed += [f"{key.replace('__', '.')}={value}" for key, value in more.items()]
    return load_recipe(recipe, changed)


def test_weights_are_shares_of_the_mix_and_no_row_is_there_twice(here):
    big, small = (
        {"path": str(write_rows(here / name, made))}
        for name, made in (("big.json", rows(90)), ("small.json", rows(100)[90:]))
    )
    recipe = mix(here, {**big, "weight": 0.75}, {**small, "weight": 0.25})
    found = split_held_out(recipe)
    assert [(taken.there, taken.taken) for taken in found.taken] == [(90, 30), (10, 10)]
    assert len({row.instruction for row in found.train}) == 40
    assert count_rows(recipe.data, recipe.training.seed) == (40, None)
    assert split_held_out(recipe) == found
    other = mix(here, {**big, "weight": 3}, {**small, "weight": 1}, training__seed=8)
    assert split_held_out(other).train != found.train
    assert len(split_held_out(other).train) == 40
    none_of_big = mix(here, {**big, "weight": 0}, {**small, "weight": 2})
    assert len(split_held_out(none_of_big).train) == 10


def test_a_source_has_its_own_limit_and_columns(here):
    write_rows(here / "rows.json", rows(9))
    (here / "table.csv").write_text("Question (en),Reply\nwhat?,that\nwho?,them\n")
    columns = {"prompt": "Question (en)", "completion": "Reply"}
    recipe = mix(here, {"path": "rows.json", "limit": 3}, {"path": "table.csv", "columns": columns})
    found = split_held_out(recipe)
    assert Counter(row.shape for row in found.train) == {
        "LLM-Adapters": 3,
        "prompt and completion": 2,
    }
    assert [(row.instruction, row.output) for row in found.train[3:]] == [
        ("what?", "that"),
        ("who?", "them"),
    ]
    write_recipe(here / "r.yaml", here / "base", here / "rows.json")
    short = load_recipe(here / "r.yaml", ["data.train=rows.json#4", "data.held_out=0"])
    assert len(split_held_out(short).train) == 4


def test_doubles_and_twins_are_counted_and_doubles_left_out_on_wish(here):
    write_rows(here / "rows.json", [*rows(6), *rows(2)])
    other = write_rows(here / "other.json", rows(9)[5:])
    found = split(here, f"data.held_out={other}")
    assert (len(found.train), found.duplicates, found.twins) == (8, 2, 1)
    fewer = split(here, f"data.held_out={other}", "data.drop_duplicates=true")
    assert (len(fewer.train), fewer.duplicates) == (6, 0)


def test_a_data_set_is_read_by_datasets_itself(here):
    """A folder laid out as one of the hub's stands for it, where no hub can be reached."""
    import datasets

    folder = here / "set"
    for part, made in (("train", rows(5)), ("test", rows(8)[5:])):
        datasets.Dataset.from_list(made).to_parquet(folder / "data" / f"{part}-00000.parquet")
    found = split_held_out(mix(here, {"hub": str(folder), "split": "test"}))
    assert [row.instruction for row in found.train] == [r["instruction"] for r in rows(8)[5:]]
    assert found.train[0].where == f"{folder} [test]: row 1"
    (name,) = found.sha256
    assert name.startswith(f"{folder} [test]")
    with pytest.raises(InputError, match=r"\[tset\]: .*tset.*train"):
        split_held_out(mix(here, {"hub": str(folder), "split": "tset"}))


def test_the_eights_rows_are_known_from_others():
    eight = read_rows(POCKET / "train.json")
    text, bare = Row(text="all of it"), Row("Is it?", "", "the correct answer is true", "true")
    labels = replace(
        bare,
        instruction="Is it?\n\nAnswer format: yes/no",
        output="the correct answer is yes",
        answer="yes",
    )
    assert kind_of(eight) == "tasks"
    assert kind_of([text]) == "texts"
    for other in (text, bare, labels, replace(eight[0], output="so")):
        assert kind_of([*eight, other]) == "own"
        assert kind_of([other, *eight]) == "own"


def test_keys_that_no_shape_reads_are_counted_and_a_slip_is_named(here):
    rows = [
        {"instruction": "Why?", "output": "So.", "id": 1, "sytem": "Be brief.", "score": None},
        {"instruction": "Who?", "output": "She.", "id": 2},
    ]
    (here / "rows.json").write_text(json.dumps(rows))
    taken: list[Taken] = []
    data = mix(here, {"path": "rows.json"}).data
    assert len(list(stream_training(data, 0, taken))) == 2
    unread = unread_of(taken)
    assert unread == {"id": 2, "sytem": 1}
    assert unread_line(unread) == "id in 2 rows, sytem in 1 rows (did you mean 'system'?)"
    assert unread_line({"score": 1, "model": 1}) == "score in 1 rows, model in 1 rows"
    many = unread_line({f"key {number}": 1 for number in range(9)})
    assert many.endswith("key 5 in 1 rows, ...")
    # Columns that are named are what the row is; the others are passed over knowingly.
    named = {"path": "rows.json", "columns": {"prompt": "instruction", "completion": "output"}}
    list(stream_training(mix(here, named).data, 0, taken := []))
    assert unread_of(taken) == {}
