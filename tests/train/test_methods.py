"""A method of PEFT that has no name here, through every command; and starts that a seed decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from safetensors.torch import load_file
from tiny import rows, write_recipe, write_rows

from san_llm.recipe.read import load_recipe
from san_llm.train.prepare import prepare

ROAD = {"name": "peft", "config": {"peft_type": "ROAD", "group_size": 16}, "target_modules": "all"}


@pytest.fixture
def recipe(here: Path, tiny_base: Path) -> Path:
    data = write_rows(here / "rows.json", rows(30))
    write_rows(here / "data" / "boolq" / "test.json", rows(4))
    asked = {"tasks": ["boolq"], "data": "data"}
    return write_recipe(here / "r.yaml", tiny_base, data, method=ROAD, evaluation=asked)


def said(command: Cli, *arguments: object) -> Any:
    done = command(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_tuner_of_peft_goes_through_every_command(command: Cli, recipe: Path) -> None:
    planned = said(command, "plan", recipe)
    assert planned["warnings"] == []
    assert set(planned["memory"]) == {"ROAD", "LoRA r32", "full fine-tuning"}
    trained = said(command, "train", recipe, "--output", "run")
    # Two numbers for every two outputs of the seven projections, in 4 blocks.
    assert trained["trained_numbers"] == planned["trained_numbers"] == 4 * 224
    for other in ("--base-only", "--adapter=run"):
        said(command, "eval", other, "--protocol", "loglik", "--output", f"eval{other}")
    merged = said(command, "merge", "run", "--verify")
    assert merged["verified"]["relative"] <= merged["verified"]["bound"]
    assert [run["method"] for run in said(command, "runs")] == ["road"]
    said(command, "compare", "eval--base-only", "eval--adapter=run")
    assert command("show", "run", "--terminal").returncode == 0
    said(command, "report", "run")
    assert "ROAD over" in (Path("run") / "report.html").read_text(encoding="utf-8")
    card = (Path("run") / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "A road adapter over" in card
    assert said(command, "generate", "Is 4 even?", "--adapter", "run")["adapter"] == "run/adapter"


def test_it_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(command: Cli, recipe: Path) -> None:
    said(command, "train", recipe, "--output", "whole")
    (run := Path("part")).mkdir()
    for path in ("recipe.yaml", "manifest.json"):
        (run / path).write_bytes((Path("whole") / path).read_bytes())
    (run / "checkpoints").mkdir()
    (Path("whole") / "checkpoints" / "checkpoint-2").rename(run / "checkpoints" / "checkpoint-2")
    assert said(command, "train", run, "--resume")["resumed_at"] == 2
    weights = "adapter/adapter_model.safetensors"
    one, two = (load_file(Path(folder) / weights) for folder in ("whole", "part"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_matrices_start_alike_for_every_method_of_a_seed(here: Path, recipe: Path) -> None:
    lora = ("method.name=lora", "method.rank=4", "method.target_modules=peft")
    told = "method.config={peft_type: LORA, r: 4, lora_alpha: 64, lora_dropout: 0.05}"
    by_name = _matrices(recipe, here, *lora)
    assert _same(by_name, _matrices(recipe, here, "method.target_modules=peft", told))
    assert not _same(by_name, _matrices(recipe, here, *lora, "training.seed=7"))


def _matrices(recipe: Path, here: Path, *changes: str) -> dict[str, torch.Tensor]:
    model = prepare(load_recipe(recipe, [*changes, "data.limit=12"]), here / "run", None).model
    return {name: p.detach() for name, p in model.named_parameters() if "lora_A" in name}


def _same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    assert one
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)
