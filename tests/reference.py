"""SAN written out plainly, to compare with: every W' = diag(gamma) W diag(s) as a dense matrix.

Nothing of the product is imported. The vectors of an adapter come by module name, such as
``model.layers.0.mlp.up_proj``; a name that is absent from ``gammas`` has gamma = 1. What a low-rank
carrier trains comes by module and tensor, such as ``model.layers.0.mlp.up_proj lora_A``. With
the word ``free`` for ``links`` s is no gamma but a vector of its own, in ``sigmas`` by module name.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Phi-3's block: one Linear has the rows of q, then k, then v; another those of gate, then up.
FOUR = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
ALL_LINKS = ("attention", "mlp", "residual")


def module_name(block: int, projection: str) -> str:
    """Return the full name of one projection of a causal language model."""
    parent = "self_attn" if projection in ATTENTION else "mlp"
    return f"model.layers.{block}.{parent}.{projection}"


def synapse_source(
    block: int, projection: str, links: tuple[str, ...] | str, fused: bool = False
) -> str | None:
    """Return the name of the module whose gamma scales the columns of this projection."""
    if links == "free":
        return None
    if projection == "o_proj" and "attention" in links:
        return module_name(block, "qkv_proj" if fused else "v_proj")
    if projection == "down_proj" and "mlp" in links:
        return module_name(block, "gate_up_proj" if fused else "up_proj")
    if projection in ("gate_proj", "up_proj", "gate_up_proj") and "residual" in links:
        return module_name(block, "o_proj")
    if projection in ("q_proj", "k_proj", "v_proj", "qkv_proj") and "residual" in links:
        return module_name(block - 1, "down_proj") if block > 0 else "model.embed_tokens"
    return None


def over_query_heads(gamma_v: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Return gamma of v (kv_heads * head_dim,) as o_proj sees it (heads * head_dim,)."""
    head_dim = len(gamma_v) // kv_heads
    parts = []
    for head in range(heads):
        kv_head = head * kv_heads // heads
        parts.append(gamma_v[kv_head * head_dim : (kv_head + 1) * head_dim])
    return torch.cat(parts)


def synapse_scale(plain: Any, projection: str, gamma: Tensor) -> Tensor:
    """Return the anterior's gamma (d_out,) as a vector over this projection's columns (d_in,)."""
    heads = plain.config.num_attention_heads
    kv_heads = plain.config.num_key_value_heads
    fused = hasattr(plain.model.layers[0].self_attn, "qkv_proj")
    if fused and projection == "o_proj":
        gamma = gamma[-(plain.config.hidden_size // heads) * kv_heads :]
    if fused and projection == "down_proj":
        gamma = gamma[plain.config.intermediate_size :]
    return over_query_heads(gamma, heads, kv_heads) if projection == "o_proj" else gamma


def dense_parameters(
    plain: Any,
    gammas: dict[str, Tensor],
    betas: dict[str, Tensor],
    *,
    targets: tuple[str, ...] = SEVEN,
    mode: str = "both",
    links: tuple[str, ...] | str = ALL_LINKS,
    adapt_embedding: bool = False,
    sigmas: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the weights and biases that SAN gives a plain model, by parameter name.

    Differentiable in all vectors; computed in the wider dtype of vectors and weights.
    """
    fused = hasattr(plain.model.layers[0].self_attn, "qkv_proj")
    adapted = {
        module_name(block, projection)
        for block in range(plain.config.num_hidden_layers)
        for projection in targets
    }
    if adapt_embedding:
        adapted.add("model.embed_tokens")
    result = {}
    for block in range(plain.config.num_hidden_layers):
        for projection in targets:
            name = module_name(block, projection)
            linear = plain.get_submodule(name)
            weight, bias = linear.weight.detach(), linear.bias
            if name in gammas and mode != "synapse":
                weight = torch.diag(gammas[name]).to(weight) @ weight
                bias = None if bias is None else bias.detach() * gammas[name]
            source = synapse_source(block, projection, links, fused)
            if mode != "neuron" and source in adapted and source in gammas:
                s = synapse_scale(plain, projection, gammas[source])
                weight = weight @ torch.diag(s).to(weight)
            if sigmas and name in sigmas:
                weight = weight @ torch.diag(sigmas[name]).to(weight)
            if name in betas:
                bias = betas[name] if bias is None else bias + betas[name]
            result[f"{name}.weight"] = weight
            if bias is not None:
                result[f"{name}.bias"] = bias
    if adapt_embedding and mode != "synapse" and "model.embed_tokens" in gammas:
        table = plain.model.embed_tokens.weight.detach()
        result["model.embed_tokens.weight"] = table @ torch.diag(gammas["model.embed_tokens"])
    return result


def skeleton(plain: Any, parameters: dict[str, Tensor]) -> Any:
    """Return an untied copy of the plain model with room for every bias in ``parameters``."""
    model = deepcopy(plain)
    model.lm_head.weight = nn.Parameter(plain.lm_head.weight.detach().clone())
    for name in parameters:
        if name.endswith(".bias"):
            linear = model.get_submodule(name.removesuffix(".bias"))
            linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
    return model


def dense_model(
    plain: Any, gammas: dict[str, Tensor], betas: dict[str, Tensor], **options: Any
) -> Any:
    """Return a copy of the plain model that holds W' and b'; options as ``dense_parameters``."""
    parameters = dense_parameters(plain, gammas, betas, **options)
    model = skeleton(plain, parameters)
    with torch.no_grad():
        for name, value in parameters.items():
            model.get_parameter(name).copy_(value)
    return model


def dense_logits(
    plain: Any, tokens: Tensor, gammas: dict[str, Tensor], betas: dict[str, Tensor], **options: Any
) -> Tensor:
    """Return logits (batch, tokens, vocabulary), differentiable in gammas and betas."""
    return logits_of(plain, tokens, dense_parameters(plain, gammas, betas, **options))


def logits_of(plain: Any, tokens: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """Return logits (batch, tokens, vocabulary) of the plain model with these parameters."""
    logits: Tensor = functional_call(skeleton(plain, parameters), parameters, (tokens,)).logits
    return logits


def trained_tensors(model: Any, adapter: str = "default") -> dict[str, Tensor]:
    """Return what an adapter of a PEFT model trains, by module and tensor."""
    return {
        name.removeprefix("base_model.model.").removesuffix(f".{adapter}").replace(".san_", " "): p
        for name, p in model.named_parameters()
        if ".san_" in name and name.endswith(f".{adapter}")
    }


def low_rank_weight(
    weight: Tensor, a: Tensor, b: Tensor, m: Tensor | None, *, carrier: str, mode: str, c: float
) -> tuple[Tensor, Tensor | None]:
    """Return ``(W' before its columns are scaled, gamma)`` of one Linear of ``lora`` or ``dora``.

    To dora's gradient the norm of V is a constant (arXiv:2402.09353, section 4.3). Of a row of W
    that is all zeros both norms count as 1.
    """
    v = weight + c * (b @ a)
    zeros = (weight == 0).all(1)
    norm, adapted = (torch.where(zeros, 1.0, matrix.pow(2).sum(1)).sqrt() for matrix in (weight, v))
    if carrier == "dora":
        adapted = adapted.detach()
        gamma = None if m is None else m / norm
    else:
        gamma = adapted / norm
    if mode == "synapse":
        v = torch.diag(norm / adapted) @ v
    elif carrier == "dora":
        assert m is not None
        v = torch.diag(m / adapted) @ v
    return v, gamma


def low_rank_parameters(
    plain: Any,
    trained: dict[str, Tensor],
    *,
    carrier: str,
    c: float,
    mode: str = "both",
    links: tuple[str, ...] | str = ALL_LINKS,
) -> dict[str, Tensor]:
    """Return the weights that a low-rank carrier gives a plain model; their biases stay.

    Differentiable in ``trained``; ``c`` is alpha / rank.
    """
    fused = hasattr(plain.model.layers[0].self_attn, "qkv_proj")
    weights: dict[str, Tensor] = {}
    gammas: dict[str, Tensor | None] = {}
    if "model.embed_tokens gamma" in trained:  # it has no product to adapt: a vector of its own
        gammas["model.embed_tokens"] = gamma = trained["model.embed_tokens gamma"]
        if mode != "synapse":
            table = plain.model.embed_tokens.weight.detach()
            weights["model.embed_tokens.weight"] = table @ torch.diag(gamma)
    for block in range(plain.config.num_hidden_layers):
        for projection in FOUR if fused else SEVEN:
            name = module_name(block, projection)
            if f"{name} lora_A" not in trained:
                continue
            weights[f"{name}.weight"], gammas[name] = low_rank_weight(
                plain.get_submodule(name).weight.detach(),
                trained[f"{name} lora_A"],
                trained[f"{name} lora_B"],
                trained.get(f"{name} magnitude"),
                carrier=carrier,
                mode=mode,
                c=c,
            )
            # every anterior stands before its readers in this order
            gamma = gammas.get(synapse_source(block, projection, links, fused) or "")
            if mode != "neuron" and gamma is not None:
                s = synapse_scale(plain, projection, gamma)
                weights[f"{name}.weight"] = weights[f"{name}.weight"] @ torch.diag(s)
            if f"{name} sigma" in trained:
                sigma = torch.diag(trained[f"{name} sigma"])
                weights[f"{name}.weight"] = weights[f"{name}.weight"] @ sigma
    return weights


def low_rank_logits(
    plain: Any, tokens: Tensor, trained: dict[str, Tensor], **options: Any
) -> Tensor:
    """Return logits (batch, tokens, vocabulary), differentiable in everything trained."""
    return logits_of(plain, tokens, low_rank_parameters(plain, trained, **options))
