"""A measured propagation graph as SAN adapts it: which modules, joined how.

It stands in for the families' table wherever a model is of none of them, or an adapter brings its
own graph along.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from san_llm.architectures.entry import Carry, Link
from san_llm.architectures.sizes import setting
from san_llm.errors import InputError, did_you_mean, first_line
from san_llm.measure.graph import (
    TOWER,
    MeasuredFold,
    MeasuredGraph,
    MeasuredLink,
    MeasuredModule,
    read_graph,
)
from san_llm.measure.units import path_of
from san_llm.san.node import Node, Norm, matches, trains_gamma, unmatched
from san_llm.san.options import Options
from san_llm.san.renamed import renamed

# The kinds of modules that SAN has layers for.
CONVOLUTIONS = ("Conv1d", "Conv2d")
ADAPTED = ("Linear", "Conv1D", *CONVOLUTIONS, "Experts")


def measured_graph(model: Any, options: Options) -> MeasuredGraph:
    """Return the graph that an adapter brings along, or measure the model's.

    Args:
        model: A model, a config of transformers or the dictionary of a ``config.json``.
        options: Of the adapter.

    Raises:
        InputError: when the model cannot be measured.
    """
    if options.graph is not None:
        return read_graph(options.graph, "adapter_config.json: graph")
    from san_llm.measure.run import measure

    config = setting(model, "config", None)
    if config is not None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        graph = measure(config, type(base))
    else:
        graph = measure(stock_config(model) if isinstance(model, Mapping) else model)
    return as_authors(graph) if options.wiring == "authors" else graph


def as_authors(graph: MeasuredGraph) -> MeasuredGraph:
    """Return the graph of a plain ViT as the authors' public code wires it.

    What a block reads first, q, k and v, gets the patch embedding's scale in every block, not that
    of the block before; nothing feeds the attention's output. The rest stays.

    Args:
        graph: Of a model of ``options.AUTHORS``.
    """
    (patches,) = (module.name for module in graph.modules if module.place == "embedding")
    links = [
        link
        if path_of(link.anterior) == path_of(link.posterior)
        else replace(link, anterior=patches)
        for link in graph.links
        if link.kind != "attention"
    ]
    return replace(graph, links=tuple(links))


def measured_norms(model: Any, adapted: Iterable[Node], options: Options) -> tuple[Norm, ...]:
    """Return the norms that are trained beside some modules of a model, or of a config's.

    Args:
        model: As :func:`measured_graph` takes it.
        adapted: The adapted modules.
        options: Of the adapter.

    Raises:
        InputError: when they are asked for, and there is none.
    """
    if not options.train_norms:
        return ()
    from san_llm.measure.copies import without_numbers
    from san_llm.measure.run import class_of
    from san_llm.san.norms import norms_of

    if setting(model, "config", None) is not None:
        whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    else:
        config = stock_config(model) if isinstance(model, Mapping) else model
        whole = without_numbers(config, class_of(config))
    return norms_of(whole, [node.name for node in adapted])


def stock_config(values: Mapping[str, Any]) -> Any:
    """Return the dictionary of a ``config.json`` as a config of transformers, quantized or not.

    Raises:
        InputError: when transformers has no such model, or does not take what it says.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise InputError(
            f"model type {model_type!r}: transformers has no such model"
            f"{did_you_mean(str(model_type), list(CONFIG_MAPPING))}"
        )
    own = {key: value for key, value in values.items() if key != "quantization_config"}
    try:
        return AutoConfig.for_model(**_numbers(own))
    except Exception as error:  # values are looked at by the model's own code
        said = " ".join(str(error).split()) or first_line(error)  # the first line names the key
        raise InputError(
            f"config.json: transformers does not take it as a {model_type}: {said}"
        ) from None


def _numbers(value: Any) -> Any:
    """Return a part of a ``config.json`` with what JSON has no number for, infinity, as one."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:  # as transformers writes it
            return float(value["__float__"])
        return {key: _numbers(one) for key, one in value.items()}
    return [_numbers(one) for one in value] if isinstance(value, list) else value


def adapted(graph: MeasuredGraph, options: Options) -> list[MeasuredModule]:
    """Return the modules of a model that are adapted, in its order.

    Raises:
        InputError: when a target is no module that can be.
    """
    usable = [m for m in graph.modules if m.usable and m.place == "block" and m.kind in ADAPTED]
    if not usable:
        others = sorted({m.kind for m in graph.modules if m.usable and m.place == "block"})
        raise InputError(
            f"model type {graph.model_type!r}: SAN adapts {', '.join(ADAPTED)} layers, and its "
            f"blocks have none; they have {', '.join(others) or 'nothing that is measured'}"
        )
    targets = options.target_modules
    if targets is not None:
        _check_targets(targets, graph, [module.name for module in usable])
        usable = [module for module in usable if matches(targets, module.name)]
    tables = [m for m in graph.modules if m.place == "embedding"]
    if options.adapt_embedding and not tables:
        raise InputError(
            f"adapt_embedding: no embedding of a {graph.model_class} feeds a module that is "
            "measured: leave it out"
        )
    for table in tables if options.adapt_embedding else ():
        if not table.usable:
            raise InputError(f"adapt_embedding: {table.name} cannot be adapted: {table.note}")
    if options.carrier != "scale":
        for module in usable:
            if not _takes_matrices(module):
                what = module.kind
                if what in CONVOLUTIONS:
                    what += " in groups, whose channels do not read all that a matrix would mix"
                raise InputError(
                    f"carrier {options.carrier!r}: has matrices for Linear layers and dense "
                    f"convolutions, and {module.name} is a {what}: take carrier 'scale', or leave "
                    "it out of target_modules"
                )
    return [*(tables if options.adapt_embedding else []), *usable]


def _takes_matrices(module: MeasuredModule) -> bool:
    """Whether the low-rank carriers have matrices for a module."""
    return module.kind == "Linear" or (module.kind in CONVOLUTIONS and not module.grouped)


def _check_targets(targets: Any, graph: MeasuredGraph, usable: list[str]) -> None:
    for module in graph.modules if isinstance(targets, str) else ():
        if module.note == TOWER and matches(targets, module.name):
            raise InputError(f"target_modules: {targets!r} names {module.name}: {TOWER}")
    missing = unmatched(targets, usable)
    for target in missing:
        wanted = target if isinstance(targets, str) else [target]
        named = next((m for m in graph.modules if matches(wanted, m.name)), None)
        if named is not None:
            why = named.note or f"it is a {named.kind}; SAN adapts {', '.join(ADAPTED)} layers"
            raise InputError(f"target_modules: {target!r}: {named.name} cannot be adapted: {why}")
        older = targets if isinstance(targets, str) else missing
        now = renamed(older, usable, graph.model_class, graph.model_type)
        known = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in usable))
        raise InputError(
            f"target_modules: {target!r} matches no module of this model"
            f"{now or did_you_mean(target, known) or ': it has ' + ', '.join(known)}"
        )


def pattern(names: Collection[str], known: Iterable[str]) -> str:
    """Return a regular expression for some of a model's modules and for no others of it.

    It is of whatever block where it can be, so that it is short.

    Args:
        names: Their names.
        known: Those of all modules, also of what cannot be adapted.
    """
    exact = [re.escape(name) for name in names]
    forms = "|".join(dict.fromkeys(re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", e) for e in exact))
    others = (name for name in known if name not in names)
    return "|".join(exact) if any(re.fullmatch(forms, name) for name in others) else forms


def joined(
    graph: MeasuredGraph, names: Iterable[str], options: Options
) -> dict[str, tuple[str, Link, Carry]]:
    """Return what feeds each of some modules: a link exists only if both of its ends are adapted.

    Args:
        graph: The model's.
        names: The adapted modules.
        options: Of the adapter: which kinds of links are on, and in which mode.
    """
    present = set(names)
    links = {}
    for name in present if options.mode != "neuron" else ():
        link = graph.into.get(name)
        if link is not None and link.anterior in present and link.kind in options.kinds:
            sizes = graph.by_name[link.anterior].d_out, graph.by_name[name].d_in
            links[name] = (link.anterior, _row(link), link.channels.carry(*sizes))
    return links


_FOLDED = {
    "norm": "norms",
    "rotation": "rotation",
    "product": "q times k",
    "attention": "attention",
    "gated": "gated MLP",
    "activation": "activation",
}  # in the order of a block


def form_of(graph: MeasuredGraph, options: Options) -> str:
    """Return in which form an adapter of a model is computed, and what takes its scales over.

    Args:
        graph: The model's.
        options: Of the adapter.
    """
    if not options.lean:
        return "plain"
    names = {module.name for module in adapted(graph, options)}
    fed = {name: link[0] for name, link in joined(graph, names, options).items()}
    kinds = {
        fold.kind
        for fold in graph.folds
        if names.issuperset(fold.members) and _moves(fold, fed, options)
    }
    told = [word for kind, word in _FOLDED.items() if kind in kinds]
    told += ["experts"] if any(graph.by_name[name].experts for name in names) else []
    return f"lean: {', '.join(told)}" if told else "plain: none of its scales can move"


def _moves(fold: MeasuredFold, fed: Mapping[str, str], options: Options) -> bool:
    """Return whether what a fold asks of links and shifts is there, for adapted members."""
    if fold.kind == "norm":
        anteriors = {fed.get(name) for name in fold.members}
        return len(anteriors) == 1 and None not in anteriors
    if fold.kind == "attention" and fed.get(fold.members[1]) != fold.members[0]:
        return False
    return not options.shift  # which stands behind the row scale


def _row(link: MeasuredLink) -> Link:
    """Return a measured link as a row of the propagation table."""
    return Link(
        link.kind,
        link.posterior.rsplit(".", 1)[-1],
        link.anterior.rsplit(".", 1)[-1],
        conversion="repeat kv heads" if link.channels.repeat > 1 else "as is",
        activation=link.exactness == "activation",
    )


def nodes(graph: MeasuredGraph, options: Options) -> tuple[Node, ...]:
    """Return the adapted modules of a model, each with what it trains and what feeds it.

    Raises:
        InputError: when a target is no module that can be adapted.
    """
    modules = adapted(graph, options)
    links = joined(graph, [module.name for module in modules], options)
    anteriors = {anterior for anterior, _, _ in links.values()}
    made = []
    for module in modules:
        anterior, link, carry = links.get(module.name, (None, None, None))
        reads = module.place != "embedding"
        low_rank = options.carrier != "scale" and _takes_matrices(module)
        made.append(
            Node(
                module.name,
                module.d_out,
                module.d_in,
                gamma=trains_gamma(module.name, options.mode, anteriors),
                beta=options.shift and reads and not module.experts,
                anterior=anterior,
                link=link,
                carry=carry,
                carrier=options.carrier if low_rank else "scale",
                rank=options.rank if low_rank else 0,
                sigma=options.free and reads and not module.grouped,
                experts=module.experts,
                kernel=module.kernel,
            )
        )
    return tuple(made)
