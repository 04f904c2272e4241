"""A training as it is seen: one view that stays in its place in a terminal, elsewhere lines.

The numbers are told when they are logged. What is drawn is drawn twice a second at most, from a
thread of rich's, and is of a size that does not grow with the run.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import Any

import psutil
import torch
from rich.console import Console, ConsoleOptions
from rich.filesize import decimal
from rich.live import Live
from rich.text import Text

from san_llm import progress
from san_llm.progress import Bar, bar
from san_llm.runs.record import held_out_parts
from san_llm.shown import BLOCKS, block

DRAWN_PER_SECOND = 2.0
SPEED_STEPS = 20  # the last steps, of which the speed is the mean
CURVE = 64  # points of a loss curve that are kept at least, and at most twice as many
ASCII_BLOCKS = "_.-=+*%#"


class Curve:
    """A curve of any length in few points: neighbours are averaged as more of them come."""

    def __init__(self) -> None:
        """Begin without points."""
        self._points: list[float] = []
        self._per, self._sum, self._count = 1, 0.0, 0

    def add(self, value: float) -> None:
        """Add the next value; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        self._sum += value
        self._count += 1
        if self._count < self._per:
            return
        self._points.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._points) == 2 * CURVE:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [(left + right) / 2 for left, right in pairs]
            self._per *= 2

    def drawn(self, width: int, blocks: str = BLOCKS) -> str:
        """Return it as at most ``width`` characters, the lowest point as the lowest block."""
        points = self._points
        if not points or width < 1:
            return ""
        edges = [len(points) * i // width for i in range(width + 1)]
        if len(points) > width:
            points = [sum(points[a:b]) / (b - a) for a, b in pairwise(edges)]
        low, high = min(points), max(points)
        return "".join(block(point, low, high, blocks) for point in points)


class View:
    """What is known of a training. Made by :func:`watching`; rich draws it."""

    def __init__(self, lines: Bar | None = None) -> None:
        """Tell ``lines`` of each step, if given; samples then are lines of their own."""
        self._lines = lines
        self.step, self.total = 0, 1
        self._first, self._began = 0, time.monotonic()
        self._curve = Curve()
        self._logged: dict[str, float] = {}
        self._held_out: tuple[float, ...] = ()  # the last, the best, the best one's step
        self._parts: dict[str, float] = {}  # the last of each file or source
        self._counts: deque[tuple[float, int, int]] = deque(maxlen=SPEED_STEPS + 1)
        self._memory = 0
        self._samples: dict[str, str] = {}

    def begin(self, step: int, total: int, history: Sequence[dict[str, Any]]) -> None:
        """Begin at a step of ``total``, after what was logged before a stop."""
        self._first, self._began = step, time.monotonic()
        for entry in history:
            self._take(entry["step"], entry)
        self.step, self.total = step, total
        self._counts.append((self._began, 0, 0))

    def counted(self, tokens: int, learned: int) -> None:
        """Take the tokens of a step's rows, and how many of them were learned."""
        self._counts.append((time.monotonic(), tokens, learned))

    def tell(self, step: int, logged: dict[str, Any]) -> None:
        """Take what was logged after a step: a loss with its gammas, a held-out loss or samples."""
        self._take(step, logged)
        if "loss" in logged:
            self.step, self._memory = step, used_memory()
        if self._lines is None:
            return
        if "loss" in logged:
            self._lines.total = self.total
            self._lines.to(step, self._note())
        for key, text in logged.items():
            if key.startswith("sample_"):
                number = key.removeprefix("sample_")
                progress.say(f"step {step}, sample {number}: {_printable(text)}")

    def _take(self, step: int, logged: dict[str, Any]) -> None:
        if "loss" in logged:
            self._logged = logged
            self._curve.add(logged["loss"])
        if "eval_loss" in logged:
            loss, before = logged["eval_loss"], self._held_out
            best = before[1:] if before and before[1] <= loss else (loss, step)
            self._held_out = (loss, *best)
            self._parts = held_out_parts(logged)
        self._samples |= {k: text for k, text in logged.items() if k.startswith("sample_")}

    def _speed(self) -> tuple[float, float] | None:
        """Return the tokens a second of the last steps: all, and those that were learned."""
        began, *counts = self._counts
        if not counts or (seconds := counts[-1][0] - began[0]) <= 0:
            return None
        return sum(c[1] for c in counts) / seconds, sum(c[2] for c in counts) / seconds

    def _note(self) -> str:
        facts = [f"loss {self._logged['loss']:.3f}"]
        if self._held_out:
            facts.append(f"held-out {self._held_out[0]:.3f}")
        if (speed := self._speed()) is not None:
            facts.append(f"{speed[0]:,.0f} tokens/s")
        if "gamma_potentiated" in self._logged:
            up, down = self._logged["gamma_potentiated"], self._logged["gamma_depressed"]
            facts.append(f"LTP {up:.0%}, LTD {down:.0%}")
        return ", ".join(facts)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Draw as many lines as fit, the most wanted first."""
        width, plain = options.max_width, options.ascii_only
        for line in self._drawn(width, plain)[: max(1, console.height - 1)]:
            line.truncate(width, overflow="crop" if plain else "ellipsis")
            yield line

    def _drawn(self, width: int, plain: bool) -> list[Text]:
        lines = [self._bar(width, plain)]
        if self._logged:
            curve = self._curve.drawn(width - 20, ASCII_BLOCKS if plain else BLOCKS)
            lines.append(_line("loss", f"{self._logged['loss']:<9.4f} ", (curve, "cyan")))
        if self._held_out:
            loss, best, step = self._held_out
            lines.append(
                _line("held-out", f"{loss:<9.4f} ", (f"best {best:.4f} at step {step:,.0f}", "dim"))
            )
            lines += [_line("", f"{part:<9.4f} ", name) for name, part in self._parts.items()]
        if self._logged:
            speed = self._speed()
            rates = [f"{self._logged.get('learning_rate', 0):<9.3g} "]
            if speed is not None:
                rates.append(f"{speed[0]:,.0f} tokens/s, {speed[1]:,.0f} learned   ")
            if self._memory:
                rates.append(f"memory {decimal(self._memory)}")
            lines.append(_line("rate", *rates))
        if "gamma_potentiated" in self._logged:
            up, down, mean = (
                self._logged[f"gamma_{name}"] for name in ("potentiated", "depressed", "change")
            )
            lines.append(
                _line(
                    "gamma",
                    (f"LTP {up:.1%}", "red"),
                    "  ",
                    (f"LTD {down:.1%}", "blue"),
                    f"  mean change {mean:.4f}",
                )
            )
        for key, text in self._samples.items():
            lines.append(_line(key.replace("_", " "), _printable(text)))
        return lines

    def _bar(self, width: int, plain: bool) -> Text:
        done, spent = self.step - self._first, time.monotonic() - self._began
        head = f"{self.step:,}/{self.total:,} "
        tail = f" {self.step / self.total:4.0%}  {_clock(spent)}"
        if done and self.step < self.total:
            tail += f", {_clock(spent / done * (self.total - self.step))} left"
        room = max(0, min(40, width - 10 - len(head) - len(tail)))
        full = room * self.step // self.total
        mark, rest = ("#", "-") if plain else ("━", "─")
        return _line(
            "Training", head, (mark * full, "green"), (rest * (room - full), "bright_black"), tail
        )


def _line(name: str, *texts: str | tuple[str, str]) -> Text:
    return Text.assemble((f"{name:<10}", "bold"), *texts, no_wrap=True, end="\n")


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _printable(text: str) -> str:
    """Return a model's text in one line, without what a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def used_memory() -> int:
    """Return the bytes this process holds, on its GPU if it has one."""
    if torch.cuda.is_available():
        return torch.cuda.memory_reserved()
    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """Return the bytes this process has held at most, on its GPU if it has one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def watching(quiet: bool = False) -> Iterator[View]:
    """Show a training for as long as the block runs.

    Args:
        quiet: Show nothing (all processes but the first).
    """
    console = progress.stderr
    if quiet:
        yield View()
    elif not console.is_terminal or console.is_dumb_terminal:
        with bar("Training", 1, "steps") as lines:
            yield View(lines)
    else:
        view = View()
        with Live(
            view, console=console, refresh_per_second=DRAWN_PER_SECOND, vertical_overflow="crop"
        ):
            yield view
