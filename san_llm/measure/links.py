"""From what channels do to a propagation graph: who feeds whom, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from san_llm.architectures.entry import Kind
from san_llm.measure.graph import MeasuredLink
from san_llm.measure.maps import ChannelMap, find_map

if TYPE_CHECKING:
    from torch import Tensor

    from san_llm.measure.probe import Reach

APART = 0.5  # of a channel's largest mover, the second largest at most: a norm's cross-talk is less
# Times: a norm passes less of what is large (0.7 to 1), GELU before one more (1.5 to 2).
WAKES = 1.1
STILL = 1e-6  # relative: a channel that moves by less does not move


def find_link(
    posterior: str, reaches: dict[str, Reach], anteriors: list[str]
) -> MeasuredLink | None:
    """Return what feeds a module, or None.

    Args:
        posterior: The module.
        reaches: What each writer's channels do there.
        anteriors: The writers in the order of a forward, the latest last.
    """
    for anterior in reversed(anteriors):
        reach = reaches[anterior]
        channels = _exact_map(reach)
        if channels is not None:
            kind: Kind = "attention" if reach.across else "mlp"
            return MeasuredLink(posterior, anterior, kind, "exact", channels)
    for anterior in reversed(anteriors):
        reach = reaches[anterior]
        active = reach.alone and (_keeps_apart(reach.woken) or _wakes(reach))
        source = _source(reach.woken if active or reach.sleeps else reach.moved)
        channels = None if source is None else find_map(source, len(reach.moved))
        if channels is not None:
            if active:
                return MeasuredLink(posterior, anterior, "mlp", "activation", channels)
            return MeasuredLink(posterior, anterior, "residual", "stream", channels)
    return None


def _exact_map(reach: Reach) -> ChannelMap | None:
    """Return the map of an exact link, in which each of the reader's channels has one writer's."""
    exact = reach.exact.numpy()
    if not (exact.sum(0) == 1).all():
        return None
    return find_map(exact.argmax(0), len(exact))


def _source(moved: Tensor) -> np.ndarray | None:
    """Return the writer's channel that moves each of the reader's most, where all stand out."""
    movement = moved.numpy()
    if not movement.any() or len(movement) < 2:
        return None
    ordered = np.sort(movement, axis=0)
    largest, second = ordered[-1], ordered[-2]
    if not (largest > STILL).all() or (second > APART * largest).any():
        return None
    source: np.ndarray = movement.argmax(0)
    return source


def _keeps_apart(moved: Tensor) -> bool:
    """Return whether each of the reader's channels moves with one of the writer's alone."""
    return bool(((moved > STILL * moved.max()).sum(0) == 1).all())


def _wakes(reach: Reach) -> bool:
    """Return whether more passes of what is large, as an activation does, also before a norm."""
    woken, moved = (x.amax(0).mean() for x in (reach.woken, reach.moved))
    return bool(woken > WAKES * moved)
