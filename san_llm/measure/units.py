"""The blocks of a model, and which of them are alike: a measurement of one holds for all."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

BEFORE, OWN = "before", "own"  # where a module stands, as seen from another one's block


@dataclass(frozen=True)
class Unit:
    """A block, or a part of a model that stands outside of all blocks.

    Attributes:
        path: What the names of its modules begin with; empty outside of blocks.
        modules: Their full names, in the order of a forward.
        signature: What its modules are; equal for blocks that are alike.
    """

    path: str
    modules: tuple[str, ...]
    signature: tuple[tuple[str, str], ...]

    def relative(self, name: str) -> str:
        """Return a module's name within it."""
        return name.removeprefix(self.path)


def path_of(name: str) -> str:
    """Return the innermost numbered block that a module's name leads through, with a last dot."""
    parts = name.split(".")
    places = [place for place, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[: places[-1] + 1]) + "." if places else ""


def list_of(path: str) -> str:
    """Return the list that a block stands in, by its path: ``model.layers``; empty outside."""
    return path.rstrip(".").rpartition(".")[0]


def find_units(order: Sequence[str], kinds: Mapping[str, str]) -> list[Unit]:
    """Return the blocks of a model in the order of a forward.

    Args:
        order: The modules, in that order.
        kinds: What each of them is, in a word.
    """
    units: list[Unit] = []
    for path, grouped in groupby(order, path_of):
        names = tuple(grouped)
        signature = tuple((name.removeprefix(path), kinds[name]) for name in names)
        units.append(Unit(path, names, signature))
    return units


def representatives(units: Sequence[Unit], which: int) -> dict[int, int]:
    """Return for each unit the one that is measured in its place.

    Two units are measured as one where they and those before them are alike, and stand in lists of
    the same names: an encoder's last block before a decoder's first is none before an encoder's. So
    is the first of a list inside of each block, a ResNet's, and another one that stands behind it.

    Args:
        units: The blocks, in order.
        which: 0 takes the first of those alike, 1 the second where there is one.
    """
    places: dict[tuple[object, ...], list[int]] = {}
    for place, unit in enumerate(units):
        before = units[place - 1] if place else None
        inside = before is not None and list_of(before.path) == list_of(unit.path)
        kinds = before and _kind(before), inside, _kind(unit)
        places.setdefault(kinds, []).append(place)
    measured: dict[int, int] = {}
    for alike in places.values():
        # The next in the same list: one in a later stage costs more, and says nothing else.
        near = [at for at in alike if list_of(units[at].path) == list_of(units[alike[0]].path)]
        measured |= dict.fromkeys(alike, near[min(which, len(near) - 1)])
    return measured


def _kind(unit: Unit) -> tuple[object, object]:
    return re.sub(r"\d+", "*", unit.path), unit.signature
