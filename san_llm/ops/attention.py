"""Attention of a few queries under a mask, as beams and choices need it, without copies of keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def added(mask: Tensor, dtype: torch.dtype, groups: int) -> Tensor:
    """Return a mask of what may be looked at as what :func:`attention` adds to scores.

    Made once a forward: a boolean one would be turned into it in every block.

    Args:
        mask: (L, S) or (B, L, S).
        dtype: The queries'.
        groups: Query heads of a key head, which are more queries of it.

    Returns:
        (B, 1, groups * L, S), with a B of 1 for one mask: of three dimensions it would keep torch
        from its faster kernel on a CPU.
    """
    mask = mask if mask.dim() == 3 else mask[None]
    zero = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return torch.cat([zero.masked_fill_(~mask, float("-inf"))] * groups, -2).unsqueeze(-3)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return attention's output; the query heads of a key head share it without copies of it.

    Args:
        query: (B, L, heads, head_dim).
        key: (B, kv_heads, S, head_dim).
        value: (B, kv_heads, S, head_dim).
        mask: Of :func:`added`, (B, 1, groups * L, S) or (1, 1, groups * L, S).
        scale: What scores are multiplied by.

    Returns:
        (B, L, heads, head_dim).
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    # (B, L, kv * g, d) -> (B, kv, g * L, d): the heads of a group are more queries of one head.
    grouped = query.view(batch, length, kv_heads, groups, head_dim).permute(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, kv_heads, groups * length, head_dim)
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    ungrouped = out.view(batch, kv_heads, groups, length, head_dim).permute(0, 3, 1, 2, 4)
    return ungrouped.reshape(batch, length, heads, head_dim)
