"""A table as texts, and how it is drawn: in the terminal, in Markdown, in LaTeX."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
} | {character: f"\\{character}" for character in "&%$#_{}"}


@dataclass(frozen=True)
class Grid:
    """A table as texts; the first column is aligned to the left."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def drawn(grid: Grid) -> Table:
    """Return a grid for the terminal."""
    table = Table(title=grid.title, title_justify="left")
    for number, name in enumerate(grid.header):
        table.add_column(escape(name), justify="right" if number else "left")
    for row in grid.rows:
        table.add_row(*map(escape, row))
    return table


def markdown_table(grid: Grid) -> str:
    """Return a grid as Markdown, its title above it."""

    def line(cells: tuple[str, ...]) -> str:
        escaped = (cell.replace("|", "\\|") for cell in cells)
        return f"| {' | '.join(escaped)} |"

    rule = ("---", *("--:",) * (len(grid.header) - 1))
    return "\n".join([f"{grid.title}:\n", *map(line, (grid.header, rule, *grid.rows))])


def latex_text(text: str) -> str:
    """Return a text with what LaTeX would read escaped."""
    return "".join(_LATEX.get(character, character) for character in text)


def latex_table(grid: Grid) -> str:
    """Return a grid as a LaTeX tabular, for the package booktabs; its title is a comment."""

    def line(cells: tuple[str, ...]) -> str:
        minus = (re.sub(r"(?<!\w)-(?=\d)", "$-$", latex_text(cell)) for cell in cells)
        return " & ".join(minus) + r" \\"

    parts = [
        f"% {grid.title}",
        rf"\begin{{tabular}}{{l{'r' * (len(grid.header) - 1)}}}",
        *(r"\toprule", line(grid.header), r"\midrule"),
        *map(line, grid.rows),
        *(r"\bottomrule", r"\end{tabular}"),
    ]
    return "\n".join(parts)
