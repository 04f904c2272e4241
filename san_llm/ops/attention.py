"""Attention under a mask, as packed tokens need it: grouped heads without copies of keys.

Its backward pass in bf16 on a CPU is our own. torch's takes 40 to 100 ms for 8 rows of 104 tokens
and 9 heads where its matrix products take 2, and so would be most of a training step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 2**18  # scores that are worked out again at a time: 1 MB in fp32


def added(mask: Tensor, dtype: torch.dtype, groups: int) -> Tensor:
    """Return a mask of what may be looked at as what :func:`attention` adds to scores.

    Made once a forward: a boolean one would be turned into it in every block, and the backward pass
    would keep each block's.

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


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """Return attention's output; the query heads of a key head share it without copies of it.

    Args:
        query: (B, L, heads, head_dim).
        key: (B, kv_heads, S, head_dim).
        value: (B, kv_heads, S, head_dim).
        mask: Of :func:`added`, (B, 1, groups * L, S) or (1, 1, groups * L, S).
        scale: What scores are multiplied by.
        dropout: Share of the attention weights that is dropped.

    Returns:
        (B, L, heads, head_dim).
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    # (B, L, kv * g, d) -> (B, kv, g * L, d): the heads of a group are more queries of one head.
    grouped = query.view(batch, length, kv_heads, groups, head_dim).permute(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, kv_heads, groups * length, head_dim)
    own = query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)
    if own and query.requires_grad and not dropout:
        out: Tensor = _Attention.apply(grouped, key, value, mask.expand(batch, -1, -1, -1), scale)
    else:
        keywords: dict[str, Any] = {"attn_mask": mask, "scale": scale, "dropout_p": dropout}
        out = F.scaled_dot_product_attention(grouped, key, value, **keywords)
    ungrouped = out.view(batch, kv_heads, groups, length, head_dim).permute(0, 3, 1, 2, 4)
    return ungrouped.reshape(batch, length, heads, head_dim)


class _Attention(torch.autograd.Function):
    """torch's flash attention on a CPU, with a backward pass made of matrix products."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
    ) -> Tensor:
        out: Tensor
        out, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=mask, scale=scale
        )
        ctx.save_for_backward(query, key, value, mask, out, log_sums)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Work the attention weights out again, some queries at a time.

        Scores and what is subtracted from one another stay wide; the other products are of the
        queries' dtype, as on a GPU (FlashAttention-2, arXiv:2307.08691, algorithm 2).
        """
        query, key, value, mask, out, log_sums = ctx.saved_tensors
        wide, low = log_sums.dtype, query.dtype
        batch, heads, queries, _ = query.shape
        d_out = grads[0].contiguous().flatten(0, 1)
        inner = (d_out.to(wide) * out.flatten(0, 1).to(wide)).sum(-1, keepdim=True)
        log_sums = log_sums.flatten(0, 1).unsqueeze(-1)
        q, k, v = (tensor.flatten(0, 1) for tensor in (query, key, value))  # (B * heads, ., d)
        keys, values = k.to(wide).mT, v.to(wide).mT
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(keys.mT), torch.zeros_like(values.mT)
        step = max(1, BLOCK // (len(q) * k.shape[1]))
        for start in range(0, queries, step):
            stop = min(start + step, queries)
            q_block = q[:, start:stop]
            d_block = d_out[:, start:stop]
            weights = torch.bmm(q_block.to(wide), keys).mul_(ctx.scale)
            weights.view(batch, heads, stop - start, -1).add_(mask[:, :, start:stop])
            weights.sub_(log_sums[:, start:stop]).exp_()
            d_scores = torch.bmm(d_block.to(wide), values).sub_(inner[:, start:stop]).mul_(weights)
            d_v += torch.bmm(weights.to(low).mT, d_block)
            scores = d_scores.mul_(ctx.scale).to(low)
            d_q[:, start:stop] = torch.bmm(scores, k)
            d_k += torch.bmm(scores.mT, q_block)
        shape = (batch, heads)
        return (
            d_q.unflatten(0, shape),
            d_k.to(low).unflatten(0, shape),
            d_v.to(low).unflatten(0, shape),
            None,
            None,
        )
