"""Attention under a mask, and its own backward pass, against the softmax written out in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from san_llm.ops import attention as module
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


def gradients(out: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return torch.autograd.grad((out * weights).sum(), tensors)


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    block=st.sampled_from([1, 30, 2**18]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_it_is_the_softmax_written_out(batch, queries, keys, kv_heads, groups, block, dtype):
    exact, mask = inputs(batch, queries, keys, kv_heads, groups)
    tensors = tuple(part.to(dtype).requires_grad_() for part in exact)
    exact = tuple(part.detach().double().requires_grad_() for part in tensors)  # what bf16 left
    expected = written_out(*exact, added(mask, torch.float64, 1), 0.3)
    before = module.BLOCK
    module.BLOCK = block
    try:
        out = attention(*tensors, added(mask, dtype, groups), 0.3)
        found = gradients(out, tensors)
    finally:
        module.BLOCK = before
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for ours, theirs in zip((out, *found), (expected, *gradients(expected, exact)), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= bound * max(theirs.norm().item(), 1)


def test_in_bf16_its_gradients_are_no_worse_than_torchs():
    exact, mask = inputs(2, 40, 40, 2, 3)
    tensors = tuple(part.bfloat16().requires_grad_() for part in exact)
    exact = tuple(part.detach().double().requires_grad_() for part in tensors)
    wanted = gradients(written_out(*exact, added(mask, torch.float64, 1), 0.3), exact)
    low = added(mask, torch.bfloat16, 1)
    query, key, value = tensors
    torchs = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.repeat_interleave(3, 1),
        value.repeat_interleave(3, 1),
        attn_mask=low,
        scale=0.3,
    ).transpose(1, 2)
    ours = gradients(attention(*tensors, added(mask, torch.bfloat16, 3), 0.3), tensors)
    for mine, theirs, right in zip(ours, gradients(torchs, tensors), wanted, strict=True):
        error, other = ((g.double() - right).norm().item() for g in (mine, theirs))
        assert error <= 1.1 * other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_weights(dtype):
    exact, mask = inputs(2, 40, 40, 2, 1)
    tensors = tuple(part.to(dtype).requires_grad_() for part in exact)
    torch.manual_seed(0)
    seen = added(mask, dtype, 1)
    dropped = attention(*tensors, seen, 0.3, dropout=0.5)
    assert not torch.allclose(dropped, attention(*tensors, seen, 0.3), atol=0.1)
    gradients(dropped, tensors)
