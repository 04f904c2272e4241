"""A measured propagation graph: a model's modules, what feeds each, and both as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from san_llm.architectures.entry import Exactness, Kind
from san_llm.errors import InputError
from san_llm.measure.maps import ChannelMap

Place = Literal["block", "embedding", "outside"]
# Notes on modules.
OUTSIDE = "outside of the blocks"
TOWER = "the vision tower is left frozen"


@dataclass(frozen=True)
class MeasuredLink:
    """What feeds a module's columns.

    Attributes:
        posterior: The module that reads.
        anterior: The module that writes what it reads.
        kind: What joins them.
        exactness: ``exact``: a channel's scale is the reader's; through an elementwise
            ``activation``, and perhaps a norm behind it; or through the residual ``stream`` and
            what normalizes it.
        channels: Which channel goes where.
    """

    posterior: str
    anterior: str
    kind: Kind
    exactness: Exactness
    channels: ChannelMap


@dataclass(frozen=True)
class MeasuredModule:
    """A module that reads or writes channels.

    Attributes:
        name: Its full name in the model.
        kind: Its class: ``Linear``, ``Conv2d``.
        d_out: Channels that it writes.
        d_in: Channels that it reads; 0 of an embedding.
        place: In a numbered ``block``, the input ``embedding``, or ``outside`` of all blocks.
        note: Why it cannot be adapted, or why nothing feeds it; None where neither is so.
        usable: Whether it can be adapted.
        grouped: Whether its channels read some of what it reads alone: a convolution's, experts'.
        experts: How many experts it is, each of which writes ``d_out`` channels; 0: it is none.
        kernel: Weights for each pair of channels: a convolution's places, else 1.
    """

    name: str
    kind: str
    d_out: int
    d_in: int
    place: Place
    note: str | None = None
    usable: bool = True
    grouped: bool = False
    experts: int = 0
    kernel: int = 1


FoldKind = Literal["norm", "attention", "rotation", "product", "gated", "activation"]


@dataclass(frozen=True)
class MeasuredFold:
    """Where scales can move without changing what a model computes; see ``san.lean``.

    Attributes:
        kind: What lets them.
        members: The modules whose scales they are, in the order of a forward.
        at: The module that applies them instead; empty where one of the members does.
        how: What it computes, where a kind has several.
    """

    kind: FoldKind
    members: tuple[str, ...]
    at: str = ""
    how: str = ""


@dataclass(frozen=True)
class MeasuredGraph:
    """Who feeds whom in a model, in the order of a forward.

    Attributes:
        model_type: The model's type.
        model_class: The class whose modules these are.
        modules: All modules that a forward runs.
        links: What feeds those that something feeds.
        folds: Where their scales can move; none in what older versions have measured.
    """

    model_type: str
    model_class: str
    modules: tuple[MeasuredModule, ...]
    links: tuple[MeasuredLink, ...]
    folds: tuple[MeasuredFold, ...] = ()

    @cached_property
    def by_name(self) -> Mapping[str, MeasuredModule]:
        """Each module by its name."""
        return {module.name: module for module in self.modules}

    @cached_property
    def into(self) -> Mapping[str, MeasuredLink]:
        """The link into each posterior, by its name."""
        return {link.posterior: link for link in self.links}

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)


def read_graph(values: Mapping[str, Any], where: str) -> MeasuredGraph:
    """Return a graph from its JSON.

    Args:
        values: What ``as_json`` made.
        where: What an error names.

    Raises:
        InputError: when it is none.
    """
    try:
        return MeasuredGraph(
            str(values["model_type"]),
            str(values["model_class"]),
            tuple(MeasuredModule(**module) for module in values["modules"]),
            tuple(
                MeasuredLink(**{**link, "channels": ChannelMap(**link["channels"])})
                for link in values["links"]
            ),
            tuple(
                MeasuredFold(**{**fold, "members": tuple(fold["members"])})
                for fold in values.get("folds", ())
            ),
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{where}: not a propagation graph: {error}") from None
