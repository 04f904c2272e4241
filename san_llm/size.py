"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

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
