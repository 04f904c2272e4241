"""A frozen base weight in fp32, some rows at a time: nothing of its whole size is made or kept.

The low-rank carriers need row norms of W and the product W A^T. Over a base in bf16, 8 or 4 bits W
has to be widened for that; a block of rows is, used, and let go, in the backward pass once more.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

BLOCK = 2**22  # numbers of a block: 16 MB in fp32


def wide_rows(linear: Any, weight: Tensor) -> Iterator[Tensor]:
    """Iterate over blocks of rows (rows, d_in) of a base layer's weight, in fp32 or wider.

    A convolution's row has all places of its kernel: (rows, d_in times those).

    Args:
        linear: A Linear, full-precision or one of bitsandbytes', or a convolution.
        weight: Its weight, as it is stored. Of a sharded one (FSDP2) all rows are gathered: every
            process must ask.
    """
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
    state, weight = getattr(weight, "quant_state", None), weight.data
    if state is not None:
        yield from _rows_of_4_bits(weight, state, max(1, BLOCK // linear.in_features))
        return
    weight = weight.flatten(1)
    step = max(1, BLOCK // weight.shape[1])
    if weight.dtype == torch.int8:
        scale = linear.state.SCB if linear.state.SCB is not None else linear.weight.SCB
        for rows, scales in zip(weight.split(step), scale.split(step), strict=True):
            yield rows * (scales.to(rows.device)[:, None] / 127)
    elif weight.dtype in (torch.float32, torch.float64):
        yield weight
    else:
        for rows in weight.split(step):
            yield rows.float()


def _rows_of_4_bits(weight: Tensor, state: Any, step: int) -> Iterator[Tensor]:
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise

    d_out, d_in = state.shape
    if d_in % state.blocksize:  # rows share blocks: read as the layer's own forward does
        yield dequantize_4bit(weight, state).float()
        return
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2).float() + state.offset
    scales = absmax.view(d_out, -1).split(step)
    codes = weight.view(torch.uint8).view(d_out, -1).split(step)
    for packed, row_scales in zip(codes, scales, strict=True):
        rows = copy.copy(state)
        rows.shape, rows.nested, rows.absmax = (len(row_scales), d_in), False, row_scales.flatten()
        yield dequantize_4bit(packed.reshape(-1, 1), rows).float()


class Projected(torch.autograd.Function):
    """``W A^T`` (d_out, rank) of a frozen weight that is widened block by block."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, linear: nn.Module, weight: Tensor) -> Tensor:
        """Return the product.

        Args:
            ctx: For the backward pass.
            a: A, (rank, d_in).
            linear: The base Linear.
            weight: Its weight, as it is stored.
        """
        ctx.linear, ctx.weight, ctx.dtype = linear, weight, a.dtype
        return torch.cat([rows.to(a.device) @ a.T for rows in wide_rows(linear, weight)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of A, ``grad^T W``."""
        total: Any = 0
        first = 0
        for rows in wide_rows(ctx.linear, ctx.weight):
            grad_rows = grad[first : first + len(rows)].T.to(rows.dtype)
            total = total + grad_rows @ rows.to(grad.device)
            first += len(rows)
        return total.to(ctx.dtype), None, None
