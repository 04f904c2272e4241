"""Names looked up in the families' entries: who feeds whom, in which block, in which order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from san_llm.architectures.decoders import EMBEDDING, FAMILIES, PARENTS
from san_llm.architectures.entry import KINDS, Carry, Family, Link
from san_llm.architectures.sizes import projection_shapes, setting
from san_llm.errors import InputError, did_you_mean


def place_of(name: str) -> tuple[int | None, str]:
    """Return a module's block, None where it is in none, and its name there: ``up_proj``.

    In models that the table does not know that is all of what follows the block: ``attn.c_proj``.
    """
    names = name.split(".")
    first = next((at for at, part in enumerate(names) if part.isdigit()), None)
    if first is None:
        return None, names[-1]
    known = len(names) == first + 3 and PARENTS.get(names[-1]) == names[-2]
    return int(names[first]), names[-1] if known else ".".join(names[first + 1 :])


def in_order(modules: Iterable[str]) -> list[str]:
    """Return modules' names within a block in the order of a model, those not known as they are."""
    known = [EMBEDDING, *PARENTS]
    return sorted(
        dict.fromkeys(modules), key=lambda name: known.index(name) if name in known else len(known)
    )


def short_label(name: str) -> str:
    """Return a module's name as drawings and trees show it: ``up``, ``qkv``, ``embed``.

    One that the table does not know keeps all of its name in its block: a GPT-2 has two ``c_proj``.
    """
    block, within = place_of(name)
    if block is None and within != EMBEDDING:
        within = name
    return within if "." in within else within.removesuffix("_proj").replace(EMBEDDING, "embed")


def in_model_order(vectors: Iterable[str]) -> list[str]:
    """Return module names in the order of a model: the embedding, then block by block."""
    names = list(vectors)
    within = in_order(place_of(name)[1] for name in names)

    def place(name: str) -> tuple[int, int]:
        block, module = place_of(name)
        return (-1 if block is None else block), within.index(module)

    return sorted(names, key=place)


LINEAR = re.compile(
    r"(?P<prefix>(?:.*\.)?)layers\.(?P<block>\d+)\.(?P<parent>self_attn|mlp)\.(?P<name>\w+_proj)"
)


def is_known(model_type: object) -> bool:
    """Return whether the propagation table describes a model type."""
    return isinstance(model_type, str) and model_type in FAMILIES


def check_family(model_type: str | None) -> None:
    """Refuse a model that the propagation table does not describe.

    Raises:
        InputError: naming the supported families.
    """
    if not is_known(model_type):
        raise InputError(
            f"model type {model_type!r} is not supported by SAN: its propagation map is known for "
            f"{', '.join(FAMILIES)}"
        )


def family_targets(targets: Any, model_type: str) -> Any:
    """Return ``target_modules`` in the names of a family.

    Args:
        targets: A list of names, one regular expression, or None for all projections.
        model_type: A supported family.

    Returns:
        A regular expression as it is, or a list. Where a Linear computes several projections, it
        stands for their names if all of them are there.

    Raises:
        InputError: when a name is none of a projection; or when only some of them are there: a
            Linear is adapted whole.
    """
    family = FAMILIES[model_type]
    if targets is None:
        return list(family.targets)
    if isinstance(targets, str):
        return targets
    for target in targets:
        name = target.rsplit(".", 1)[-1]
        if name not in PARENTS:
            raise InputError(
                f"target module {target!r} is not one of {', '.join(PARENTS)}"
                f"{did_you_mean(name, PARENTS)}"
            )
    for whole, projections in family.fused.items():
        there = [projection for projection in projections if projection in targets]
        if there and len(there) < len(projections):
            raise InputError(
                f"target module {there[0]!r} is a part of {whole!r} in a {model_type} model: name "
                f"that, or all of {', '.join(projections)}"
            )
    return list(dict.fromkeys(family.linear_of(name) for name in targets))


def family_of(model_type: str, table: Mapping[str, Any] | None = None) -> Family:
    """Return a family's entry; with the wiring that an adapter brings along, if it does.

    Args:
        model_type: A supported family.
        table: What ``table_of`` made, of this version or another.

    Raises:
        InputError: when it is none.
    """
    family = FAMILIES[model_type]
    if table is None:
        return family
    try:
        links = tuple(Link(**row) for row in table["links"])
        fused = {name: tuple(parts) for name, parts in table["fused"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"adapter_config.json: table: not a propagation table: {error}") from None
    return replace(family, links=links, fused=fused)


def table_of(family: Family) -> dict[str, Any]:
    """Return a family's wiring as JSON has it."""
    fused = {name: list(parts) for name, parts in family.fused.items()}
    return {"links": [asdict(link) for link in family.links], "fused": fused}


def link_into(
    posterior: str, kinds: tuple[str, ...] = KINDS, family: Family = FAMILIES["llama"]
) -> tuple[str, Link] | None:
    """Return the full name of the module that feeds ``posterior``, and the table's row.

    Args:
        posterior: A module name such as ``model.layers.3.mlp.down_proj``, with any prefix.
        kinds: The link kinds that are switched on.
        family: The family, whose table is read.

    Returns:
        ``(anterior name, row)``, or None where nothing feeds it or its kind is off.
    """
    match = LINEAR.fullmatch(posterior)
    if match is None:
        return None
    for link in family.links:
        if link.posterior != match["name"] or link.kind not in kinds:
            continue
        block = int(match["block"]) - link.blocks_back
        if block >= 0:
            parent = PARENTS[link.anterior]
            return f"{match['prefix']}layers.{block}.{parent}.{link.anterior}", link
        if link.first is not None:
            return f"{match['prefix']}{link.first}", link
    return None


def carry(link: Link, config: Any, family: Family) -> Carry:
    """Return how a row of a family's table maps its vector in a model of this config."""
    sizes = {name: d_out for name, (d_out, _) in projection_shapes(config).items()}
    heads = setting(config, "num_attention_heads")
    groups, head_dim = 1, sizes["q_proj"] // heads
    if link.conversion == "repeat kv heads":
        groups = sizes["q_proj"] // sizes["v_proj"]
    if link.projection is None:
        return Carry(0, sizes[link.anterior], groups, head_dim)
    projections = family.fused[link.anterior]
    start = sum(
        sizes[projection] for projection in projections[: projections.index(link.projection)]
    )
    return Carry(start, start + sizes[link.projection], groups, head_dim)
