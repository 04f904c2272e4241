"""Scaling with a backward pass that keeps little and computes in blocks that fit a CPU's cache.

``scaled`` is the plain form; the functions give the same values and, up to rounding, the same
gradients. Shapes: features are (..., d), scales are (d,) and of fp32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 2**17  # numbers: 512 KB in fp32


def scaled(features: Tensor, scale: Tensor | None) -> Tensor:
    """Return ``features * scale`` in the features' dtype, multiplied in fp32 or wider.

    Args:
        features: (..., d), in any floating dtype.
        scale: (d,), or None for 1. In bf16 a scale near 1 has steps of 1/128: casting it first
            would lose what was learned, so the product is rounded instead.
    """
    if scale is None:
        return features
    return (features * scale.to(features.device)).to(features.dtype)


class Scaled(torch.autograd.Function):
    """``features * scale``; keeps the features."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, scale: Tensor) -> Tensor:
        """Return the scaled features."""
        ctx.save_for_backward(features, scale)
        if not _mixed(features, scale):
            return scaled(features, scale)
        out = _like(features)
        for x, y, work in _blocks(features, out, scratch=1, dtype=scale.dtype):
            _times(x, scale, y, work)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the gradients to features and scale."""
        features, scale = ctx.saved_tensors
        d_features, d_scale = _like(grads[0]), _Summed()
        blocks = _blocks(grads[0], features, d_features, scratch=2, dtype=scale.dtype)
        for grad, x, d_x, wide, work in blocks:
            grad = _wide(grad, wide)
            d_scale.add(grad, _wide(x, work))
            _times(grad, scale, d_x, wide)
        return d_features, d_scale.gradient()


class ScaledNorm(torch.autograd.Function):
    """``RMSNorm(x) * weight``; keeps x, the weight and one number a token."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, rounded_once: bool = False
    ) -> Tensor:
        """Return x (..., d), normalized and scaled by the weight (d,).

        ``rounded_once``: not before it is scaled, as LLaMA does, but only afterwards.
        """
        out = _like(x)
        rstds = x.new_empty(*x.shape[:-1], 1, dtype=weight.dtype)
        for x_, rstd, y, wide, work in _blocks(x, rstds, out, scratch=2, dtype=weight.dtype):
            x_ = _wide(x_, wide)
            torch.rsqrt(torch.mul(x_, x_, out=work).mean(-1, keepdim=True).add_(eps), out=rstd)
            torch.mul(x_, rstd, out=work)
            if not rounded_once and y.dtype != work.dtype:
                # Rounded where the base's own norm rounds, so that s = 1 gives its bits.
                work.copy_(y.copy_(work))
            _times(work, weight, y, work)
        ctx.save_for_backward(x, weight, rstds)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """Return the gradients to x and the weight."""
        x, weight, rstds = ctx.saved_tensors
        d_x, d_weight = _like(x), _Summed()
        blocks = _blocks(x, rstds, grads[0], d_x, scratch=3, dtype=weight.dtype)
        for x_, rstd, grad, d_x_, n, wide, work in blocks:
            torch.mul(_wide(x_, n), rstd, out=n)
            grad = _wide(grad, wide)
            d_weight.add(n, grad)
            torch.mul(grad, weight, out=work)
            inner = torch.linalg.vecdot(work, n).unsqueeze(-1)
            work.addcmul_(n, inner.div_(-n.shape[-1]))
            _times(work, rstd, d_x_, work)
        return d_x, d_weight.gradient(), None, None


class ScaledLayerNorm(torch.autograd.Function):
    """LayerNorm of another dtype than its weight's, rounded once; keeps x and two numbers a token.

    torch's own takes two dtypes on a CPU alone.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """Return x (..., d), normalized, scaled by the weight and shifted by the bias (d,)."""
        ctx.shape = x.shape[-1:]
        wide = x.to(weight.dtype)
        out, mean, rstd = torch.native_layer_norm(wide, ctx.shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        """Return the gradients to x, the weight and the bias."""
        x, weight, bias, mean, rstd = ctx.saved_tensors
        grad, wide = grads[0].to(weight.dtype), x.to(weight.dtype)
        wanted = [True, True, bias is not None]
        d_x, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
            grad, wide, ctx.shape, mean, rstd, weight, bias, wanted
        )
        return d_x.to(x.dtype), d_weight, d_bias, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Return x (..., d), normalized, scaled and shifted by (d,), in the dtype of x.

    Args:
        x: In any floating dtype.
        weight: Of fp32 or wider.
        bias: Likewise, or None for 0.
        eps: What is added to the variance.
    """
    if x.dtype == weight.dtype or x.device.type == "cpu":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    out: Tensor = ScaledLayerNorm.apply(x, weight, bias, eps)
    return out


class ScaledActivation(torch.autograd.Function):
    """``act(g * x) * c`` for an activation as a model has it; keeps x, and computes the rest again.

    The activation is a function of each token alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        g: Tensor | None,
        c: Tensor | None,
        act: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Return the hidden features (..., d) of an MLP; None stands for a scale of 1."""
        ctx.save_for_backward(x, g, c)
        ctx.act = act
        out = _like(x)
        for x_, h, work in _blocks(x, out, scratch=1, dtype=_widest(x, g, c)):
            _times(act(_times(x_, g, h, work)), c, h, work)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        """Return the gradients to x, g and c."""
        x, g, c = ctx.saved_tensors
        d_x, d_g, d_c = _like(x), _Summed(), _Summed()
        blocks = _blocks(x, grads[0], d_x, scratch=3, dtype=_widest(x, g, c))
        for x_, d_h, d_x_, a, wide, work in blocks:
            d_h = _wide(d_h, wide)
            leaf = _times(x_, g, a, a).detach().requires_grad_()
            with torch.enable_grad():
                y = ctx.act(leaf)
            if c is not None:
                d_c.add(y.detach(), d_h)
                d_h = _times(d_h, c, work, work)
            (d_a,) = torch.autograd.grad(y, leaf, d_h)
            if g is not None:
                d_g.add(d_a, _wide(x_, wide))
            _times(d_a, g, d_x_, work)
        return d_x, d_g.gradient(), d_c.gradient(), None


class ScaledSwiGLU(torch.autograd.Function):
    """``silu(g * gate) * up * c``; keeps gate and up where the base's own keeps three tensors.

    With ``gelu`` it is GeGLU: GELU in its tanh form stands where silu does.
    """

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, g: Tensor | None, c: Tensor | None, gelu: bool = False
    ) -> Tensor:
        """Return the hidden features (..., d) of the gated MLP; None stands for a scale of 1."""
        ctx.save_for_backward(gate, up, g, c)
        ctx.gelu = gelu
        out = _like(gate)
        for gate_, up_, h, work in _blocks(gate, up, out, scratch=1, dtype=_widest(gate, g, c)):
            _activate(_times(gate_, g, h, work), gelu, out=h).mul_(up_)
            _times(h, c, h, work)
        return out

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, None]:
        """Return the gradients to gate, up, g and c."""
        gate, up, g, c = ctx.saved_tensors
        d_gate, d_up = _like(gate), _like(up)
        d_g, d_c = _Summed(), _Summed()
        wide = _widest(gate, g, c)
        blocks = _blocks(gate, up, grads[0], d_gate, d_up, scratch=6, dtype=wide)
        for gate_, up_, d_h, d_gate_, d_up_, a, work, more, *wides in blocks:
            gate_, up_, d_h = map(_wide, (gate_, up_, d_h), wides)
            _times(gate_, g, a, a)
            _activate(a, ctx.gelu, out=work).mul_(d_h)
            if c is not None:
                d_c.add(work, up_)
            _times(work, c, d_up_, more)
            _times(d_h, c, work, more).mul_(up_)
            if ctx.gelu:
                gradient = torch.ops.aten.gelu_backward.grad_input
                gradient(work, a, approximate="tanh", grad_input=work)
            else:
                torch.ops.aten.silu_backward.grad_input(work, a, grad_input=work)
            if g is not None:
                d_g.add(work, gate_)
            _times(work, g, d_gate_, more)
        return d_gate, d_up, d_g.gradient(), d_c.gradient(), None


class ScaledRotary(torch.autograd.Function):
    """The rotary embedding of ``features * scale``; keeps the features."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        """Return rotated queries or keys, bit for bit what scaling and then rotating gives.

        Args:
            ctx: For the backward pass.
            x: (batch, heads, tokens, head_dim), a view of features (batch, tokens, d).
            scale: (d,), or None for 1.
            cos: (batch or 1, tokens, head_dim), its halves alike, in the dtype of x.
            sin: Likewise.
        """
        batch, heads, tokens, head_dim = x.shape
        features = x.transpose(1, 2).flatten(2)
        cos, sin = (table.expand(batch, -1, -1) for table in (cos, sin))
        ctx.save_for_backward(None if scale is None else features, scale, cos, sin)
        out = _like(features)
        wide = features.dtype if scale is None else scale.dtype
        blocks = _blocks(features, out, cos, sin, scratch=2)
        wides = _blocks(features, scratch=1, dtype=wide)
        for (x_, y, c, s, mine, work), (_, w) in zip(blocks, wides, strict=True):
            _rotate(x_ if scale is None else _times(x_, scale, mine, w), c, s, y, work)
        return out.view(batch, tokens, heads, head_dim).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """Return the gradients to x and the scale."""
        features, scale, cos, sin = ctx.saved_tensors
        grad = grads[0].transpose(1, 2)
        d_x, d_scale = _like(grad), _Summed()
        grad, out = grad.flatten(2), d_x.flatten(2)
        if scale is None:
            for g, d_x_, c, s, work in _blocks(grad, out, cos, sin, scratch=1):
                _rotate(g, c, -s, d_x_, work)
            return d_x.transpose(1, 2), None, None, None
        blocks = _blocks(grad, features, out, cos, sin, scratch=4, dtype=scale.dtype)
        for g, x_, d_x_, c, s, turned, work, wide_g, wide_x in blocks:
            c, s = c.to(scale.dtype), s.to(scale.dtype)
            _rotate(_wide(g, wide_g), c, -s, turned, work)
            d_scale.add(turned, _wide(x_, wide_x))
            _times(turned, scale, d_x_, work)
        return d_x.transpose(1, 2), d_scale.gradient(), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, work: Tensor) -> None:
    """Write ``x * cos + (-x2, x1) * sin`` into ``out``, for each head's halves x1 and x2.

    Args:
        x: (tokens, d).
        cos: (tokens, head_dim), its halves alike.
        sin: Likewise.
        out: (tokens, d), other memory than x.
        work: (tokens, d), to work in.
    """
    width = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)[..., : width // 2]
    x, out, work = (tensor.unflatten(-1, (-1, width)) for tensor in (x, out, work))
    x1, x2 = x.chunk(2, -1)
    out1, out2 = out.chunk(2, -1)
    work1, work2 = work.chunk(2, -1)
    torch.mul(x, cos, out=out)
    out1.sub_(torch.mul(x2, sin, out=work1))
    out2.add_(torch.mul(x1, sin, out=work2))


class _Summed:
    """The gradient of a scale: products added up block by block, over tokens only at the end."""

    def __init__(self) -> None:
        self.products: Tensor | None = None

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add ``one * other`` of a block (tokens, d), which has at most the first one's tokens."""
        if self.products is not None:
            self.products[: len(left)].addcmul_(left, right)
            return
        products = left * right
        # Elsewhere than on a CPU the first block is the only one.
        self.products = products if left.device.type == "cpu" else products.sum(0, keepdim=True)

    def gradient(self) -> Tensor | None:
        """Return the sum (d,), or None where nothing was added."""
        return None if self.products is None else self.products.sum(0)


def _activate(features: Tensor, gelu: bool, out: Tensor) -> Tensor:
    """Write silu of the features, or their GELU in its tanh form, into ``out``; return that."""
    if gelu:
        torch.ops.aten.gelu.out(features, approximate="tanh", out=out)
    else:
        torch.ops.aten.silu.out(features, out=out)
    return out


def _mixed(features: Tensor, scale: Tensor) -> bool:
    return features.dtype != scale.dtype and features.device.type == "cpu"


def _widest(features: Tensor, *scales: Tensor | None) -> torch.dtype:
    return next((scale.dtype for scale in scales if scale is not None), features.dtype)


def _wide(features: Tensor, scratch: Tensor) -> Tensor:
    """Return the features in the scratch's dtype: they themselves, or copied into it."""
    return features if features.dtype == scratch.dtype else scratch.copy_(features)


def _times(features: Tensor, scale: Tensor | None, out: Tensor, scratch: Tensor) -> Tensor:
    """Write ``features * scale``, rounded once, into ``out``, and return that.

    On a CPU a product of two dtypes takes six times as long as one of a copy.
    """
    if scale is None:
        return out if out is features else out.copy_(features)
    if _mixed(out, scale) or _mixed(features, scale):
        return out.copy_(torch.mul(_wide(features, scratch), scale, out=scratch))
    return torch.mul(features, scale, out=out)


def _blocks(
    *features: Tensor, scratch: int = 0, dtype: torch.dtype | None = None
) -> Iterator[list[Tensor]]:
    """Iterate over blocks of tokens, as views of each (..., d), with scratch of the first's shape.

    On a CPU a block stays in its cache, and the scratch is the same memory again and again: fresh
    memory costs more than the arithmetic. Elsewhere all tokens are one block.
    """
    # A view wherever there is one: halves of one tensor are read where they stand.
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in features]
    tokens, width = flat[0].shape
    count = max(1, round(tokens * width / BLOCK)) if flat[0].device.type == "cpu" else 1
    step = max(1, -(-tokens // count))
    work = [flat[0].new_empty(step, width, dtype=dtype) for _ in range(scratch)]
    for views in zip(*(tensor.split(step) for tensor in flat), strict=True):
        rest = len(views[0])
        yield [*views, *(work if rest == step else (tensor[:rest] for tensor in work))]


def _like(features: Tensor) -> Tensor:
    return torch.empty_like(features, memory_format=torch.contiguous_format)
