"""The scales of a SAN adapter over its base, computed from the files of both, without torch.

A merge and ``san-llm diff`` ask for them. Norms of the low-rank carriers take the base's weights,
some rows at a time, so that no whole weight is ever in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from san_llm.architectures.decoders import DOWN, GATE_UP
from san_llm.architectures.lookup import in_model_order, place_of
from san_llm.errors import InputError, SanError
from san_llm.files import read_json
from san_llm.models.adapter import Adapter
from san_llm.models.agree import HEAD
from san_llm.models.weights import (
    Numbers,
    Stored,
    read_rows,
    read_weights,
    row_blocks,
    stored_weights,
)
from san_llm.san.formulas import (
    along,
    carried,
    expert_factors,
    inner_scale,
    row_norms,
    scales,
    squared_row_norms,
)
from san_llm.san.graph import PropagationGraph, propagation_graph
from san_llm.san.measured import stock_config
from san_llm.san.node import Node
from san_llm.san.options import saved_options

if TYPE_CHECKING:
    from san_llm.measure.in_files import Changes, InFiles

TRANSPOSED = ("Conv1D", "Embedding")  # modules whose weight's rows are not its features


class Scales:
    """The vectors of an adapter by the nodes of its graph, and what they make of a base.

    Attributes:
        graph: Who feeds whom.
        nodes: The graph's nodes, by name.
        stored: The base's tensors, by name; of a measured model by their names in memory, those
            that are one parameter as a whole.
        files: Of a measured model what its files' tensors are of its parameters.
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
        self.norms = {norm.name for norm in self.graph.norms}
        self.files: InFiles | None = None
        if adapter.measured:
            tensors = {tensor.name: tensor for tensor in stored_weights(base)}
            self.files = files_of(adapter, config, tensors.values())
            self.stored = {own: tensors[name] for own, name in self.files.names.items()}
        else:
            self.stored = {
                tensor.name: tensor
                for tensor in read_weights(base)
                # Buffers that old models' files hold and no model loads.
                if not tensor.name.endswith("rotary_emb.inv_freq")
            }
        self._adapter, self._base_name, self._dtype = adapter, base_name, dtype
        self._options, self._kinds = saved_options(adapter.options), {}
        self._lock = Lock()
        self._read: dict[str, Numbers | None] = {}
        self._scales: dict[str, tuple[Numbers | None, Numbers | None]] = {}
        if self.files is not None:
            self._kinds = module_kinds(adapter)
            self._check_measured(self.files)
        for node in self.graph if self.files is None else ():
            weight = self.stored.get(f"{node.name}.weight")
            if weight is None or (node.d_in and weight.shape != (node.d_out, node.d_in)):
                raise InputError(f"{base}: has no {node.name}.weight of the shape in its config")
        self._check_tensors()

    def _check_measured(self, files: InFiles) -> None:
        """Refuse an adapter whose graph is another model's."""
        for node in self.graph:
            experts = {
                GATE_UP: (node.experts, node.d_out - node.d_in, node.d_in),
                DOWN: (node.experts, node.d_in, (node.d_out - node.d_in) // 2),
            }
            for kind in experts if node.experts else ("weight",):
                shape = files.shapes.get(f"{node.name}.{kind}", ())
                if node.experts:
                    fits = shape == experts[kind]
                else:
                    features = 1 if self._kinds[node.name] in TRANSPOSED else 0
                    fits = len(shape) > 1 and shape[features] == node.d_out
                    fits &= node.anterior is None or shape[1 - features] == node.d_in
                if not fits:
                    raise InputError(
                        f"{self._adapter.folder}: was made for another model: {self._base_name} "
                        f"has no {node.name}.{kind} of the shape in its graph"
                    )
            if node.rank and f"{node.name}.weight" not in self.stored:
                from san_llm.measure.in_files import UntranslatedError

                raise UntranslatedError(
                    f"the files have {node.name}.weight in parts or with others, and the "
                    f"{node.carrier} carrier adds to all of it"
                )

    def _check_tensors(self) -> None:
        folder, base_name = self._adapter.folder, self._base_name
        place = {node.name: number for number, node in enumerate(self.graph)}
        tensors = self._adapter.tensors
        # In the model's order, so that it is its first one that is named.
        for name in sorted(tensors, key=lambda name: place.get(name.rpartition(".san_")[0], -1)):
            tensor = tensors[name]
            module, _, kind = name.rpartition(".san_")
            known = self.files.shapes if self.files else (*self.stored, HEAD)  # or tied, not stored
            if module not in self.nodes and name in known:
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
        if module in self.norms:
            stored = self.stored.get(f"{module}.{kind}")
            return None if stored is None else stored.shape
        node = self.nodes.get(module)
        if node is None or (kind == "sigma" and not node.sigma):
            return None
        if kind == "sigma":
            return (node.d_in,)
        if kind.startswith("lora_"):
            rank = self._adapter.options["r"]
            kernel = self.stored[f"{module}.weight"].shape[2:]
            if kind == "lora_A":
                return (rank, node.d_in, *kernel)
            return (node.d_out, rank, *(1 for _ in kernel))
        return (node.experts, node.d_out) if node.experts else (node.d_out,)

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
        if module not in self.norms:
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
        a, b = self._matrices(node)
        squared, adapted = np.empty(node.d_out, self._dtype), np.empty(node.d_out, self._dtype)
        for first, last in row_blocks(weight):
            rows = self._rows(weight, first, last).reshape(last - first, -1)
            squares = squared[first:last] = (rows * rows).sum(-1)
            adapted[first:last] = squared_row_norms(squares, rows @ a.T, a, b[first:last], self._c)
        norms: tuple[Numbers, Numbers] = row_norms(squared, adapted)
        return norms

    def _matrices(self, node: Node) -> tuple[Numbers, Numbers]:
        """Return A (rank, d_in times a kernel's places) and B (d_out, rank)."""
        a, b = self._needed(node, "lora_A"), self._needed(node, "lora_B")
        return a.reshape(len(a), -1), b.reshape(len(b), -1)

    @property
    def _c(self) -> float:
        return float(self._adapter.options["lora_alpha"]) / int(self._adapter.options["r"])

    def changes(self, parameter: str) -> Changes:
        """Return what a parameter of a measured model is multiplied by, and what is added."""
        module, _, kind = parameter.rpartition(".")
        node = self.nodes.get(module)
        if node is None or self.files is None:
            return None, None, self.norm_change(parameter)
        gamma = self._needed(node, "gamma") if node.experts and node.gamma else None
        inner = inner_scale(gamma, node.d_in, self._options.mode, self._options.kinds)
        return changes(
            node,
            kind,
            len(self.files.shapes[parameter]),
            self._kinds[module],
            self.scales(node)[0],
            self.synapse_scale(node),
            inner,
            self.vector(node, "beta"),
        )

    def delta(self, node: Node, first: int, last: int) -> Numbers | None:
        """Return rows of ``c B A``, or None where the carrier has no low-rank product."""
        if not node.rank:
            return None
        a, b = self._matrices(node)
        product: Numbers = self._dtype(self._c) * (b[first:last] @ a)
        return product.reshape(-1, *self.stored[f"{node.name}.weight"].shape[1:])

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


def files_of(adapter: Adapter, config: Mapping[str, Any], stored: Iterable[Stored]) -> InFiles:
    """Return what a measured model's tensors are of the parameters that its adapter changes.

    Args:
        adapter: The adapter, which says of which class its model is.
        config: The model's ``config.json``.
        stored: The tensors.

    Raises:
        UntranslatedError: when that is not known, see ``measure.in_files``.
        InputError: when they do not fit together.
    """
    from san_llm.measure.in_files import in_files

    model_class = str(adapter.options["graph"].get("model_class"))
    shapes = {tensor.name: tensor.shape for tensor in stored}
    return in_files(stock_config(config), model_class, shapes)


def module_kinds(adapter: Adapter) -> dict[str, str]:
    """Return of which kind each module of a measured model is: ``Linear``, ``Conv2d``."""
    return {module["name"]: str(module["kind"]) for module in adapter.options["graph"]["modules"]}


def changes(
    node: Node,
    parameter: str,
    axes: int,
    kind: str,
    rows: Numbers | None,
    s: Numbers | None,
    inner: Numbers | None,
    beta: Numbers | None,
) -> Changes:
    """Return what a parameter of a node is multiplied by, two times, and what is added to it.

    Args:
        node: The node.
        parameter: Its own name: ``weight``, ``bias``, that of one of two weights of experts.
        axes: How many it has.
        kind: Of which kind the module is.
        rows: What the features are multiplied by, or None for 1.
        s: What the columns are, or None for 1.
        inner: What the columns of each expert's down are, or None for 1.
        beta: The shift, or None for 0.
    """
    if node.experts:
        return *expert_factors(rows, s, inner, node.d_in).get(parameter, (None, None)), None
    if parameter == "bias":
        return None if node.rank else rows, None, beta
    features, columns = (1, 0) if kind in TRANSPOSED else (0, 1)
    return along(rows, features, axes), along(s, columns, axes), None


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
    # Of a measured model's those of the adapter say all: transformers' tables take seconds to ask.
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


def norm_changes(adapter: Adapter) -> dict[str, Numbers]:
    """Return what the adapter adds to norms, (d,) each, by parameter: ``model.norm.weight``.

    In the order of the blocks; those outside of them come last.

    Raises:
        SanError: when one is not finite.
    """
    added = {
        f"{module}.{kind}": read_rows(tensor).astype(np.float64)
        for name, tensor in adapter.tensors.items()
        for module, _, kind in [name.rpartition(".san_")]
        if module and kind in ("weight", "bias")
    }
    _check_finite(adapter, added)

    def place(name: str) -> tuple[bool, int, str]:
        block, _ = place_of(name)
        return block is None, block or 0, name

    return {name: added[name] for name in sorted(added, key=place)}


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
