"""The drawings of a run in characters, for a terminal: curves and maps of one line each.

Heights, not colours, carry the numbers: the picture is the same in a log, in grey and to every eye.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.markup import escape
from rich.table import Table

from san_llm.look.numbers import Curve, RunNumbers, Scores, block_maps
from san_llm.models.weights import Numbers
from san_llm.san.formulas import STILL
from san_llm.shown import block, percent, plain

CURVE, MAP, SCORES = 28, 46, 24  # characters of each at most: all fits 80 columns


def sketches(numbers: RunNumbers) -> Iterator[Table]:
    """Return what there are numbers of, as tables for rich."""
    if numbers.train_loss is not None:
        yield _curves(numbers)
    if numbers.gammas is not None:
        modules, blocks, (far, more) = block_maps(
            numbers.gammas,
            lambda gamma: np.abs(gamma - 1).mean(),
            lambda gamma: 100 * (gamma > 1 + STILL).mean(),
        )
        yield _map("mean distance of gamma from 1", "{:.4f}", modules, blocks, far)
        yield _map("LTP: channels with gamma > 1, %", "{:.0f}", modules, blocks, more)
    if numbers.scores is not None:
        if numbers.scores.tasks:
            yield _scores(numbers.scores)
        if numbers.scores.others:
            yield _others(numbers.scores)


def _curves(numbers: RunNumbers) -> Table:
    named: list[tuple[str, Curve | None]] = [
        ("training loss", numbers.train_loss),
        ("held-out loss", numbers.held_out_loss),
        ("learning rate", numbers.learning_rate),
    ]
    table = Table(box=None, pad_edge=False)
    for column in ("curve", "", "first", "last", "lowest", "at step"):
        table.add_column(column, justify="left" if column in ("curve", "") else "right")
    losses = np.concatenate([curve.values for _, curve in named[:2] if curve is not None])
    for name, curve in named:
        if curve is None:
            continue
        values, at = curve.values, int(curve.values.argmin())
        ends = losses if name.endswith("loss") else values  # both losses on one scale
        bars = sparkline(values, float(ends.min()), float(ends.max()), CURVE)
        cells = [f"{value:.4g}" for value in (values[0], values[-1], values[at])]
        table.add_row(f"[bold]{name}[/]", bars, *cells, f"{int(curve.steps[at]):,}")
    return table


def _map(title: str, form: str, modules: list[str], blocks: list[int], grid: Numbers) -> Table:
    low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
    table = Table(box=None, pad_edge=False)
    table.add_column("module")
    table.add_column(f"{title}; block {blocks[0]} to {blocks[-1]}", no_wrap=True)
    table.add_column("least", justify="right")
    table.add_column("most", justify="right")
    for module, line in zip(modules, grid, strict=True):
        ends = [form.format(end) for end in (np.nanmin(line), np.nanmax(line))]
        table.add_row(f"[bold]{module}[/]", sparkline(line, low, high, MAP), *ends)
    return table


def _scores(scores: Scores) -> Table:
    def shown(pair: tuple[float, float | None] | None) -> str:
        return "-" if pair is None else f"{percent(pair[0])} ± {percent(pair[1])}"

    table = Table(box=None, pad_edge=False)
    for column in ("task", "base %", "with adapter %", "0 to 100 %: base o, with adapter ●"):
        table.add_column(
            column, justify="right" if column.endswith(" %") and column[0] != "0" else "left"
        )
    for task in scores.tasks:
        places = [" "] * (SCORES + 1)
        for mark, pair in (("o", task.before), ("●", task.after)):
            if pair is not None:
                places[round(pair[0] * (SCORES))] = mark
        bar = "".join(places)
        table.add_row(
            f"[bold]{escape(plain(task.task))}[/]",
            *(shown(pair) for pair in (task.before, task.after)),
            f"|{bar}|",
        )
    return table


def _others(scores: Scores) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("task", "measure", "base", "with adapter"):
        table.add_column(column, justify="left" if column in ("task", "measure") else "right")
    for other in scores.others:
        name = f"[bold]{escape(plain(other.task))}[/]"
        table.add_row(name, other.measure, other.before, other.after)
    return table


def sparkline(values: Numbers, low: float, high: float, width: int) -> str:
    """Return a line of bars, each as high as the mean of the values behind it.

    Args:
        values: Finite numbers; nan leaves a gap.
        low: What the lowest bar stands for.
        high: What the highest bar stands for.
        width: How many bars at most; fewer values have a bar each.
    """
    bars = []
    for behind in np.array_split(values, min(width, len(values))):
        finite = behind[np.isfinite(behind)]
        bars.append(block(finite.mean(), low, high) if len(finite) else " ")
    return "".join(bars)
