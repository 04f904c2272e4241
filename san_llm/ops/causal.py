"""Causal attention of rows that lie behind one another, without a mask of tokens x tokens.

A row that shares nothing goes through torch's causal kernels. One that goes on from tokens of
other rows, or that is longer than a sliding window, is worked out some queries at a time under a
mask that all such rows share. Nothing that is made or kept grows with the square of a row. On a GPU
the flash kernels for rows of different lengths need no mask at all.

The backward pass of few queries in bf16 on a CPU is our own: torch's takes 2.1 ms for 104 tokens
and 9 heads where matrix products take 0.8; from 192 queries on torch's is the faster one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

BLOCK = 256  # queries under a mask at a time: with more, more is computed that is hidden
FEW = 192  # queries


class Part(NamedTuple):
    """Queries of a row's own tokens and the keys that any of them sees, of all the row's.

    Attributes:
        queries: Counted from the row's first own token.
        keys: Counted from the row's beginning.
        plain: Whether they are as many, and each query sees all keys up to its own.
    """

    queries: slice
    keys: slice
    plain: bool


@dataclass(frozen=True)
class Segment:
    """A row's own tokens in the sequence, and where the earlier ones stand that it begins with.

    Attributes:
        start: The first own token.
        stop: The one after the last.
        before: Earlier tokens that the row begins with, as ``(start, stop)``, in order.
    """

    start: int
    stop: int
    before: tuple[tuple[int, int], ...] = ()

    @property
    def own(self) -> slice:
        """Where the row's own tokens stand."""
        return slice(self.start, self.stop)

    @property
    def spans(self) -> list[slice]:
        """Where all tokens of the row stand, in order."""
        return [*(slice(*span) for span in self.before), self.own]

    @property
    def queries(self) -> int:
        """How many tokens are its own."""
        return self.stop - self.start

    @property
    def length(self) -> int:
        """How many tokens the row has."""
        return sum(span.stop - span.start for span in self.spans)

    def gather(self, tokens: Tensor) -> Tensor:
        """Return those of ``tokens`` (N, ...) that are the row's: a view if all are its own."""
        if not self.before:
            return tokens[self.own]
        return torch.cat([tokens[span] for span in self.spans])

    def room(self, tokens: Tensor) -> Tensor:
        """Return where to add what belongs to the row's of ``tokens`` (N, ...)."""
        if not self.before:
            return tokens[self.own]
        return tokens.new_zeros(self.length, *tokens.shape[1:])

    def give_back(self, gathered: Tensor, tokens: Tensor) -> None:
        """Add to ``tokens`` (N, ...) what was added to :meth:`room`, unless that is a view."""
        done = 0
        for span in self.spans if self.before else ():
            tokens[span] += gathered[done : (done := done + span.stop - span.start)]


@dataclass(frozen=True)
class Segments:
    """The rows of one forward, and what all its blocks share.

    Attributes:
        rows: Those that have tokens of their own; together they are all tokens, in order.
    """

    rows: list[Segment]
    _shared: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of_last(cls, queries: int, keys: int) -> Segments:
        """Return one row, whose first tokens were computed before."""
        return cls([Segment(keys - queries, keys, ((0, keys - queries),) * (keys > queries))])

    def mask(self, row: Segment, part: Part, window: int | None, like: Tensor) -> Tensor | None:
        """Return the mask of a row's part, (1, 1, queries, keys), unless it is a plain one."""
        if part.plain:
            return None
        if window not in self._shared:
            self._shared[window] = Hidden(max(row.length for row in self.rows), window, like)
        hidden: Hidden = self._shared[window]
        return hidden.of(part, row.length - row.queries)[None, None]

    def ends(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return where rows end, by own and by all their tokens, and where all these stand.

        The ends are int32 (rows + 1,), from 0; the places None where nothing is shared.
        """
        if "ends" not in self._shared:
            own = torch.tensor([0, *(row.stop for row in self.rows)])
            whole = torch.tensor([0, *(row.length for row in self.rows)]).cumsum(0)
            places = torch.cat([torch.arange(s.start, s.stop) for r in self.rows for s in r.spans])
            self._shared["ends"] = (
                own.to(device, torch.int32),
                whole.to(device, torch.int32),
                places.to(device) if any(row.before for row in self.rows) else None,
            )
        ends: tuple[Tensor, Tensor, Tensor | None] = self._shared["ends"]
        return ends


class Hidden:
    """Masks of parts: one strip, as high as a block, of which a part takes the columns it needs."""

    def __init__(self, longest: int, window: int | None, like: Tensor) -> None:
        """Make the strip for rows of up to ``longest`` tokens, to be added to scores."""
        height = min(BLOCK, longest)
        self._before = longest if window is None else min(longest, window)
        key = torch.arange(-self._before, height, device=like.device)  # from the first query
        query = torch.arange(height, device=like.device)[:, None]
        unseen = key > query
        if window is not None:
            unseen |= key <= query - window
        strip = torch.zeros(unseen.shape, dtype=like.dtype, device=like.device)
        self._strip = strip.masked_fill_(unseen, float("-inf"))

    def of(self, part: Part, earlier: int) -> Tensor:
        """Return (queries, keys) of a part of a row that begins with ``earlier`` shared tokens."""
        queries, keys, _ = part
        first = earlier + queries.start - self._before  # the key of the strip's first column
        return self._strip[: queries.stop - queries.start, keys.start - first : keys.stop - first]


def parts(queries: int, keys: int, window: int | None) -> Iterator[Part]:
    """Give the parts of causal attention of the last ``queries`` of ``keys`` tokens."""
    if queries == keys and (window is None or window >= keys):
        yield Part(slice(0, queries), slice(0, keys), plain=True)
        return
    for start in range(0, queries, BLOCK):
        stop = min(start + BLOCK, queries)
        at = keys - queries + start
        first = 0 if window is None else max(0, at - window + 1)
        yield Part(slice(start, stop), slice(first, at + stop - start), plain=False)


def causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return the attention of packed rows, (N, heads, head_dim), differentiable.

    Args:
        query: (N, heads, head_dim).
        key: (N, kv_heads, head_dim).
        value: (N, kv_heads, head_dim).
        segments: How the rows lie.
        scale: What scores are multiplied by.
        window: How many tokens a query sees, itself included; all earlier ones where None.
        dropout: Share of the attention weights that is dropped.
    """
    if query.device.type == "cpu" and not dropout:
        out: Tensor = _Causal.apply(query, key, value, segments, scale, window)
        return out
    if not dropout and _has_flash(query, key, value):
        return _flash(query, key, value, segments, scale, window)
    rows = [
        last_of(
            query[row.own],
            row.gather(key),
            row.gather(value),
            segments,
            row,
            scale,
            window,
            dropout,
        )
        for row in segments.rows
    ]
    return torch.cat(rows)


def last_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    row: Segment,
    scale: float,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return the causal attention of the last tokens of one row, (queries, heads, head_dim).

    Args:
        query: (queries, heads, head_dim).
        key: (keys, kv_heads, head_dim); the last ones are the queries' own.
        value: Like the keys.
        segments: Those of the forward, which keep its masks.
        row: Which of them it is.
        scale: See :func:`causal`.
        window: See :func:`causal`.
        dropout: See :func:`causal`.
    """
    groups, length = query.shape[1] // key.shape[1], len(key)
    # A group of heads is a batch of its own, to which keys are shown without copies.
    queries = query.unflatten(1, (-1, groups)).permute(2, 1, 0, 3)
    keys, values = (t.transpose(0, 1).expand(groups, -1, -1, -1) for t in (key, value))
    how: dict[str, Any] = {"scale": scale, "dropout_p": dropout}
    if query.device.type != "cpu" and (window is None or window >= length):
        bias: Any = causal_lower_right(len(query), length)  # a GPU's kernels know it without a mask
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, **how)
        return _by_token(out)
    pieces = [
        F.scaled_dot_product_attention(
            queries[:, :, part.queries],
            keys[:, :, part.keys],
            values[:, :, part.keys],
            attn_mask=segments.mask(row, part, window, query),
            is_causal=part.plain,
            **how,
        )
        for part in parts(len(query), length, window)
    ]
    return _by_token(torch.cat(pieces, -2))


def _by_token(out: Tensor) -> Tensor:
    """Return (groups, kv_heads, L, d) as (L, heads, d)."""
    return out.permute(2, 1, 0, 3).flatten(1, 2)


def _by_head(tokens: Tensor) -> Tensor:
    """Return (L, heads, ...) as (1, heads, L, ...)."""
    return tokens.transpose(0, 1)[None]


class _Causal(torch.autograd.Function):
    """torch's flash attention on a CPU, part by part, into one output."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Segments,
        scale: float,
        window: int | None,
    ) -> Tensor:
        outs: list[Tensor] = []
        log_sums: list[Tensor] = []
        for row in segments.rows:
            q, k, v = (_by_head(t) for t in (query[row.own], row.gather(key), row.gather(value)))
            for part in parts(row.queries, row.length, window):
                at, seen, plain = part
                out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    q[:, :, at],
                    k[:, :, seen],
                    v[:, :, seen],
                    is_causal=plain,
                    attn_mask=segments.mask(row, part, window, query),
                    scale=scale,
                )
                outs.append(out[0].transpose(0, 1))
                log_sums.append(sums[0].transpose(0, 1))
        # One part's output is kept as it lies: a copy would leave a hole in malloc's memory.
        out, sums = (one[0] if len(one) == 1 else torch.cat(one) for one in (outs, log_sums))
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.how = segments, scale, window
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Work the attention weights out again (FlashAttention-2, arXiv:2307.08691, algorithm 2).

        What a key is given by many queries is summed wide.
        """
        query, key, value, out, log_sums = ctx.saved_tensors
        segments, scale, window = ctx.how
        narrow = query.dtype in (torch.bfloat16, torch.float16)
        d_query = torch.empty(query.shape, dtype=query.dtype)
        d_key, d_value = (torch.zeros(t.shape, dtype=log_sums.dtype) for t in (key, value))
        for row in segments.rows:
            d_o, q, o, sums, d_q = (
                _by_head(tensor[row.own]) for tensor in (grads[0], query, out, log_sums, d_query)
            )
            k, v = (_by_head(row.gather(tensor)) for tensor in (key, value))
            d_k, d_v = (_by_head(row.room(tensor)) for tensor in (d_key, d_value))
            for part in parts(row.queries, row.length, window):
                at, seen, _ = part
                few = narrow and at.stop - at.start < FEW
                d_q[:, :, at], part_k, part_v = (_few_backward if few else _flash_backward)(
                    (d_o[:, :, at], q[:, :, at], k[:, :, seen], v[:, :, seen]),
                    (o[:, :, at], sums[:, :, at]),
                    segments.mask(row, part, window, query),
                    scale,
                )
                d_k[:, :, seen] += part_k
                d_v[:, :, seen] += part_v
            row.give_back(d_k[0].transpose(0, 1), d_key)
            row.give_back(d_v[0].transpose(0, 1), d_value)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None, None


def _flash_backward(
    given: tuple[Tensor, Tensor, Tensor, Tensor],
    found: tuple[Tensor, Tensor],
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a part's queries, keys and values.

    Args:
        given: The output's gradient and queries, (1, heads, L, d); keys and values,
            (1, kv_heads, S, d).
        found: The output, and (1, heads, L) the logarithms of the sums of exponents.
        mask: (1, 1, L, S), added to the scores; None where each sees all up to its own.
        scale: What scores were multiplied by.
    """
    gradients: tuple[Tensor, Tensor, Tensor] = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *given, *found, 0.0, mask is None, attn_mask=mask, scale=scale
        )
    )
    return gradients


def _few_backward(
    given: tuple[Tensor, Tensor, Tensor, Tensor],
    found: tuple[Tensor, Tensor],
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what :func:`_flash_backward` does, by matrix products, for a narrow dtype.

    Scores and what is subtracted from one another stay wide; the other products are of the
    queries' dtype, as on a GPU.
    """
    low, wide = given[0].dtype, found[1].dtype
    k, v = (tensor[0] for tensor in given[2:])
    length, together = given[0].shape[2], (len(k), -1)
    # The heads of a group are more queries of one head: (kv_heads, groups * L, d).
    d_o, q, o, sums = (
        tensor[0].unflatten(0, together).flatten(1, 2)
        for tensor in (*given[:2], found[0], found[1][..., None])
    )
    inner = (d_o.to(wide) * o.to(wide)).sum(-1, keepdim=True)
    weights = torch.bmm(q.to(wide), k.to(wide).mT).mul_(scale).sub_(sums)
    by_query = weights.unflatten(1, (-1, length))
    if mask is not None:
        by_query.add_(mask[0])
    weights.exp_()
    if mask is None:
        by_query.tril_()
    scores = torch.bmm(d_o.to(wide), v.to(wide).mT).sub_(inner).mul_(weights)
    d_v = torch.bmm(weights.to(low).mT, d_o)
    scores = scores.mul_(scale).to(low)
    d_q = torch.bmm(scores, k).unflatten(1, (-1, length)).flatten(0, 1)
    return d_q[None], torch.bmm(scores.mT, q)[None], d_v[None]


@cache
def _varlen() -> Any:
    """Return torch's attention of rows of different lengths, or None before torch 2.12."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    # At first it knew no heads that share keys.
    return varlen_attn if "enable_gqa" in inspect.signature(varlen_attn).parameters else None


def _has_flash(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether this GPU has flash kernels for such tensors."""
    if query.device.type != "cuda" or _varlen() is None or query.shape[-1] % 8:
        return False
    heads = [_by_head(tensor) for tensor in (query, key, value)]
    params: Any = torch.backends.cuda.SDPAParams  # whose stub lacks the last argument
    params = params(*heads, None, 0.0, True, True)
    return torch.backends.cuda.can_use_flash_attention(params)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
) -> Tensor:
    """Do :func:`causal` by flash kernels, in which the last query sees the last key."""
    own, whole, places = segments.ends(query.device)
    if places is not None:
        key, value = (tensor.index_select(0, places) for tensor in (key, value))
    out: Tensor = _varlen()(
        query,
        key,
        value,
        own,
        whole,
        max(row.queries for row in segments.rows),
        max(row.length for row in segments.rows),
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
    )
    return out
