"""A SAN adapter folded into a full-precision base at the speed of the disk.

Every tensor goes from the base's files to the new ones once: copied as it is, or read some rows at
a time, folded in fp32 by the carriers' formula and rounded once. Neither torch nor a whole weight
is ever in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from san_llm.errors import InputError, SanError
from san_llm.san.carriers import merged_bias, merged_weight, scales, squared_row_norms
from san_llm.san.graph import BIAS_FLAGS, EMBEDDING, Node, PropagationGraph, propagation_graph
from san_llm.shards import (
    Numbers,
    Output,
    Stored,
    read_checkpoint,
    read_header,
    read_rows,
    row_blocks,
)

PREFIX = "base_model.model."


def carried(gamma: Numbers, carry: tuple[int, int, int, int]) -> Numbers:
    """Return the synapse scale s (d_in,) that a gamma (d_out,) becomes; ``graph.Node.carry``."""
    start, stop, groups, head_dim = carry
    if groups == 1:
        return gamma[start:stop]
    heads = gamma[start:stop].reshape(-1, head_dim)  # (kv_heads, head_dim)
    repeated: Numbers = np.repeat(heads, groups, axis=0).reshape(-1)
    return repeated


class Folded:
    """The tensors of the merged checkpoint, each with how its rows come about."""

    def __init__(
        self, base: Path, config: Mapping[str, Any], adapter: Path, options: Mapping[str, Any]
    ) -> None:
        """Open a base and an adapter.

        Args:
            base: The base's folder.
            config: Its ``config.json``.
            adapter: The adapter's folder.
            options: Its ``adapter_config.json``.

        Raises:
            InputError: when they do not fit together.
        """
        self.graph: PropagationGraph = propagation_graph(config, options)
        self._options, self._config = options, config
        self._nodes = {node.name: node for node in self.graph}
        self._stored = {
            tensor.name: tensor
            for tensor in read_checkpoint(base)
            # Buffers that old checkpoints hold and no model loads.
            if not tensor.name.endswith("rotary_emb.inv_freq")
        }
        self._vectors = {
            tensor.name.removeprefix(PREFIX): tensor
            for tensor in read_header(adapter / "adapter_model.safetensors")
        }
        self._lock = Lock()
        self._read: dict[str, Numbers | None] = {}
        self._scales: dict[str, tuple[Numbers | None, Numbers | None]] = {}
        for node in self.graph:
            weight = self._stored.get(f"{node.name}.weight")
            if weight is None or (node.d_in and weight.shape != (node.d_out, node.d_in)):
                raise InputError(f"{base}: has no {node.name}.weight of the shape in its config")
        self._check_vectors(adapter)
        self.untied = f"model.{EMBEDDING}" in self._nodes and "lm_head.weight" not in self._stored

    def _check_vectors(self, adapter: Path) -> None:
        for name, tensor in self._vectors.items():
            module, _, kind = name.rpartition(".san_")
            node = self._nodes.get(module)
            if node is None and name in self._stored:
                continue  # a whole module that was trained and saved beside the scales
            if node is None:
                raise InputError(f"{adapter}: {name} belongs to nothing in this base")
            shape: tuple[int, ...] = (node.d_out,)
            if kind.startswith("lora_"):
                rank = self._options["r"]
                shape = (rank, node.d_in) if kind == "lora_A" else (node.d_out, rank)
            if tensor.shape != shape:
                raise InputError(
                    f"{adapter}: {name} has the shape {tensor.shape}, this base asks for {shape}: "
                    "it was trained on another base"
                )
            if not np.isfinite(read_rows(tensor)).all():
                raise SanError(f"{adapter}: {name} has numbers that are not finite")

    def _vector(self, node: Node, kind: str) -> Numbers | None:
        name = f"{node.name}.san_{kind}"
        if name not in self._read:
            tensor = self._vectors.get(name)
            self._read[name] = None if tensor is None else read_rows(tensor)
        return self._read[name]

    def _needed(self, node: Node, kind: str) -> Numbers:
        vector = self._vector(node, kind)
        if vector is None:
            raise InputError(f"the adapter has no {kind} for {node.name}")
        return vector

    def scales(self, node: Node) -> tuple[Numbers | None, Numbers | None]:
        """Return ``(row scale, gamma)`` of a node, each (d_out,) or None for 1."""
        with self._lock:  # several threads ask, and norms take a whole weight
            if node.name not in self._scales:
                self._scales[node.name] = self._compute_scales(node)
            return self._scales[node.name]

    def _compute_scales(self, node: Node) -> tuple[Numbers | None, Numbers | None]:
        own = None
        if node.carrier == "scale":
            own = self._needed(node, "gamma") if node.gamma else None
        elif node.carrier == "dora":
            own = self._vector(node, "magnitude")
        mode = self._options.get("mode", "both")
        found: tuple[Numbers | None, Numbers | None] = scales(
            node.carrier, mode, own, lambda: self._norms(node)
        )
        return found

    def _norms(self, node: Node) -> tuple[Numbers, Numbers]:
        """Return the row norms of W and of W + c B A, each (d_out,)."""
        weight = self._stored[f"{node.name}.weight"]
        a, b = self._needed(node, "lora_A"), self._needed(node, "lora_B")
        squared, adapted = np.empty(node.d_out, np.float32), np.empty(node.d_out, np.float32)
        for first, last in row_blocks(weight):
            rows = read_rows(weight, first, last)
            part = squared[first:last] = (rows * rows).sum(-1)
            adapted[first:last] = squared_row_norms(part, rows @ a.T, a, b[first:last], self._c)
        return np.sqrt(squared), np.sqrt(adapted)

    @property
    def _c(self) -> float:
        return float(self._options["lora_alpha"]) / int(self._options["r"])

    def synapse_scale(self, node: Node) -> Numbers | None:
        """Return s (d_in,) of a node, or None for 1."""
        if node.anterior is None or node.carry is None:
            return None
        gamma = self.scales(self._nodes[node.anterior])[1]
        if gamma is None:
            return None
        return carried(gamma, node.carry)

    def outputs(self, dtype: str) -> list[Output]:
        """Return the tensors of the merged checkpoint as ``dtype``, in the base's order.

        Raises:
            InputError: when the family's config cannot hold a shift.
        """
        made = []
        parents = self._biased()
        for name, tensor in self._stored.items():
            module, _, kind = name.rpartition(".")
            node = self._nodes.get(module)
            if name in self._vectors:
                tensor = self._vectors[name]
            if node is not None and kind == "weight":
                made.append(self._weight(node, tensor, dtype))
            elif node is not None and kind == "bias":
                made.append(self._bias(module, node.d_out, tensor, dtype))
            else:
                made.append(Output(name, dtype, tensor.shape, tensor))
            if (
                kind == "weight"
                and module.rpartition(".")[0].rpartition(".")[2] in parents
                and f"{module}.bias" not in self._stored
            ):
                # A config's flag gives a bias to all Linears of a parent, or to none.
                made.append(self._bias(module, tensor.shape[0], None, dtype))
        if self.untied:
            table = self._stored[f"model.{EMBEDDING}.weight"]
            made.append(Output("lm_head.weight", dtype, table.shape, table))
        return made

    def _weight(self, node: Node, tensor: Stored, dtype: str) -> Output:
        def fold(wide: Numbers, first: int, last: int) -> Numbers:
            row_scale, gamma = self.scales(node)
            if not node.d_in:  # an embedding's features are its columns
                return merged_weight(wide, None, None, gamma, in_place=True)
            delta = None
            if node.rank:
                a, b = self._needed(node, "lora_A"), self._needed(node, "lora_B")
                delta = np.float32(self._c) * (b[first:last] @ a)
            part = None if row_scale is None else row_scale[first:last]
            return merged_weight(wide, part, delta, self.synapse_scale(node), in_place=True)

        return Output(tensor.name, dtype, tensor.shape, tensor, fold)

    def _bias(self, module: str, d_out: int, tensor: Stored | None, dtype: str) -> Output:
        node = self._nodes.get(module)

        def fold(zeros_or_bias: Numbers, first: int, last: int) -> Numbers:
            if node is None:
                return zeros_or_bias
            row_scale = None if node.rank else self.scales(node)[0]
            row_scale, beta = (
                None if vector is None else vector[first:last]
                for vector in (row_scale, self._vector(node, "beta"))
            )
            bias = merged_bias(None if tensor is None else zeros_or_bias, row_scale, beta)
            if bias is not None:
                zeros_or_bias[...] = bias
            return zeros_or_bias

        return Output(f"{module}.bias", dtype, (d_out,), tensor, fold)

    def _biased(self) -> set[str]:
        """Return the parents, such as ``mlp``, whose Linears all get a bias from a shift."""
        parents = {node.name.split(".")[-2] for node in self.graph if node.beta}
        family = self._config["model_type"]
        if parents and family not in BIAS_FLAGS:
            raise InputError(f"a stock {family} cannot hold the biases that a shift merges into")
        return parents

    def merged_config(self, dtype: str) -> dict[str, Any]:
        """Return the base's config with what the merge changes; dtype as torch spells it."""
        dropped = ("_name_or_path", "torch_dtype", "transformers_version")
        config = {key: value for key, value in self._config.items() if key not in dropped}
        config["dtype"] = dtype
        for flag, parent in BIAS_FLAGS.get(config["model_type"], {}).items():
            if parent in self._biased():
                config[flag] = True
        if self.untied:
            config["tie_word_embeddings"] = False
        return config
