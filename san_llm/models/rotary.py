"""Rotary positions of each row by its own length, whatever shares its batch.

Longrope (Phi-3 with 128k) and dynamic NTK rotate long rows by other frequencies than short ones.
transformers takes the longest row of a batch for all of them, padding included, and dynamic NTK
remembers the longest that it has seen (``dynamic_rope_update``). So a row's features would depend
on its batch, and what a training comes to on ``micro_batch_size``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

CHANGING = ("dynamic", "longrope")  # the kinds whose frequencies change with a row's length


def alike_to(config: Any) -> float:
    """Return how many tokens rows may have to be rotated alike; beyond, each by its length.

    Args:
        config: The model's config, as transformers reads it.
    """
    limits = (
        kind["original_max_position_embeddings"]
        if kind["rope_type"] == "longrope"
        else config.max_position_embeddings
        for kind in _kinds(config)
        if kind["rope_type"] in CHANGING
    )
    return min(map(float, limits), default=math.inf)


def _kinds(config: Any) -> Iterator[Mapping[str, Any]]:
    """Give the rotary settings of a model: one for all of its blocks, or one for each kind."""
    settings = getattr(config, "rope_parameters", None) or {}
    for kind in (settings,) if "rope_type" in settings else settings.values():
        if isinstance(kind, Mapping) and "rope_type" in kind:
            yield kind


def rotate_by_row(model: torch.nn.Module) -> None:
    """Let a model rotate each row of a batch by the row's own length."""
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        if set(kinds.values() if isinstance(kinds, dict) else (kinds,)) & set(CHANGING):
            module.forward = partial(_rotations, module)


@torch.no_grad()
def _rotations(
    module: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (rows, tokens, head_dim) of positions (rows, tokens)."""
    kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
    which = {} if layer_type is None else {"layer_type": layer_type}
    if kind not in CHANGING:
        stock: tuple[Tensor, Tensor] = type(module).forward(module, x, position_ids, **which)
        return stock
    lengths: list[int] = (position_ids.amax(-1) + 1).tolist()
    known = {
        length: ROPE_INIT_FUNCTIONS[kind](module.config, x.device, seq_len=length, **which)
        for length in set(lengths)
    }
    frequencies = torch.stack([known[length][0] for length in lengths])  # (rows, head_dim / 2)
    angles = position_ids[..., None].float() * frequencies[:, None].float()
    angles = torch.cat((angles, angles), dim=-1)
    scaling = known[lengths[0]][1]  # which does not depend on the length
    return (angles.cos() * scaling).to(x.dtype), (angles.sin() * scaling).to(x.dtype)
