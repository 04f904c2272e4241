"""Where a training begins: a new run of a recipe, or one that goes on; here, or by a launcher.

What cannot be right is refused before torch is loaded and before a folder is made.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from san_llm.data.split import count_rows, refuse_no_rows, row_files, rows_sha256
from san_llm.errors import STOPPED, InputError, debugging
from san_llm.evaluate.questions import refuse_wrong_tasks
from san_llm.files import folder_sha256, write_text
from san_llm.launch.command import (
    Ended,
    accelerate_command,
    machine_rank,
    machines,
    run_launched,
)
from san_llm.launch.devices import check_alone, let_memory_grow, tell_devices
from san_llm.launch.engine import check_engine, engine_of, find_config, read_config
from san_llm.launch.processes import agree, is_first
from san_llm.models.locate import FoundBase, find_base
from san_llm.progress import say
from san_llm.recipe.read import load_recipe, to_yaml
from san_llm.recipe.schema import PeftMethod, Recipe, check_learnable, leaves, refuse_bits
from san_llm.recipe.shipped import find_recipe
from san_llm.runs.folder import MODEL, begun, last_run, new_run, recipe_of
from san_llm.runs.lock import refuse_busy
from san_llm.runs.record import Hashes, TrainResult
from san_llm.train.trackers import check_trackers

# Keys that do not change what a run comes to, so that one may go on with other values of them.
HARMLESS = (
    *("name", "evaluation", "method.form", "data.workers"),
    *("training.micro_batch_size", "training.gradient_checkpointing", "training.save_minutes"),
    *("training.keep_checkpoints", "training.bad_batches", "training.packing"),
    *("training.report_to", "training.sample_prompts", "training.sample_every"),
    "training.sample_tokens",
)


def _places(recipe: Recipe) -> dict[str, Any]:
    """Return where base and rows lie, by key; the manifest's sha256 tell if they are the same."""
    data = recipe.data
    held_out = {"data.held_out": data.held_out} if data.held_out_files else {}
    return {"base.model": recipe.base.model, "data.train": data.train, **held_out}


def harmful_changes(before: Recipe, after: Recipe) -> list[str]:
    """Return ``key: old -> new`` for the differences that would make another run of it."""
    old, new = _leaves(before), _leaves(after)
    free = (*HARMLESS, *(_places(before).keys() & _places(after).keys()))
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and not any(key == name or key.startswith(f"{name}.") for name in free)
    ]


def _leaves(recipe: Recipe) -> dict[str, Any]:
    """Return what a recipe says by key, with names where a word stands for target modules."""
    values = recipe.model_dump(mode="json")
    values["method"]["target_modules"] = recipe.method.targets()
    return leaves(values)


@dataclass(frozen=True)
class TrainRequest:
    """What ``san-llm train`` was asked.

    Attributes:
        recipe: A recipe file or the name of a shipped one; with ``resume`` a run's folder. None:
            with ``resume`` the last run.
        overrides: ``key=value`` arguments.
        processes: How many on this machine; None: one, or as many as ``accelerate`` says.
        accelerate: A config file of Accelerate's, or the name of a shipped one.
        output: The run's folder; None: ``runs/<name>-<date>-<time>``.
        resume: Go on from the last checkpoint.
        overwrite: Empty ``output`` first, if it is a run.
        as_json: How launched processes print the result.
    """

    recipe: str | None
    overrides: Sequence[str] = ()
    processes: int | None = None
    accelerate: Path | None = None
    output: Path | None = None
    resume: bool = False
    overwrite: bool = False
    as_json: bool = False


def start(request: TrainRequest) -> Ended[TrainResult]:
    """Train as asked, in this process or in several that are launched; return how it ended.

    Raises:
        InputError: when something that was asked for cannot be right.
        SanError: when the training fails.
    """
    let_memory_grow()
    launched, config = "WORLD_SIZE" in os.environ, find_config(request.accelerate)
    # On several machines, as in several processes, the first alone knows the run.
    if launched and not is_first():
        return _join()
    if machines(config) == 1:
        check_alone("train")
    if not launched and machine_rank(config):
        return _run_launched(accelerate_command(["train"], request.processes, config))
    run, recipe = new_or_resumed(request)
    if busy := run or request.output:
        refuse_busy(busy)
    check_learnable(recipe)
    check_trackers(recipe)
    command = None if launched else _launcher(request.processes, config, recipe)
    found = None if launched and request.resume else _look_ahead(recipe, run)
    is_new = run is None
    if run is not None and recipe_of(run) != recipe:
        write_text(run / "recipe.yaml", to_yaml(recipe))
    run = run or new_run(recipe, request.output, request.overwrite)
    with begun(run, is_new):
        if command is None:
            return _train_here(recipe, run, launched, found)
        options = ["--json"] if request.as_json else []
        return _run_launched([*command, "train", str(run), "--resume", *options])


def new_or_resumed(request: TrainRequest) -> tuple[Path | None, Recipe]:
    """Return the run that goes on, or None for a new one, and the recipe with its overrides.

    Raises:
        InputError: when there is no such recipe or run, or the run cannot go on so.
    """
    name, overrides = request.recipe, list(request.overrides)
    if request.resume and name is not None and "=" in name and not Path(name).exists():
        overrides, name = [name, *overrides], None
    if request.resume and request.output:
        raise InputError("--resume goes on in the run's own folder: no --output")
    run: Path | None = None
    if request.resume and (name is None or Path(name).is_dir()):
        run = last_run() if name is None else Path(name)
        recipe_of(run)
        recipe = load_recipe(run / "recipe.yaml", overrides)
    elif name is None:
        raise InputError("no recipe named; `san-llm recipes list` shows those that are shipped")
    else:
        recipe = load_recipe(find_recipe(name), overrides)
        run = last_run() if request.resume else None
    if run is None:
        return None, recipe
    if (run / "adapter").is_dir() or (run / MODEL).is_dir():
        raise InputError(f"{run}: is finished; there is nothing to go on with")
    if changes := harmful_changes(recipe_of(run), recipe):
        raise InputError(
            f"{run}: goes on only with what it began with; changed are "
            f"{', '.join(changes)}: change them back, or start a new run"
        )
    return run, recipe


def _launcher(processes: int | None, config: Path | None, recipe: Recipe) -> list[str] | None:
    """Return the command that launches several processes; None where one was asked for."""
    if (processes or 1) == 1 and config is None:
        return None
    command = accelerate_command([], processes, config)
    if config is not None:
        check_engine(engine_of(config), recipe)
        processes = processes or read_config(config)["num_processes"]
    rows = recipe.training.batch_size
    if rows % (processes or 1):
        raise InputError(f"training.batch_size: {rows} is not a multiple of {processes} processes")
    return [*command, *(["--debug"] if debugging() else [])]


def _look_ahead(recipe: Recipe, run: Path | None) -> FoundBase:
    """Refuse wrong rows, and a base that is not there or not the run's; tell the recipe.

    Args:
        recipe: What is going to run.
        run: The run that goes on, or None for a new one.
    """
    if run is not None:
        _refuse_lost(recipe)
    refuse_no_rows(recipe.data)
    count_rows(recipe.data, recipe.training.seed)
    if run is None:
        refuse_wrong_tasks(recipe.evaluation)
    say(to_yaml(recipe))
    found = find_base(recipe.base)
    if run is None:
        from san_llm.models.load import load_config

        if recipe.method.name == "full":
            refuse_bits(found.bits, recipe.base.model)
        config = load_config(found)
        if isinstance(recipe.method, PeftMethod):
            from san_llm.models.tuners import check_bits, on_meta

            check_bits(recipe.method, found.trained_bits)
            on_meta(recipe.method, config, recipe.base.dtype)
    elif _places(recipe_of(run)) != _places(recipe):  # else compared when they are loaded
        from san_llm.train.resume import refuse_other_data

        now = Hashes(base=folder_sha256(found.folder), data=rows_sha256(recipe.data))
        refuse_other_data(run, now, renamed=True)
    return found


def _refuse_lost(recipe: Recipe) -> None:
    """Refuse to go on without a base or rows that have moved.

    Raises:
        InputError: saying how to name them.
    """
    way = "; if it has moved, `--resume {}=PATH` goes on with it"
    for file in row_files(recipe.data):
        if not file.exists():
            key = "held_out" if str(file) in recipe.data.held_out_files else "train"
            raise InputError(f"{file}: no such file{way.format(f'data.{key}')}")
    try:
        find_base(recipe.base)
    except InputError as error:
        raise InputError(f"{error}{way.format('base.model')}") from None


def _train_here(
    recipe: Recipe, run: Path, launched: bool, found: FoundBase | None
) -> Ended[TrainResult]:
    from san_llm.train.run import train

    if not launched:
        tell_devices("train")
        signal.signal(signal.SIGTERM, _stop_at_once)
    run, recipe = agree((run, recipe))
    say(f"run: {run}")
    result = train(recipe, run, found)
    if result.finished or launched:  # a launcher takes anything but 0 for a crash
        return Ended(0, result)
    return Ended(STOPPED[result.stopped_by or "SIGINT"], result)


def _run_launched(command: list[str]) -> Ended[TrainResult]:
    code = run_launched(command)
    return Ended(code if code in (0, *STOPPED.values()) else 1)


def _join() -> Ended[TrainResult]:
    """Train with the first process, which tells the run."""
    from san_llm.train.run import train

    shared: Any = agree(None)
    run, recipe = shared
    train(recipe, run)
    return Ended(0)


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    """Before the first step, and after the last, there is nothing to save that is not saved."""
    say("stopped by SIGTERM; `san-llm train --resume` goes on")
    sys.exit(STOPPED["SIGTERM"])
