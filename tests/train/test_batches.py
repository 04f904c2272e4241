"""Which rows make a batch, and how a batch of a step is named."""

from __future__ import annotations

import json
import random

import pytest
import torch

from san_llm.data.rows import Row
from san_llm.recipe.read import parse_recipe
from san_llm.train.batches import GroupedByLength, batch_names

LENGTHS = [1 + (n * 37) % 100 for n in range(523)]


def sampler(step: int = 0, last: int = 10**9, seed: int = 1, size: int = 4) -> GroupedByLength:
    return GroupedByLength(LENGTHS, size, seed, lambda: step, lambda: last)


@pytest.mark.parametrize("epoch", [0, 1, 7])
@pytest.mark.parametrize("size", [1, 4, 523, 1000])
def test_a_steps_batch_is_what_the_epoch_gives_then(epoch, size):
    steps = -(-len(LENGTHS) // size)
    assert len(sampler(size=size)) == steps * size
    order = list(sampler(epoch * steps, size=size))
    for number in {0, 1 % steps, steps // 2, steps - 1}:
        given = order[number * size : (number + 1) * size]
        named = sampler(size=size).batch(epoch * steps + number + 1)
        assert [row for row in given if row < len(LENGTHS)] == named
        assert all(row == len(LENGTHS) for row in given[len(named) :])


def test_rows_are_sorted_within_fifty_batches_and_no_farther():
    size, window = 4, 200
    rows = list(range(len(LENGTHS)))
    random.Random("1 0").shuffle(rows)
    near = [
        sorted(rows[i : i + window], key=lambda row: -LENGTHS[row])
        for i in range(0, len(rows), window)
    ]
    in_order = [part[i : i + size] for part in near for i in range(0, len(part), size)]
    given = list(sampler())
    found = [given[i : i + size] for i in range(0, len(given), size)]
    found = [[row for row in batch if row < len(LENGTHS)] for batch in found]
    assert sorted(found) == sorted(in_order)
    # The longest come anywhere, not first in each window.
    assert all(found[i : i + 50] != in_order[i : i + 50] for i in range(0, 131, 50))


def test_there_are_no_rows_after_the_last_step():
    assert list(sampler(step=3, last=3)) == []
    assert list(sampler(step=4, last=3)) == []
    assert len(list(sampler(step=2, last=3))) == 524


def test_other_seeds_and_epochs_shuffle_otherwise():
    orders = [list(sampler(step, seed=seed)) for step, seed in ((0, 1), (131, 1), (0, 2), (0, 11))]
    assert len({tuple(order) for order in orders}) == 4
    assert list(sampler(130)) == orders[0], "the last step of an epoch belongs to it"


def test_a_batch_is_named_by_files_and_rows_in_their_order():
    settings = {
        "base": {"model": "b"},
        "method": {"name": "san"},
        "data": {"train": "a.json", "held_out": 0, "prompt": "alpaca", "loss": "response"},
        "training": {"learning_rate": 1e-3, "batch_size": 4, "seed": 1},
    }
    recipe = parse_recipe(json.dumps(settings), "r.yaml")
    data = type("Rows", (), {"lengths": LENGTHS})()

    def named() -> list[Row]:
        files = ("a: odd name.json", "b.json")
        return [Row(where=f"{files[n % 2]}: row {n + 1}") for n in range(len(LENGTHS))]

    for step in (1, 131, 132):
        rows = sorted(sampler().batch(step))
        odd = ", ".join(f"row {n + 1}" for n in rows if n % 2 == 0)
        even = ", ".join(f"row {n + 1}" for n in rows if n % 2)
        first = [f"a: odd name.json: {odd}"] * bool(odd)
        second = [f"b.json: {even}"] * bool(even)
        both = first + second if not rows[0] % 2 else second + first
        assert batch_names(recipe, step, data, named) == ", ".join(both)


def test_a_sampler_gives_torch_its_rows():
    loader = torch.utils.data.DataLoader(range(len(LENGTHS) + 1), batch_size=4, sampler=sampler())
    assert [row for batch in loader for row in batch.tolist()] == list(sampler())
