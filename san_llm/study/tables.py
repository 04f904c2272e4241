"""A study's tables: its plan, what each variant came to, how far each is from the baseline."""

from __future__ import annotations

from collections.abc import Sequence

from rich.filesize import decimal

from san_llm.evaluate.compare_tables import p_value
from san_llm.evaluate.differences import LEVEL
from san_llm.evaluate.grids import Grid, latex_table, markdown_table
from san_llm.shown import duration
from san_llm.study.plan import StudyPlan
from san_llm.study.record import Measure, StudyResult, VariantResult
from san_llm.study.statistics import ALPHA, POWER, Apart, Spread

NONE = "-"


def plan_grid(plan: StudyPlan) -> Grid:
    """Return what a study will take, a line a variant."""
    rows = [
        (
            one.variant,
            f"{one.trained:,}",
            str(one.runs),
            str(one.done),
            NONE if one.seconds is None else duration(one.seconds),
            f"{one.memory / 1e9:.1f}",
            decimal(one.disk * one.runs),
        )
        for one in plan.variants
    ]
    header = ("variant", "trained", "runs at most", "there", "time of one", "memory, GB", "disk")
    return Grid("plan", header, tuple(rows))


def plan_lines(plan: StudyPlan) -> list[str]:
    """Return what the plan comes to, in words."""
    left = plan.runs - plan.done
    hours = plan.hours
    when = (
        "how long they take is known when the first has ended"
        if hours is None
        else (f"about {hours:.1f} hours, by those that have ended")
    )
    return [
        f"{plan.runs} runs at most, {plan.done} there; the {left} others, {plan.at_once} at once: "
        f"{when}",
        f"at most {plan.memory / 1e9:.1f} GB of memory at once, {decimal(plan.disk)} of disk",
        *(f"variants.{one.variant}: {one.note}" for one in plan.variants if one.note),
    ]


def grids(result: StudyResult) -> list[Grid]:
    """Return the table of all variants, then one of differences for each measure."""
    return [_overview(result), *(g for m in result.measures if (g := _differences(result, m)))]


def _overview(result: StudyResult) -> Grid:
    header = ("variant", "trained", "rate", "seeds", *(m.name for m in result.measures))
    header = (*header, "time", "GB")
    rows = []
    if any(measure.base is not None for measure in result.measures):
        values = (value(measure, measure.base) for measure in result.measures)
        rows.append(("base", NONE, NONE, NONE, *values, NONE, NONE))
    if any(measure.guessing is not None for measure in result.measures):
        values = (value(measure, measure.guessing) for measure in result.measures)
        rows.append(("guessing", NONE, NONE, NONE, *values, NONE, NONE))
    rows += [_line(result, one) for one in result.variants]
    arrows = ", ".join(m.name for m in result.measures if m.lower_is_better)
    title = f"{result.name}: mean ± standard deviation over seeds; baseline {result.baseline}"
    return Grid(title + (f"; less is better: {arrows}" if arrows else ""), header, tuple(rows))


def _line(result: StudyResult, one: VariantResult) -> tuple[str, ...]:
    return (
        one.variant,
        NONE if one.trained is None else f"{one.trained:,}",
        NONE if one.rate is None else f"{one.rate:g}",
        f"{len(one.seeds)} of {len(result.seeds)}",
        *(_spread(measure, one.spreads.get(measure.name)) for measure in result.measures),
        NONE if one.seconds is None else duration(one.seconds.mean),
        NONE if one.memory is None else f"{one.memory / 1e9:.1f}",
    )


def value(measure: Measure, number: float | None, sign: bool = False) -> str:
    """Return a measure's number: shares in percent, nats with four decimals."""
    if number is None:
        return NONE
    form = "+" if sign else ""
    return f"{100 * number:{form}.1f}" if measure.unit == "share" else f"{number:{form}.4f}"


def _spread(measure: Measure, told: Spread | None) -> str:
    if told is None:
        return NONE
    mean = value(measure, told.mean)
    return mean if told.deviation is None else f"{mean} ± {value(measure, told.deviation)}"


def _differences(result: StudyResult, measure: Measure) -> Grid | None:
    rows = [
        (one.variant, *_apart(measure, one.apart[measure.name]))
        for one in result.variants
        if measure.name in one.apart
    ]
    if not rows:
        return None
    less = ", less is better" if measure.lower_is_better else ""
    unit = "points" if measure.unit == "share" else "nats a token"
    header = (
        *("variant", "difference", f"{LEVEL:.0%} between seeds", "p, seeds"),
        *("p, these runs", "Holm", "least seen"),
    )
    return Grid(f"{measure.name} - {result.baseline}, {unit}{less}", header, tuple(rows))


def _apart(measure: Measure, told: Apart) -> tuple[str, ...]:
    interval = NONE
    if told.low is not None and told.high is not None:
        interval = f"{value(measure, told.low, True)} to {value(measure, told.high, True)}"
    return (
        value(measure, told.difference, True),
        interval,
        *(NONE if p is None else p_value(p) for p in (told.p_seeds, told.p_rows, told.p_rows_holm)),
        value(measure, told.least),
    )


def remarks(result: StudyResult) -> list[str]:
    """Return how the tables are to be read, and what failed or is still missing."""
    several = max((len(one.seeds) for one in result.variants), default=0)
    lines = []
    if not result.complete:
        lines.append("not all of it is there yet: the same command goes on")
    if several > 1:
        lines.append(
            f"between seeds: the paired t interval of the seeds' differences; with "
            f"{len(result.seeds)} seeds an exact test over them cannot reach a p below "
            f"{result.smallest_p:.3g}"
            + (", so the interval has to do" if result.smallest_p > ALPHA else "")
        )
        lines.append(
            "p, these runs: rows turned at random 9,999 times, each row's difference averaged over "
            "the seeds; Holm: the same for all comparisons of the table together"
        )
        lines.append(
            f"least seen: the difference that so many seeds show in {POWER:.0%} of all studies"
        )
    for one in result.variants:
        lines += [f"failed: {name}: {reason}" for name, reason in one.failed.items()]
    return lines


def markdown(result: StudyResult) -> str:
    """Return the tables and remarks as Markdown."""
    about = "\n".join(f"- {line}" for line in remarks(result))
    return "\n\n".join([*map(markdown_table, grids(result)), about])


def latex(result: StudyResult) -> str:
    """Return the tables as LaTeX tabulars, for the package booktabs; remarks are comments."""
    about = "\n".join(f"% {line}" for line in remarks(result))
    return "\n\n".join([*map(latex_table, grids(result)), about])


def rate_grid(result: StudyResult) -> Grid:
    """Return the held-out losses of each variant's rates."""
    rows: list[tuple[str, ...]] = []
    for one in result.variants:
        for rate, loss in one.curve:
            chosen = "chosen" if rate == one.rate and len(one.curve) > 1 else ""
            shown = "failed" if loss is None else f"{loss:.4f}"
            rows.append((one.variant, f"{rate:g}", shown, chosen))
    return Grid("held-out loss by rate", ("variant", "rate", "loss", ""), tuple(rows))


def all_grids(result: StudyResult) -> Sequence[Grid]:
    """Return every table of a study, the rates' last where there was a choice."""
    rates = rate_grid(result)
    return [*grids(result), *([rates] if rates.rows else [])]
