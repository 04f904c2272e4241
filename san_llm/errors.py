"""What can go wrong, and the exit code that each kind ends a command with."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from errno import EACCES, EDQUOT, EFBIG, ENOSPC, EPERM, EROFS
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class SanError(Exception):
    """A run that failed: exit code 1. The message is one plain line for the user."""

    exit_code = 1


class InputError(SanError, ValueError):
    """Input that cannot be right (recipe, flag, file, model): exit code 2, nothing was started."""

    exit_code = 2


DEBUG = "SAN_LLM_DEBUG"  # the environment's name for --debug
# What a training that was asked to stop, and has saved, ends with. 75 is sysexits.h's EX_TEMPFAIL:
# try again. A shell shows 143 for a process that SIGTERM has killed, so that would say too little.
STOPPED = {"SIGINT": 130, "SIGTERM": 75}


def did_you_mean(given: str, known: Iterable[str], alike: float = 0.5) -> str:
    """Return ``" (did you mean 'x'?)"`` for the nearest known name, or an empty string.

    Args:
        given: What was written.
        known: What may be.
        alike: How much of two names must be the same, from 0 to 1.
    """
    names = {name.lower(): name for name in known}
    close = get_close_matches(given.lower(), list(names), n=1, cutoff=alike)
    return f" (did you mean {names[close[0]]!r}?)" if close else ""


def nearest_file(path: Path) -> str:
    """Return ``" (did you mean 'folder/x'?)"`` for the nearest name in the path's folder."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        return ""
    # By stem: all that ends in .yaml is alike.
    stem = get_close_matches(path.stem, [Path(name).stem for name in names], n=1, cutoff=0.6)
    alike = [name for name in names if stem and Path(name).stem == stem[0]]
    close = get_close_matches(path.name, alike, n=1, cutoff=0)
    return f" (did you mean {str(path.parent / close[0])!r}?)" if close else ""


def not_one_of(given: object, known: Collection[str]) -> str:
    """Return ``"'x' is not one of a, b"``, and the nearest of them."""
    return f"{given!r} is not one of {', '.join(known)}{did_you_mean(str(given), known)}"


def check_one_of(what: str, given: object, known: Collection[str]) -> None:
    """Refuse what is not among the known names.

    Raises:
        InputError: naming ``what`` it was meant as, all names and the nearest.
    """
    if given not in known:
        raise InputError(f"{what}: {not_one_of(given, known)}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def first_mistake(error: ValidationError) -> str:
    """Return where pydantic finds the first thing wrong, and what: ``tasks.0.n: ...``."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def unexpected(error: BaseException) -> str:
    """Return the kind and the first line of an error that is not one of ours."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def of_the_disk(error: BaseException) -> str | None:
    """Return in one line what is wrong with a place that is full or closed; None of all else."""
    if not isinstance(error, OSError):
        return None
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (ENOSPC, EDQUOT, EFBIG):
        return f"{where}cannot be written: {error.strerror}; make room"
    if error.errno in (EROFS, EACCES, EPERM):
        return f"{where}{error.strerror}; open it, or name another place"
    return None


def debugging() -> bool:
    """Whether ``--debug`` was given, to this process or to the one that started it."""
    return os.environ.get(DEBUG) == "1"
