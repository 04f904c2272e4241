"""How values are shown to a person, and read from one: sizes, times, shares, a terminal's lines."""

from __future__ import annotations

import json
import os
import re
from typing import Any

from san_llm.errors import InputError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as ``500MB``, ``2GB`` (of 10^9) or ``2GiB`` (of 2^30).

    Raises:
        InputError: when it is none, less than a byte, or more than any disk has.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE | re.ASCII)
    unit = match[2].upper() or "B" if match else ""
    size = float(match[1]) * UNITS[unit] if match and unit in UNITS else 0
    if not 1 <= size < 2**63:
        raise InputError(f"{text!r} is not a size: write it as 500MB, 2GB or 2GiB")
    return int(size)


LONGEST = 1000  # characters of a line: a terminal's screen, not a file's content
# What no one but its owner may read, and stands in URLs, arguments and environments.
_SECRETS = re.compile(r"(?<=:/)(/?)[^/\s@]+(?=@)|\bhf_[A-Za-z0-9]{16,}")
_SECRET_NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")


def masked(text: str) -> str:
    """Return a text with ``***`` for credentials in URLs, the hub's tokens and the user's own."""
    for name in _SECRET_NAMES:
        secret = os.environ.get(name, "").strip()
        if len(secret) >= 8:
            text = text.replace(secret, "***")
    return _SECRETS.sub(lambda match: f"{match[1] or ''}***", text)


def plain(line: str) -> str:
    """Return a line as a terminal may show it, whatever names and data are quoted in it.

    Control characters, which could move the cursor or recolour and retitle a terminal, are written
    as escapes, secrets are masked, and the middle of an endless line is left out.
    """
    line = masked(line)
    if len(line) > LONGEST:
        line = f"{line[: LONGEST * 2 // 3]} ... {line[-LONGEST // 4 :]}"
    return escaped(line)


def escaped(text: str, kept: str = "") -> str:
    """Return a text with escapes for control characters, but for those that are ``kept``."""
    return "".join(
        c if c.isprintable() or c in kept else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def percent(fraction: float | None) -> str:
    """Return a fraction as percent with one decimal; a dash where there is none."""
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def with_error(accuracy: float, error: float | None) -> str:
    """Return an accuracy in percent with its standard error, if it has one."""
    return percent(accuracy) if error is None else f"{percent(accuracy)} ± {percent(error)}"


def nats(loss: float, error: float | None) -> str:
    """Return a loss in nats with its standard error, if it has one."""
    return f"{loss:.4f}" if error is None else f"{loss:.4f} ± {error:.4f}"


def duration(seconds: float) -> str:
    """Return a time as a person says it: ``4.2 s``, ``3 min 20 s``, ``5 h 07 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def shown(value: Any) -> str:
    """Return a value of a recipe or manifest as its file spells it; text without quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


BLOCKS = "▁▂▃▄▅▆▇█"


def block(value: float, low: float, high: float, blocks: str = BLOCKS) -> str:
    """Return the character whose height tells where a value stands from ``low`` to ``high``."""
    share = (value - low) / (high - low) if high > low else 0.0
    return blocks[round(float(share) * (len(blocks) - 1))]
