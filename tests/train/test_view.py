"""The view of a training: what stands in it, on any screen, and how it leaves the terminal."""

from __future__ import annotations

import io
import math
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyte
import pytest
from forking import interruptible
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny import rows, write_recipe, write_rows

from san_llm import progress
from san_llm.train.view import ASCII_BLOCKS, BLOCKS, CURVE, Curve, View, watching

LOGGED = {
    "loss": 1.25,
    "learning_rate": 5e-3,
    "gamma_potentiated": 0.412,
    "gamma_depressed": 0.39,
    "gamma_change": 0.0123,
}


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=700),
    st.integers(-3, 150),
)
def test_a_curve_of_any_length_fits(values: list[float], width: int) -> None:
    curve = Curve()
    for value in values:
        curve.add(value)
    drawn = curve.drawn(width)
    finite = [value for value in values if math.isfinite(value)]
    assert len(drawn) <= min(max(width, 0), 2 * CURVE, len(finite))
    assert set(drawn) <= set(BLOCKS)
    assert (drawn == "") == (not finite or width < 1)


@pytest.mark.parametrize("steps", [8, 100, 10_000])
def test_a_falling_loss_is_drawn_falling(steps: int) -> None:
    curve = Curve()
    for step in range(steps):
        curve.add(1 - step / steps)
    drawn = [BLOCKS.index(block) for block in curve.drawn(40)]
    assert drawn == sorted(drawn, reverse=True)
    assert (drawn[0], drawn[-1], len(drawn)) == (7, 0, min(steps, 40))


def seen(view: View, width: int, height: int, **how: Any) -> list[str]:
    """Return the lines of a view on a screen."""
    console = Console(
        file=io.StringIO(), force_terminal=True, width=width, height=height, soft_wrap=True, **how
    )
    with console.capture() as drawn:
        console.print(view)
    return drawn.get().splitlines()


def told() -> View:
    """A view in the middle of a run that goes on from step 10."""
    view = View()
    history: list[dict[str, Any]] = [{"step": step, "loss": 3 - step / 10} for step in range(1, 11)]
    view.begin(10, 400, [*history, {"step": 10, "eval_loss": 1.5}])
    for step in range(11, 41):
        view.counted(1000, 200)
        view.tell(step, LOGGED)
    view.tell(40, {"eval_loss": 1.75})
    view.tell(40, {"sample_1": "one\ntwo \x1b[31mred\x1b[0m\r\x07" + "long " * 60})
    return view


def test_the_view_says_all_that_is_watched() -> None:
    lines = seen(told(), 100, 24, color_system=None)
    assert lines[0].startswith("Training  40/400 ━━━━────")
    assert " 10%  0:00:00, 0:00:00 left" in lines[0]
    assert lines[1].startswith("loss      1.2500    ██▇▇▆▆▅▅▅▄▁▁▁")
    assert lines[2] == "held-out  1.7500    best 1.5000 at step 10"
    assert lines[3].startswith("rate      0.005     ")
    assert "tokens/s" in lines[3]
    assert "learned   memory" in lines[3]
    assert lines[4] == "gamma     LTP 41.2%  LTD 39.0%  mean change 0.0123"
    # What a terminal would obey is not handed on.
    assert lines[5].startswith("sample 1  one two  [31mred [0m ")
    assert len(lines) == 6


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 5), (20, 3), (10, 1)])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_it_fits_any_screen(width: int, height: int, encoding: str) -> None:
    view = told()
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, force_terminal=True, width=width, height=height, color_system=None)
    console.print(view)
    file.flush()
    text = file.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    lines = text.splitlines()
    assert 1 <= len(lines) <= max(1, height - 1)
    assert all(len(line) <= width for line in lines)
    if encoding == "ascii" and height > 5:
        assert set(lines[1][20:]) <= set(ASCII_BLOCKS)


def test_lines_stand_where_no_view_can(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(progress, "stderr", Console(file=written, width=200, soft_wrap=True))
    with watching() as view:
        view.begin(0, 2, [])
        for step in (1, 2):
            view.counted(1000, 200)
            view.tell(step, LOGGED)
        view.tell(2, {"sample_1": "yes\x1b[2J"})
    first, second = written.getvalue().splitlines()
    assert first.startswith("Training: 2 of 2 steps after 0 s, loss 1.250, ")
    assert first.endswith(" tokens/s, LTP 41%, LTD 39%")
    assert second == "step 2, sample 1: yes [2J"


def test_ctrl_c_leaves_the_terminal_clean(here: Path, tiny_base: Path) -> None:
    data = write_rows(here / "rows.json", rows(30))
    how = {"max_steps": 100_000, "epochs": 1e5, "evaluate_every": 20}
    how |= {"sample_prompts": ["Is 4 even?"], "sample_tokens": 4}
    write_recipe(here / "r.yaml", tiny_base, data, training=how)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "san_llm", "train", "r.yaml", "--output", "run"],
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=interruptible,
    )
    os.close(theirs)
    screen = pyte.Screen(80, 24)
    stream = pyte.ByteStream(screen)
    hidden, end = False, time.monotonic() + 120
    pressed = False
    while time.monotonic() < end:
        try:
            got = os.read(ours, 65536)
        except OSError:  # closed by the end of the process
            break
        if not got:
            break
        stream.feed(got)
        hidden = hidden or screen.cursor.hidden
        if not pressed and any(line.startswith("sample 1") for line in screen.display):
            process.send_signal(signal.SIGINT)
            pressed = True
    assert process.wait(timeout=60) == 130
    os.close(ours)
    shown = [line.rstrip() for line in screen.display]
    assert hidden  # while the view was drawn
    assert not screen.cursor.hidden
    starts = ("Training", "loss", "held-out", "rate", "gamma", "sample 1")
    for start in starts:  # once: the view stayed in its place
        assert sum(line.startswith(f"{start:<10}") for line in shown) == 1, shown
    assert any(line.startswith("stopped after step") for line in shown)
    assert "\x1b" not in (here / "run" / "log.jsonl").read_text()
