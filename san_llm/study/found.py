"""What of a study is done: its runs, found by what they were made of, whatever they are called."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from san_llm.data.split import rows_sha256
from san_llm.files import folder_sha256, key_of, read_json, write_json
from san_llm.models.locate import find_base
from san_llm.recipe.read import parse_recipe, to_yaml
from san_llm.recipe.schema import Recipe
from san_llm.runs.folder import is_finished, recipe_of
from san_llm.runs.lock import seems_busy
from san_llm.runs.record import Hashes, Metrics, read_metrics, read_run_manifest
from san_llm.study.schema import Cell
from san_llm.train.start import harmful_changes

State = Literal["finished", "failed", "begun", "running"]
RUNS, FAILED, RECIPES, LOGS = "runs", "failed", "recipes", "logs"  # of a study's folder


@dataclass(frozen=True)
class Trial:
    """A run that is there, or one that failed.

    Attributes:
        place: The run's folder; of a failed one the file that says why.
        recipe: What was trained.
        sha256: The hashes of its base and rows; None where they were not written yet.
        state: How far it is.
        metrics: What it came to; None before its end.
        reason: Why it failed.
    """

    place: Path
    recipe: Recipe
    sha256: Hashes | None
    state: State
    metrics: Metrics | None = None
    reason: str | None = None

    @property
    def loss(self) -> float:
        """The best held-out loss a token; infinite where the run failed."""
        loss = None if self.metrics is None else self.metrics.held_out_loss
        return math.inf if loss is None else loss

    @property
    def seconds(self) -> float | None:
        """Its training's time; None of a run that was gone on with, whose time is not all known."""
        told = self.metrics
        return None if told is None or told.resumed_at else told.seconds


def read_trials(folder: Path) -> list[Trial]:
    """Return the runs in a study's folder, finished ones first, and those that failed.

    Raises:
        InputError: when one is damaged.
    """
    trials = [_run(path.parent) for path in sorted(folder.glob(f"{RUNS}/*/recipe.yaml"))]
    for path in sorted(folder.glob(f"{FAILED}/*.json")):
        told = read_json(path)
        recipe = parse_recipe(told["recipe"], str(path))
        hashes = Hashes.model_validate(told["sha256"])
        trials.append(Trial(path, recipe, hashes, "failed", reason=told["reason"]))
    order: list[State] = ["finished", "failed", "running", "begun"]
    return sorted(trials, key=lambda trial: order.index(trial.state))


def _run(path: Path) -> Trial:
    told = read_run_manifest(path).sha256
    hashes = told if {"base", "data"} <= told.model_fields_set else None  # stopped early
    if is_finished(path):
        return Trial(path, recipe_of(path), hashes, "finished", read_metrics(path))
    return Trial(path, recipe_of(path), hashes, "running" if seems_busy(path) else "begun")


class Inputs:
    """The hashes of bases and rows, each file read once."""

    def __init__(self) -> None:
        self._known: dict[str, Hashes] = {}

    def of(self, recipe: Recipe) -> Hashes:
        """Return the hashes of a recipe's base and rows.

        Raises:
            InputError: when one of them is not there.
        """
        key = repr((recipe.base, recipe.data.train, recipe.data.held_out))
        if key not in self._known:
            base = folder_sha256(find_base(recipe.base).folder)
            self._known[key] = Hashes(base=base, data=rows_sha256(recipe.data))
        return self._known[key]

    def short(self, recipe: Recipe) -> str:
        """Return some characters that tell a recipe with its base and rows from others."""
        told = {"recipe": recipe.model_dump(mode="json"), "inputs": self.of(recipe).model_dump()}
        return key_of(told)[:8]


def find_trial(cell: Cell, trials: Sequence[Trial], inputs: Inputs) -> Trial | None:
    """Return the run that a cell of the study asks for, if it is there.

    Of several the first, by state: finished ones stand before those that can go on.
    """
    return next((trial for trial in trials if is_of(trial, cell, inputs)), None)


def is_of(trial: Trial, cell: Cell, inputs: Inputs) -> bool:
    """Return whether a run is a cell's: of the same recipe, base and rows, in all that counts."""
    if harmful_changes(trial.recipe, cell.recipe):
        return False
    if trial.sha256 is None:  # it has not come so far: its own resuming compares them
        return True
    now = inputs.of(cell.recipe)
    rows = list(trial.sha256.data.values())
    return trial.sha256.base == now.base and rows == list(now.data.values())


def keep_failure(folder: Path, cell: Cell, reason: str, inputs: Inputs) -> None:
    """Write down why a run failed, so that it counts as a result and is not tried again."""
    path = folder / FAILED / f"{cell.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    hashes = inputs.of(cell.recipe)
    told = {"reason": reason, "sha256": hashes.model_dump(), "recipe": to_yaml(cell.recipe)}
    write_json(path, told)
