"""What the merge of an adapted layer needs besides the formulas: biases, and their dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from san_llm.architectures.decoders import BIAS_FLAGS


def bias_dtype(base: nn.Module, weight: Tensor) -> torch.dtype:
    """Return the dtype a merged bias is kept in: the old bias's, else that of the arithmetic."""
    if isinstance(base.bias, Tensor):
        return base.bias.dtype
    if weight.is_floating_point():
        return weight.dtype
    computed = getattr(base, "compute_dtype", None)  # bitsandbytes' 4-bit layers have one
    return computed if isinstance(computed, torch.dtype) else torch.float32


def hold_biases(model: Any) -> None:
    """Let a stock config load the merged biases: set its flags, fill absent biases with zeros."""
    for flag, parent in BIAS_FLAGS[model.config.model_type].items():
        linears = [
            module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and f".{parent}." in f".{name}"
        ]
        if any(linear.bias is not None for linear in linears):
            setattr(model.config, flag, True)
            for linear in linears:
                if linear.bias is None:
                    zeros = torch.zeros(linear.out_features, device=linear.weight.device)
                    like = linear.weight.dtype if linear.weight.is_floating_point() else zeros.dtype
                    linear.bias = nn.Parameter(zeros.to(like), requires_grad=False)
