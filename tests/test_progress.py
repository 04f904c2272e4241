"""Signs of life: lines where no bar can be drawn, nothing from processes that stay quiet."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from san_llm import progress


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is written to stderr where it is no terminal."""
    written = io.StringIO()
    monkeypatch.setattr(progress, "stderr", Console(file=written, width=200, soft_wrap=True))
    return written


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test moves."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(
    screen: io.StringIO, clock: list[float]
) -> None:
    with progress.bar("Training", 1000, "steps") as bar:
        for step in range(1, 1001):
            clock[0] += 0.125
            bar.to(step, "loss 1.000")
    lines = screen.getvalue().splitlines()
    # 125 seconds, a line each 15 and one at the end.
    assert len(lines) == 9
    assert lines[0] == "Training: 120 of 1,000 steps after 15 s, about 110 s left, loss 1.000"
    assert lines[-1] == "Training: 1,000 of 1,000 steps after 125 s, loss 1.000"


def test_nothing_done_yet_makes_no_guess_of_the_time_left(
    screen: io.StringIO, clock: list[float]
) -> None:
    with progress.bar("Loading", 10, "rows") as bar:
        clock[0] += 20
        bar.to(0)
    assert screen.getvalue() == "Loading: 0 of 10 rows after 20 s\n"


def test_advance_counts_on(screen: io.StringIO) -> None:
    with progress.bar("Merging", 3, "shards") as bar:
        bar.advance()
        bar.advance(2, "done")
    assert bar.done == 3
    assert screen.getvalue() == "Merging: 3 of 3 shards after 0 s, done\n"


def test_a_quiet_bar_writes_nothing(screen: io.StringIO) -> None:
    with progress.bar("Training", 2, quiet=True) as bar:
        bar.to(2, "loss 1.000")
    assert screen.getvalue() == ""


def test_a_terminal_gets_a_bar_with_the_note(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    terminal = Console(file=written, force_terminal=True, width=160)
    monkeypatch.setattr(progress, "stderr", terminal)
    with progress.bar("Training", 1, "steps") as bar:
        bar.total = 4
        bar.to(4, "loss 1.234")
    shown = written.getvalue()
    assert "loss 1.234" in shown
    assert "4/4" in shown


def test_bytes_are_shown_in_their_large_units(
    screen: io.StringIO, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress.bar("Merging", 16_000_000_000, "bytes") as bar:
        clock[0] += 20
        bar.to(4_000_000_000)
    assert screen.getvalue() == "Merging: 4.0 GB of 16.0 GB after 20 s, about 60 s left\n"
    terminal = Console(file=(written := io.StringIO()), force_terminal=True, width=160)
    monkeypatch.setattr(progress, "stderr", terminal)
    with progress.bar("Merging", 16_000_000_000, "bytes") as bar:
        bar.to(4_000_000_000)
    assert "4.0/16.0 GB" in written.getvalue()
