"""A model's propagation graph, measured: two small copies, one channel moved at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from san_llm.errors import InputError, first_line
from san_llm.files import cache_folder, code_sha256, key_of, read_json, write_json
from san_llm.measure.copies import Copy, small_copies, without_numbers
from san_llm.measure.experts import expert_sizes, is_experts, is_gated
from san_llm.measure.folds import find_folds
from san_llm.measure.graph import (
    OUTSIDE,
    MeasuredGraph,
    MeasuredLink,
    MeasuredModule,
    Place,
    read_graph,
)
from san_llm.measure.links import find_link
from san_llm.measure.probe import Probe, Reach, channels_in, channels_out
from san_llm.measure.rooted import language_model, reads_pictures_with_text, rooted
from san_llm.measure.units import Unit, find_units, list_of, path_of, representatives

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D)
APART = "nothing near it writes its channels one for one"
EXPERTS = "experts that compute otherwise than down(act(gate) * up), for which SAN has no layer"
TIED = "its weight is also that of "
ROUTER = "the router, whose choice stays as it was"
AFTER_EXPERTS = "experts write what it reads, each with channels of its own"
ONE = "it writes one number, a gate or a score"
INERT = "nothing reads what it writes"
BARRED = (EXPERTS, INERT, ONE, ROUTER, TIED)  # what begins so cannot be adapted
DEPTHWISE = "each of its channels reads itself alone, so that s would be a second gamma"
GROUPED = "its channels read in groups, and SAN has no s for one that each group reads apart"


def measure(config: Any, model_class: Any = None) -> MeasuredGraph:
    """Return a model's propagation graph, measured once for each config.

    Args:
        config: The config of a model of transformers.
        model_class: The class of the model; None: the one that its config names, or the first of
            transformers' auto classes that has one.

    Raises:
        InputError: when no small copy can be made, or two of them do not agree.
    """
    model_class = model_class or class_of(config)
    told = {"config": config.to_dict(), "class": model_class.__name__, "code": code_sha256()}
    file = cache_folder("graphs") / f"{key_of(json.loads(json.dumps(told, default=str)))}.json"
    if file.is_file():
        return read_graph(read_json(file), str(file))
    if reads_pictures_with_text(config):
        whole = without_numbers(config, model_class)
        path = language_model(whole)
        part = whole.get_submodule(path)
        graph = rooted(whole, path, measure(part.config, type(part)))
    else:
        graph = _measured(config, model_class)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, graph.as_json())
    return graph


def class_of(config: Any) -> Any:
    """Return the class of a model of this config.

    Raises:
        InputError: when transformers has none.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    # A class that is named beside another model's type would be made of what it can be.
    named = [made for made in named if isinstance(config, getattr(made, "config_class", ()))]
    tables = (
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        auto.MODEL_MAPPING,
    )
    of_config = [table[type(config)] for table in tables if type(config) in table]
    for made in (*named, *of_config):
        if made is not None and not isinstance(made, (list, tuple)):
            return made
    raise InputError(f"model type {config.model_type!r}: transformers has no model class of it")


def _measured(config: Any, model_class: Any) -> MeasuredGraph:
    first, second = small_copies(config, model_class)
    what = f"model type {config.model_type!r}: no consistent propagation graph"
    try:
        order, links, notes = _links(first, 0)
        other_order, other_links, _ = _links(second, 1)
        kept = _inert(first) | _tied(first) | _routers(first)
    except Exception as error:  # a model's own code, of whatever kind
        raise InputError(f"{what}: a small copy cannot be measured: {first_line(error)}") from error
    if order != other_order:
        raise InputError(f"{what}: two small copies run other modules")
    for name in order:
        if links.get(name) != other_links.get(name):
            raise InputError(
                f"{what}: two small copies do not agree on what feeds {name}: "
                f"{_told(links.get(name))} or {_told(other_links.get(name))}"
            )
    sizes = _sizes(config, model_class)
    if missing := [name for name in order if name not in sizes]:
        raise InputError(f"{what}: a small copy has a {missing[0]}, the model has none")
    modules = tuple(_module(name, first, sizes[name], links, notes | kept) for name in order)
    graph = MeasuredGraph(
        config.model_type,
        model_class.__name__,
        modules,
        tuple(links.values()),
        find_folds(first, links, modules),
    )
    for link in graph.links:
        writer, reader = graph.by_name[link.anterior], graph.by_name[link.posterior]
        try:
            link.channels.carry(writer.d_out, reader.d_in)
        except InputError as error:
            raise InputError(f"{what}: {link.anterior} -> {link.posterior}: {error}") from None
    return graph


def _told(link: MeasuredLink | None) -> str:
    if link is None:
        return "nothing"
    return f"{link.anterior} ({link.kind}, {link.exactness}, {link.channels})"


def _links(copy: Copy, which: int) -> tuple[list[str], dict[str, MeasuredLink], dict[str, str]]:
    """Return the modules that a copy runs, in order, and by name what feeds each, or why nothing.

    Args:
        copy: A small model.
        which: Of blocks that are alike: 0 measures the first, 1 the second.
    """
    probe = Probe(copy)
    modules = dict(copy.model.named_modules())
    table = _embedding(copy.model)
    order = probe.order(
        [n for n, m in modules.items() if isinstance(m, KINDS) or m is table or is_experts(m)]
    )
    units = find_units(order, {name: type(modules[name]).__name__ for name in order})
    alike = representatives(units, which)
    wanted = {alike[place] for place, unit in enumerate(units) if unit.path}
    reaches: dict[str, dict[str, Reach]] = {}
    for place, unit in enumerate(units):
        near = [units[at] for at in (place, place + 1) if at in wanted]
        readers = [n for u in near for n in u.modules if not isinstance(modules[n], nn.Embedding)]
        for writer in unit.modules:
            later = [name for name in readers if order.index(name) > order.index(writer)]
            if later:
                for name, reach in probe.reach(writer, later).items():
                    reaches.setdefault(name, {})[writer] = reach
    links: dict[str, MeasuredLink] = {}
    notes: dict[str, str] = {}
    for place, unit in enumerate(units):
        for name in unit.modules if unit.path else ():
            measured = units[alike[place]]
            link = _link(measured.path + unit.relative(name), reaches, order, table, modules)
            if isinstance(link, MeasuredLink):
                links[name] = _moved_to(link, measured, unit, units[alike[place] - 1], units, place)
            else:
                notes[name] = link
    for name in _once_only(units, links, notes):
        del links[name]
        notes[name] = APART
    return order, links, notes


def _once_only(
    units: list[Unit], links: Mapping[str, MeasuredLink], notes: Mapping[str, str]
) -> list[str]:
    """Return what another list's last block feeds in the first block of a list, but in no other.

    A decoder's blocks all read their encoder; only the first of them stands next to it.
    """
    return [
        name
        for unit, after in pairwise(units)
        if list_of(unit.path) == list_of(after.path) and unit.signature == after.signature
        for name in unit.modules
        if name in links
        and list_of(path_of(links[name].anterior)) not in ("", list_of(unit.path))
        and notes.get(after.path + unit.relative(name)) == APART
    ]


def _link(
    name: str,
    reaches: Mapping[str, dict[str, Reach]],
    order: list[str],
    table: nn.Module | None,
    modules: Mapping[str, nn.Module],
) -> MeasuredLink | str:
    """Return what feeds a module of a block that was measured, or why nothing does."""
    if is_experts(modules[name]) and not is_gated(modules[name]):
        return EXPERTS
    if _is_grouped(modules[name]):
        return DEPTHWISE if modules[name].groups == channels_in(modules[name]) else GROUPED
    own = reaches.get(name, {})
    writers = [writer for writer in order if writer in own]
    link = find_link(name, own, writers)
    if link is None:
        return APART
    if link.exactness == "stream":
        # Beside experts nobody writes the stream alone: not a shared one, nor attention before.
        block = path_of(link.anterior)
        beside = [w for w in writers if is_experts(modules[w]) and path_of(w) == block]
        if beside and find_link(name, own, beside) is not None:
            return AFTER_EXPERTS
    if modules[link.anterior] is table or not path_of(link.anterior):
        # What a block reads of an embedding is its stream, whether a norm stands between or not.
        return MeasuredLink(name, link.anterior, "residual", "stream", link.channels)
    return link


def _moved_to(
    link: MeasuredLink, measured: Unit, unit: Unit, before: Unit, units: list[Unit], place: int
) -> MeasuredLink:
    """Return a link of the block that was measured as that of another one, alike to it."""
    if link.anterior in measured.modules:
        anterior = unit.path + measured.relative(link.anterior)
    else:
        anterior = units[place - 1].path + before.relative(link.anterior)
    posterior = unit.path + measured.relative(link.posterior)
    return MeasuredLink(posterior, anterior, link.kind, link.exactness, link.channels)


def _embedding(model: Any) -> nn.Module | None:
    """Return a model's table of tokens, or None where it reads none."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return table if isinstance(table, nn.Embedding) else None


def _is_grouped(module: Any) -> bool:
    groups = getattr(module, "groups", 1)
    return isinstance(module, (nn.Conv1d, nn.Conv2d)) and groups > 1


def _inert(copy: Copy) -> dict[str, str]:
    """Return that a module is inert, by the names of those whose weight gets no gradient."""
    copy.model.requires_grad_(True)
    with torch.enable_grad():
        out: Any = copy.model(**copy.rows)
        first = next(value for value in out.values() if isinstance(value, torch.Tensor))
        # No random numbers, whose state is the caller's.
        weights = torch.arange(1.0, first.numel() + 1, dtype=first.dtype).cos()
        (first * weights.view_as(first)).sum().backward()
    still = {
        name: INERT
        for name, module in copy.model.named_modules()
        if isinstance(module, KINDS)
        and (module.weight.grad is None or not module.weight.grad.any())
    }
    copy.model.requires_grad_(False)
    return still


def _tied(copy: Copy) -> dict[str, str]:
    """Return whose weight it also is, by the names of modules of blocks that share one."""
    owners: dict[int, list[str]] = {}
    for name, module in copy.model.named_modules():
        if isinstance(module, (*KINDS, nn.Embedding)):
            owners.setdefault(id(module.weight), []).append(name)
    return {
        name: TIED + next(other for other in names if other != name)
        for names in owners.values()
        for name in names
        if len(names) > 1 and path_of(name)
    }


def _routers(copy: Copy) -> dict[str, str]:
    """Return that it is a router, by the names of those that write a number for each expert."""
    modules = dict(copy.model.named_modules())
    counts = {
        path_of(name): len(next(module.parameters(recurse=False)))
        for name, module in modules.items()
        if is_experts(module)
    }
    return {
        name: ROUTER
        for name, module in modules.items()
        if isinstance(module, KINDS)
        and path_of(name)
        and channels_out(module) == counts.get(path_of(name))
    }


def _sizes(config: Any, model_class: Any) -> dict[str, tuple[int, int, int, int]]:
    """Return by name what the real model's modules write and read.

    And how many experts do so, and by how many weights for each pair of channels.
    """
    return {
        name: (*expert_sizes(module), 1)
        if is_experts(module)
        else (
            channels_out(module),
            channels_in(module),
            0,
            prod(getattr(module, "kernel_size", ())),
        )
        for name, module in without_numbers(config, model_class).named_modules()
        if isinstance(module, (*KINDS, nn.Embedding)) or is_experts(module)
    }


def _module(
    name: str,
    copy: Copy,
    size: tuple[int, int, int, int],
    links: Mapping[str, MeasuredLink],
    notes: Mapping[str, str],
) -> MeasuredModule:
    module = copy.model.get_submodule(name)
    place: Place = "block" if path_of(name) else "outside"
    if module is _embedding(copy.model) or (place == "outside" and _feeds(name, links)):
        place = "embedding"  # of tokens, or of patches
    note = OUTSIDE if place == "outside" else notes.get(name)
    d_out, d_in, experts, kernel = size
    if is_experts(module):
        kind, grouped = "Experts", True
    else:
        if place == "block" and d_out == 1:
            note = ONE
        made = next(kind for kind in (*KINDS, nn.Embedding) if isinstance(module, kind))
        kind, grouped = made.__name__, _is_grouped(module)
    usable = place != "outside" and not (note or "").startswith(BARRED)
    return MeasuredModule(name, kind, d_out, d_in, place, note, usable, grouped, experts, kernel)


def _feeds(name: str, links: Mapping[str, MeasuredLink]) -> bool:
    return any(link.anterior == name for link in links.values())
