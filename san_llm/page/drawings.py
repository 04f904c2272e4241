"""A run's drawings as the page holds them: each a picture of its own, inside of the file."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass

from san_llm.errors import InputError
from san_llm.page.facts import Facts, Missing
from san_llm.plots import as_svg, check_matplotlib, figures
from san_llm.run_numbers import numbers_of


@dataclass(frozen=True)
class Drawing:
    """One drawing.

    Attributes:
        title: What is seen, for who cannot see it.
        source: A ``data:`` address with the SVG: as a picture it can neither run a script nor
            disturb the page, and its names are its own.
    """

    title: str
    source: str


def drawings(facts: Facts) -> tuple[dict[str, Drawing], list[Missing]]:
    """Return what can be drawn of a run, by name, and what hinders it."""
    try:
        check_matplotlib()
    except InputError as error:
        return {}, [Missing(f"It has no drawings: {error}.")]
    drawn = {}
    for name, figure in figures(numbers_of(facts.folder)).items():
        encoded = b64encode(as_svg(figure).encode()).decode()
        drawn[name] = Drawing(figure.get_suptitle(), f"data:image/svg+xml;base64,{encoded}")
    return drawn, []
