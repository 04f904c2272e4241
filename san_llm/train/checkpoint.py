"""A checkpoint is whole or absent, and shows by its checksums that it still is what was written.

Its files are written into a hidden folder beside the others, listed with their sizes and sha256 in
``sha256.json``, flushed to the disk, and then the folder gets its name. A kill at any moment leaves
the checkpoints that were there, and perhaps a hidden folder that the next one clears away.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from san_llm.files import flush, sha256_of, write_json

SEAL = "sha256.json"


def checkpoint_of(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies, as Trainer names it."""
    return folder / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint's folder is named after."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


@contextmanager
def whole_checkpoint(
    folder: Path, step: int, best: int | None, first: bool, together: Callable[[], None]
) -> Iterator[Path]:
    """Give a hidden folder that becomes the checkpoint of ``step`` if the block ends well.

    Args:
        folder: Where a run's checkpoints lie.
        step: The optimizer steps done.
        best: The step whose checkpoint is the best so far.
        first: Whether this process is the one that makes, seals and names the folder.
        together: Waits for all processes, which may each write files of their own.
    """
    temporary = folder / f".checkpoint-{step}"
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(".checkpoint-*"):  # what a kill left
            shutil.rmtree(path)
        temporary.mkdir()
    together()
    try:
        yield temporary
        together()
        if first:
            _seal(temporary, best)
            _name(temporary, checkpoint_of(folder, step))
    except BaseException:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _seal(folder: Path, best: int | None) -> None:
    """List all files with their checksums, and bring everything to the disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": sha256_of(path),
        }
        for path in paths
    }
    write_json(folder / SEAL, {"best": best, "files": files})
    for path in (*paths, folder / SEAL, folder):
        flush(path)


def _name(temporary: Path, final: Path) -> None:
    if final.exists():  # a damaged one, which the run did not go on from
        aside = final.with_name(f".{final.name}.old")
        final.rename(aside)
        temporary.rename(final)
        shutil.rmtree(aside)
    else:
        temporary.rename(final)
    flush(final.parent)


def remove_old(folder: Path, keep: int) -> None:
    """Keep the last ``keep`` checkpoints, and the best ones that those know of.

    Each kept one needs its own best: if the last is damaged, a run goes on from the one before.
    """
    steps = _steps(folder)
    kept = set(steps[:keep])
    for step in steps[:keep]:
        best = best_of(checkpoint_of(folder, step))
        kept |= set() if best is None else {best}
    for step in steps:
        if step not in kept:
            # Renamed first, so that a kill leaves no half checkpoint.
            path = checkpoint_of(folder, step)
            shutil.rmtree(path.rename(folder / f".checkpoint-{step}.old"))


def _steps(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint, the last one first."""
    names = (path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*"))
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def _sealed(folder: Path) -> dict[str, Any]:
    if not (folder / SEAL).is_file():  # nor a pipe, which never ends
        return {}
    try:
        value = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def best_of(folder: Path) -> int | None:
    """Return the step of the best checkpoint that a checkpoint knows of."""
    best = _sealed(folder).get("best")
    return best if isinstance(best, int) else None


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None if it is what was written."""
    if not folder.is_dir():
        return f"{folder.name} is missing"
    files = _sealed(folder).get("files")
    if not isinstance(files, dict) or not files:
        return f"{folder.name} was not written to its end"
    for name, known in files.items():
        path = folder / name
        if not path.is_file() or path.is_symlink() or ".." in Path(name).parts:
            return f"{folder.name}/{name} is missing"
        if not isinstance(known, dict) or path.stat().st_size != known.get("bytes"):
            return f"{folder.name}/{name} has {path.stat().st_size:,} bytes, not those written"
        if sha256_of(path) != known.get("sha256"):
            return f"{folder.name}/{name} has changed since it was written"
    return None


def last_checkpoint(folder: Path, warn: Callable[[str], None] | None = None) -> Path | None:
    """Return the latest checkpoint that a run can go on from, or None.

    That is one which is whole, and whose best checkpoint is whole: the run may end with it.

    Args:
        folder: Where a run's checkpoints lie.
        warn: Is told why a later checkpoint is left out.
    """
    for step in _steps(folder):
        path = checkpoint_of(folder, step)
        best = best_of(path)
        wrong = damage(path)
        if wrong is None and best not in (None, step):
            wrong = damage(checkpoint_of(folder, best))
            wrong = wrong and f"{wrong}, which {path.name} counts on"
        if wrong is None:
            return path
        if warn is not None:
            warn(f"{folder}: {wrong}; not gone on from {path.name}")
    return None
