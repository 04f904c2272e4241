"""Attention of packed rows against the softmax written out in float64, and what it may not make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from san_llm.ops import causal as module
from san_llm.ops.causal import Segment, Segments, causal, last_of

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@st.composite
def layouts(draw: Any, longest: int = 9) -> list[Segment]:
    """Return rows that share nothing, or go on from any token of a row before them."""
    rows: list[Segment] = []
    paths: list[list[int]] = []
    start = 0
    for number in range(draw(st.integers(1, 4))):
        earlier = paths[draw(st.integers(0, number - 1))] if number and draw(st.booleans()) else []
        earlier = earlier[: draw(st.integers(0, len(earlier)))]
        stop = start + draw(st.integers(1, longest))
        rows.append(Segment(start, stop, tuple((token, token + 1) for token in earlier)))
        paths.append([*earlier, *range(start, stop)])
        start = stop
    return rows


def tensors(rows: list[Segment], kv_heads: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    """Return query, key and value, (N, heads, 8)."""
    dice = torch.Generator().manual_seed(0)
    shapes = [(rows[-1].stop, heads, 8) for heads in (kv_heads * groups, kv_heads, kv_heads)]
    return [torch.randn(s, generator=dice).to(dtype).requires_grad_() for s in shapes]


def written_out(
    given_: list[Tensor], rows: list[Segment], scale: float, window: int | None
) -> Tensor:
    query, key, value = given_
    groups, outs = query.shape[1] // key.shape[1], []
    for row in rows:
        path = [token for span in row.spans for token in range(span.start, span.stop)]
        k, v = (t[path].repeat_interleave(groups, 1).transpose(0, 1) for t in (key, value))
        at = torch.arange(row.length)
        seen = at <= at[:, None]
        if window is not None:
            seen &= at > at[:, None] - window
        scores = query[row.own].transpose(0, 1) @ k.mT * scale
        scores = scores.masked_fill(~seen[-row.queries :], float("-inf"))
        outs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outs)


def by_row(given_: list[Tensor], rows: list[Segment], scale: float, window: int | None) -> Tensor:
    query, key, value = given_
    segments = Segments(rows)
    return torch.cat(
        [
            last_of(
                query[row.own], row.gather(key), row.gather(value), segments, row, scale, window
            )
            for row in rows
        ]
    )


def gradients(out: Tensor, given_: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad((out * weights).sum(), given_)]


@settings(deadline=None, max_examples=80)
@given(
    rows=layouts(),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 3), (1, 4)]),
    window=st.sampled_from([None, 1, 3, 8]),
    block=st.sampled_from([1, 4, 256]),
    few=st.sampled_from([3, 192]),
    dtype=st.sampled_from(list(BOUNDS)),
)
def test_it_is_the_softmax_written_out(rows, heads, window, block, few, dtype):
    given_ = tensors(rows, *heads, dtype)
    exact = [part.detach().double().requires_grad_() for part in given_]  # what the dtype left
    expected = gradients(written_out(exact, rows, 0.3, window), exact)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        patch.setattr(module, "FEW", few)
        found = gradients(causal(*given_, Segments(rows), 0.3, window), given_)
        apart = gradients(by_row(given_, rows, 0.3, window), given_)
    for theirs, *ours in zip(expected, found, apart, strict=True):
        for mine in ours:
            assert mine.dtype == dtype
            assert (mine.double() - theirs).norm() <= BOUNDS[dtype] * max(theirs.norm().item(), 1)


def of_different_lengths(query, key, value, cu_q, cu_k, max_q, max_k, **how) -> Tensor:
    """What torch's page says of ``varlen_attn``: windows end at each row's last key."""
    left, right = how["window_size"]
    assert right == 0
    assert max_q == cu_q.diff().max()
    assert max_k == cu_k.diff().max()
    assert cu_q.dtype == cu_k.dtype == torch.int32
    outs = []
    for row in range(len(cu_q) - 1):
        k, v = (t[cu_k[row] : cu_k[row + 1]].transpose(0, 1) for t in (key, value))
        q = query[cu_q[row] : cu_q[row + 1]].transpose(0, 1)
        far = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
        seen = (far >= 0) & (far <= left) if left >= 0 else far >= 0
        gqa = {"scale": how["scale"], "enable_gqa": how["enable_gqa"]}
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=seen, **gqa)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


@settings(deadline=None, max_examples=30)
@given(rows=layouts(), window=st.sampled_from([None, 1, 3]))
def test_flash_kernels_are_told_the_same(rows, window):
    given_ = tensors(rows, 2, 2, torch.float64)
    expected = written_out(given_, rows, 0.3, window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_varlen", lambda: of_different_lengths)
        found = module._flash(*given_, Segments(rows), 0.3, window)
    assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 100])
def test_a_gpu_gives_the_same(dtype, window):
    rows = [Segment(0, 300), Segment(300, 420, ((0, 200),)), Segment(420, 500)]
    given_ = tensors(rows, 2, 3, dtype)
    exact = [part.detach().double().requires_grad_() for part in given_]
    there = [part.detach().cuda().requires_grad_() for part in given_]
    found = gradients(causal(*there, Segments(rows), 0.3, window), there)
    for mine, theirs in zip(
        found, gradients(written_out(exact, rows, 0.3, window), exact), strict=True
    ):
        assert (mine.cpu().double() - theirs).norm() <= 2 * BOUNDS[dtype] * theirs.norm()


@pytest.mark.parametrize("few", [1, 192])
def test_in_bf16_gradients_are_no_worse_than_torchs(few, monkeypatch):
    monkeypatch.setattr(module, "FEW", few)
    rows = [Segment(0, 40)]
    given_ = tensors(rows, 2, 3, torch.bfloat16)
    exact = [part.detach().double().requires_grad_() for part in given_]
    wanted = gradients(written_out(exact, rows, 0.3, None), exact)
    query, key, value = given_
    torchs = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.repeat_interleave(3, 1).transpose(0, 1)[None],
        value.repeat_interleave(3, 1).transpose(0, 1)[None],
        is_causal=True,
        scale=0.3,
    )[0].transpose(0, 1)
    ours = gradients(causal(*given_, Segments(rows), 0.3), given_)
    for mine, theirs, right in zip(ours, gradients(torchs, given_), wanted, strict=True):
        error, other = ((g.double() - right).norm().item() for g in (mine, theirs))
        assert error <= 1.1 * other


@pytest.mark.parametrize("window", [None, 3])
def test_dropout_drops_weights(window):
    rows = [Segment(0, 40), Segment(40, 60)]
    given_ = tensors(rows, 2, 2, torch.float32)
    torch.manual_seed(0)
    dropped = causal(*given_, Segments(rows), 0.3, window, dropout=0.5)
    plain = causal(*given_, Segments(rows), 0.3, window)
    assert not torch.allclose(dropped, plain, atol=0.1)
    assert dropped.mean(0).sub(plain.mean(0)).abs().max() < 1  # what stays is scaled up
    gradients(dropped, given_)
