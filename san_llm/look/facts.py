"""What a run's folder tells of it; what it does not have is said, with the command for it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from san_llm.errors import SanError
from san_llm.look.diff import DiffResult, diff
from san_llm.models.cards import trained_on
from san_llm.protocol.tasks import is_task_file
from san_llm.recipe.schema import Recipe
from san_llm.runs.folder import is_finished, read_log, recipe_of
from san_llm.runs.listing import Run, look_at
from san_llm.runs.record import Metrics, RunManifest, read_metrics, read_run_manifest


@dataclass(frozen=True)
class Missing:
    """What a run does not have.

    Attributes:
        what: What is missing, in a sentence.
        command: What would make it; empty where nothing would.
    """

    what: str
    command: str = ""


@dataclass(frozen=True)
class Facts:
    """One run.

    Attributes:
        folder: The run's folder.
        run: The run's status, steps, best loss and size.
        recipe: The recipe as it ran.
        manifest: Versions, device, hashes; nothing before the training's start.
        metrics: What training came to; None before its end.
        log: The entries of the run's log, a step or a held-out loss each.
        scales: What happened to the neuron scales; None where there are none to be read.
        missing: What is not there.
    """

    folder: Path
    run: Run
    recipe: Recipe
    manifest: RunManifest
    metrics: Metrics | None
    log: tuple[Mapping[str, Any], ...]
    scales: DiffResult | None
    missing: tuple[Missing, ...]

    @property
    def method(self) -> str:
        """The method, and of SAN its carrier, its mode and whether s is carried."""
        method = self.recipe.method
        if method.name == "san":
            columns = ", free column scales" if method.options.free else ""
            return f"SAN ({method.carrier} carrier, mode {method.mode}{columns})"
        return method.kind.upper()

    @property
    def asks_tasks(self) -> bool:
        """Whether tasks are known that say something of what it learned: the eight, or its own."""
        own = any(map(is_task_file, self.recipe.evaluation.tasks))
        return own or self.metrics is None or self.metrics.row_kind == "tasks"

    @property
    def data(self) -> str:
        """The names of what was learned from."""
        return trained_on(self.recipe)


def read_facts(folder: Path) -> Facts:
    """Return what a run's files tell of it.

    Raises:
        InputError: when the folder is not a run, or its recipe, manifest or metrics are damaged.
    """
    recipe = recipe_of(folder)
    run = look_at(folder)
    manifest, metrics = read_run_manifest(folder), read_metrics(folder)
    missing = []
    log = tuple(read_log(folder))
    if run.status == "running":
        missing.append(Missing(f"It is running: this is what it was after step {run.steps:,}."))
    elif not is_finished(folder):
        missing.append(
            Missing(
                f"Its training was not finished: it stopped after step {run.steps:,}.",
                shlex.join(["san-llm", "train", str(folder), "--resume"]),
            )
        )
    if log and not any("eval_loss" in entry for entry in log):
        missing.append(Missing("It took no held-out loss."))
    scales = None
    if (folder / "adapter" / "adapter_config.json").is_file():
        try:
            scales = diff(folder)
        except SanError as error:
            missing.append(Missing(f"Its neuron scales cannot be shown: {error}."))
    return Facts(folder, run, recipe, manifest, metrics, log, scales, tuple(missing))
