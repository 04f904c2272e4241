"""A run's drawings as the page holds them: each a picture of its own, inside of the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from san_llm.page.facts import Missing


@dataclass(frozen=True)
class Drawing:
    """One drawing.

    Attributes:
        title: What is seen, for its caption and for who cannot see it.
        source: A ``data:`` address with the SVG.
    """

    title: str
    source: str


def drawings(run: Path) -> tuple[dict[str, Drawing], list[Missing]]:
    """Return what can be drawn of a run, by name, and what hinders it."""
    return {}, []
