"""Tiny models of every family, adapters that have moved from their start, and their vectors."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from tiny import tiny_config
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from san_llm import SanConfig


class DoubleNorm(nn.Module):
    """A family's RMSNorm without its drop to float32, so that float64 means float64."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        square = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(square + self.variance_epsilon))


FAMILIES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}


def family_config(family: str, **changes: Any) -> PretrainedConfig:
    """Return the tiny config as one of another family."""
    settings = tiny_config(initializer_range=0.2, **changes).to_dict()
    # Rotary settings are per family, and a head size is only fixed where a test asks for one.
    dropped = {"model_type", "rope_parameters", "architectures", "head_dim"} - set(changes)
    return FAMILIES[family](**{key: settings[key] for key in settings if key not in dropped})


def family_model(
    family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Any:
    """Return a random tiny model of a family; in float64 its norms do not drop to float32."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(family_config(family, **changes)).to(dtype).eval()
    for name, module in list(model.named_modules()):
        if name.endswith("norm"):
            module.weight.data.uniform_(0.5, 1.5)
            if dtype == torch.float64:
                model.set_submodule(name, DoubleNorm(module))
        elif getattr(module, "bias", None) is not None:
            module.bias.data.normal_(std=0.2)
    return model


def shake(model: Any, seed: int = 1, adapter: str = "default") -> Any:
    """Move an adapter's vectors far from their start, some to zero or below; return the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not name.endswith(f".{adapter}") or ".san_" not in name:
            continue
        values = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
        if ".san_gamma." in name:
            sign = torch.where(values > 0.9, -1.0, torch.where(values < 0.03, 0.0, 1.0))
            values = (0.6 + 0.8 * values) * sign
        parameter.data.copy_(values)
    return model


def adapt(base: Any, seed: int = 1, adapter: str = "default", **options: Any) -> Any:
    """Return ``base`` with a SAN adapter that has moved from its start."""
    return shake(get_peft_model(base, SanConfig(**options), adapter), seed, adapter)


def vectors(model: Any, adapter: str = "default") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return ``(gammas, betas)`` of an adapter by the base model's module names."""
    gammas, betas = {}, {}
    for name, parameter in model.named_parameters():
        module, _, last = name.removeprefix("base_model.model.").partition(".san_")
        if last == f"gamma.{adapter}":
            gammas[module] = parameter
        elif last == f"beta.{adapter}":
            betas[module] = parameter
    return gammas, betas


def text(batch: int = 2, length: int = 7, seed: int = 3) -> Tensor:
    """Return random token ids (batch, length) of the tiny vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 90, (batch, length), generator=generator)


@torch.no_grad()
def logits(model: Any, tokens: Tensor | None = None) -> Tensor:
    """Return the logits of a model on random text."""
    result: Tensor = model(input_ids=text() if tokens is None else tokens).logits
    return result


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest expected number."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
