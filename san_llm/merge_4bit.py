"""Merging over a quantized base: the model that was trained, dequantized or still in 4 bits.

``dequantize`` turns the quantized weights back into numbers and merges into those. ``keep`` leaves
the 4-bit codes as they are: all that the adapter does goes into the scales of their blocks and into
norm weights (``fold_columns``), so nothing is quantized a second time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from san_llm.data.rows import sha256_of
from san_llm.errors import InputError
from san_llm.fold_columns import fold_columns
from san_llm.model import load_adapter, load_base
from san_llm.progress import bar
from san_llm.quantize import dequantize, is_quantized, scale_rows, single_quantization
from san_llm.recipe import Base
from san_llm.san.graph import EMBEDDING, FAMILIES, propagation_graph
from san_llm.shards import Numbers


def merge_quantized(
    way: str, base: Base, adapter: Path, folder: Path, dtype: str, shard_size: int
) -> tuple[dict[str, str], int]:
    """Merge over the base as it was quantized in training; save weights and config.

    Args:
        way: ``dequantize`` or ``keep``.
        base: The base, with its quantization.
        adapter: The adapter; to keep 4 bits a SAN adapter of the scale carrier.
        folder: Where to save.
        dtype: Of what is not in 4 bits.
        shard_size: Bytes that one file may hold.

    Returns:
        The sha256 of each file of weights, and how many numbers the model has.

    Raises:
        InputError: when something cannot be loaded, does not fit, or cannot be kept in 4 bits.
    """
    target = getattr(torch, dtype)
    with bar("Merging", 3, "parts") as progress:
        model = load_base(base)
        progress.advance(note="loaded")
        if way == "keep":
            merged = keep(model, adapter)
        else:
            merged = load_adapter(dequantize(model), adapter).merge_and_unload(safe_merge=True)
        round_plain(merged, target)
        merged.config.dtype = target
        progress.advance(note="folded")
        # As it stands: a reverse of how it was loaded is not implemented for 4-bit layers.
        merged.save_pretrained(folder, max_shard_size=shard_size, save_original_format=False)
        progress.advance(note="written")
    sums = {file.name: sha256_of(file) for file in sorted(folder.glob("*.safetensors"))}
    return sums, sum(_size(parameter) for parameter in merged.parameters())


def _size(parameter: Any) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())


def round_plain(model: Any, dtype: torch.dtype) -> None:
    """Round what is not quantized to a dtype, in place."""
    for parameter in model.parameters():
        if getattr(parameter, "quant_state", None) is None:
            parameter.data = parameter.data.to(dtype)


def keep(model: Any, adapter: Path) -> Any:
    """Fold a SAN adapter into a 4-bit model, in place, without touching a code; return it.

    What is not in 4 bits is in fp32 afterwards.

    Raises:
        InputError: when the adapter does not fit, or has parts that 4 bits cannot hold.
    """
    linears = {name: module for name, module in model.named_modules() if is_quantized(module)}
    if not any(type(linear).__name__ == "Linear4bit" for linear in linears.values()):
        raise InputError("only weights in 4 bits can be kept; these are in 8: dequantize them")
    adapted = load_adapter(model, adapter)
    options = adapted.peft_config["default"]
    if options.modules_to_save:
        raise InputError("the adapter has whole modules beside its scales; dequantize instead")
    model_type = adapted.config.model_type
    graph = propagation_graph(adapted.config, options)
    vectors = {
        node.name: adapted.get_submodule(f"base_model.model.{node.name}").san_gamma.get("default")
        for node in graph
        if node.gamma and node.carrier == "scale"
    }
    gammas = {name: gamma.detach().cpu().numpy() for name, gamma in vectors.items()}
    rows, norms = fold_columns(graph, model_type, options.mode, gammas)
    merged = adapted.unload()
    round_plain(merged, torch.float32)
    for linear in linears.values():
        single_quantization(linear)
    for name, scale in rows.items():
        _scale(merged, name, torch.from_numpy(scale))
    for name, scale in norms.items():
        _scale_norm(merged.get_submodule(name), scale, FAMILIES[model_type].norm_offset)
    merged.config.quantization_config.bnb_4bit_use_double_quant = False
    return merged


def _scale(model: Any, name: str, scale: Tensor) -> None:
    module = model.get_submodule(name)
    if name.rpartition(".")[2] == EMBEDDING:
        _scale_embedding(model, module, scale)
        return
    if is_quantized(module):
        scale_rows(name, module, scale)
    else:  # one that the base leaves out of its quantization
        module.weight.data *= scale.to(module.weight)[:, None]
    if module.bias is not None:
        module.bias.data *= scale.to(module.bias)


def _scale_embedding(model: Any, embedding: Any, scale: Tensor) -> None:
    table, head = embedding.weight.data, model.get_output_embeddings()
    if head.weight is embedding.weight:  # the features are scaled, the head is not
        head.weight = nn.Parameter(table.clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
    embedding.weight.data = table * scale.to(table)


def _scale_norm(norm: Any, scale: Numbers, offset: int) -> None:
    weight = norm.weight.data
    norm.weight.data = (offset + weight) * torch.from_numpy(scale).to(weight) - offset
