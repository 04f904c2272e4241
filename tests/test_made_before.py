"""Runs, adapters and a merge that an earlier version made are read as that version read them.

What is in ``made_before/`` was made, and what its commands said kept in ``said/``, by ``make.sh``.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli
from safetensors.torch import load_file

WHOLE = Path("runs/whole")
# Of the fp32 numbers that another machine or another torch computes from the same files.
NEAR = 1e-5
ANEW = {"run", "folder", "output", "seconds", "peak_memory", "resumed_at"}  # of every doing anew


@pytest.fixture(autouse=True)
def made(here: Path) -> Path:
    """A copy of what was made, as the working directory."""
    return shutil.copytree(Path(__file__).with_name("made_before"), here, dirs_exist_ok=True)


def read_text(path: str | Path) -> str:
    return Path(path).read_text(encoding="utf-8")


def read(path: str | Path) -> Any:
    return json.loads(read_text(path))


def lines(path: Path) -> list[Any]:
    return list(map(json.loads, read_text(path).splitlines()))


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Give every number, text and empty value in a JSON value with its place there."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        if key in ANEW:
            continue
        place = f"{path}/{key}"
        if isinstance(inner, dict | list) and inner:
            yield from flat(inner, place)
        else:
            yield place, inner


def check_same(now: Any, before: Any, near: float = NEAR) -> None:
    """Check that all that was said before is said now; more may be."""
    present = dict(flat(now))
    for place, value in flat(before):
        assert place in present, f"{place} is not said any more"
        expected = pytest.approx(value, abs=near, rel=near) if type(value) is float else value
        assert present[place] == expected, place


def said(command: Cli, *arguments: object) -> Any:
    done = command(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_runs_their_change_and_their_page_are_told_as_before(command: Cli) -> None:
    by_name = {run["run"]: run for run in said(command, "runs")}
    expected = {run["run"]: run for run in read("said/runs.json")}
    expected[str(WHOLE)]["latest"] = (
        True  # since then: where no link names a run, the newest finished
    )
    check_same(by_name, expected, near=0)
    change = read("said/diff.json")
    for place in (change["total"], *change["modules"], *change["blocks"]):
        assert place.pop("relative") is None  # it told of merged models
    check_same(said(command, "diff", WHOLE), change, near=1e-6)
    shown = command("show", WHOLE, "--terminal")
    numbers = [re.findall(r"\d+\.\d+", text) for text in (shown.stdout, read_text("said/show.txt"))]
    assert set(numbers[0]) >= set(numbers[1])
    page = said(command, "report", WHOLE)
    assert page["missing"] == []
    html = read_text(page["output"])
    for number in ("0.0346", "864", "66.7 ± 33.3", "33.3 ± 23.6", "0879049"):
        assert number in html


def test_its_evaluations_compare_as_before_and_an_evaluation_made_now_gives_the_same_answers(
    command: Cli,
) -> None:
    folders = [WHOLE / "eval" / f"loglik-{of}" for of in ("base", "adapter")]
    check_same(said(command, "compare", *folders), read("said/compare.json"))
    asked = ("--tasks", "boolq,piqa", "--data", "pocket", "--limit", 3)
    output = ("--output", "now", "--overwrite")
    subject = ("--adapter", WHOLE / "adapter")
    for protocol, model in (
        ("loglik", subject),
        ("generate", subject),
        ("generate", ("--model", WHOLE / "merged")),  # asks in the prompt style of its training
    ):
        before = WHOLE / "eval" / f"{protocol}-adapter"
        result = said(command, "eval", *model, *asked, "--protocol", protocol, *output)
        assert result["prompt"] == "alpaca"
        check_same(result["tasks"], read(before / "results.json")["tasks"])
        check_same(lines(Path("now/rows.jsonl")), lines(before / "rows.jsonl"), near=1e-4)
        (_, compared) = said(command, "compare", before, "now")["runs"]
        assert compared["changes"] == []


def test_base_adapter_and_merged_model_answer_as_before(command: Cli) -> None:
    for file, *subject in (
        ("said/generate.json", "--adapter", WHOLE / "adapter", "--compare"),
        ("said/generate_merged.json", "--model", WHOLE / "merged"),
    ):
        before = read(file)
        assert before["style"] == "alpaca"
        check_same(said(command, "generate", *subject, "Is 7 even?"), before)


def test_the_adapter_merges_to_the_same_bytes(command: Cli) -> None:
    merged = said(command, "merge", "--adapter", WHOLE / "adapter", "--output", "again")
    assert merged["parameters"] > 20_000
    before, now = WHOLE / "merged", Path("again")
    assert (now / "model.safetensors").read_bytes() == (before / "model.safetensors").read_bytes()
    check_same(read(now / "config.json"), read(before / "config.json"), near=0)
    shas = [read(folder / "merge_manifest.json")["sha256"] for folder in (now, before)]
    assert shas[0] == shas[1]
    files = {path.name for path in before.iterdir()}
    assert files <= {path.name for path in now.iterdir()}


def test_a_run_that_was_stopped_goes_on_to_what_the_whole_run_came_to(command: Cli) -> None:
    stopped = Path("runs/stopped")
    result = said(command, "train", stopped, "--resume")
    assert (result["resumed_at"], result["finished"]) == (5, True)
    check_same(result, read(WHOLE / "metrics.json"))
    logs = [lines(run / "log.jsonl") for run in (stopped, WHOLE)]
    assert len(logs[0]) == len(logs[1])
    check_same(*logs)
    now, before = (
        load_file(run / "adapter" / "adapter_model.safetensors") for run in (stopped, WHOLE)
    )
    assert now.keys() == before.keys()
    # Bit for bit on the machine that made them; elsewhere sums have other last bits.
    assert max((now[name] - before[name]).abs().max().item() for name in before) < 1e-6


def test_adapters_of_each_carrier_and_of_lora_load_into_peft_and_give_the_same_logits() -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from san_llm import SanConfig

    for folder, before in load_file("said/logits.safetensors").items():
        base = AutoModelForCausalLM.from_pretrained("base")
        model = PeftModel.from_pretrained(base, folder).eval()
        assert isinstance(model.peft_config["default"], SanConfig) is (folder != "adapters/lora")
        with torch.no_grad():
            now = model(torch.arange(4, 16)[None]).logits[0, -4:]
        assert (now - before).abs().max() < NEAR * before.abs().max()
