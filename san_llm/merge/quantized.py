"""Merging over a quantized base: the model that was trained, dequantized or still in 4 bits.

``dequantize`` turns the quantized weights back into numbers and merges into those. ``keep`` leaves
the 4-bit codes as they are: all that the adapter does goes into the scales of their blocks and into
norm weights (``merge_columns``), so nothing is quantized a second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from san_llm.architectures.decoders import EMBEDDING, FAMILIES, PARENTS
from san_llm.errors import InputError
from san_llm.models.quantize import is_quantized, scale_rows, single_quantization
from san_llm.models.weights import Numbers
from san_llm.san.graph import PropagationGraph, propagation_graph


def round_plain(model: Any, dtype: torch.dtype) -> None:
    """Round what is not quantized to a dtype, in place."""
    for parameter in model.parameters():
        if getattr(parameter, "quant_state", None) is None:
            parameter.data = parameter.data.to(dtype)


def keep(adapted: Any) -> Any:
    """Merge a SAN adapter into its 4-bit model, in place, without touching a code; return it.

    What is not in 4 bits is in fp32 afterwards.

    Raises:
        InputError: when the adapter does not fit, or has parts that 4 bits cannot hold.
    """
    plain = adapted.get_base_model()
    linears = {
        name.replace(".base_layer", ""): module
        for name, module in plain.named_modules()
        if is_quantized(module)
    }
    if not any(type(linear).__name__ == "Linear4bit" for linear in linears.values()):
        raise InputError("only weights in 4 bits can be kept; these are in 8: dequantize them")
    options = adapted.peft_config["default"]
    if options.modules_to_save:
        raise InputError("the adapter has whole modules beside its scales; dequantize instead")
    model_type = adapted.config.model_type
    graph = propagation_graph(adapted.config, options)
    vectors = {
        node.name: plain.get_submodule(node.name).san_gamma.get("default")
        for node in graph
        if node.gamma and node.carrier == "scale"
    }
    gammas = {name: gamma.detach().cpu().numpy() for name, gamma in vectors.items()}
    rows, norms = merge_columns(graph, model_type, options.mode, gammas)
    trained = {
        norm.name: plain.get_submodule(norm.name).merged_tensors(["default"])[0]
        for norm in graph.norms
    }
    merged = adapted.unload()
    round_plain(merged, torch.float32)
    for name, weight in trained.items():
        merged.get_submodule(name).weight.data = weight
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


def merge_columns(
    graph: PropagationGraph, model_type: str, mode: str, gammas: Mapping[str, Numbers]
) -> tuple[dict[str, Numbers], dict[str, Numbers]]:
    """Return ``(rows, norms)``: scales by module name that stand for the whole adapter.

    Args:
        graph: Who feeds whom.
        model_type: The family, which says who reads which norm.
        mode: ``both``, ``neuron`` or ``synapse``.
        gammas: The neuron scale (d_out,) of each module that trains one.

    Returns:
        Row scales (d_out,) of Linears (of the embedding: of its features), and factors (hidden,)
        of what a norm multiplies by. A module that is not there is not scaled.

    Raises:
        InputError: when a carrier has other parts than a scale, or a norm has other readers than
            those whose columns are scaled.
    """
    for node in graph:
        if node.carrier != "scale":
            raise InputError(
                f"the {node.carrier} carrier changes weights within their 4-bit blocks; only the "
                "scale carrier can keep them"
            )
        if node.beta:
            raise InputError("a shift needs biases, which the 4-bit layers of the base do not have")
        if node.sigma:
            # Rows of v and up could take in what o, without shared heads, and down have; a norm
            # has one scale for its readers, which have one each.
            raise InputError(
                "links: free trains column scales, which go across the 4-bit blocks of their "
                "weights; only scales that links carry on can keep them: dequantize instead"
            )
    rows = {} if mode == "synapse" else {name: gamma.copy() for name, gamma in gammas.items()}
    into_norms = {}
    for node in graph:
        if node.anterior is None or node.link is None or node.carry is None:
            continue
        gamma, (start, stop, *_) = gammas[node.anterior], node.carry
        if node.link.kind == "residual":
            into_norms[node.name] = gamma
        else:
            scale = rows.setdefault(node.anterior, np.ones_like(gamma))
            with np.errstate(over="ignore"):  # told where the merged numbers are looked at
                scale[start:stop] *= gamma[start:stop]
    return rows, _shared_by_readers(into_norms, model_type)


def _shared_by_readers(columns: Mapping[str, Numbers], model_type: str) -> dict[str, Numbers]:
    """Return column scales (hidden,) by posterior as factors by norm."""
    norms: dict[str, Numbers] = {}
    for name, scale in columns.items():
        block, _, linear = name.rsplit(".", 2)
        norm, readers = next(
            (norm, readers)
            for norm, readers in FAMILIES[model_type].norms.items()
            if linear in readers
        )
        for reader in readers:
            if f"{block}.{PARENTS[reader]}.{reader}" not in columns:
                raise InputError(
                    f"{block}.{norm}: {reader} reads it and has no column scale, {linear} has one: "
                    "it can neither move into the norm nor stay in 4-bit columns"
                )
        norms[f"{block}.{norm}"] = scale  # one anterior feeds all readers of a norm
    return norms
