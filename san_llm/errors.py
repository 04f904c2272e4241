"""What can go wrong, and the exit code that each kind ends a command with."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SanError(Exception):
    """A run that failed: exit code 1. The message is one plain line for the user."""

    exit_code = 1


class InputError(SanError, ValueError):
    """Input that cannot be right (recipe, flag, file, model): exit code 2, nothing was started."""

    exit_code = 2


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the nearest known name, or an empty string."""
    names = {name.lower(): name for name in known}
    close = get_close_matches(found.lower(), list(names), n=1, cutoff=0.5)
    return f" (did you mean {names[close[0]]!r}?)" if close else ""
