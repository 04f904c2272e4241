"""A comparison as tables: for the terminal, Markdown and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase

from san_llm.evaluate.compare import Comparison
from san_llm.evaluate.differences import LEVEL, Difference
from san_llm.evaluate.grids import Grid, latex_table, latex_text, markdown_table
from san_llm.protocol.published import Quoted
from san_llm.shown import nats, percent

SHOWN = 5  # changed rows that are listed; --json has all
LONGEST = 60  # characters of an answer there


def label(number: int) -> str:
    """Return the short name of a run: A, B, ..."""
    return ascii_uppercase[number] if number < len(ascii_uppercase) else f"R{number}"


def legend(comparison: Comparison) -> list[str]:
    """Return a line for each run: its label, its folder and what was evaluated."""
    return [
        f"{label(number)}  {run.name}: {run.about} ({run.protocol}, {run.prompt})"
        for number, run in enumerate(comparison.runs)
    ]


def grids(comparison: Comparison, names: Sequence[str] = ()) -> list[Grid]:
    """Return the accuracies in percent with standard errors, each run's differences, and quotes.

    Args:
        comparison: The comparison.
        names: Short names of the runs; default: their labels.
    """
    runs = comparison.runs
    names = names or [label(number) for number in range(len(runs))]
    first = names[0]
    rows = []
    for task in [*comparison.rows, *(["average"] if comparison.averaged else [])]:
        cells = (run.accuracies[task] for run in runs)
        rows.append((task, *(f"{percent(mean)} ± {percent(error)}" for mean, error in cells)))
    header = ("task", *names)
    tables = []
    if rows:
        rows.append(("no answer", *(str(run.unparseable) for run in runs)))
        tables.append(Grid(f"{comparison.metric}, percent", header, tuple(rows)))
    if runs[0].losses:
        losses = ((task, *(nats(*run.losses[task]) for run in runs)) for task in runs[0].losses)
        tables.append(Grid("loss, nats a token; less is better", header, tuple(losses)))
    for name, run in zip(names, runs, strict=True):
        if run.differences:
            interval = f"{LEVEL:.0%} interval"
            header = ("task", "difference", interval, f"only {name}", f"only {first}", "p")
            title = f"{name} - {first}, points"
            tables.append(Grid(title, header, tuple(map(_difference, run.differences))))
        if run.loss_differences:
            header = ("task", "difference", f"{LEVEL:.0%} interval", "p")
            title = f"{name} - {first}, nats a token; below 0 is better"
            tables.append(Grid(title, header, tuple(map(loss_cells, run.loss_differences))))
    if comparison.quoted:
        tables.append(published(comparison.quoted))
    return tables


def published(quoted: Sequence[Quoted]) -> Grid:
    """Return others' averages with what each was trained on, and a short name of the source."""
    rows = []
    for one in quoted:
        unknown = "-" if one.learned == "nothing" else "?"
        rows.append(
            (
                *(one.name, f"{one.average:.1f}"),
                unknown if one.share is None else f"{one.share:g} %",
                "-" if one.learned == "nothing" else one.learned,
                unknown if one.epochs is None else str(one.epochs),
                one.source.partition(",")[0],
            )
        )
    header = ("model (quoted)", "average", "trained", "loss on", "epochs", "source")
    return Grid("published, percent", header, tuple(rows))


def _difference(difference: Difference) -> tuple[str, ...]:
    return (
        difference.task,
        points(difference.difference),
        f"{points(difference.low)} to {points(difference.high)}",
        *("-" if n is None else str(n) for n in (difference.gained, difference.lost)),
        p_value(difference.p),
    )


def loss_cells(difference: Difference) -> tuple[str, ...]:
    """Return the cells of a difference of losses: task, difference, interval, p-value."""
    interval = f"{difference.low:+.4f} to {difference.high:+.4f}"
    return (difference.task, f"{difference.difference:+.4f}", interval, p_value(difference.p))


def points(fraction: float) -> str:
    """Return a difference of accuracies in percentage points, with its sign."""
    return f"{100 * fraction:+.1f}"


def p_value(p: float) -> str:
    """Return a p-value: three decimals, or one digit of a small one and its power of ten."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def remarks(comparison: Comparison) -> list[str]:
    """Return what the tables do not say: of the average, the changed rows, notes and sources."""
    lines = _of_average(comparison)
    total = sum(comparison.rows.values())
    for number, run in enumerate(comparison.runs[1:] if total else (), start=1):
        count, name = len(run.changes), label(number)
        lines.append(f"{name} answers {count:,} of {total:,} rows otherwise than A")
        for change in run.changes[:SHOWN]:
            answers = f"A {_short(change.first)}, {name} {_short(change.other)}"
            right = _short(change.answer)
            lines.append(f"  {change.task} row {change.row}: {answers}; right is {right}")
        if count > SHOWN:
            lines.append(f"  and {count - SHOWN:,} more; --json has them all")
    lines += [f"note: {note}" for note in comparison.notes]
    lines += [f"note: {line}" for line in _unlike_quoted(comparison)]
    return [*lines, *sources(comparison.quoted)]


def _short(answer: str | None) -> str:
    """Return an answer on one line, cut where it is a whole text."""
    words = " ".join((answer or "no answer").split())
    return words if len(words) <= LONGEST else f"{words[:LONGEST]}..."


def _of_average(comparison: Comparison) -> list[str]:
    lines = []
    counted = comparison.averaged
    if len(counted) > 1:
        lines.append(
            "average: difference and interval weigh tasks alike; counts and p pool all rows"
        )
    if counted and (len(counted) < len(comparison.rows) or comparison.runs[0].losses):
        lines.append(f"average: over {', '.join(counted)}, whose answers are right or wrong")
    return lines


def sources(quoted: Sequence[Quoted]) -> list[str]:
    """Return a line for each source, and for each number that has to be taken with care."""
    whence = dict.fromkeys(one.source for one in quoted)
    lines = [f"quoted, not measured here: {source}" for source in whence]
    return lines + [f"{one.name} (quoted): {one.note}" for one in quoted if one.note]


def _unlike_quoted(comparison: Comparison) -> list[str]:
    """Return a line for each run that learned otherwise than quoted numbers did."""
    trained = [one for one in comparison.quoted if one.learned != "nothing"]
    lines = []
    for number, run in enumerate(comparison.runs):
        if run.learned is None or not trained:
            continue
        like = sum(
            one.epochs is not None and (one.learned, one.epochs) == (run.learned, run.epochs)
            for one in trained
        )
        time = "some steps" if run.epochs is None else f"{run.epochs:g} epochs"
        lines.append(
            f"{label(number)} learned the {run.learned} for {time}, as did {like} of the "
            f"{len(trained)} quoted; of the others one of these differs or was not found out"
        )
    return lines


def markdown(comparison: Comparison) -> str:
    """Return Markdown: the tables, and below them what the terminal says besides."""
    lines = [*legend(comparison), *remarks(comparison)]
    about = [re.sub(r"^( *)", r"\1- ", text) for text in lines]  # indented: a list in the list
    return "\n\n".join([*map(markdown_table, grids(comparison)), "\n".join(about)])


def latex(comparison: Comparison) -> str:
    """Return LaTeX tabulars, for the package booktabs, with notes below in small print.

    What the runs are is in comments: a text has its own names for them.
    """
    about = [f"% {text}" for text in [*legend(comparison), *sources(comparison.quoted)]]
    parts = ["\n".join(about), *map(latex_table, grids(comparison))]
    if notes := _footnotes(comparison):
        small = (rf"\noindent {latex_text(note)}\par" for note in notes)
        parts.append("\n".join([r"{\footnotesize", *small, "}"]))
    return "\n\n".join(parts)


def _footnotes(comparison: Comparison) -> list[str]:
    """Return what a printed table must not hide, with the runs' labels for their folders."""
    lines = _of_average(comparison)
    first = comparison.runs[0]
    for number, run in enumerate(comparison.runs):
        name = label(number)
        if run.protocol != first.protocol:
            lines.append(f"{name}: protocol {run.protocol}, not {first.protocol}")
        if run.prompt != first.prompt:
            lines.append(f"{name}: prompts {run.prompt}, not {first.prompt}")
        lines += [f"{name}: {note}" for note in run.notes]
    return [*lines, *_unlike_quoted(comparison)]
