"""Where a model's own attention rotates queries and keys, and how another rotation is put there."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import nn

from san_llm.ops.scale import ScaledRotary

ROTARY = "apply_rotary_pos_emb"  # transformers' name of it, in every family's module
RENAMES = "transformers.utils.deprecation"  # its decorator stands before what it wraps


def with_rotation(attention: nn.Module, rotate: Callable[..., Any]) -> Any:
    """Return the model's own forward, unbound, with another function for its rotation."""
    own = own_forward(attention)
    names = {**own.__globals__, ROTARY: rotate}
    forward: Any = FunctionType(
        own.__code__, names, own.__name__, own.__defaults__, own.__closure__
    )
    forward.__kwdefaults__ = own.__kwdefaults__
    return forward


def own_forward(attention: nn.Module) -> Any:
    """Return its forward without what renames outdated arguments, which its block does not pass."""
    forward: Any = type(attention).forward
    while getattr(forward, "__globals__", {}).get("__name__") == RENAMES:
        forward = forward.__wrapped__
    return forward


def rotates_halves(attention: nn.Module) -> bool:
    """Return whether its forward calls a function of that name that rotates as LLaMA's does."""
    forward = own_forward(attention)
    rotary = getattr(forward, "__globals__", {}).get(ROTARY)
    return rotary is not None and ROTARY in forward.__code__.co_names and _same_rotary(rotary)


@cache
def _same_rotary(rotary: Any) -> bool:
    """Return whether a function gives the numbers of ``ScaledRotary`` on a few made up."""
    features = torch.arange(1.0, 25.0, dtype=torch.float64).view(1, 2, 3, 4) / 7
    cos, sin = (
        tensor.repeat(1, 1, 2)
        for tensor in (features[:, 0, :, :2].cos(), features[:, 1, :, :2].sin())
    )
    try:
        rotated = rotary(features, -features, cos, sin)
        wanted = (ScaledRotary.apply(tensor, None, cos, sin) for tensor in (features, -features))
        return all(map(torch.equal, rotated, wanted))
    except (TypeError, RuntimeError, IndexError):
        return False
