"""Who feeds whom in a model: as its family's table says, as measured, and where they differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from san_llm.architectures.lookup import is_known
from san_llm.errors import InputError
from san_llm.measure.graph import MeasuredGraph
from san_llm.plan.bases import any_config_of
from san_llm.recipe.read import load_recipe
from san_llm.recipe.schema import Base, SanMethod
from san_llm.recipe.shipped import find_recipe, shipped_recipes
from san_llm.san.formulas import carried
from san_llm.san.graph import PropagationGraph, propagation_graph
from san_llm.san.measured import measured_graph, measured_norms, nodes
from san_llm.san.node import Node
from san_llm.san.options import Options


@dataclass(frozen=True)
class Wiring:
    """What is known of a model's propagation graph.

    Attributes:
        graph: Who feeds whom.
        measured: The measured graph, where there was one.
        differences: Where the family's table says something else; None where nothing was compared.
    """

    graph: PropagationGraph
    measured: MeasuredGraph | None
    differences: tuple[str, ...] | None

    @property
    def left_alone(self) -> dict[str, list[str]]:
        """The measured modules that are not adapted, by the reason."""
        adapted = {node.name for node in self.graph}
        reasons: dict[str, list[str]] = {}
        for module in self.measured.modules if self.measured else ():
            if module.name not in adapted:
                note = module.note or ("the embedding" if not module.d_in else "not asked for")
                reasons.setdefault(note, []).append(module.name)
        return reasons

    def as_values(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "trained": self.graph.trained,
            "measured": self.measured is not None,
            "differences": None if self.differences is None else list(self.differences),
            "modules": [_values(node) for node in self.graph],
            "norms": {norm.name: norm.trained for norm in self.graph.norms},
            "left_alone": self.left_alone,
        }


_CARRY = ("start", "stop", "groups", "head_dim", "parts", "tile")


def _values(node: Node) -> dict[str, Any]:
    return {
        "name": node.name,
        "d_out": node.d_out,
        "d_in": node.d_in,
        "experts": node.experts,
        "trained": node.trained,
        "anterior": node.anterior,
        "kind": node.link.kind if node.link else None,
        "exactness": node.link.exactness if node.link else None,
        "channels": dict(zip(_CARRY, node.carry, strict=True)) if node.carry else None,
    }


def wiring(name: str, overrides: tuple[str, ...] = (), measured: bool = False) -> Wiring:
    """Return who feeds whom in a recipe's base, or in a model.

    Args:
        name: A recipe's file or name; or a model: a folder, a download's name or a hub id.
        overrides: Of the recipe's keys.
        measured: Measure it, of a family that a table knows, too, and compare.

    Raises:
        InputError: when it is neither, trains another method, or cannot be measured.
    """
    options = Options()
    if name.endswith((".yaml", ".yml")) or name in shipped_recipes():
        recipe = load_recipe(find_recipe(name), overrides)
        if not isinstance(recipe.method, SanMethod):
            raise InputError(
                f"{name}: method {recipe.method.name}: only san has a propagation graph"
            )
        base, options = recipe.base, recipe.method.options
    elif overrides:
        raise InputError(f"{overrides[0]}: only a recipe has keys to override, and {name} is none")
    else:
        base = Base(model=name)
    config, _ = any_config_of(base)
    table = propagation_graph(config, options) if is_known(config.get("model_type")) else None
    if table is not None and not measured:
        return Wiring(table, None, None)
    found = measured_graph(config, options)
    made = nodes(found, options)
    graph = PropagationGraph(made, measured_norms(config, made, options))
    if table is None:
        return Wiring(graph, found, None)
    return Wiring(table, found, tuple(differences(table, graph)))


def differences(declared: PropagationGraph, measured: PropagationGraph) -> list[str]:
    """Return in words where two graphs of a model differ, and nothing where they do not."""
    told = []
    theirs = {node.name: node for node in measured}
    for node in declared:
        other = theirs.pop(node.name, None)
        if other is None:
            told.append(f"{node.name}: in the table, not in the model")
            continue
        facts = zip(_facts(node, declared), _facts(other, measured), strict=True)
        told += [
            f"{node.name}: {what}: {one} in the table, {two} measured"
            for what, (one, two) in zip(_WHAT, facts, strict=True)
            if one != two
        ]
    return [*told, *(f"{name}: in the model, not in the table" for name in theirs)]


_WHAT = ("shape", "fed by", "link", "channels")


def _facts(node: Node, graph: PropagationGraph) -> tuple[Any, ...]:
    channels = None
    if node.carry is not None:
        d_out = next(other.d_out for other in graph if other.name == node.anterior)
        channels = carried(np.arange(d_out), node.carry).tolist()
    kind = node.link.kind if node.link else None
    return (node.d_out, node.d_in), node.anterior, kind, channels
