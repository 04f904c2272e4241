"""Read the text blocks of the pocket set's fact modules into facts with ids, grouped in units.

A unit is what the split moves: a cluster whose members serve as one another's wrong choices, or a
single fact of a family that is divided fact by fact.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """One thing that a row can ask about.

    Attributes:
        id: Unique over the whole fact base.
        fields: Its columns, in the order of the block it stands in.
        group: Facts with the same group are too alike to be each other's wrong choices.
    """

    id: str
    fields: tuple[str, ...]
    group: str = ""


@dataclass(frozen=True)
class Unit:
    """Facts that stay on one side.

    Attributes:
        id: Unique over the whole fact base.
        name: The header's name.
        kind: The header's second word; empty where it has none.
        facts: The members.
    """

    id: str
    name: str
    kind: str
    facts: tuple[Fact, ...]

    def apart(self) -> list[Unit]:
        """Return one unit per fact, for families that are divided fact by fact."""
        return [Unit(fact.id, self.name, self.kind, (fact,)) for fact in self.facts]


def capital(text: str) -> str:
    """Return the text with its first letter in upper case and the rest as it is."""
    return text[:1].upper() + text[1:]


def slug(text: str) -> str:
    """Return the text as it appears in an id."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _lines(block: str) -> list[str]:
    """Return the lines that are not empty; one that starts with a space goes on with the last."""
    lines: list[str] = []
    for line in block.splitlines():
        if line.startswith(" "):
            lines[-1] += " " + line.strip()
        elif line.strip():
            lines.append(line.strip())
    return lines


def _sections(block: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each header without its sign, and the lines under it."""
    header, lines = "", list[str]()
    for line in _lines(block):
        if line.startswith("= "):
            if header:
                yield header, lines
            header, lines = line[2:], []
        else:
            lines.append(line)
    yield header, lines


def _columns(line: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in line.split(" | "))


def read_clusters(prefix: str, block: str) -> list[Unit]:
    """Read clusters of two-line facts: a stem, then ``> `` and its answer.

    In social clusters the header's last word says what is asked.
    """
    units = []
    for header, lines in _sections(block):
        name, _, kind = header.rpartition(" ") if prefix == "social" else (header, "", "")
        unit = f"{prefix}/{slug(name)}"
        facts = tuple(
            Fact(f"{unit}/{number}", (stem, answer.removeprefix("> ")))
            for number, (stem, answer) in enumerate(zip(lines[::2], lines[1::2], strict=True))
        )
        units.append(Unit(unit, name, kind, facts))
    return units


def read_columns(prefix: str, block: str) -> list[Unit]:
    """Read clusters of one-line facts with columns, the last one perhaps ending in ``~group``."""
    units = []
    for header, lines in _sections(block):
        unit = f"{prefix}/{slug(header)}"
        facts = []
        for line in lines:
            text, _, group = line.partition(" ~")
            fields = _columns(text)
            facts.append(Fact(f"{unit}/{slug(fields[0])}", fields, group))
        units.append(Unit(unit, header, "", tuple(facts)))
    return units


def read_pairs(prefix: str, block: str) -> list[Unit]:
    """Read one-line facts that each stand alone, called after their first column."""
    units = []
    for line in _lines(block):
        fields = _columns(line)
        name = f"{prefix}/{slug(fields[0])}"
        units.append(Unit(name, prefix, "", (Fact(name, fields),)))
    return units


def read_twins(prefix: str, block: str) -> list[Unit]:
    """Read twin sentences, called after their two nouns or, between people, by their text."""
    units = []
    for line in _lines(block):
        fields = _columns(line)
        kind, text = fields
        name = f"{prefix}/{slug(text.split('_')[0] if kind == 'names' else kind)}"
        units.append(Unit(name, prefix, "", (Fact(name, fields),)))
    return units


def read_sorts(prefix: str, block: str) -> list[Unit]:
    """Read pairs of opposite groups; a fact is a member, what holds of it and what does not."""
    units = []
    for header, lines in _sections(block):
        name, _, kind = header.partition(" ")
        unit = f"{prefix}/{name}"
        (one, some), (two, others) = (_columns(line) for line in lines)
        facts = [
            Fact(f"{unit}/{slug(item)}", (item.strip(), holds, opposite))
            for holds, opposite, items in ((one, two, some), (two, one, others))
            for item in items.split(";")
        ]
        units.append(Unit(unit, name, kind, tuple(facts)))
    return units
