"""What a model says while it learns: asked in time, logged once, and without a trace in it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from safetensors.torch import load_file
from tiny import rows, write_recipe, write_rows
from transformers import TrainerCallback

from san_llm.ask.respond import Sampling, question, respond
from san_llm.errors import InputError
from san_llm.models.load import load_model
from san_llm.models.locate import find_base
from san_llm.models.subject import find_subject
from san_llm.models.tokenizer import load_tokenizer
from san_llm.recipe.read import load_recipe
from san_llm.runs.folder import new_run, recipe_of
from san_llm.runs.record import TrainResult
from san_llm.train.run import train
from san_llm.train.trainer import SanTrainer

FSDP2 = Path(__file__).parents[2] / "recipes" / "accelerate" / "fsdp2.yaml"
SAMPLES = {"sample_prompts": ["Is 4 even?", "Is 5 x even?"], "sample_tokens": 8}
# Dropout draws at random in each step; packing lays rows side by side in attention.
METHODS: dict[str, dict[str, Any]] = {
    "packed": {},
    "dropout": {"carrier": "dora", "rank": 2, "alpha": 4, "dropout": 0.2},
}


def write(here: Path, base: Path, method: dict[str, Any], **training: Any) -> Path:
    """Write a recipe of 5 steps, sampled after each second one and the last."""
    how = {"max_steps": 5, "epochs": 9.0, "evaluate_every": 3, "sample_every": 2}
    data = write_rows(here / "rows.json", rows(20))
    return write_recipe(here / "r.yaml", base, data, method=method, training={**how, **training})


def start(path: Path, folder: Path, *overrides: str) -> TrainResult:
    recipe = load_recipe(path, list(overrides))
    return train(recipe, new_run(recipe, folder, overwrite=False))


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def sampled(run: Path) -> dict[int, tuple[str, str]]:
    """Return the answers of each step that was sampled; no step twice."""
    found = [e for e in log(run) if "sample_1" in e]
    answers = {e["step"]: (e["sample_1"], e["sample_2"]) for e in found}
    assert len(answers) == len(found)
    return answers


@pytest.mark.parametrize("name", METHODS)
def test_samples_are_the_models_answers_and_leave_no_trace(
    here: Path, tiny_base: Path, name: str
) -> None:
    path = write(here, tiny_base, METHODS[name], **SAMPLES)
    start(path, here / "asked")
    dice = torch.get_rng_state()
    start(path, here / "left alone", "training.sample_prompts=[]")
    assert torch.equal(dice, torch.get_rng_state())  # both ended with the same dice

    one, two = (
        load_file(here / run / "adapter" / "adapter_model.safetensors")
        for run in ("asked", "left alone")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert [e for e in log(here / "asked") if "sample_1" not in e] == log(here / "left alone")

    answers = sampled(here / "asked")
    assert list(answers) == [2, 4, 5]
    adapter = here / "asked" / "checkpoints" / "checkpoint-5"
    base = find_base(find_subject(str(tiny_base), adapter).base)
    model, tokenizer = load_model(base, adapter), load_tokenizer(base)
    for prompt, said in zip(SAMPLES["sample_prompts"], answers[5], strict=True):
        _, tokens = question(prompt, "alpaca", tokenizer)
        answer = respond(model, tokenizer, tokens, Sampling(8), on_text=lambda _: None)
        assert (answer.text, answer.tokens <= 8) == (said, True)


def test_a_stop_among_samples_is_made_up_for(
    here: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StopBeforeSampling(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
            if state.global_step == 3 and "loss" in logs:
                os.kill(os.getpid(), signal.SIGTERM)

    # Step 3 is sampled and judged: neither is there after the stop, each is once after the resume.
    path = write(here, tiny_base, METHODS["dropout"], **SAMPLES, sample_every=3)
    whole = start(path, here / "whole")
    build = SanTrainer.__init__

    def stopping(self: SanTrainer, **arguments: Any) -> None:
        callbacks = [*arguments["callbacks"], StopBeforeSampling()]
        build(self, **(arguments | {"callbacks": callbacks}))

    with monkeypatch.context() as patch:
        patch.setattr(SanTrainer, "__init__", stopping)
        patch.setattr("san_llm.train.trainer.SLOW", -1.0)  # whatever it takes is too long
        stopped = start(path, here / "parts")
    assert (stopped.finished, stopped.steps) == (False, 3)
    assert sampled(here / "parts") == {}
    assert not any("eval_loss" in entry for entry in log(here / "parts"))
    result = train(recipe_of(here / "parts"), here / "parts")
    assert (result.best_step, result.held_out_loss) == (whole.best_step, whole.held_out_loss)
    assert log(here / "parts") == log(here / "whole")
    assert list(sampled(here / "parts")) == [3, 5]


def test_a_prompt_without_room_for_an_answer_is_refused(here: Path, tiny_base: Path) -> None:
    path = write(here, tiny_base, {}, sample_prompts=["Is it?", "x" * 1100])
    with pytest.raises(InputError, match=r"^training\.sample_prompts\[1\]: the prompt has 1,"):
        start(path, here / "run")


@pytest.mark.slow
def test_processes_that_share_a_base_answer_together(cli: Cli, here: Path, tiny_base: Path) -> None:
    path = write(here, tiny_base, {}, **SAMPLES)
    done = cli("train", path, "--accelerate", FSDP2, "--processes", 2, "--output", "two")
    assert done.returncode == 0, done.stderr
    assert "2 processes, FSDP2" in done.stderr
    start(path, here / "one")
    assert sampled(here / "two") == sampled(here / "one")
    step_2 = sampled(here / "one")[2]
    assert f"step 2, sample 1: {' '.join(step_2[0].split())}\n" in done.stderr
    assert done.stderr.count("step 2, sample 1: ") == 1  # the first alone speaks
