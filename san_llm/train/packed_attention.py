"""Attention of packed rows: each token sees the tokens of its own row that stand before it.

It takes the place of transformers' SDPA attention and lays the rows side by side; all else in the
model works on single tokens and needs to know nothing of rows.
https://huggingface.co/docs/transformers/attention_interface
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from san_llm.architectures.decoders import FAMILIES
from san_llm.ops.attention import added, attention

NAME = "sdpa_packed"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    layout: dict[str, Any] | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Return the attention output (1, N, heads, head_dim) of N packed tokens.

    Args:
        module: The attention module.
        query: (1, heads, N, head_dim), rotated; key and value likewise with their own heads.
        key: See query.
        value: See query.
        attention_mask: Not used with a layout.
        layout: What :func:`laid_out` gives; without one this is SDPA attention.
        **keywords: What the model tells every attention function.
    """
    if layout is None:
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **keywords
        )
        return out
    keys, queries = layout["keys"], layout["queries"]
    rows = attention(
        _rows(query, queries),
        _rows(key, keys).transpose(1, 2),
        _rows(value, keys).transpose(1, 2),
        _mask(layout, keywords.get("sliding_window"), query, query.shape[1] // key.shape[1]),
        keywords["scaling"],
        keywords["dropout"],
    )
    return rows.flatten(0, 1).index_select(0, layout["slots"]).unsqueeze(0), None


def laid_out(layout: dict[str, Tensor], positions: Tensor) -> dict[str, Any]:
    """Return a layout as attention takes it, for one forward.

    Args:
        layout: As ``data.batches.Pack`` makes it.
        positions: The positions of the tokens in their rows, (N,).
    """
    return {**layout, "positions": positions, "masks": {}}


def _mask(layout: dict[str, Any], window: int | None, query: Tensor, groups: int) -> Tensor:
    """Return the mask of a block; all blocks of a forward with the same window share one."""
    masks: dict[int | None, Tensor] = layout["masks"]
    if window not in masks:
        positions, width = layout["positions"][layout["queries"]], layout["keys"].shape[1]
        seen = _before(positions + 1, width)
        if window is not None:
            seen &= ~_before(positions - window + 1, width)
        masks[window] = added(seen, query.dtype, groups)
    return masks[window]


def _before(ends: Tensor, width: int) -> Tensor:
    """Return which of ``width`` positions come before each end: (R, q) -> (R, q, width)."""
    return torch.lt(torch.arange(width, device=ends.device), ends.unsqueeze(-1))


def _rows(heads: Tensor, index: Tensor) -> Tensor:
    """Return rows (R, length, heads, head_dim) of packed heads (1, heads, N, head_dim)."""
    tokens = heads[0].transpose(0, 1)
    return tokens.index_select(0, index.flatten()).view(*index.shape, *tokens.shape[1:])


def can_pack(model: Any) -> bool:
    """Whether a model's blocks can take packed rows: a family of the table, with SDPA attention."""
    config = model.config
    return config.model_type in FAMILIES and config._attn_implementation in ("sdpa", NAME)


def has_dropout(model: Any) -> bool:
    """Whether a model in training draws at random what it drops, each row for itself."""
    return bool(getattr(model.config, "attention_dropout", 0)) or any(
        isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()
    )


def use_packed_attention(model: Any) -> None:
    """Let a model's attention take packed rows; without a layout it stays what it was."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
