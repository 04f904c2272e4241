"""Trackers: what Trainer's callbacks write for them, where, and how a resume goes on."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli
from tiny import rows, write_recipe, write_rows

from san_llm.recipe.read import load_recipe
from san_llm.recipe.schema import Recipe
from san_llm.runs.folder import new_run
from san_llm.train.run import train
from san_llm.train.trackers import check_trackers

KEY = "0123456789abcdef0123456789abcdef01234567"


def recipe(here: Path, base: Path, *trackers: str, **training: Any) -> Recipe:
    data = write_rows(here / "rows.json", rows(20))
    how = {"report_to": trackers, **training}
    return load_recipe(write_recipe(here / "r.yaml", base, data, training=how))


def go_back(run: Path, step: int) -> None:
    """Leave a run as a kill would have, soon after the checkpoint of a step."""
    shutil.rmtree(run / "adapter")
    for path in (run / "checkpoints").glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)


def test_tensorboard_gets_the_log_and_forgets_what_lies_behind_a_resume(
    here: Path, tiny_base: Path
) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    samples = {"sample_prompts": ["Is 4 even?"], "sample_tokens": 4}
    chosen = recipe(here, tiny_base, "tensorboard", **samples)
    run = new_run(chosen, here / "run", overwrite=False)
    train(chosen, run)
    go_back(run, 2)
    train(chosen, run)
    assert len(list((run / "tensorboard").iterdir())) == 2

    events = reading.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for tag in ("loss", "gamma_potentiated", "gamma_depressed", "gamma_change", "learning_rate"):
        assert [event.step for event in events.Scalars(f"train/{tag}")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("eval/loss")] == [2, 4]
    shares = [events.Scalars(f"train/gamma_{name}")[-1] for name in ("potentiated", "depressed")]
    assert sum(share.value for share in shares) == pytest.approx(1, abs=0.05)
    # TensorBoard's reader forgets numbers, not texts: the same one stands there twice.
    assert [e.step for e in events.Tensors("train/sample_1/text_summary")] == [2, 4, 4]
    assert not list(here.glob("runs/*/events*"))
    assert not (run / "checkpoints" / "runs").exists()


def test_wandb_works_offline_in_the_runs_folder_and_goes_on_as_one_run(
    here: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    chosen = recipe(here, tiny_base, "wandb")
    check_trackers(chosen)
    run = new_run(chosen, here / "run", overwrite=False)
    train(chosen, run)
    go_back(run, 2)
    train(chosen, run)
    named = (run / "wandb" / "id").read_text()
    kept = list((run / "wandb").glob(f"offline-run-*-{named}/run-{named}.wandb"))
    assert kept
    for file in kept:
        assert b"gamma_potentiated" in file.read_bytes()
    for file in run.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file
    assert not (here / "wandb").exists()


def test_wandb_without_a_key_is_refused(cli: Cli, here: Path, tiny_base: Path) -> None:
    pytest.importorskip("wandb")
    recipe(here, tiny_base, "wandb")
    nobody = {"HOME": str(here), "WANDB_MODE": "online", "WANDB_API_KEY": ""}
    done = cli("train", "r.yaml", "--output", "run", **nobody)
    assert done.returncode == 2
    assert done.stderr.startswith("error: training.report_to: wandb has no key: sign in with ")
    assert not (here / "run").exists()


def test_mlflow_gets_the_log(here: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (here / "mlruns").as_uri())
    chosen = recipe(here, tiny_base, "mlflow")
    train(chosen, new_run(chosen, here / "run", overwrite=False))
    (found,) = mlflow.search_runs(output_format="list")
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    history = mlflow.MlflowClient().get_metric_history(found.info.run_id, "gamma_change")
    assert [point.step for point in history] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_one_that_is_not_installed_is_named_before_anything_is_made(
    command: Cli, here: Path, tiny_base: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    recipe(here, tiny_base, name)
    (here / name).mkdir()  # Python takes a folder in the working directory for a package
    monkeypatch.syspath_prepend(here)
    done = command("train", "r.yaml", "--output", "run")
    assert done.returncode == 2
    told = f"error: training.report_to: {name} is not installed: `pip install {name}`, or leave it"
    assert done.stderr.startswith(told)
    assert not (here / "run").exists()
