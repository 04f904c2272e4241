"""What each run leaves behind: the recipe as run, versions, seeds, hashes, results.

A run folder is complete on its own: ``recipe.yaml`` (resolved), ``manifest.json``, ``log.jsonl``,
``metrics.json``, ``adapter/``, ``checkpoints/`` and later ``eval/``, ``merged/`` and ``plots/``.
Every file is written under a temporary name and renamed, so that a killed run leaves no half of
one.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, count
from pathlib import Path
from typing import Any

from san_llm import __version__
from san_llm.errors import InputError
from san_llm.recipe import Recipe, load_recipe

RUNS = Path("runs")
# All that a run leaves in its folder. A folder with anything else in it is not ours to empty.
CONTENTS = (
    *("recipe.yaml", "manifest.json", "log.jsonl", "metrics.json", "lock", "report.html"),
    *("adapter", "checkpoints", "eval", "merged", "plots", "tensorboard", "wandb"),
)
ASIDE = ".old"  # a folder that is being replaced, until the new one has its name
LARGEST_JSON = 2**26  # bytes; the index of the largest model known has a hundredth of that
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "tokenizers")


def cache_folder(kind: str) -> Path:
    """Return where things of a kind are kept that can be made again: ``tokenized``, ``gguf``."""
    home = os.environ.get("SAN_LLM_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "san-llm"
    )
    return Path(home) / kind


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing: under a temporary name beside it, then renamed."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk names no file
        raise


def flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: when the file is missing, not JSON or not an object.
    """
    try:
        if path.stat().st_size > LARGEST_JSON or not path.is_file():
            raise InputError(f"{path}: not a file of a model's or adapter's settings")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except InputError:
        raise
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not valid JSON") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def refuse_link(file: Path) -> None:
    """Refuse to pass on a model's file that is a link to somewhere else, a key of the user's, say.

    Raises:
        InputError: when it leads out of the model's folder, and not into the hub's cache.
    """
    inside, found = file.parent.resolve(), file.resolve()
    blobs = inside.parent.parent / "blobs"  # what the snapshots of the hub's cache link to
    if not (found.is_relative_to(inside) or found.is_relative_to(blobs)):
        raise InputError(f"{file}: a symbolic link out of the folder; put the file itself there")


def refuse_files(folder: Path, overwrite: bool) -> None:
    """Refuse to write where files are.

    Raises:
        InputError: when ``folder`` has files and ``overwrite`` is not set, or is a file itself.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file stands there; expected a folder to write to")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder}: has files in it; add --overwrite to replace them")


@contextmanager
def whole_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Give a temporary folder that becomes ``folder`` if the block ends well, else vanishes.

    It gets its name when all that is in it is on the disk. What a killed process left of the same
    folder is cleared away first.

    Raises:
        InputError: see :func:`refuse_files`.
    """
    made = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear_stale(folder)
    refuse_files(folder, overwrite)
    temporary, owned = _own_temporary(folder)
    try:
        yield temporary
        for path in (temporary, *temporary.rglob("*")):  # made private, like every temporary
            path.chmod(0o755 if path.is_dir() else 0o644)
            flush(path)
        if folder.exists():
            # Moved aside, not deleted: if the rename below fails the old folder comes back.
            aside = temporary.with_name(f"{temporary.name}{ASIDE}")
            folder.rename(aside)
            try:
                temporary.rename(folder)
            except OSError:
                aside.rename(folder)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        else:
            temporary.rename(folder)
        flush(folder.parent)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:  # the disk is full
            error.filename = str(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # somebody else's files are in it
                parent.rmdir()
        raise
    finally:
        os.close(owned)


def _own_temporary(folder: Path) -> tuple[Path, int]:
    """Make a temporary folder; return it and the handle whose lock says that its owner lives."""
    while True:
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.san-llm-"))
        owned = _locked(temporary)
        if owned is not None and temporary.exists():
            return temporary, owned
        if owned is not None:  # another process took it for stale before it was locked
            os.close(owned)


def _locked(path: Path) -> int | None:
    """Return a handle that locks a folder until it is closed or the process dies, or None."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # renamed by its owner
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _clear_stale(folder: Path) -> None:
    """Remove temporary folders whose owner is dead; bring back what it had moved aside."""
    ours = f".{glob.escape(folder.name)}.san-llm-????????"
    asides = list(folder.parent.glob(ours + ASIDE))  # first: each had its temporary beside it
    alive = set()
    for temporary in folder.parent.glob(ours):
        owned = _locked(temporary)
        if owned is None:
            alive.add(f"{temporary.name}{ASIDE}")
        else:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(owned)
    for aside in asides:
        if aside.name in alive:
            continue
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(folder)


def new_run(recipe: Recipe, output: Path | None, overwrite: bool) -> Path:
    """Make a run's folder with the resolved recipe in it.

    Args:
        recipe: What will run.
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
    write_text(output / "recipe.yaml", recipe.to_yaml())
    return output


def read_log(run: Path) -> Iterator[dict[str, Any]]:
    """Iterate over the entries of a run's ``log.jsonl`` that have a step; none if there is no log.

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
    """Make the folder that :func:`_unused` names; runs that start at once get one each."""
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
def begun(run: Path, made: bool) -> Iterator[None]:
    """Make a run the last one while the block runs, and after it; input refused late undoes that.

    Args:
        run: Its folder.
        made: It was made for this, by :func:`new_run`, and goes away if it has no checkpoint.
    """
    before = point_latest(run)
    try:
        yield
    except InputError:
        if made and any(run.glob("checkpoints/checkpoint-*")):
            raise
        (RUNS / "latest").unlink(missing_ok=True)
        if before is not None:
            (RUNS / "latest").symlink_to(before)
        if made:
            shutil.rmtree(run, ignore_errors=True)
            with suppress(OSError):  # other runs are in it
                RUNS.rmdir()
        raise


def refuse_strange(run: Path) -> None:
    """Refuse a run, which may be another's gift, that would be written to elsewhere, or cannot be.

    Raises:
        InputError: naming the symbolic link that leads out of the run's folder, or the file that
            stands where a folder belongs, or the other way round.
    """
    inside = run.resolve()
    for path in (run / name for name in CONTENTS):
        for one in (path, *(path.glob("*") if path.name in ("checkpoints", "eval") else ())):
            if one.is_symlink() and not one.resolve().is_relative_to(inside):
                raise InputError(f"{one}: a symbolic link out of the run's folder; take it away")
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
    """Return the run that ``runs/latest`` names.

    Raises:
        InputError: when there is none yet.
    """
    latest = RUNS / "latest"
    if not latest.is_dir():
        raise InputError(
            f"{latest}: no run yet in this directory: `san-llm train RECIPE` makes one, "
            "or name a model or an adapter"
        )
    return _from_here(latest.resolve())


def _from_here(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def recipe_of(run: Path) -> Recipe:
    """Read the resolved recipe of a run.

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
        InputError: when training has not come to its end.
    """
    adapter = run / "adapter"
    if not (adapter / "adapter_config.json").is_file():
        raise InputError(
            f"{run}: no adapter yet: the training was not finished; "
            f"`san-llm train {run} --resume` goes on with it"
        )
    return adapter


def run_of(adapter: Path) -> Path | None:
    """Return the run folder that an adapter lies in, or None."""
    run = adapter.resolve().parent
    return _from_here(run) if (run / "recipe.yaml").is_file() else None


def versions() -> dict[str, str]:
    """Return the versions of this package and of those that decide what it computes."""
    found = {"san-llm": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def manifest(**facts: Any) -> dict[str, Any]:
    """Return where and with what a run was made, with the facts that only it knows."""
    return {
        "made": datetime.now().astimezone().isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "versions": versions(),
        "git": _git_state(),
        **facts,
    }


def _git_state() -> dict[str, Any] | None:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
