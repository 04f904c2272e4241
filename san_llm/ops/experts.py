"""A mixture's experts, held as two 3-D parameters, with scales on what each of them writes.

They are computed one after another, as transformers' own ``eager`` form of them does:
https://huggingface.co/docs/transformers/experts_interface
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from san_llm.ops.scale import Scaled, ScaledSwiGLU, scaled


def experts(
    wide: Tensor,
    narrow: Tensor,
    act: Callable[[Tensor], Tensor],
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    columns: Tensor | None = None,
    rows: Tensor | None = None,
    inner: Tensor | None = None,
    gelu: bool | None = None,
) -> Tensor:
    """Return what a router's choice of experts makes of tokens, (tokens, d).

    Args:
        wide: The weights of gate and up, (E, 2 i, d).
        narrow: Those of down, (E, d, i).
        act: The activation of the gate.
        hidden: (tokens, d).
        index: The experts of each token, (tokens, chosen); E and above stand for none.
        weights: What each is weighted with, (tokens, chosen).
        columns: What all experts' inputs are multiplied by, (d,).
        rows: What each expert's outputs are multiplied by, (E, 2 i + d): gate's, up's and down's.
        inner: What down multiplies its input by, (E, i).
        gelu: In the lean form which activation ``ScaledSwiGLU`` computes; None in the plain form.
    """
    if gelu is not None:
        return _lean(wide, narrow, hidden, index, weights, columns, rows, inner, gelu)
    count, between = narrow.shape[0], wide.shape[1]
    given, out = scaled(hidden, columns), torch.zeros_like(hidden)
    for expert in torch.unique(index).tolist():
        if expert >= count:
            continue
        places, tokens = torch.where(expert == index.T)  # in this order, for the last bits
        written = F.linear(given[tokens], wide[expert])
        written = scaled(written, None if rows is None else rows[expert, :between])
        gate, up = written.chunk(2, dim=-1)
        gated = scaled(act(gate) * up, None if inner is None else inner[expert])
        written = F.linear(gated, narrow[expert])
        written = scaled(written, None if rows is None else rows[expert, between:])
        out.index_add_(0, tokens, (written * weights[tokens, places, None]).to(out.dtype))
    return out


def _lean(
    wide: Tensor,
    narrow: Tensor,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    columns: Tensor | None,
    rows: Tensor | None,
    inner: Tensor | None,
    gelu: bool,
) -> Tensor:
    """Return the same, keeping gate, up and what down writes, once for each chosen expert."""
    count, _, inside = narrow.shape
    given = hidden if columns is None else Scaled.apply(hidden, columns.to(hidden.device))
    out = torch.zeros_like(hidden)
    for expert in torch.unique(index).tolist():
        if expert >= count:
            continue
        places, tokens = torch.where(expert == index.T)  # in this order, for the last bits
        gate, up = F.linear(given[tokens], wide[expert]).chunk(2, dim=-1)
        g = c = down = None
        if rows is not None:
            g, c, down = rows[expert].split([inside, inside, narrow.shape[1]])
        if inner is not None:
            c = inner[expert] if c is None else c * inner[expert]
        gated = ScaledSwiGLU.apply(gate, up, g, c, gelu)
        written = F.linear(gated, narrow[expert])
        share = weights[tokens, places, None]
        weighted = written * share if down is None else _Weighted.apply(written, down, share)
        out.index_add_(0, tokens, weighted.to(out.dtype))
    return out


class _Weighted(torch.autograd.Function):
    """``features * scale * share``, (n, d) by (d,) and (n, 1); keeps the features once."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, scale: Tensor, share: Tensor) -> Tensor:
        ctx.save_for_backward(features, scale, share)
        return scaled(features, scale) * share

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, scale, share = ctx.saved_tensors
        grad = grads[0].to(scale.dtype)
        products = grad * features
        d_share = (products * scale).sum(-1, keepdim=True).to(share.dtype)
        d_scale = (products * share).sum(0)
        return (grad * share * scale).to(features.dtype), d_scale, d_share
