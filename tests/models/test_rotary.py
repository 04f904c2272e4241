"""Rows of a batch are rotated as each would be alone, whatever lies beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CHARACTERS, rows, save_tiny, tiny_config, tiny_model, write_recipe, write_rows
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM

from san_llm.data.batches import Pad
from san_llm.data.encode import IGNORE
from san_llm.models.rotary import alike_to, rotate_by_row
from san_llm.recipe.read import load_recipe
from san_llm.runs.folder import new_run
from san_llm.train.loss import token_losses
from san_llm.train.run import train

SWITCH = 20  # not a multiple of 8, to which batches are padded
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [4.0, 6.0, 8.0, 12.0],
    "original_max_position_embeddings": SWITCH,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
LENGTHS = [SWITCH - 3, SWITCH + 1, SWITCH, 2 * SWITCH, 5, SWITCH + 5]


def phi3() -> Any:
    torch.manual_seed(0)
    shape = tiny_config().to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads", "bos_token_id", "eos_token_id")
    config = Phi3Config(
        **{key: shape[key] for key in (*kept, *heads, "pad_token_id")},
        max_position_embeddings=1024,
        original_max_position_embeddings=SWITCH,
        rope_parameters=dict(LONGROPE),
        initializer_range=0.2,
    )
    return Phi3ForCausalLM(config).eval()


MODELS = {
    "Phi-3, longrope": phi3,
    "Llama, longrope": lambda: tiny_model(rope_parameters=dict(LONGROPE)),
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
    [(512, {"micro_batch_size": 1}), (512, {"packing": False}), (280, {"packing": False})],
)
def test_neither_the_micro_batch_nor_packing_changes_what_is_learned(
    here: Path, cutoff: int, training: dict[str, Any]
) -> None:
    longrope = LONGROPE | {"original_max_position_embeddings": 280}
    base = save_tiny(here / "base", rope_parameters=longrope)
    some = [
        r | {"instruction": r["instruction"] * (1 + 3 * (n % 3))} for n, r in enumerate(rows(12))
    ]
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
