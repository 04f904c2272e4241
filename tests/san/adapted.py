"""Tiny models of every family, adapters that have moved from their start, and their vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tiny import tiny_config
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.masking_utils import eager_mask

from san_llm import SanConfig


class DoubleNorm(nn.Module):
    """A family's RMSNorm without its drop to float32, so that float64 means float64."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        square = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(square + self.variance_epsilon))


class DoubleGemmaNorm(nn.Module):
    """Gemma's RMSNorm, which multiplies by 1 + weight, without its drop to float32."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x) * (1.0 + self.weight)


def double_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' eager one, without its drop to float32."""
    groups = module.num_key_value_groups
    scores = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3) * scaling
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if attention_mask is None else scores + attention_mask
    mixed = scores.softmax(-1) @ value.repeat_interleave(groups, dim=1)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register("double", double_attention)
AttentionMaskInterface.register("double", eager_mask)

# With the seven Linears of a LLaMA block.
FAMILIES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gemma3_text": Gemma3TextConfig,
}
# With q, k and v in one Linear, and gate and up in another.
FUSED = {"phi3": Phi3Config}


def family_config(family: str, **changes: Any) -> PretrainedConfig:
    """Return the tiny config as one of another family."""
    settings = tiny_config(initializer_range=0.2, **changes).to_dict()
    # Rotary settings and the activation are per family. A head size is only fixed where a test asks
    # for one, or where it does not follow from the hidden size.
    own = {"model_type", "rope_parameters", "architectures", "head_dim", "hidden_act"}
    dropped = own - set(changes)
    settings = {key: settings[key] for key in settings if key not in dropped}
    if family == "qwen3" or family.startswith("gemma"):
        settings = {"head_dim": 12} | settings
    if family in ("gemma2", "gemma3_text"):
        settings["query_pre_attn_scalar"] = 12
    return (FAMILIES | FUSED)[family](**settings)


def family_model(
    family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Any:
    """Return a random tiny model of a family; in float64 its norms do not drop to float32."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(family_config(family, **changes)).to(dtype).eval()
    if dtype == torch.float64 and family == "gemma2":  # which has no other than eager attention
        model.set_attn_implementation("double")
    for name, module in list(model.named_modules()):
        if name.endswith("norm"):
            gemma = family.startswith("gemma")
            module.weight.data.uniform_(0.5, 1.5).sub_(int(gemma))
            if dtype == torch.float64:
                model.set_submodule(name, DoubleGemmaNorm(module) if gemma else DoubleNorm(module))
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
        if ".san_gamma." in name or ".san_sigma." in name:
            sign = torch.where(values > 0.9, -1.0, torch.where(values < 0.03, 0.0, 1.0))
            values = (0.6 + 0.8 * values) * sign
        parameter.data.copy_(values)
    return model


def centered(model: Any) -> Any:
    """Move A and B of a shaken adapter around zero, where V is of about the size of W."""
    for name, parameter in model.named_parameters():
        if ".san_lora_" in name:
            parameter.data.sub_(0.5)
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


def columns(model: Any, adapter: str = "default") -> dict[str, Tensor]:
    """Return the column scales that targets have of their own, by the base model's names."""
    return {
        name.removeprefix("base_model.model.").partition(".san_")[0]: parameter
        for name, parameter in model.named_parameters()
        if name.endswith(f".san_sigma.{adapter}")
    }


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


def assert_same_gradients(found: Tensor, expected: Tensor, trained: dict[str, Tensor]) -> None:
    """Hold the gradients of a random sum of logits against those of the reference's, each by name.

    Every vector has to matter: one without a gradient would be held against nothing.
    """
    weights = torch.randn(found.shape, dtype=found.dtype)
    mine = torch.autograd.grad((found * weights).sum(), list(trained.values()))
    theirs = torch.autograd.grad((expected * weights).sum(), list(trained.values()))
    for name, one, other in zip(trained, mine, theirs, strict=True):
        assert other.abs().max() > 0, name
        assert relative(one, other) < 1e-10, name


def moved(model: Any) -> dict[str, Tensor]:
    """Give every gamma numbers of its own around 1; return them by the base's module names."""
    gammas, _ = vectors(model)
    torch.manual_seed(7)
    for gamma in gammas.values():
        gamma.data += 0.3 * torch.randn_like(gamma)
    return gammas


def dense_linear(model: Any, name: str, gamma: Tensor, s: Tensor) -> dict[str, Tensor]:
    """Return diag(gamma) W diag(s) and gamma b of a model's Linear, by their names."""
    module = model.get_submodule(name)
    made = {f"{name}.weight": gamma[:, None] * module.weight * s}
    return made if module.bias is None else made | {f"{name}.bias": gamma * module.bias}


def held_against_dense(
    base: Any,
    given: Mapping[str, Tensor],
    options: SanConfig,
    dense: Callable[[Any, dict[str, Tensor]], Tensor],
    folder: Path,
    *,
    gradients: Mapping[str, float],
    merges: float,
    moves: float,
) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """Hold an adapter against dense weights: fresh, moved, in every gradient, loaded and merged.

    Args:
        base: A model in float64.
        given: The arguments of its forward.
        options: Of the adapter.
        dense: The logits of a plain model with the weights that gammas make.
        folder: Where the adapter is saved.
        gradients: The bounds, ``rtol`` and ``atol``, of gradients.
        merges: Both bounds of merged logits.
        moves: By how much the adapter moves logits at least.

    Returns:
        ``(merged model, the dense logits, gammas)``.
    """
    plain = deepcopy(base)
    before = plain(**given).logits
    adapted = get_peft_model(base, options)
    assert torch.equal(adapted(**given).logits, before)
    gammas = moved(adapted)
    copies = {name: gamma.detach().clone().requires_grad_() for name, gamma in gammas.items()}
    ours, theirs = adapted(**given).logits, dense(plain, copies)
    assert (theirs - before).abs().max() > moves
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(ours)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    for name, gamma in gammas.items():
        torch.testing.assert_close(gamma.grad, copies[name].grad, **gradients)

    adapted.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(deepcopy(plain), folder)
    torch.testing.assert_close(loaded(**given).logits, theirs, rtol=1e-9, atol=1e-9)
    with loaded.disable_adapter():
        assert torch.equal(loaded(**given).logits, before)
    loaded.merge_adapter()
    torch.testing.assert_close(loaded(**given).logits, theirs, rtol=merges, atol=merges)
    loaded.unmerge_adapter()
    with loaded.disable_adapter():
        assert torch.equal(loaded(**given).logits, before)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(**given).logits, theirs, rtol=merges, atol=merges)
    return merged, theirs, gammas
