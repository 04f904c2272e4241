"""Times of two or more ways to do the same, taken in turn in one process, and their ratios."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

PAIRS = 5  # below that no ratio is quoted


@dataclass
class Times:
    """Seconds of each run of a way, and what the last one returned."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    output: Any = None


def times(ways: Mapping[str, Callable[[], Any]], pairs: int) -> dict[str, Times]:
    """Run every way in turn, ``pairs`` times; one that does not repeat itself is an error."""
    by_way = {name: Times() for name in ways}
    for number in range(pairs):
        for name, way in ways.items():
            cpu, wall = time.process_time(), time.perf_counter()
            output = way()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            kept = by_way[name]
            kept.cpu.append(cpu)
            kept.wall.append(wall)
            if number and output != kept.output:
                sys.exit(f"{name}: another output than before")
            kept.output = output
            print(f"{name} {cpu:.1f} CPU s, {wall:.1f} s", file=sys.stderr)
    return by_way


def ratios(slow: Times, fast: Times) -> dict[str, Any]:
    """Return how many times faster the one is, pair by pair, by CPU seconds and by the clock.

    From fewer than five pairs no ratio is returned.
    """
    result: dict[str, Any] = {
        "plain_cpu_seconds": slow.cpu,
        "cpu_seconds": fast.cpu,
        "plain_seconds": slow.wall,
        "seconds": fast.wall,
    }
    if len(fast.cpu) >= PAIRS:
        for name, a, b in (("cpu", slow.cpu, fast.cpu), ("clock", slow.wall, fast.wall)):
            by_pair = [x / y for x, y in zip(a, b, strict=True)]
            result[f"ratio_{name}"] = {
                "median": statistics.median(by_pair),
                "lowest": min(by_pair),
                "highest": max(by_pair),
            }
    return result


def columns(row: Mapping[str, Any] | None = None) -> str:
    """Return the table's middle: times and ratios of a row, or their headings."""
    if row is None:
        return "plain, CPU s | CPU s | times faster (lowest to highest), CPU | clock"
    spread = [
        "{median:.2f} ({lowest:.2f} to {highest:.2f})".format(**row[key])
        if (key := f"ratio_{name}") in row
        else f"not quoted from fewer than {PAIRS} pairs"
        for name in ("cpu", "clock")
    ]
    plain, fast = (statistics.median(row[key]) for key in ("plain_cpu_seconds", "cpu_seconds"))
    return f"{plain:.1f} | {fast:.1f} | {spread[0]} | {spread[1]}"
