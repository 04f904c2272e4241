"""A mixture's experts, held as two 3-D parameters, with scales on what each of them writes.

They are computed one after another, as transformers' own ``eager`` form of them does:
https://huggingface.co/docs/transformers/experts_interface
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from san_llm.ops.scale import scaled


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
    """
    count, between = narrow.shape[0], wide.shape[1]
    given, out = scaled(hidden, columns), torch.zeros_like(hidden)
    for expert in torch.unique(index).tolist():
        if expert >= count:
            continue
        tokens, places = torch.where(index == expert)
        written = F.linear(given[tokens], wide[expert])
        written = scaled(written, None if rows is None else rows[expert, :between])
        gate, up = written.chunk(2, dim=-1)
        gated = scaled(act(gate) * up, None if inner is None else inner[expert])
        written = F.linear(gated, narrow[expert])
        written = scaled(written, None if rows is None else rows[expert, between:])
        out.index_add_(0, tokens, (written * weights[tokens, places, None]).to(out.dtype))
    return out
