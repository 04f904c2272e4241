"""What autograd keeps of a computation: each place in memory once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


def saved_bytes(compute: Callable[[], object], own: set[Any]) -> int:
    """Return the bytes that autograd keeps of a computation.

    Args:
        compute: The computation.
        own: Places that are there anyway and do not count, see :func:`storage`.
    """
    kept: dict[Any, int] = {}
    alive = []  # else another tensor could get the place of one

    def see(tensor: Tensor) -> Tensor:
        if (place := storage(tensor)) not in own:
            kept[place] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        compute()
    return sum(kept.values())


def storage(tensor: Tensor) -> Any:
    """Return a tensor's place, which without numbers has no address."""
    return StorageWeakRef(tensor.untyped_storage())
