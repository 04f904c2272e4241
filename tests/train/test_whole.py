"""Method ``full``: every weight trained as a plain loop does it, resumed, judged, handed on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from safetensors.torch import load_file
from tiny import rows, save_tiny, write_recipe, write_rows
from transformers import AutoModelForCausalLM

from san_llm.data.tokenized import Rows
from san_llm.recipe.read import load_recipe
from san_llm.recipe.schema import Recipe
from san_llm.runs.folder import new_run
from san_llm.train.batches import GroupedByLength
from san_llm.train.prepare import prepare
from san_llm.train.run import train

WEIGHTS = "model.safetensors"


@pytest.fixture
def recipe(here: Path) -> Path:
    base = save_tiny(here / "base", num_hidden_layers=2, tie_word_embeddings=True)
    data = write_rows(here / "rows.json", rows(24))
    write_rows(here / "data" / "boolq" / "test.json", rows(4))
    return write_recipe(
        here / "r.yaml",
        base,
        data,
        method={"name": "full"},
        training={"learning_rate": 1e-4, "micro_batch_size": 4},
        evaluation={"tasks": ["boolq"], "data": "data"},
    )


def said(command: Cli, *arguments: object) -> Any:
    done = command(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def plain_loop(recipe: Recipe, here: Path) -> Any:
    """Train as a few lines of torch do, in fp64: rows one by one, padded by nobody."""
    prepared = prepare(recipe, here / "none", None)
    data, training = Rows(prepared.data.train), recipe.training
    model = AutoModelForCausalLM.from_pretrained(recipe.base.model).double().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, weight_decay=0)
    steps = training.max_steps or 0
    order = GroupedByLength(
        data.lengths, training.batch_size, training.seed, step=lambda: 0, last=lambda: steps
    )
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * (steps - step + 1) / steps
        batch = [data[row] for row in order.batch(step)]
        learned = sum(label != -100 for row in batch for label in row["labels"][1:])
        for row in batch:
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(row["labels"][1:])
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            (loss / learned).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_it_is_a_plain_loop_over_every_weight(here: Path, recipe: Path) -> None:
    told = load_recipe(recipe, ["data.held_out=0"])
    trained = train(told, new_run(told, here / "run", overwrite=False))
    expected = plain_loop(told, here)
    before = AutoModelForCausalLM.from_pretrained(here / "base")
    after = AutoModelForCausalLM.from_pretrained(here / "run" / "model")
    assert after.lm_head.weight is after.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(here / "run" / "model" / WEIGHTS)
    assert trained.trained_numbers == sum(p.numel() for p in after.parameters())
    old, wanted = dict(before.named_parameters()), dict(expected.named_parameters())
    for name, number in after.named_parameters():
        assert number.dtype == torch.float32
        assert not torch.equal(number, old[name]), name
        # Adam's step of a gradient that is nearly 0 is any; nearly all others are the same.
        apart = (number - wanted[name]).abs() / told.training.learning_rate
        assert float(apart.quantile(0.99)) < 1e-2, name


def test_it_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(here: Path, recipe: Path) -> None:
    told = load_recipe(recipe)
    whole = train(told, new_run(told, here / "whole", overwrite=False))
    part = new_run(told, here / "part", overwrite=False)
    shutil.copyfile(here / "whole" / "manifest.json", part / "manifest.json")
    shutil.copytree(here / "whole/checkpoints/checkpoint-2", part / "checkpoints" / "checkpoint-2")
    resumed = train(told, part)
    assert (resumed.resumed_at, resumed.best_step) == (2, whole.best_step)
    one, two = (load_file(here / run / "model" / WEIGHTS) for run in ("whole", "part"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_that_trained_every_weight_is_taken_by_every_command(
    command: Cli, recipe: Path
) -> None:
    planned = said(command, "plan", recipe)
    assert list(planned["memory"]) == ["full fine-tuning", "LoRA r32"]
    need, numbers = planned["memory"]["full fine-tuning"], planned["trained_numbers"]
    assert (need["weights"], need["gradients"]) == (4 * numbers, 4 * numbers)
    assert (need["optimizer"], need["adapter"]) == (8 * numbers, 0)
    trained = said(command, "train", recipe, "--output", "runs/run")
    assert trained["trained_numbers"] == numbers
    run = Path("runs/run")
    card = (run / "model" / "README.md").read_text(encoding="utf-8")
    assert "Every weight of `" in card
    assert "from peft" not in card
    done = said(command, "eval", run, "--protocol", "loglik")
    assert done["adapter"] is None
    assert Path(done["model"]) == run / "model"
    assert "| boolq |" in (run / "model" / "README.md").read_text(encoding="utf-8")
    said(command, "eval", run, "--protocol", "loglik", "--base-only")
    (listed,) = said(command, "runs")
    assert (listed["status"], listed["method"]) == ("finished", "full")
    assert {score["of"] for score in listed["scores"]} == {"base", "adapter"}
    base, tuned = sorted((run / "eval").iterdir(), key=lambda folder: folder.name[-5:] != "-base")
    assert tuned.name.endswith("-trained")
    said(command, "compare", base, run)
    shown = command("show", run, "--terminal")
    assert shown.returncode == 0
    assert "not evaluated" not in shown.stderr
    said(command, "report", run)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "FULL over" in page
    assert "was not evaluated" not in page
    sent = said(command, "push", "owner/name", run, "--dry-run")
    assert Path(sent["folder"]) == run / "model"
    answer = said(command, "generate", "Is 4 even?")
    assert Path(answer["model"]) == run / "model"
    for arguments, says in (
        (("diff", run), "has no adapter: it trained every weight"),
        (("generate", "a", "--compare"), "--compare: the run trained every weight"),
        (("merge", "--verify"), "--verify: the run trained every weight"),
        (("merge", "--quantized", "keep"), "--quantized: the run trained every weight"),
        (("merge", "--model", "base"), "has no adapter: it trained every weight"),
        (("train", run, "--resume"), "is finished"),
    ):
        refused = command(*arguments)
        assert refused.returncode == 2
        assert says in refused.stderr.splitlines()[-1]


def test_its_model_is_handed_on_as_it_is_or_rounded(command: Cli, recipe: Path) -> None:
    said(command, "train", recipe, "--output", "runs/run", "training.max_steps=1")
    own = load_file(Path("runs/run/model") / WEIGHTS)
    same = said(command, "merge", "--output", "same")
    assert (same["dtype"], same["whole"]) == ("float32", True)
    copied = load_file(Path("same") / WEIGHTS)
    assert all(torch.equal(own[name], copied[name]) for name in own)
    said(command, "merge", "--output", "half", "--dtype", "bfloat16")
    model = AutoModelForCausalLM.from_pretrained("half")
    assert model.dtype == torch.bfloat16
    for name, number in model.state_dict().items():
        if name in own:
            assert torch.equal(number, own[name].to(torch.bfloat16))
    assert "with every weight trained" in Path("half/README.md").read_text(encoding="utf-8")
    # As the run's own, it is asked in the prompt style of the training.
    assert said(command, "generate", "a", "--model", "half")["style"] == "alpaca"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("base.dtype=bfloat16", "base.dtype bfloat16: method full trains the weights themselves"),
        ("base.quantization=4bit", "base.quantization 4bit: method full trains the weights"),
    ],
)
def test_what_cannot_hold_small_steps_is_refused(
    command: Cli, recipe: Path, change: str, says: str
) -> None:
    for name in ("plan", "train"):
        refused = command(name, recipe, change)
        assert refused.returncode == 2
        assert says in refused.stderr.splitlines()[-1]
    assert not Path("runs").exists()
