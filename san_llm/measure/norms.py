"""Which norm a module computes, told from its numbers: how a scale goes into its weight."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from san_llm.ops.scale import ScaledNorm, layer_norm

LAYER = "layer"  # LayerNorm; all others are RMSNorms
# By name of an RMSNorm: what it adds to its weight, and whether it rounds only once, at the end.
RMS = {"rms": (0, False), "rms rounded once": (0, True), "1 + rms": (1, True)}
TOKENS = 5


def epsilon(norm: Any) -> float | None:
    """Return what a norm adds to the mean square, or None where it does not say so."""
    named = (getattr(norm, name, None) for name in ("variance_epsilon", "eps", "epsilon"))
    return next((value for value in named if isinstance(value, float)), None)


def scaled_norm(norm: Any, how: str, x: Tensor, s: Tensor | None) -> Tensor:
    """Return a norm of x (..., d) whose channels are multiplied by s, which its weight takes in.

    Args:
        norm: A module that computes ``how``.
        how: ``LAYER``, or one of ``RMS``.
        x: In any floating dtype.
        s: (d,), of fp32 or wider; None for 1.
    """
    weight, bias = _wide(norm.weight), getattr(norm, "bias", None)
    offset, once = RMS.get(how, (0, False))
    weight = offset + weight if offset else weight
    bias = None if bias is None else _wide(bias)
    if s is not None:
        s = s.to(weight.device)
        weight, bias = weight * s, None if bias is None else bias * s
    eps = epsilon(norm)
    assert eps is not None
    if how == LAYER:
        return layer_norm(x, weight, bias, eps)
    out: Tensor = ScaledNorm.apply(x, weight, eps, once)
    return out


def _wide(vector: Tensor) -> Tensor:
    return vector if vector.dtype == torch.float64 else vector.float()


def find_norm(module: nn.Module) -> str | None:
    """Return which norm a module computes, bit for bit in fp32 and bf16, or None for another.

    Args:
        module: Of a small copy.
    """
    own = dict(module.named_parameters())
    if own.keys() not in ({"weight"}, {"weight", "bias"}) or own["weight"].dim() != 1:
        return None
    if epsilon(module) is None:
        return None
    # Spread like no numbers with a mean of 0 and a size of 1, and the same on every run.
    x = torch.arange(1.0, TOKENS * own["weight"].numel() + 1).view(TOKENS, -1)
    x = 3 * (7 * x).sin() + 1
    with torch.no_grad():
        return next((how for how in (LAYER, *RMS) if _computes(module, how, x)), None)


def _computes(module: nn.Module, how: str, x: Tensor) -> bool:
    for dtype in (torch.float32, torch.bfloat16):
        norm, given = deepcopy(module).to(dtype), x.to(dtype)
        try:
            if not torch.equal(norm(given), scaled_norm(norm, how, given, None)):
                return False
        except Exception:  # a model's own code, which takes other shapes or arguments
            return False
    return True
