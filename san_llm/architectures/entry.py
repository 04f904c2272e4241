"""What is said of a family of models: an entry's fields, and the words they are filled with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Kind = Literal["attention", "mlp", "residual"]
Conversion = Literal["as is", "repeat kv heads"]
Exactness = Literal["exact", "activation", "stream"]


@dataclass(frozen=True)
class Link:
    """One row of the propagation table.

    Attributes:
        kind: What joins the two ends: attention, the gated MLP, or the residual stream.
        posterior: The Linear whose columns are scaled.
        anterior: The Linear whose neuron scale is carried there.
        blocks_back: 0 when both stand in the same block, 1 when the anterior is one block earlier;
            of a measured link the two modules' names tell.
        conversion: How gamma (d_out of the anterior) becomes s (d_in of the posterior).
        first: What feeds the posterior where there is no earlier block.
        projection: Whose rows of the anterior feed it, where one Linear computes several
            projections; None for all rows.
        activation: Whether an elementwise activation stands between the two.
    """

    kind: Kind
    posterior: str
    anterior: str
    blocks_back: int = 0
    conversion: Conversion = "as is"
    first: str | None = None
    projection: str | None = None
    activation: bool = False

    @property
    def exactness(self) -> Exactness:
        """What stands between the two: nothing, an activation, or the residual stream."""
        if self.kind == "residual":
            return "stream"
        return "activation" if self.activation else "exact"


@dataclass(frozen=True)
class Family:
    """How the blocks of one model type are wired.

    Attributes:
        projections: What a block computes, in the order of the model: LLaMA's seven.
        links: The propagation table.
        norms: Which Linears read the output of which RMSNorm of a block.
        other_norms: A block's norms whose output no Linear reads; a part's own, such as
            ``self_attn.q_norm``, are as wide as a head.
        norm_offset: A norm multiplies by ``norm_offset + weight``.
        fused: Linears that compute several of the seven projections, in the order of their rows.
    """

    projections: tuple[str, ...]
    links: tuple[Link, ...]
    norms: Mapping[str, tuple[str, ...]]
    other_norms: tuple[str, ...] = ()
    norm_offset: int = 0
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def targets(self) -> tuple[str, ...]:
        """The Linears of a block that SAN adapts, in the order of the model."""
        return tuple(dict.fromkeys(self.linear_of(name) for name in self.projections))

    def linear_of(self, projection: str) -> str:
        """Return the Linear that computes one of the seven projections: itself, or a fused one."""
        wholes = (whole for whole, projections in self.fused.items() if projection in projections)
        return next(wholes, projection)


KINDS: tuple[Kind, ...] = ("attention", "mlp", "residual")


class Carry(NamedTuple):
    """How gamma (d_out of the anterior) becomes s (d_in of the posterior).

    Attributes:
        start: The first row of the anterior, or of each of its parts, that feeds the posterior.
        stop: The row after the last one.
        groups: How often the channels of each head are repeated: query heads per kv head, or 1.
        head_dim: Channels of one head, which are repeated together.
        parts: Parts of the anterior's rows that are read alike: heads that keep q, k and v
            together, or 1.
        tile: How often all of it stands in the posterior's columns, one after another.
    """

    start: int
    stop: int
    groups: int
    head_dim: int
    parts: int = 1
    tile: int = 1
