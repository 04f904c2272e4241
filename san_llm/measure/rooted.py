"""A model for pictures with text: its graph is its language model's, by full names.

The tower that reads pictures and the connector behind it are listed with why they are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from san_llm.errors import InputError
from san_llm.measure.graph import OUTSIDE, TOWER, MeasuredGraph, MeasuredModule
from san_llm.measure.probe import CONVOLUTIONS, channels_in, channels_out
from san_llm.measure.units import path_of

CONNECTOR = "the connector is left frozen; modules_to_save=[{!r}] trains it whole"
TABLE = "pictures pass it by: the first block would have its scale for text, and none for pictures"
FIRST = "it reads text from the embedding and pictures from the connector, and has one s for both"


def reads_pictures_with_text(config: Any) -> bool:
    """Return whether a config is of a model that has a language model among its parts."""
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return False
    return type(config.get_text_config()) is not type(config)


def language_model(whole: Any) -> str:
    """Return the name of the part of a model that its text config is of.

    Raises:
        InputError: when none is.
    """
    text = type(whole.config.get_text_config())
    for name, module in whole.named_modules():
        if isinstance(module, PreTrainedModel) and type(module.config) is text:
            return str(name)
    raise InputError(f"model type {whole.config.model_type!r}: no part of it is a language model")


def rooted(whole: Any, path: str, graph: MeasuredGraph) -> MeasuredGraph:
    """Return the graph of a whole model from that of its language model.

    Args:
        whole: The model, without numbers.
        path: The name of its language model.
        graph: What was measured of that alone.

    Raises:
        InputError: when a text alone does not run all of the language model's blocks.
    """
    model_type = whole.config.model_type
    unmeasured = (n for n, _ in _layers(whole.get_submodule(path)) if path_of(n))
    if left := next((n for n in unmeasured if n not in graph.by_name), None):
        raise InputError(
            f"model type {model_type!r}: no consistent propagation graph: text alone does not run "
            f"{path}.{left}, so that what pictures do there is not measured"
        )
    tables = {module.name for module in graph.modules if module.place == "embedding"}
    first = {link.posterior for link in graph.links if link.anterior in tables}
    modules = []
    for module in graph.modules:
        named = replace(module, name=f"{path}.{module.name}")
        if module.name in tables:
            named = replace(named, note=TABLE, usable=False)
        elif module.name in first:
            named = replace(named, note=FIRST)
        modules.append(named)
    links = tuple(
        replace(link, posterior=f"{path}.{link.posterior}", anterior=f"{path}.{link.anterior}")
        for link in graph.links
        if link.posterior not in first
    )
    folds = tuple(
        replace(
            fold,
            members=tuple(f"{path}.{name}" for name in fold.members),
            at=fold.at and f"{path}.{fold.at}",
        )
        for fold in graph.folds
    )
    beside = tuple(_beside(whole, path))
    return MeasuredGraph(model_type, type(whole).__name__, (*modules, *beside), links, folds)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model that write channels, by name."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding, *CONVOLUTIONS)):
            yield name, module


def _beside(whole: Any, path: str) -> Iterator[MeasuredModule]:
    """Yield what stands beside a language model: towers, connectors, the head."""
    around = path.rpartition(".")[0]
    stream = whole.config.get_text_config().hidden_size
    connectors = []
    reasons = {}
    for name, part in whole.get_submodule(around).named_children():
        name = f"{around}.{name}" if around else name
        if name == path:
            continue
        if isinstance(part, PreTrainedModel):
            reasons[f"{name}."] = TOWER
            inside = part.named_children()
            connectors += [f"{name}.{n}" for n, child in inside if _connects(child, stream)]
        elif any(True for _ in part.parameters()):
            connectors.append(name)
    for name in connectors:
        kind = type(whole.get_submodule(name)).__name__
        reason = CONNECTOR.format(name.rpartition(".")[2])
        yield MeasuredModule(name, kind, 0, 0, "outside", reason, usable=False)
    told = (f"{path}.", *(f"{name}." for name in connectors))
    for name, layer in _layers(whole):
        if not f"{name}.".startswith(told):
            reason = next((why for part, why in reasons.items() if name.startswith(part)), OUTSIDE)
            size = channels_out(layer), channels_in(layer)
            kind = type(layer).__name__
            yield MeasuredModule(name, kind, *size, "outside", reason, usable=False)


def _connects(part: nn.Module, stream: int) -> bool:
    """Return whether a part of a tower writes a language model's stream, and is no blocks."""
    modules = list(part.modules())
    if any(isinstance(module, nn.ModuleList) for module in modules):
        return False
    return any(isinstance(m, nn.Linear) and m.out_features == stream for m in modules)
