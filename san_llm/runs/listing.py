"""The runs in ``runs/``: what each was, what it came to, and how one is taken away."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from san_llm.errors import InputError, SanError, did_you_mean
from san_llm.runs.folder import (
    RUNS,
    default_run,
    is_finished,
    is_its_model,
    not_ours,
    read_log,
    recipe_of,
)
from san_llm.runs.lock import refuse_busy, seems_busy
from san_llm.runs.record import evaluations_of, read_results

Status = Literal["running", "finished", "stopped", "damaged"]


@dataclass(frozen=True)
class Score:
    """An evaluation's average, as fractions of 1.

    Attributes:
        folder: The evaluation's folder.
        of: ``adapter`` (or the model that the run trained whole), ``base``, or ``another model``,
            such as a merged one.
        protocol: The protocol by which rows were asked.
        accuracy: The mean accuracy over the tasks.
        standard_error: The standard error of ``accuracy``.
    """

    folder: str
    of: str
    protocol: str
    accuracy: float
    standard_error: float | None


@dataclass(frozen=True)
class Run:
    """One run, as its files tell.

    Attributes:
        run: The run's folder.
        latest: Whether it is the one that commands take unless told otherwise.
        status: ``finished`` has an adapter; ``stopped`` can go on; ``damaged`` cannot be read.
        method: The name of the recipe's method; None where the recipe cannot be read.
        base: The recipe's base model; None where the recipe cannot be read.
        steps: Optimizer steps done.
        loss: The best held-out loss, per token; None where none was taken.
        scores: The score of each evaluation, the oldest first.
        bytes: The size of all files; what links lead to is not counted.
    """

    run: str
    latest: bool
    status: Status
    method: str | None
    base: str | None
    steps: int
    loss: float | None
    scores: tuple[Score, ...]
    bytes: int


def list_runs() -> list[Run]:
    """Return the runs of this directory, the oldest first, and the last one if it is elsewhere."""
    latest = RUNS / "latest"
    folders = []
    if RUNS.is_dir():
        folders = [path for path in RUNS.iterdir() if path.is_dir() and not path.is_symlink()]
    if latest.is_dir() and latest.resolve().parent != RUNS.resolve():
        folders.append(latest.resolve())
    runs = [path for path in folders if (path / "recipe.yaml").is_file()]
    runs.sort(key=lambda path: ((path / "recipe.yaml").stat().st_mtime_ns, path.name))
    return [look_at(path) for path in runs]


def remove_run(run: Path) -> None:
    """Remove a run that :func:`removable` has found; a killed removal can be done again.

    Raises:
        InputError: when a process has begun to train into it.
        SanError: when a file cannot be removed.
    """
    refuse_busy(run)
    latest = RUNS / "latest"
    was_latest = latest.is_symlink() and latest.resolve() == run.resolve()
    try:
        for path in run.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != "recipe.yaml":  # last, as without it the folder is no run
                path.unlink()
        shutil.rmtree(run)
    except OSError as error:
        raise SanError(f"{run}: not all of it could be removed: {error}") from None
    if was_latest:
        latest.unlink()


def removable(name: str) -> Path:
    """Return the folder of a run that may be removed.

    Args:
        name: The run's name or path; ``latest`` is a name, too.

    Raises:
        InputError: when it is not in ``runs/``, not a run, has other files in it, or is running.
    """
    given = Path(name)
    path = RUNS / name if len(given.parts) == 1 else given
    if not path.is_dir():
        names = [path.name for path in RUNS.iterdir()] if RUNS.is_dir() else []
        raise InputError(f"{name}: no such run{did_you_mean(given.name, names)}")
    real = path.resolve()
    if real.parent != RUNS.resolve():
        raise InputError(f"{name}: is not in {RUNS}/, so it is not removed")
    why = not_ours(real)
    if why is not None:
        raise InputError(f"{name}: not a run of ours ({why}): not removed")
    refuse_busy(RUNS / real.name)
    return RUNS / real.name


def look_at(path: Path) -> Run:
    """Return what the files of a run tell of it."""
    default = default_run()
    method = base = None
    status: Status = "stopped"
    try:
        recipe = recipe_of(path)
        method, base = recipe.method.kind, recipe.base.model
        if seems_busy(path):
            status = "running"
        elif is_finished(path):
            status = "finished"
        scores = _scores(path, base)
        steps, loss = _progress(path)
    except InputError:
        status, scores, steps, loss = "damaged", (), 0, None
    return Run(
        run=str(path),
        latest=default is not None and default.resolve() == path.resolve(),
        status=status,
        method=method,
        base=base,
        steps=steps,
        loss=loss,
        scores=scores,
        bytes=_size(path),
    )


def _progress(run: Path) -> tuple[int, float | None]:
    """Return the steps done and the best held-out loss, by the log, which every run has."""
    steps, best = 0, None
    for entry in read_log(run):
        steps = max(steps, entry["step"])
        loss = entry.get("eval_loss")
        if isinstance(loss, float) and (best is None or loss < best):
            best = loss
    return steps, best


def _scores(run: Path, base: str) -> tuple[Score, ...]:
    scores = []
    for folder in evaluations_of(run):
        results = read_results(folder)
        alone = "base" if results.model == base else "another model"
        of = "adapter" if results.adapter or is_its_model(results.model, run) else alone
        average = results.average
        if average is None:  # of losses, and of answers that are right in part, there is none
            continue
        scores.append(
            Score(str(folder), of, results.protocol, average.accuracy, average.standard_error)
        )
    return tuple(scores)


def _size(folder: Path) -> int:
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            with suppress(FileNotFoundError):  # a run in progress removes files, too
                total += os.lstat(os.path.join(root, name)).st_size
    return total
