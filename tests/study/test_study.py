"""A whole study on a tiny model, in real processes: stopped, gone on with, asked again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from tiny import rows, write_recipe, write_rows

from san_llm.evaluate.store import read_evaluation
from san_llm.runs.record import read_metrics
from san_llm.study.record import read_study_result

STUDY = {
    "recipe": "recipe.yaml",
    "variants": {
        "san": {"rates": [1e-3, 1e-2]},
        "lora": {"method": {"name": "lora", "rank": 2, "alpha": 4}},
    },
    "baseline": "lora",
    "seeds": [1, 2],
    "sweep": {"widen": 0, "refine": None},
}
RUNS = ["lora-0.01-seed1", "lora-0.01-seed2", "san-0.001-seed1", "san-0.01-seed1"]
RUNS += ["san-0.01-seed2"]


def write_study(folder: Path, base: Path, **changes):
    write_rows(folder / "rows.json", rows(24))
    write_rows(folder / "held.json", rows(6))
    (folder / "held.yaml").write_text("rows: held.json\njudge: loss\n")
    write_recipe(
        folder / "recipe.yaml",
        base,
        Path("rows.json"),
        data={"held_out": "held.json"},
        training={"max_steps": 3, "evaluate_every": 3},
        evaluation={"tasks": ["held.yaml"]},
    )
    (folder / "study.yaml").write_text(json.dumps(STUDY | changes))


@pytest.fixture(scope="module")
def studied(tmp_path_factory, tiny_base):
    """A folder with a finished study in it, which was stopped in its midst and gone on with."""
    folder = tmp_path_factory.mktemp("study")
    write_study(folder, tiny_base)
    command = [sys.executable, "-m", "san_llm", "study", "study.yaml", "--processes", "2"]
    how = {
        "cwd": folder,
        "env": {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "stdin": subprocess.DEVNULL,
    }
    first = subprocess.Popen(command, **how)
    runs = folder / "studies/study/runs"
    until = time.monotonic() + 200
    while not list(runs.glob("*/adapter")) and time.monotonic() < until:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=200)[1]
    assert first.returncode == 75, said
    assert "stopped: `san-llm study study.yaml` goes on" in said
    assert not (folder / "studies/study/study.json").exists()
    again = subprocess.run(command, check=False, timeout=300, **how)
    assert again.returncode == 0, again.stderr
    return folder, again


@pytest.fixture
def study(studied, here):
    """A copy of it, to be changed; the evaluations that the first has in its cache are not here."""
    shutil.copytree(studied[0], here, dirs_exist_ok=True, symlinks=True)
    return here / "studies/study"


def test_what_it_came_to_is_what_runs_and_evaluations_have_written(studied):
    folder, said = studied
    study = folder / "studies/study"
    result = read_study_result(study)
    assert sorted(path.name for path in (study / "runs").iterdir()) == RUNS
    assert result.complete
    assert [m.name for m in result.measures] == ["held-out loss", "held"]
    san, lora = result.of("san"), result.of("lora")
    assert san.seeds == lora.seeds == (1, 2)
    assert (san.rate, lora.rate) == (1e-2, 1e-2)
    # The sweep chose by the held-out loss, and LoRA had nothing to choose from.
    losses = dict(san.curve)
    assert losses[1e-2] < losses[1e-3]
    assert lora.curve == ()
    for one in (san, lora):
        for run, seed, loss in zip(
            one.runs, one.seeds, one.spreads["held-out loss"].values, strict=True
        ):
            metrics = read_metrics(folder / run)
            assert metrics.held_out_loss == loss
            assert metrics.trained_numbers == one.trained
            recipe = (folder / run / "recipe.yaml").read_text()
            assert f"seed: {seed}\n" in recipe
    # The task asks the held-out rows: its loss is that of the training's own measurement.
    for one in (san, lora):
        assert one.spreads["held"].values == pytest.approx(
            one.spreads["held-out loss"].values, rel=1e-4
        )
    pairs = np.subtract(san.spreads["held"].values, lora.spreads["held"].values)
    wanted = stats.ttest_rel(san.spreads["held"].values, lora.spreads["held"].values)
    told = san.apart["held"]
    assert told.difference == pytest.approx(pairs.mean())
    interval = wanted.confidence_interval(0.95)
    assert (told.low, told.high) == pytest.approx((interval.low, interval.high))
    assert told.p_seeds is None  # two seeds cannot reach a small one
    assert result.smallest_p == 0.5
    by_row = []
    for one in (san, lora):
        answered = [next((folder / run / "eval").glob("*-adapter")) for run in one.runs]
        losses = [[row.loss for row in read_evaluation(path).rows] for path in answered]
        by_row.append(np.mean(losses, axis=0))
    signs = np.array(np.meshgrid(*[[1, -1]] * 6)).reshape(6, -1)
    apart = by_row[0] - by_row[1]
    ways = np.abs(apart @ signs)
    assert told.p_rows == pytest.approx((ways >= abs(apart.sum()) - 1e-12).mean())
    assert lora.apart == {}
    for word in ("san", "lora", "± ", "held-out loss by rate", "chosen", "95% between seeds"):
        assert word in said.stdout
    pictures = sorted(path.name for path in (study / "plots").iterdir())
    assert pictures == ["measures.png", "measures.svg", "rates.png", "rates.svg"]


def test_asked_again_it_runs_nothing_and_tells_the_same(study, command):
    before = {path: path.stat().st_mtime_ns for path in study.glob("runs/**/*")}
    said = command("study", "study.yaml", "--json")
    assert said.returncode == 0, said.stderr
    now = json.loads(said.stdout)
    then = json.loads((study / "study.json").read_text())
    assert {**now, "made": ""} == {**then, "made": ""}
    assert {path: path.stat().st_mtime_ns for path in study.glob("runs/**/*")} == before
    page = command("report", study)
    assert page.stdout.strip() == f"{study}/report.html"
    text = (study / "report.html").read_text()
    for part in ("How far from lora", "less is better", "data:image/svg+xml", "rates:"):
        assert part in text
    assert "is there already" in command("report", study).stderr
    for option, word in (("--markdown", "| variant |"), ("--latex", r"\begin{tabular}")):
        assert word in command("study", "study.yaml", option).stdout


def test_runs_are_found_by_what_made_them_and_a_new_variant_costs_only_its_own(study, command):
    (study / "runs/san-0.01-seed1").rename(study / "runs/under another name")
    shutil.move("rows.json", "moved.json")
    Path("recipe.yaml").write_text(
        Path("recipe.yaml").read_text().replace("rows.json", "moved.json")
    )
    variants = STUDY["variants"] | {"neuron": {"method": {"mode": "neuron"}}}
    Path("study.yaml").write_text(json.dumps(STUDY | {"variants": variants}))
    said = command("study", "study.yaml", "--commands")
    assert said.returncode == 0, said.stderr
    assert [line.split()[:2] for line in said.stdout.splitlines()] == [["san-llm", "train"]] * 2
    assert all("neuron-0.01-seed" in line for line in said.stdout.splitlines())
    plan = json.loads(command("study", "study.yaml", "--plan", "--json").stdout)
    counts = {one["variant"]: (one["runs"], one["done"]) for one in plan["variants"]}
    assert counts == {"san": (3, 3), "lora": (2, 2), "neuron": (2, 0)}
    biased = {"name": "peft", "config": {"peft_type": "BEFT"}, "target_modules": "all"}
    variants = STUDY["variants"] | {"biases": {"method": biased}}
    Path("study.yaml").write_text(json.dumps(STUDY | {"variants": variants}))
    assert "variants.biases: `merge` refuses it" in command("study", "study.yaml", "--plan").stdout


def test_other_rows_make_other_runs(study, command):
    write_rows(Path("rows.json"), rows(25))
    said = command("study", "study.yaml", "--commands")
    runs = [line.split("--output ")[1] for line in said.stdout.splitlines()]
    # San's rate is to be chosen anew, LoRA's seeds can begin; no folder of before is touched.
    assert len(runs) == 4
    assert not any(Path(run).exists() for run in runs)


def test_a_run_that_fails_is_a_result_with_its_reason_and_is_not_tried_again(study, command):
    variants = {"lora": STUDY["variants"]["lora"]}
    wild = {"method": {"name": "lora", "rank": 2, "alpha": 1e6}, "training": {"learning_rate": 0.9}}
    changes = {"variants": variants | {"wild": wild}, "seeds": [1, 2]}
    Path("study.yaml").write_text(json.dumps(STUDY | changes))
    # A run that was made elsewhere may have wished for another evaluation than the study's.
    run = study / "runs/lora-0.01-seed1"
    shutil.rmtree(run / "eval")
    recipe = (run / "recipe.yaml").read_text()
    until, after = recipe.split("evaluation:\n")
    assert "  limit: null\n" in after
    fewer = after.replace("limit: null", "limit: 2")
    (run / "recipe.yaml").write_text(f"{until}evaluation:\n{fewer}")
    said = command("study", "study.yaml")
    assert said.returncode == 0, said.stderr
    result = read_study_result(study)
    wild = result.of("wild")
    assert len(wild.failed) == 2
    assert all("loss" in reason for reason in wild.failed.values())
    assert (wild.seeds, wild.spreads, wild.apart) == ((), {}, {})
    assert result.complete
    assert "failed: wild-0.9-seed1: " in said.stdout
    assert command("study", "study.yaml", "--commands").stdout == ""
    assert command("study", "study.yaml", "--commands", "--retry").stdout.count("\n") == 2
