"""Whether a mixture's experts are what SAN has a layer for, tried on a small copy."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from san_llm.architectures.decoders import DOWN, GATE_UP
from san_llm.ops.experts import experts
from san_llm.ops.scale import ScaledSwiGLU

TOKENS = 5
GATES = {"silu": False, "gelu tanh": True}  # by name of an activation: what ScaledSwiGLU calls it
CLOSE = 1e-9  # of the largest output, in float64


def is_experts(module: nn.Module) -> bool:
    """Return whether a module is experts held as one, whose parameters have an axis for them."""
    if isinstance(module, nn.Conv1d):  # (out, in, kernel) and a bias (out,)
        return False
    shapes = [parameter.shape for parameter in module.parameters(recurse=False)]
    counts = {shape[0] for shape in shapes if shape}
    return len(shapes) > 1 and len(counts) == 1 and counts != {1} and max(map(len, shapes)) == 3


def weights_of(module: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the weights of gate and up (E, 2 i, d), and those of down (E, d, i), of experts.

    None of those that keep them otherwise.
    """
    wide, narrow = (getattr(module, name, None) for name in (GATE_UP, DOWN))
    if not all(isinstance(one, torch.Tensor) and one.dim() == 3 for one in (wide, narrow)):
        return None
    assert wide is not None
    assert narrow is not None
    count, read, inside = narrow.shape
    usual = wide.shape == (count, 2 * inside, read) and callable(getattr(module, "act_fn", None))
    return (wide, narrow) if usual else None


def expert_sizes(module: Any) -> tuple[int, int, int]:
    """Return the channels that each expert writes and reads, and how many experts there are.

    It writes those of its gate, of up and of down; (0, 0, 0) of experts that keep them otherwise.
    """
    weights = weights_of(module)
    if weights is None:
        return 0, 0, 0
    count, between, read = weights[0].shape
    return between + read, read, count


def is_gated(module: Any) -> bool:
    """Return whether experts compute ``down(act(gate) * up)``, in whatever way they do.

    A channel's scale then passes from up to down within each expert. Tried by numbers: on random
    tokens they must give what ``ops.experts`` does, with up's rows scaled or down's columns.

    Args:
        module: Of a small copy, in float64.
    """
    weights = weights_of(module)
    if weights is None:
        return False
    wide, narrow = weights
    count, read, inside = narrow.shape
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        hidden = torch.randn(TOKENS, read, dtype=torch.float64)
        shares, index = torch.rand(TOKENS, count, dtype=torch.float64).topk(2)
        scale = 0.5 + torch.rand(count, inside, dtype=torch.float64)
        up, down = deepcopy(module), deepcopy(module)
        getattr(up, GATE_UP)[:, inside:] *= scale[:, :, None]
        getattr(down, DOWN).mul_(scale[:, None])
        ours = [
            experts(wide, narrow, module.act_fn, hidden, index, shares, inner=inner)
            for inner in (None, scale, scale)
        ]
        try:
            theirs = [other(hidden, index, shares) for other in (module, up, down)]
        except Exception:  # a model's own code, which takes other arguments
            return False
    return all(
        one.shape == other.shape and bool((one - other).abs().max() <= CLOSE * other.abs().max())
        for one, other in zip(theirs, ours, strict=True)
    )


def gate_of(module: nn.Module) -> str | None:
    """Return which of ``GATES`` a module is, bit for bit, or None."""
    if any(True for _ in (*module.children(), *module.parameters())):
        return None
    with torch.no_grad():
        return next((how for how in GATES if _is_gate(module, how)), None)


def _is_gate(module: nn.Module, how: str) -> bool:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.linspace(-4, 4, 64).to(dtype)
        try:
            if not torch.equal(
                module(x), ScaledSwiGLU.apply(x, x.new_ones(64), None, None, GATES[how])
            ):
                return False
        except Exception:  # a model's own code, which takes other arguments
            return False
    return True
