"""Rows of a batch are rotated as each would be alone, whatever lies beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    CHARACTERS,
    LONGROPE,
    rows,
    save_tiny,
    tiny_model,
    tiny_phi3,
    write_recipe,
    write_rows,
)
from torch import Tensor

from san_llm.data.batches import Pad
from san_llm.data.encode import IGNORE
from san_llm.models.rotary import alike_to, rotate_by_row
from san_llm.recipe.read import load_recipe
from san_llm.runs.folder import new_run
from san_llm.train.loss import token_losses
from san_llm.train.run import train

SWITCH = 20  # not a multiple of 8, to which batches are padded
SWITCHED = LONGROPE | {"original_max_position_embeddings": SWITCH}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
LENGTHS = [SWITCH - 3, SWITCH + 1, SWITCH, 2 * SWITCH, 5, SWITCH + 5]


MODELS = {
    "Phi-3, longrope": lambda: tiny_phi3(SWITCH),
    "Llama, longrope": lambda: tiny_model(rope_parameters=dict(SWITCHED)),
    "Llama, dynamic": lambda: tiny_model(
        rope_parameters=dict(DYNAMIC), max_position_embeddings=SWITCH
    ),
}


def row(length: int) -> dict[str, list[int]]:
    tokens = [4 + (length * 7 + 3 * place) % len(CHARACTERS) for place in range(length)]
    return {"input_ids": tokens, "labels": [IGNORE, IGNORE, *tokens[2:]]}


def loss(model: Any, lengths: list[int]) -> Tensor:
    with torch.no_grad():
        return token_losses(model, Pad(2)([row(length) for length in lengths]))


@pytest.mark.parametrize("name", MODELS)
def test_a_row_is_learned_in_a_batch_as_stock_transformers_has_it_alone(name: str) -> None:
    stock = {}
    for length in LENGTHS:
        model = MODELS[name]()  # a fresh one: it remembers
        tokens = torch.tensor([row(length)["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0, 1:-1]
        stock[length] = torch.nn.functional.cross_entropy(logits, tokens[0, 2:], reduction="sum")
    plain = loss(MODELS[name](), LENGTHS)
    assert alike_to(model.config) == SWITCH
    rotate_by_row(model)
    for length in LENGTHS:  # after longer ones, too
        assert loss(model, [length]).item() == pytest.approx(stock[length].item(), rel=1e-5)
    together = sum(stock.values())
    assert loss(model, LENGTHS).item() == pytest.approx(float(together), rel=1e-5)
    assert abs(plain.item() - float(together)) > 1e-3  # so there is something to be seen


def test_other_models_are_left_as_they_are() -> None:
    scaled = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
    model = tiny_model(rope_parameters=scaled)
    rotate_by_row(model)
    assert alike_to(model.config) == float("inf")
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("cutoff", "training"),
    [(512, {"micro_batch_size": 1}), (512, {"packing": False}), (260, {"packing": False})],
)
def test_neither_the_micro_batch_nor_packing_changes_what_is_learned(
    here: Path, cutoff: int, training: dict[str, Any]
) -> None:
    longrope = LONGROPE | {"original_max_position_embeddings": 260}
    base = save_tiny(here / "base", rope_parameters=longrope)
    some = [row | {"instruction": "x" * (1 + n % 6 * 40)} for n, row in enumerate(rows(12))]
    data = {"cutoff": cutoff}
    path = write_recipe(here / "r.yaml", base, write_rows(here / "rows.json", some), data=data)
    held_out = []
    for name, changes in (("one", {"micro_batch_size": 4}), ("other", training)):
        overrides = [f"training.{key}={value}".lower() for key, value in changes.items()]
        recipe = load_recipe(path, overrides)
        held_out.append(train(recipe, new_run(recipe, here / name, overwrite=False)))
    one, other = held_out
    assert one.train_loss == pytest.approx(other.train_loss, rel=1e-5)
    assert one.held_out_loss == pytest.approx(other.held_out_loss, rel=1e-5)
