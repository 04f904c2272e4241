"""The scales of a SAN adapter over its base, computed from the files of both, without torch.

A merge and ``san-llm diff`` ask for them. Norms of the low-rank carriers take the base's weights,
some rows at a time, so that no whole weight is ever in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from san_llm.architectures.lookup import in_model_order
from san_llm.errors import InputError, SanError
from san_llm.files import read_json
from san_llm.models.adapter import Adapter
from san_llm.models.weights import Numbers, Stored, read_rows, read_weights, row_blocks
from san_llm.san.formulas import carried, row_norms, scales, squared_row_norms
from san_llm.san.graph import PropagationGraph, propagation_graph
from san_llm.san.node import Node


class Scales:
    """The vectors of an adapter by the nodes of its graph, and what they make of a base.

    Attributes:
        graph: Who feeds whom.
        nodes: The graph's nodes, by name.
        stored: The base's tensors, by name.
    """

    def __init__(
        self,
        adapter: Adapter,
        base: Path,
        config: Mapping[str, Any],
        base_name: str = "this base",
        dtype: type[np.floating[Any]] = np.float32,
    ) -> None:
        """Hold an adapter against a base.

        Args:
            adapter: A SAN adapter.
            base: The base's folder, in full precision.
            config: The base's ``config.json``.
            base_name: What messages call it.
            dtype: The precision to compute in.

        Raises:
            InputError: when they do not fit together.
            SanError: when a number of the adapter is not finite.
        """
        self.graph: PropagationGraph = propagation_graph(config, adapter.options)
        self.nodes = {node.name: node for node in self.graph}
        self._trained_norms = {norm.name for norm in self.graph.norms}
        self.stored = {
            tensor.name: tensor
            for tensor in read_weights(base)
            # Buffers that old models' files hold and no model loads.
            if not tensor.name.endswith("rotary_emb.inv_freq")
        }
        self._adapter, self._base_name, self._dtype = adapter, base_name, dtype
        self._lock = Lock()
        self._read: dict[str, Numbers | None] = {}
        self._scales: dict[str, tuple[Numbers | None, Numbers | None]] = {}
        for node in self.graph:
            weight = self.stored.get(f"{node.name}.weight")
            if weight is None or (node.d_in and weight.shape != (node.d_out, node.d_in)):
                other = "; a model's files may have other names than it" if adapter.measured else ""
                raise InputError(
                    f"{base}: has no {node.name}.weight of the shape in its config{other}"
                )
        self._check_tensors()

    def _check_tensors(self) -> None:
        folder, base_name = self._adapter.folder, self._base_name
        place = {node.name: number for number, node in enumerate(self.graph)}
        tensors = self._adapter.tensors
        # In the model's order, so that it is its first one that is named.
        for name in sorted(tensors, key=lambda name: place.get(name.rpartition(".san_")[0], -1)):
            tensor = tensors[name]
            module, _, kind = name.rpartition(".san_")
            if module not in self.nodes and name in self.stored:
                continue  # a whole module that was trained and saved beside the scales
            shape = self._shape(module, kind)
            if shape is None:
                raise InputError(f"{folder}: {name} belongs to nothing in {base_name}")
            if tensor.shape != shape:
                raise InputError(
                    f"{folder}: {name} has the shape {tensor.shape}, {base_name} asks for {shape}: "
                    "it was trained on another base"
                )
            if not np.isfinite(read_rows(tensor)).all():
                raise SanError(f"{folder}: {name} has numbers that are not finite")

    def _shape(self, module: str, kind: str) -> tuple[int, ...] | None:
        """Return the shape of one of the adapter's tensors, or None where there is no such."""
        if module in self._trained_norms:
            stored = self.stored.get(f"{module}.{kind}")
            return None if stored is None else stored.shape
        node = self.nodes.get(module)
        if node is None or (kind == "sigma" and not node.sigma):
            return None
        if kind == "sigma":
            return (node.d_in,)
        if kind.startswith("lora_"):
            rank = self._adapter.options["r"]
            return (rank, node.d_in) if kind == "lora_A" else (node.d_out, rank)
        return (node.d_out,)

    def _rows(self, tensor: Stored, first: int, last: int | None) -> Numbers:
        return read_rows(tensor, first, last).astype(self._dtype, copy=False)

    def vector(self, node: Node, kind: str) -> Numbers | None:
        """Return one of the adapter's tensors of a node: ``gamma``, ``beta``, ``lora_A``, ..."""
        name = f"{node.name}.san_{kind}"
        if name not in self._read:
            tensor = self._adapter.tensors.get(name)
            self._read[name] = None if tensor is None else self._rows(tensor, 0, None)
        return self._read[name]

    def norm_change(self, name: str) -> Numbers | None:
        """Return what the adapter adds to a norm's weight or bias (d,), None to another tensor.

        Args:
            name: A tensor's of the base: ``model.norm.weight``.

        Raises:
            InputError: when the adapter trains that norm, and has no vector for it.
        """
        module, _, kind = name.rpartition(".")
        if module not in self._trained_norms:
            return None
        tensor = self._adapter.tensors.get(f"{module}.san_{kind}")
        if tensor is None:
            raise InputError(
                f"{self._adapter.folder}: has no {module}.san_{kind}, which train_norms asks for"
            )
        return self._rows(tensor, 0, None)

    def _needed(self, node: Node, kind: str) -> Numbers:
        vector = self.vector(node, kind)
        if vector is None:
            missing = "low-rank matrices" if kind.startswith("lora_") else kind
            raise InputError(
                f"{self._adapter.folder}: has no {missing} for {node.name} of {self._base_name}"
            )
        return vector

    def scales(self, node: Node) -> tuple[Numbers | None, Numbers | None]:
        """Return ``(row scale, gamma)`` of a node, each (d_out,) or None for 1."""
        with self._lock:  # several threads ask, and norms take a whole weight
            if node.name not in self._scales:
                mode = self._adapter.options.get("mode") or "both"
                self._scales[node.name] = self._compute_scales(node, mode)
            return self._scales[node.name]

    def neuron_scale(self, node: Node) -> Numbers | None:
        """Return gamma (d_out,) of a node, propagated or not, or None where it has none."""
        return self._compute_scales(node, "both")[1]

    def _compute_scales(self, node: Node, mode: str) -> tuple[Numbers | None, Numbers | None]:
        own = None
        if node.carrier == "scale":
            own = self._needed(node, "gamma") if node.gamma else None
        elif node.carrier == "dora":
            own = self.vector(node, "magnitude")
        pair: tuple[Numbers | None, Numbers | None] = scales(
            node.carrier, mode, own, lambda: self._norms(node)
        )
        return pair

    def _norms(self, node: Node) -> tuple[Numbers, Numbers]:
        """Return the row norms of W and of W + c B A, each (d_out,)."""
        weight = self.stored[f"{node.name}.weight"]
        a, b = self._needed(node, "lora_A"), self._needed(node, "lora_B")
        squared, adapted = np.empty(node.d_out, self._dtype), np.empty(node.d_out, self._dtype)
        for first, last in row_blocks(weight):
            rows = self._rows(weight, first, last)
            squares = squared[first:last] = (rows * rows).sum(-1)
            adapted[first:last] = squared_row_norms(squares, rows @ a.T, a, b[first:last], self._c)
        norms: tuple[Numbers, Numbers] = row_norms(squared, adapted)
        return norms

    @property
    def _c(self) -> float:
        return float(self._adapter.options["lora_alpha"]) / int(self._adapter.options["r"])

    def delta(self, node: Node, first: int, last: int) -> Numbers | None:
        """Return rows of ``c B A``, or None where the carrier has no low-rank product."""
        if not node.rank:
            return None
        a, b = self._needed(node, "lora_A"), self._needed(node, "lora_B")
        product: Numbers = self._dtype(self._c) * (b[first:last] @ a)
        return product

    def synapse_scale(self, node: Node) -> Numbers | None:
        """Return s (d_in,) of a node, or None for 1."""
        if node.sigma:
            return self._needed(node, "sigma")
        if node.anterior is None or node.carry is None:
            return None
        gamma = self.scales(self.nodes[node.anterior])[1]
        if gamma is None:
            return None
        scale: Numbers = carried(gamma, node.carry)
        return scale


def neuron_scales(adapter: Adapter, base: Path | None) -> dict[str, Numbers]:
    """Return every neuron scale of a SAN adapter (d_out,), by module, in the model's order.

    Args:
        adapter: The adapter.
        base: Its base's folder, which the low-rank carriers need; with None the ``scale`` carrier's
            are returned as they are held.

    Raises:
        InputError: when it is another method's, there is no scale, or they do not fit the base.
        SanError: when one is not finite.
    """
    if adapter.method != "SAN":
        raise InputError(
            f"{adapter.folder}: a {adapter.method} adapter: only SAN's have neuron scales"
        )
    scaled = (adapter.options.get("carrier") or "scale") == "scale"
    # Of a measured model the files may have other names than its modules.
    held = base is None or (scaled and adapter.measured)
    gammas = _held(adapter, "gamma") if base is None or held else _on_base(adapter, base)
    _check_finite(adapter, gammas)
    if not gammas:
        raise InputError(f"{adapter.folder}: has no neuron scale in it")
    return gammas


def column_scales(adapter: Adapter) -> dict[str, Numbers]:
    """Return the column scales that the targets have of their own (d_in,), by module.

    Raises:
        SanError: when one is not finite.
    """
    sigmas = _held(adapter, "sigma")
    _check_finite(adapter, sigmas)
    return sigmas


def _check_finite(adapter: Adapter, scales: Mapping[str, Numbers]) -> None:
    for name, scale in scales.items():
        if not np.isfinite(scale).all():
            raise SanError(f"{adapter.folder}: the scale of {name} has numbers that are not finite")


def _held(adapter: Adapter, kind: str) -> dict[str, Numbers]:
    """Return the scales that an adapter's file holds as they are, by module."""
    ending = f".san_{kind}"
    held = {
        name.removesuffix(ending): tensor
        for name, tensor in adapter.tensors.items()
        if name.endswith(ending)
    }
    graph: Any = adapter.options.get("graph")
    modules = [module["name"] for module in graph["modules"]] if graph else in_model_order(held)
    # Experts have a gamma each, one after another.
    return {
        name: read_rows(held[name]).astype(np.float64).ravel() for name in modules if name in held
    }


def _on_base(adapter: Adapter, base: Path) -> dict[str, Numbers]:
    """Return the neuron scales of an adapter on its base, by module."""
    config = read_json(base / "config.json")
    on_base = Scales(adapter, base, config, str(base), np.float64)
    gammas = {node.name: on_base.neuron_scale(node) for node in on_base.graph}
    return {name: gamma for name, gamma in gammas.items() if gamma is not None}
