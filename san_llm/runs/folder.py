"""What each run leaves behind: the recipe as run, versions, seeds, hashes, results.

A run folder is complete on its own: ``recipe.yaml`` (resolved), ``manifest.json``, ``log.jsonl``,
``metrics.json``, ``adapter/`` (or ``model/``), ``checkpoints/`` and later ``eval/``, ``merged/``
and ``plots/``. Every file is written under a temporary name and renamed, so that a killed run
leaves no half of one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Any

from san_llm.errors import InputError
from san_llm.files import refuse_files, write_text
from san_llm.recipe.read import load_recipe, to_yaml
from san_llm.recipe.schema import Recipe
from san_llm.runs.record import ADAPTER_CONFIG, MANIFEST, METRICS

RUNS = Path("runs")
MODEL = "model"  # of a run that trained every weight, instead of an adapter
HELD_OUT = "held-out"  # what a run's held-out rows are called where a file of rows is
HELD_OUT_ANSWERS = "held_out.jsonl"  # them, with the run's answers
# What an answer is called beside a row's own keys, of which it is none, by who gives it.
ANSWER_KEYS = {"base": "generated_base", "adapted": "generated"}
# All that a run leaves in its folder. A folder with anything else in it is not ours to empty.
CONTENTS = (
    *("recipe.yaml", MANIFEST, "log.jsonl", METRICS, "lock", "report.html"),
    HELD_OUT_ANSWERS,
    *("adapter", MODEL, "checkpoints", "eval", "merged", "plots", "tensorboard", "wandb"),
)


def new_run(recipe: Recipe, output: Path | None, overwrite: bool) -> Path:
    """Make a run's folder with the resolved recipe in it, and return it.

    Args:
        recipe: The recipe that will run.
        output: The folder; default ``runs/<name>-<date>-<time>``.
        overwrite: Empty the folder first if it is a run of ours.

    Raises:
        InputError: when the folder has files and may not, or must not, be emptied.
    """
    _refuse_other_latest()
    if output is None:
        output = _make_unused(RUNS / f"{recipe.name}-{datetime.now():%Y%m%d-%H%M%S}")
    refuse_files(output, overwrite)
    if output.is_dir() and any(output.iterdir()):
        why = not_ours(output)
        if why is not None:
            raise InputError(f"{output}: not a run of ours ({why}): not emptied")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "recipe.yaml", to_yaml(recipe))
    return output


def read_log(run: Path) -> Iterator[dict[str, Any]]:
    """Give the entries of a run's ``log.jsonl`` that have a step; none if there is no log.

    What is no entry is left out: the last line of a killed run, say.
    """
    with suppress(FileNotFoundError), (run / "log.jsonl").open("rb") as log:
        for line in log:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                yield entry


def not_ours(folder: Path) -> str | None:
    """Return why a folder is not a run with nothing else in it, or None where it is."""
    # Hidden files are what a killed run did not come to rename.
    strange = sorted(
        path.name
        for path in folder.iterdir()
        if path.name not in CONTENTS
        and not path.name.startswith(tuple(f".{name}." for name in CONTENTS))
    )
    if strange:
        return f"{strange[0]} is in it"
    return None if (folder / "recipe.yaml").is_file() else "no recipe.yaml"


def _unused(path: Path) -> Path:
    """Return ``path``, or with a number behind it the first that does not exist."""
    paths = chain([path], (path.with_name(f"{path.name}-{n}") for n in count(2)))
    return next(path for path in paths if not os.path.lexists(path))


def _make_unused(path: Path) -> Path:
    """Make and return an unused folder; runs that start at once get one each."""
    while True:
        folder = _unused(path)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder


def new_eval_folder(run: Path | None, kind: str) -> Path:
    """Return an unused name for an evaluation's folder: in its run, or beside the runs."""
    return _unused((run or RUNS) / "eval" / f"{datetime.now():%Y%m%d-%H%M%S}-{kind}")


@contextmanager
def begun(run: Path, is_new: bool) -> Iterator[None]:
    """Make a run the last one while the block runs, and after it; input refused late undoes that.

    Args:
        run: The run's folder.
        is_new: The folder was made for this by :func:`new_run`, and goes away if it has no
            checkpoint.
    """
    before = point_latest(run)
    try:
        yield
    except InputError:
        if is_new and any(run.glob("checkpoints/checkpoint-*")):
            raise
        (RUNS / "latest").unlink(missing_ok=True)
        if before is not None:
            (RUNS / "latest").symlink_to(before)
        if is_new:
            shutil.rmtree(run, ignore_errors=True)
            with suppress(OSError):  # other runs are in it
                RUNS.rmdir()
        raise


def refuse_strange(run: Path) -> None:
    """Refuse a run that cannot be written to, or only elsewhere; it may be another's gift.

    Raises:
        InputError: naming the symbolic link that leads out of the run's folder, or the file that
            stands where a folder belongs, or the other way round.
    """
    inside = run.resolve()
    for path in (run / name for name in CONTENTS):
        for entry in (path, *(path.glob("*") if path.name in ("checkpoints", "eval") else ())):
            if entry.is_symlink() and not entry.resolve().is_relative_to(inside):
                raise InputError(f"{entry}: a symbolic link out of the run's folder; take it away")
        a_file = path.name == "lock" or path.suffix != ""
        if path.exists() and not (path.is_file() if a_file else path.is_dir()):
            kind = "file" if a_file else "folder"
            raise InputError(f"{path}: expected a {kind}; move away what stands there")


def _refuse_other_latest() -> None:
    latest = RUNS / "latest"
    if latest.exists() and not latest.is_symlink():
        raise InputError(f"{latest}: expected a link to the last run; move away what stands there")


def point_latest(run: Path) -> str | None:
    """Make ``runs/latest`` name this run, and return what it named before.

    Raises:
        InputError: when something else stands there.
    """
    RUNS.mkdir(exist_ok=True)
    _refuse_other_latest()
    latest = RUNS / "latest"
    inside = run.resolve().parent == RUNS.resolve()
    target = Path(run.name) if inside else run.resolve()
    temporary = RUNS / f".latest.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    before = os.readlink(latest) if latest.is_symlink() else None
    os.replace(temporary, latest)
    return before


def last_run() -> Path:
    """Return the run that commands take unless told otherwise.

    Raises:
        InputError: when there is none yet.
    """
    run = default_run()
    if run is None:
        raise InputError(
            f"{RUNS / 'latest'}: no run yet in this directory: `san-llm train RECIPE` makes one, "
            "or name a model or an adapter"
        )
    return run


def default_run() -> Path | None:
    """Return the run that ``runs/latest`` names; where that names none, the newest finished one."""
    latest = RUNS / "latest"
    if latest.is_dir():
        return _from_here(latest.resolve())
    if not RUNS.is_dir():
        return None
    finished = [run for run in RUNS.iterdir() if not run.is_symlink() and is_finished(run)]
    return max(finished, key=lambda run: _product(run).stat().st_mtime_ns, default=None)


def is_finished(run: Path) -> bool:
    """Whether a folder is a run whose training came to its end."""
    there = (_product(run) / name for name in (ADAPTER_CONFIG, "config.json"))
    return any(file.is_file() for file in there) and (run / "recipe.yaml").is_file()


def _product(run: Path) -> Path:
    """Return the folder of what a run has made, or will."""
    model = run / MODEL
    return model if (model / "config.json").is_file() else run / "adapter"


def is_its_model(model: str, run: Path) -> bool:
    """Whether a model is the one that a run trained whole."""
    return Path(model).resolve() == (run / MODEL).resolve()


def _from_here(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def recipe_of(run: Path) -> Recipe:
    """Return the resolved recipe of a run.

    Raises:
        InputError: when the folder is not a run.
    """
    path = run / "recipe.yaml"
    if not path.is_file():
        raise InputError(f"{run}: not a run: no recipe.yaml in it")
    refuse_strange(run)
    return load_recipe(path)


def adapter_of(run: Path) -> Path:
    """Return the folder of a run's adapter.

    Raises:
        InputError: when training has not come to its end, or trained every weight.
    """
    product = product_of(run)
    if product.name == MODEL:
        raise InputError(f"{run}: has no adapter: it trained every weight, its model is {product}")
    return product


def product_of(run: Path) -> Path:
    """Return the folder of a run's adapter, or of the model that it trained whole.

    Raises:
        InputError: when training has not come to its end.
    """
    product = _product(run)
    if not (product / ("config.json" if product.name == MODEL else ADAPTER_CONFIG)).is_file():
        raise InputError(
            f"{run}: no adapter yet: the training was not finished; "
            f"`san-llm train {run} --resume` goes on with it"
        )
    return product


def run_of(adapter: Path) -> Path | None:
    """Return the run folder that an adapter lies in, or None."""
    run = adapter.resolve().parent
    return _from_here(run) if (run / "recipe.yaml").is_file() else None
