"""LoRA, DoRA, IA3 and other methods of PEFT merged by it, in a model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from san_llm.errors import InputError, SanError, first_line
from san_llm.models.adapter import Adapter
from san_llm.models.locate import FoundBase
from san_llm.models.weights import read_weights
from san_llm.runs.record import ADAPTER_CONFIG

WAY_OUT = "there is no merged model of it: use it with PEFT, beside its base"


def check_mergeable(adapter: Adapter) -> None:
    """Refuse an adapter of a method that changes no weights, before its base is looked for.

    Raises:
        InputError: when PEFT has no merging of that method.
    """
    from peft import PEFT_TYPE_TO_TUNER_MAPPING

    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(adapter.method)
    if not hasattr(tuner, "merge_and_unload"):
        raise InputError(
            f"{adapter.folder / ADAPTER_CONFIG}: peft_type {adapter.method} adds to what a model "
            f"reads, not to its weights: {WAY_OUT}"
        )


def check_biases(adapter: Adapter, found: FoundBase) -> None:
    """Refuse biases of an adapter that the base has no place for, before it is loaded.

    Raises:
        InputError: naming the first.
    """
    end = "lora_B.bias"
    given = {name.removesuffix(end) + "bias" for name in adapter.tensors if name.endswith(end)}
    missing = given and sorted(given - {tensor.name for tensor in read_weights(found.folder)})
    if missing:
        raise InputError(
            f"{adapter.folder / ADAPTER_CONFIG}: lora_bias gives the base a {missing[0]}, which "
            f"it has no place for: {WAY_OUT}"
        )


def fold(adapted: Any, adapter: Path) -> Any:
    """Return a base with its adapter merged into it, in place.

    Weights that modules share, as a head and an embedding that are tied, are each given its own
    first: an adapter of one is none of the other. Those that come out equal are tied again.

    Args:
        adapted: The base with the adapter on it.
        adapter: The adapter's folder.

    Raises:
        InputError: when PEFT refuses to merge such an adapter.
    """
    config = adapted.get_base_model().config
    tied, config.tie_word_embeddings = config.tie_word_embeddings, False
    seen: set[int] = set()
    for module in adapted.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                own = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                module.register_parameter(name, own)
            seen.add(id(parameter))
    try:
        merged: Any = adapted.merge_and_unload(safe_merge=True)
    except SanError:
        raise
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"{adapter}: PEFT does not merge it: {first_line(error)}") from error
    if tied:
        head, table = merged.get_output_embeddings(), merged.get_input_embeddings()
        if torch.equal(head.weight, table.weight):
            head.weight, config.tie_word_embeddings = table.weight, True
    return merged
