"""The drawings of a run, as matplotlib figures: for ``san-llm show`` and for reports.

Readable without colour: maps of shares and sizes grow darker steadily, a side of 1 is told by place
or by a sign as well, curves differ in their marks. A title says what is seen, in numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from san_llm.architectures.lookup import place_of, short_label
from san_llm.errors import InputError
from san_llm.look.figures import (
    ABOVE,
    BELOW,
    FAR,
    INK,
    LESS,
    MORE,
    SIDES,
    SOFT,
    check_matplotlib,
    finish,
    new_figure,
    plain_ticks,
    save_figures,
    styled,
)
from san_llm.look.numbers import (
    Curve,
    RunNumbers,
    Scores,
    SynapseScale,
    block_maps,
    in_blocks,
    numbers_of,
)
from san_llm.models.weights import Numbers
from san_llm.san.formulas import STILL
from san_llm.shown import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure


POINTS = 400  # rows and columns of a weight's map at most
LONG = 400  # steps
GAMMA = "\N{GREEK SMALL LETTER GAMMA}"


def draw(run: Path, weight: str | None = None) -> dict[str, Figure]:
    """Return the drawings that a run has the data for, by name.

    Args:
        run: The run's folder.
        weight: See :func:`san_llm.look.numbers.numbers_of`.

    Raises:
        InputError: when the folder is not a run, or matplotlib is not installed.
    """
    return figures(numbers_of(run, weight))


def figures(numbers: RunNumbers) -> dict[str, Figure]:
    """Return a drawing for each thing that there are numbers of: loss, gamma, ... by name.

    Raises:
        InputError: when matplotlib is not installed.
    """
    check_matplotlib()
    drawn: dict[str, Figure] = {}
    with styled():
        if numbers.train_loss is not None:
            drawn["loss"] = _loss(numbers, numbers.train_loss)
        if numbers.gammas is not None:
            drawn["gamma"] = _gamma(numbers.gammas)
            drawn["distribution"] = _distribution(numbers.gammas)
        if numbers.synapse is not None:
            drawn["synapse"] = _synapse(numbers.synapse)
        if numbers.scores is not None and numbers.scores.tasks:
            drawn["scores"] = _scores(numbers.scores)
        for figure in drawn.values():
            finish(figure, numbers.title)
    return drawn


def save(numbers: RunNumbers, folder: Path, overwrite: bool) -> list[Path]:
    """Write every drawing as PNG and SVG into a folder, which appears whole, and return the files.

    Raises:
        InputError: when there is nothing to draw, the folder has files and ``overwrite`` is not
            set, or they are not drawings; or without matplotlib.
    """
    drawn = figures(numbers)
    if not drawn:
        raise InputError(f"nothing to draw yet: {'; '.join(numbers.left_out)}")
    return save_figures(drawn, folder, overwrite)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _loss(numbers: RunNumbers, train: Curve) -> Figure:
    held_out, rate = numbers.held_out_loss, numbers.learning_rate
    title = f"Training loss went from {train.values[0]:.3g} to {train.values[-1]:.3g}"
    title += f" in {int(train.steps[-1]):,} steps"
    if held_out is not None:
        best = int(held_out.values.argmin())
        title += f"; held-out at best {held_out.values[best]:.3g}"
    figure = new_figure(8, 5, title)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    thin = 1.4 if len(train.steps) < LONG else 0.5  # a long noisy curve would hide the other
    top.plot(train.steps, train.values, color=BELOW, lw=thin, label="training, each step's batch")
    if held_out is not None:
        last: dict[str, Any] = {
            "color": ABOVE,
            "ls": "--",
            "marker": "o",
            "ms": 7 if len(held_out.steps) < 20 else 4,
            "label": "held-out rows",
        }
        top.plot(held_out.steps, held_out.values, **last)
    top.legend(frameon=False)
    if min(curve.values.min() for curve in (train, held_out) if curve is not None) > 0:
        top.set_yscale("log")
        for axis in (top.yaxis.set_major_formatter, top.yaxis.set_minor_formatter):
            axis(plain_ticks())
        top.set_ylabel("loss (nats a token, log scale)")
    else:
        top.set_ylabel("loss (nats a token)")
    top.grid(axis="y", color="#dddddd", lw=0.6)
    if rate is not None:
        below.plot(rate.steps, rate.values, color=INK, lw=1.4)
    below.set_ylim(bottom=0)
    below.set_ylabel("learning\nrate")
    below.set_xlabel("optimizer step")
    below.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _gamma(gammas: Mapping[str, Numbers]) -> Figure:
    """Return the paper's picture of LTP and LTD: a cell for each module of each block."""
    modules, blocks, maps = block_maps(
        gammas,
        lambda g: 100 * (g > 1 + STILL).mean(),
        lambda g: 100 * (g < 1 - STILL).mean(),
        lambda g: np.abs(g - 1).mean(),
        lambda g: g.mean(),
    )
    more, less, far, mean = (grid.T for grid in maps)  # (blocks, modules): drawn upwards
    every = np.concatenate(list(gammas.values()))
    title = f"{_percent((every > 1 + STILL).mean())} of the channels potentiated, "
    title += f"{_percent((every < 1 - STILL).mean())} depressed; "
    title += f"{GAMMA} is on average {np.abs(every - 1).mean():.2g} away from 1"
    figure = new_figure(11, max(4.5, min(10, 3 + 0.14 * len(blocks))), title)
    panels = figure.subplots(1, 4, sharey=True)

    shares = _limits(np.stack([more, less]))  # one scale for the two that belong together
    minus = "\N{MINUS SIGN}"
    for panel, label, colours, grid, norm in zip(
        panels,
        (
            f"LTP: channels\nwith {GAMMA} > 1 (%)",
            f"LTD: channels\nwith {GAMMA} < 1 (%)",
            f"distance from 1:\nmean |{GAMMA} {minus} 1|",
            f"mean {GAMMA}\n(+ above, {minus} below 1)",
        ),
        (MORE, LESS, FAR, SIDES),
        (more, less, far, mean),
        (shares, shares, _limits(far), _around_one(mean)),
        strict=True,
    ):
        image = panel.imshow(
            grid, cmap=colours, norm=norm, aspect="auto", interpolation="nearest", origin="lower"
        )
        bar = figure.colorbar(image, ax=panel, location="bottom", pad=0.02)
        bar.ax.locator_params(nbins=3)
        panel.set_title(label)
        panel.set_xticks(range(len(modules)), [short_label(name) for name in modules], rotation=90)
    _mark_sides(panels[-1], mean)
    step = max(1, round(len(blocks) / 8))
    shown = range(0, len(blocks), step)
    panels[0].set_yticks(list(shown), [str(blocks[at]) for at in shown])
    panels[0].set_ylabel("block (0 is next to the embedding)")
    return figure


def _limits(grid: Numbers) -> Any:
    from matplotlib.colors import Normalize

    return Normalize(float(np.nanmin(grid)), float(np.nanmax(grid)))


def _around_one(grid: Numbers) -> Any:
    from matplotlib.colors import CenteredNorm

    widest = float(np.nanmax(np.abs(grid - 1)))
    return CenteredNorm(1, max(widest, STILL))


def _mark_sides(panel: Any, grid: Numbers) -> None:
    """Write the side of 1 into each cell, which a diverging map does not tell in grey."""
    widest = np.nanmax(np.abs(grid - 1))
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value) and abs(value - 1) > max(STILL, widest / 10):
            sign = "+" if value > 1 else "\N{MINUS SIGN}"
            ink = "white" if abs(value - 1) > 0.55 * widest else INK
            panel.text(column, row, sign, ha="center", va="center", size=7, color=ink)


def _distribution(gammas: Mapping[str, Numbers]) -> Figure:
    modules, _, placed = in_blocks(gammas)
    kinds = {
        module: np.concatenate([g for (_, name), g in placed.items() if name == module])
        for module in modules
    }
    every = np.concatenate(list(kinds.values()))
    low, high = np.quantile(every, [0.025, 0.975])
    far = max(kinds, key=lambda module: float(np.abs(kinds[module] - 1).max()))
    furthest = kinds[far][np.abs(kinds[far] - 1).argmax()]
    title = f"95 % of the {GAMMA} lie between {low:.3f} and {high:.3f}; "
    title += f"the furthest is {furthest:.3f}, in {short_label(far)}"
    width = max(float(np.quantile(np.abs(values - 1), 0.999)) for values in kinds.values())
    edges = np.linspace(1 - 1.05 * max(width, STILL), 1 + 1.05 * max(width, STILL), 81)
    columns = min(4, len(modules))
    lines = -(-len(modules) // columns)
    figure = new_figure(2.6 * columns, 1 + 2.2 * lines, title)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True)
    for panel, module in zip(panels.flat, modules, strict=False):
        values = kinds[module]
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        shares = 100 * counts / len(values)
        middle = (edges[1:] + edges[:-1]) / 2
        for side, colour in ((middle < 1, BELOW), (middle > 1, ABOVE)):
            panel.fill_between(middle, np.where(side, shares, 0), step="mid", color=colour, lw=0)
        panel.axvline(1, color=INK, lw=1)
        panel.set_title(short_label(module), weight="bold")
        panel.set_ylim(0, 1.35 * shares.max())
        for x, name, share in (
            (0.02, "LTD", (values < 1 - STILL).mean()),
            (0.98, "LTP", (values > 1 + STILL).mean()),
        ):
            text = f"{name}\n{_percent(share)}"
            end = "left" if x < 0.5 else "right"
            panel.text(x, 0.98, text, transform=panel.transAxes, ha=end, va="top", size=10)
        panel.locator_params(axis="y", nbins=3)
        panel.locator_params(axis="x", nbins=3)
        panel.tick_params(labelbottom=True)
    for panel in list(panels.flat)[len(modules) :]:
        panel.set_visible(False)
    figure.supxlabel(f"neuron scale {GAMMA} of a channel; all blocks", size=11)
    figure.supylabel("share of channels (%)", size=11)
    return figure


def _synapse(scale: SynapseScale) -> Figure:
    """Return a map of each weight's factor, rows and columns sorted, beside the two vectors."""
    rows, columns = _thinned(scale.gamma), _thinned(scale.s)
    factors = scale.gamma[:, None] * _thinned(scale.s)  # one side thinned is precise enough
    up = float((factors > 1 + STILL).mean())
    block, name = place_of(scale.module)
    where = "" if block is None else f"of block {block}"
    title = f"{short_label(name)} {where}: {_percent(up)} of its weights are strengthened, "
    title += f"{_percent(float((factors < 1 - STILL).mean()))} weakened"
    figure = new_figure(8.5, 6.5, title)
    grid = figure.add_gridspec(2, 2, width_ratios=[1, 4.5], height_ratios=[1, 4.5])
    panel = figure.add_subplot(grid[1, 1])
    left = figure.add_subplot(grid[1, 0], sharey=panel)
    top = figure.add_subplot(grid[0, 1], sharex=panel)
    high, wide = len(scale.gamma), len(scale.s)
    shown = rows[:, None] * columns
    image = panel.imshow(
        shown, cmap=SIDES, norm=_around_one(shown), aspect="auto", extent=(0, wide, 0, high)
    )
    across = (np.arange(len(columns)) + 0.5) * wide / len(columns)
    along = (np.arange(len(rows)) + 0.5) * high / len(rows)
    if shown.min() < 1 < shown.max() and min(shown.shape) > 1:
        lines = panel.contour(across, along[::-1], shown, levels=[1], colors=INK, linewidths=1.2)
        panel.clabel(lines, fmt={1: "1 (unchanged)"}, fontsize=10)
    for corner, x, y, end, bottom in (
        (shown[0, 0], 0.03, 0.96, "left", "top"),
        (shown[-1, -1], 0.97, 0.04, "right", "bottom"),
    ):
        word = "strengthened" if corner > 1 else "weakened"
        look: dict[str, Any] = {"ha": end, "va": bottom, "color": "white", "weight": "bold"}
        if abs(corner - 1) > 0.7 * np.abs(shown - 1).max():  # dark enough to be written on
            panel.text(x, y, word, transform=panel.transAxes, **look)
    left.plot(rows, along[::-1], color=INK, lw=1.4)
    left.axvline(1, color=SOFT, lw=0.8, ls=":")
    left.set_xlabel(f"{GAMMA} of {short_label(name)}")
    left.set_ylabel(f"rows: outputs, by {GAMMA}")
    top.plot(across, columns, color=INK, lw=1.4)
    top.axhline(1, color=SOFT, lw=0.8, ls=":")
    top.set_ylabel(_source(scale.anterior, block))
    panel.set_xlabel("columns: inputs, by s")
    for axis in (top, panel):
        axis.tick_params(labelbottom=axis is panel)
    panel.tick_params(labelleft=False)
    figure.colorbar(image, ax=[panel], label=f"a weight's factor {GAMMA} \N{MULTIPLICATION SIGN} s")
    return figure


def _source(anterior: str | None, block: int | None) -> str:
    """Return what the columns of a weight in this block are scaled by."""
    if anterior is None:
        return "s: its own"
    fed, name = place_of(anterior)
    return f"s: {GAMMA} of\n{short_label(name)}" + ("" if fed == block else f"\nof block {fed}")


def _thinned(values: Numbers) -> Numbers:
    """Return values sorted downwards, as at most ``POINTS`` quantiles: none is averaged away."""
    ordered = np.sort(values)[::-1]
    places = np.linspace(0, len(ordered) - 1, min(POINTS, len(ordered)))
    thinned: Numbers = ordered[np.round(places).astype(int)]
    return thinned


def _scores(scores: Scores) -> Figure:
    tasks = scores.tasks
    last = tasks[-1]
    many = f"over {len(tasks) - 1} tasks" if len(tasks) > 1 else f"on {last.task}"
    title = f"{100 * last.after[0]:.1f} % right {many}"
    if last.before is not None:
        title += f", where the base has {100 * last.before[0]:.1f} %"
    figure = new_figure(8.5, 1.9 + 0.42 * len(tasks), title)
    axis = figure.subplots()
    places = np.arange(len(tasks))[::-1].astype(float)
    sides = [("with adapter", [task.after for task in tasks], "s", ABOVE, ABOVE, 0.12)]
    if last.before is not None:
        before = [task.before for task in tasks if task.before is not None]
        sides.insert(0, ("base", before, "o", "white", INK, -0.12))
    for (name, accuracies, marker, fill, ink, shift), lost in zip(
        sides, scores.no_answer[-len(sides) :], strict=True
    ):
        label = f"{name}: no answer in {lost} of {scores.rows} outputs"
        axis.errorbar(
            [100 * value for value, _ in accuracies],
            places - shift,
            xerr=[100 * (error or 0) for _, error in accuracies],
            label=label if scores.protocol == "generate" else name,
            fmt=marker,
            ms=7,
            mfc=fill,
            color=ink,
            capsize=3,
            lw=1.3,
        )
    known = [(task.guessing, place) for task, place in zip(tasks, places, strict=True)]
    marks = [(100 * share, place) for share, place in known if share is not None]
    if marks:
        at, heights = np.transpose(marks)
        mean = " on average" if len(tasks) > 1 else ""
        known_mean = "" if last.guessing is None else f": {100 * last.guessing:.1f} %{mean}"
        label = f"guessing{known_mean}"
        axis.vlines(at, heights - 0.3, heights + 0.3, colors=INK, ls=":", lw=1.3, label=label)
    if len(tasks) > 1:
        axis.axhline(0.5, color=SOFT, lw=0.8)
    axis.set_yticks(places, [plain(task.task) for task in tasks])
    axis.set_ylim(-0.6, len(tasks) - 0.4)
    axis.set_xlim(-1, 101)
    axis.set_xlabel(f"accuracy on {plain(scores.data)} (%); bars: one standard error either way")
    axis.grid(axis="x", color="#dddddd", lw=0.6)
    axis.set_axisbelow(True)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, ncols=2, fontsize=10)
    return figure
