"""A study's pictures: measures by trained numbers, curves over rates, forgetting beside gain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from san_llm.evaluate.differences import LEVEL
from san_llm.look.figures import (
    ABOVE,
    BELOW,
    INK,
    SOFT,
    check_matplotlib,
    finish,
    new_figure,
    plain_ticks,
    save_figures,
    styled,
)
from san_llm.recipe.task_file import FORGETTING
from san_llm.shown import plain
from san_llm.study.record import HELD_OUT, Measure, StudyResult, VariantResult
from san_llm.study.statistics import t_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = "osD^vP*Xhp<>"  # told apart without colour
COLOURS = (BELOW, ABOVE, INK, SOFT)


def draw_study(result: StudyResult) -> dict[str, Figure]:
    """Return the drawings that a study has the data for, by name.

    Raises:
        InputError: when matplotlib is not installed.
    """
    check_matplotlib()
    drawn: dict[str, Figure] = {}
    with styled():
        if any(one.spreads for one in result.variants):
            drawn["measures"] = _measures(result)
        if any(len(one.curve) > 1 for one in result.variants):
            drawn["rates"] = _rates(result)
        if any(FORGETTING in one.spreads for one in result.variants):
            drawn["forgetting"] = _forgetting(result)
        for figure in drawn.values():
            finish(figure, result.name)
    return drawn


def save_study_drawings(result: StudyResult, folder: Path) -> list[Path]:
    """Write the drawings into a folder, in place of older ones, and return the files."""
    return save_figures(draw_study(result), folder, overwrite=True)


def _look(number: int) -> dict[str, Any]:
    return {"marker": MARKS[number % len(MARKS)], "color": COLOURS[number % len(COLOURS)], "ms": 7}


def _measures(result: StudyResult) -> Figure:
    """Return a panel a measure: its mean and interval over seeds, against trained numbers."""
    measures = result.measures
    columns = min(3, len(measures))
    lines = -(-len(measures) // columns)
    seeds = max(len(one.seeds) for one in result.variants)
    title = f"{len(result.variants)} variants over {seeds} seeds"
    title += f"; bars: {LEVEL:.0%} interval of the mean" if seeds > 1 else ""
    figure = new_figure(4.2 * columns, 0.9 + 3.4 * lines, title)
    panels = figure.subplots(lines, columns, squeeze=False)
    for panel, measure in zip(panels.flat, measures, strict=False):
        for number, one in enumerate(result.variants):
            _point(panel, measure, one, number)
        for level, name in ((measure.base, "base"), (measure.guessing, "guessing")):
            if level is not None and _near(result, measure, level):
                panel.axhline(_shown(measure, level), color=SOFT, ls=":", lw=1.2)
                panel.annotate(
                    name,
                    (0.99, _shown(measure, level)),
                    size=9,
                    color=SOFT,
                    xycoords=("axes fraction", "data"),
                    ha="right",
                    va="bottom",
                )
        _log(panel, (1, 3), short=True)
        panel.set_title(plain(measure.name), weight="bold")
        better = "less is better" if measure.lower_is_better else "more is better"
        panel.set_ylabel(f"{'%' if measure.unit == 'share' else 'nats a token'} ({better})")
        panel.set_xlabel("trained numbers")
        panel.grid(axis="y", color="#dddddd", lw=0.6)
    for panel in list(panels.flat)[len(measures) :]:
        panel.set_visible(False)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, frameon=False, fontsize=10)
    return figure


def _log(axis: Axes, digits: tuple[int, ...], short: bool = False) -> None:
    """Give an axis a logarithmic scale with labels in plain numbers."""
    axis.set_xscale("log")
    for set_formatter in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        set_formatter(plain_ticks(digits, short))


def _near(result: StudyResult, measure: Measure, level: float) -> bool:
    """Return whether a level lies so near to what was measured that drawing it hides nothing."""
    means = [
        one.spreads[measure.name].mean for one in result.variants if measure.name in one.spreads
    ]
    low, high = min(means), max(means)
    return low - 2 * (high - low) <= level <= high + 2 * (high - low)


def _shown(measure: Measure, number: float) -> float:
    return 100 * number if measure.unit == "share" else number


def _point(panel: Axes, measure: Measure, one: VariantResult, number: int) -> None:
    told = one.spreads.get(measure.name)
    if told is None or one.trained is None:
        return
    interval = t_interval(told.values)
    reach = 0.0 if interval is None else (interval[1] - interval[0]) / 2
    panel.errorbar(
        [one.trained], [_shown(measure, told.mean)], yerr=[_shown(measure, reach)],
        fmt="none", ecolor=_look(number)["color"], capsize=3, lw=1.3,
    )  # fmt: skip
    panel.plot(
        [one.trained],
        [_shown(measure, told.mean)],
        ls="",
        label=plain(one.variant),
        **_look(number),
    )


def _rates(result: StudyResult) -> Figure:
    """Return each variant's held-out loss over its rates; the chosen one is ringed."""
    curves = [(n, one) for n, one in enumerate(result.variants) if len(one.curve) > 1]
    figure = new_figure(8, 5, "Held-out loss by learning rate; the chosen rate is ringed")
    axis = figure.subplots()
    for number, one in curves:
        known = [(rate, loss) for rate, loss in one.curve if loss is not None]
        failed = sum(loss is None for _, loss in one.curve)
        label = plain(one.variant) + (f" ({failed} failed)" if failed else "")
        rates, losses = [rate for rate, _ in known], [loss for _, loss in known]
        axis.plot(rates, losses, lw=1.3, label=label, **_look(number))
        chosen = [(rate, loss) for rate, loss in known if rate == one.rate]
        axis.plot(
            *zip(*chosen, strict=True) if chosen else ([], []),
            ls="",
            marker="o",
            ms=14,
            mfc="none",
            color=INK,
        )
    _log(axis, (1, 2, 3, 5))
    axis.set_xlabel("learning rate")
    axis.set_ylabel("held-out loss (nats a token)")
    axis.grid(axis="y", color="#dddddd", lw=0.6)
    axis.legend(frameon=False, fontsize=10)
    return figure


def _forgetting(result: StudyResult) -> Figure:
    """Return what each variant forgets beside what it gains: the fall of the held-out loss."""
    figure = new_figure(7, 5, "What is forgotten beside what is gained; each seed and the mean")
    axis = figure.subplots()
    for number, one in enumerate(result.variants):
        lost, gained = one.spreads.get(FORGETTING), one.spreads.get(HELD_OUT)
        if lost is None or gained is None:
            continue
        look = _look(number)
        axis.plot(lost.values, gained.values, ls="", **(look | {"ms": 4, "alpha": 0.5}))
        axis.plot([lost.mean], [gained.mean], ls="", label=plain(one.variant), **(look | {"ms": 9}))
    axis.axvline(0, color=SOFT, lw=0.8, ls=":")
    axis.set_xlabel("forgetting: rise of the loss on neutral text (nats a token)")
    axis.set_ylabel("held-out loss (nats a token)")
    axis.grid(color="#dddddd", lw=0.6)
    axis.legend(frameon=False, fontsize=10)
    return figure
