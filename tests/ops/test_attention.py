"""Attention under a mask against the softmax written out in float64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from san_llm.ops.attention import added, attention


def written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    groups = query.shape[2] // key.shape[1]
    keys, values = (part.repeat_interleave(groups, 1) for part in (key, value))
    scores = query.transpose(1, 2) @ keys.mT * scale + mask
    return (scores.softmax(-1) @ values).transpose(1, 2)


def inputs(
    batch: int, queries: int, keys: int, kv_heads: int, groups: int, seed: int = 0
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return query, key and value in float64, and a mask that leaves each query some keys."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, queries, kv_heads * groups, 8),
        (batch, kv_heads, keys, 8),
        (batch, kv_heads, keys, 8),
    )
    tensors = tuple(torch.randn(s, generator=generator).double() for s in shapes)
    mask = torch.rand(batch, queries, keys, generator=generator) < 0.6
    mask[..., 0] = True
    return tensors, mask


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_it_is_the_softmax_written_out(batch, queries, keys, kv_heads, groups, dtype):
    exact, mask = inputs(batch, queries, keys, kv_heads, groups)
    tensors = tuple(part.to(dtype) for part in exact)
    # What bf16 left of them.
    expected = written_out(*(part.double() for part in tensors), added(mask, torch.float64, 1), 0.3)
    out = attention(*tensors, added(mask, dtype, groups), 0.3)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert out.dtype == dtype
    assert (out.double() - expected).norm() <= bound * max(expected.norm().item(), 1)
