"""One adapted module of a propagation graph, and how targets are named."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from san_llm.architectures.entry import Carry, Link


@dataclass(frozen=True)
class Node:
    """One adapted module: its shape, the vectors it trains and what feeds its columns.

    Attributes:
        name: The module's name in the base model.
        d_out: Rows of the weight: the size of gamma.
        d_in: Columns of the weight: the size of s (0 for the embedding).
        gamma: Whether it trains a neuron scale.
        beta: Whether it trains a neuron shift.
        anterior: The name of the module whose gamma is its synapse scale, or None for s = 1.
        link: The table's row behind ``anterior``.
        carry: How its gamma becomes the synapse scale of this one.
        carrier: What holds gamma: ``scale``, ``lora`` or ``dora``.
        rank: Of the two matrices of a low-rank carrier, else 0.
        sigma: Whether it trains a column scale of its own, and none is propagated to it.
        experts: How many experts it is, each with a gamma of its own; 0: it is none.
        kernel: Weights for each pair of channels: a convolution's places, else 1.
    """

    name: str
    d_out: int
    d_in: int
    gamma: bool
    beta: bool
    anterior: str | None
    link: Link | None
    carry: Carry | None = None
    carrier: str = "scale"
    rank: int = 0
    sigma: bool = False
    experts: int = 0
    kernel: int = 1

    @property
    def trained(self) -> int:
        """How many numbers this module trains."""
        # Gamma is a vector of its own, or dora's magnitude; with lora it is in the matrices.
        vectors = int(self.gamma and self.carrier != "lora") + int(self.beta)
        columns = self.d_in * int(self.sigma)
        return (
            (self.experts or 1) * self.d_out * vectors
            + columns
            + self.rank * (self.d_out + self.d_in * self.kernel)
        )


@dataclass(frozen=True)
class Norm:
    """A norm that is trained beside the scales.

    Attributes:
        name: The module's name in the base model.
        trained: How many numbers it trains: a weight, and perhaps a bias, for each channel.
    """

    name: str
    trained: int


def trained_by(nodes: Iterable[Node], norms: Iterable[Norm]) -> int:
    """Return how many numbers adapted modules and norms train in all."""
    return sum(node.trained for node in nodes) + sum(norm.trained for norm in norms)


def trains_gamma(name: str, mode: str, anteriors: set[str]) -> bool:
    """Whether a target trains a neuron scale: always, but in ``synapse`` mode only if it is read.

    A gamma that nothing reads would be inert in ``synapse`` mode: no gradient, never saved.
    """
    return mode != "synapse" or name in anteriors


def matches(target_modules: Any, name: str) -> bool:
    """Whether PEFT's ``target_modules`` (a list of names, or one regular expression) names it."""
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in target_modules)


def unmatched(targets: Any, names: Iterable[str]) -> list[str]:
    """Return those of PEFT's ``target_modules`` that name none of some modules."""
    known = list(names)
    if isinstance(targets, str):
        return [] if any(matches(targets, name) for name in known) else [targets]
    return [target for target in targets if not any(matches([target], name) for name in known)]
