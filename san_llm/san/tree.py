"""A propagation graph drawn as a tree: a branch a block, a line a module and what feeds it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from san_llm.architectures.lookup import short_label
from san_llm.measure.units import path_of
from san_llm.san.node import Node, Norm, trained_by

if TYPE_CHECKING:
    from rich.tree import Tree

GUIDES = 8  # columns that the tree takes before a module's line


@dataclass(frozen=True)
class _Names:
    """How a graph's blocks and modules are named in its tree.

    Attributes:
        titles: Of each path of a block, and of modules outside of all.
        labels: Of each module, told apart within its block.
        one_list: Whether all blocks stand in one list.
    """

    titles: dict[str, str]
    labels: dict[str, str]
    one_list: bool


def tree_of(nodes: Sequence[Node], norms: Sequence[Norm], width: int) -> Tree:
    """Return a graph as a tree; blocks wired alike one after another are drawn once.

    Args:
        nodes: Of the graph, in the order of the model.
        norms: Those that are trained beside them.
        width: Columns that there are.
    """
    from rich.text import Text
    from rich.tree import Tree

    names = _names(nodes)
    blocks: dict[str, list[Node]] = {}
    for node in nodes:
        blocks.setdefault(names.titles[path_of(node.name) or node.name], []).append(node)
    halves = {node.name: (_own(node, names), _feed(node, names)) for node in nodes}
    room = width - GUIDES
    repeated = {_vectors(node) for node in nodes} == {"gamma"} and any(
        Text.from_markup(" ".join(half)).cell_len > room for half in halves.values()
    )
    if repeated:  # what every line would say again
        halves = {name: (own.removesuffix(" gamma"), feed) for name, (own, feed) in halves.items()}
    free = any(node.sigma for node in nodes)
    how = "sigma: an s of its own" if free else "x [green]<- y[/]: s of x is gamma of y"
    trained = trained_by(nodes, norms)
    count = f"{trained:,} trained: gamma of each" if repeated else f"{trained:,} trained numbers"
    tree = Tree(f"[bold]SAN propagation[/]  {count}; {how}")
    runs: list[tuple[list[str], list[str]]] = []
    for title, inside in blocks.items():
        lines = [_fitted(*halves[node.name], room) for node in inside]
        if runs and runs[-1][1] == lines:
            runs[-1][0].append(title)
        else:
            runs.append(([title], lines))
    for titles, lines in runs:
        first, last = titles[0], titles[-1]
        label = first if first == last else f"{first} ... {last}  ({len(titles)} alike)"
        branch = tree.add(f"[bold]{label}[/]")
        for line in lines:
            branch.add(line)
    if norms:
        tree.add(f"[bold]{len(norms)} norms[/]  {sum(norm.trained for norm in norms):,} trained")
    return tree


def _fitted(own: str, feed: str, room: int) -> str:
    """Return a module's line, what feeds it below where there is no room beside."""
    from rich.text import Text

    if not feed:
        return own
    beside = f"{own} {feed}"
    return beside if Text.from_markup(beside).cell_len <= room else f"{own}\n  {feed}"


def _names(nodes: Sequence[Node]) -> _Names:
    inside: dict[str, list[str]] = {}
    for node in nodes:
        inside.setdefault(path_of(node.name), []).append(node.name)
    outside = inside.pop("", [])
    split = {path: path.rstrip(".").split(".") for path in inside}
    lists = {tuple(parts[:-1]) for parts in split.values()}
    one = len(lists) == 1 and not any(part.isdigit() for part in next(iter(lists)))
    shared = _shared([_before_list(parts) for parts in split.values()])
    titles = {
        path: f"block {parts[-1]}" if one else ".".join(parts[shared:])
        for path, parts in split.items()
    }
    labels = {name: name.rsplit(".", 1)[-1] for name in outside}
    for path, members in inside.items():
        relative = {name: name.removeprefix(path) for name in members}
        labels |= {name: _apart(own, relative.values()) for name, own in relative.items()}
    return _Names(titles | {name: short_label(labels[name]) for name in outside}, labels, one)


def _before_list(parts: list[str]) -> list[str]:
    """Return what stands before the outermost list that a block is in."""
    return parts[: next(place for place, part in enumerate(parts) if part.isdigit()) - 1]


def _shared(names: list[list[str]]) -> int:
    """Return how many first parts some names share."""
    same = [len(set(parts)) == 1 for parts in zip(*names, strict=False)]
    return [*same, False].index(False)


def _apart(name: str, others: Iterable[str]) -> str:
    """Return the end of a module's name in its block that no other one there has."""
    parts = name.split(".")
    beside = [other for other in others if other != name]
    for count in range(1, len(parts)):
        end = ".".join(parts[-count:])
        if not end.isdigit() and not any(f".{other}".endswith(f".{end}") for other in beside):
            return end
    return name


def _vectors(node: Node) -> str:
    return " + ".join(
        symbol
        for symbol, there in (
            (f"{node.carrier} rank {node.rank}", node.rank),
            ("gamma", node.gamma and not node.rank),
            ("sigma", node.sigma),
            ("beta", node.beta),
        )
        if there
    )


def _own(node: Node, names: _Names) -> str:
    shape = f"({node.d_out} x {node.d_in})" if node.d_in else f"({node.d_out})"
    shape = f"{node.experts} x {shape}" if node.experts else shape
    return f"[cyan]{names.labels[node.name]}[/] [dim]{shape}[/] {_vectors(node) or 'reads only'}"


def _feed(node: Node, names: _Names) -> str:
    if node.anterior is None or node.link is None:
        return ""
    projection = f", {short_label(node.link.projection)}" if node.link.projection else ""
    through = ", activation" if node.link.activation else ""
    where = _where(path_of(node.name), path_of(node.anterior), names)
    how = f"{node.link.kind}{where}{projection}{_repeated(node)}{through}"
    return f"[green]<- {names.labels[node.anterior]}[/] [dim]({how})[/]"


def _repeated(node: Node) -> str:
    if node.link and node.link.kind == "attention":
        return "" if node.link.conversion == "as is" else ", per kv head"
    times = node.carry.groups * node.carry.tile if node.carry else 1
    return f", {times} times" if times > 1 else ""


def _where(posterior: str, anterior: str, names: _Names) -> str:
    """Return in words where an anterior stands that is not in the posterior's block."""
    if not anterior or anterior == posterior:
        return ""
    here, there = posterior.rstrip(".").split("."), anterior.rstrip(".").split(".")
    place = _shared([here, there])
    nearer, further = here[place : place + 1], there[place : place + 1]
    numbered = all(part and part[0].isdigit() for part in (nearer, further))
    if numbered and int(nearer[0]) == int(further[0]) + 1:
        return f", {'block' if names.one_list else here[place - 1].removesuffix('s')} before"
    return f", {names.titles[anterior]}"
