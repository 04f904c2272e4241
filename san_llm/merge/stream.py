"""A SAN adapter merged into a full-precision base at the speed of the disk.

Every tensor goes from the base's files to the new ones once: copied as it is, or read some rows at
a time, merged in fp32 by the carriers' formula and rounded once. Neither torch nor a whole weight
is ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from san_llm.architectures.decoders import BIAS_FLAGS, EMBEDDING
from san_llm.errors import InputError
from san_llm.files import read_json
from san_llm.merge.write import Output
from san_llm.models.adapter import Adapter, embedding_rows
from san_llm.models.locate import FoundBase
from san_llm.models.scales import Scales
from san_llm.models.weights import Numbers, Stored
from san_llm.san.formulas import merged_bias, merged_weight
from san_llm.san.node import Node


class Merged:
    """The tensors of the merged model, each with how its rows come about."""

    def __init__(self, adapter: Adapter, found: FoundBase) -> None:
        """Open a SAN adapter over a base in full precision.

        Raises:
            InputError: when they do not fit together.
            SanError: when a number of the adapter is not finite.
        """
        self._scales = Scales(adapter, found.folder, found.config)
        self._tensors, self._found = adapter.tensors, found
        tied = bool(found.config["tie_word_embeddings"])
        self._rows = embedding_rows(adapter, found.config["vocab_size"], tied)
        embedding = self._scales.nodes.get(f"model.{EMBEDDING}")
        scaled = embedding is not None and self._scales.scales(embedding)[0] is not None
        self.untied = scaled and tied  # the features are scaled, the head is not

    def outputs(self, dtype: str) -> list[Output]:
        """Return the tensors of the merged model as ``dtype``, in the base's order.

        Raises:
            InputError: when the family's config cannot hold a shift.
        """
        outputs = []
        parents = self._biased()
        for name, tensor in self._scales.stored.items():
            module, _, kind = name.rpartition(".")
            node = self._scales.nodes.get(module)
            if name in self._tensors:
                tensor = self._tensors[name]
            if node is not None and kind == "weight":
                outputs.append(self._weight(node, tensor, dtype))
            elif node is not None and kind == "bias":
                outputs.append(self._bias(module, node.d_out, tensor, dtype))
            else:
                outputs.append(Output(name, dtype, tensor.shape, tensor, self._norm(name)))
            if (
                kind == "weight"
                and module.rpartition(".")[0].rpartition(".")[2] in parents
                and f"{module}.bias" not in self._scales.stored
            ):
                # A config's flag gives a bias to all Linears of a parent, or to none.
                outputs.append(self._bias(module, tensor.shape[0], None, dtype))
        if self.untied and "lm_head.weight" not in self._scales.stored:
            table = self._scales.stored[f"model.{EMBEDDING}.weight"]
            outputs.append(Output("lm_head.weight", dtype, table.shape, table))
        return outputs

    def _weight(self, node: Node, tensor: Stored, dtype: str) -> Output:
        def merge(wide: Numbers, first: int, last: int) -> Numbers:
            row_scale, _ = self._scales.scales(node)
            if not node.d_in:  # an embedding's features are its columns
                return merged_weight(wide, row_scale, None, None, in_place=True, axes=(1, 0))
            delta, s = self._scales.delta(node, first, last), self._scales.synapse_scale(node)
            rows = None if row_scale is None else row_scale[first:last]
            return merged_weight(wide, rows, delta, s, in_place=True)

        return Output(tensor.name, dtype, tensor.shape, tensor, merge)

    def _norm(self, name: str) -> Callable[[Numbers, int, int], Numbers] | None:
        """Return how a norm's weight or bias comes about, None of what is copied as it is."""
        change = self._scales.norm_change(name)
        return None if change is None else lambda wide, first, last: wide + change[first:last]

    def _bias(self, module: str, d_out: int, tensor: Stored | None, dtype: str) -> Output:
        node = self._scales.nodes.get(module)

        def merge(zeros_or_bias: Numbers, first: int, last: int) -> Numbers:
            if node is None:
                return zeros_or_bias
            row_scale = None if node.rank else self._scales.scales(node)[0]
            row_scale, beta = (
                None if vector is None else vector[first:last]
                for vector in (row_scale, self._scales.vector(node, "beta"))
            )
            bias = merged_bias(None if tensor is None else zeros_or_bias, row_scale, beta)
            if bias is not None:
                zeros_or_bias[...] = bias
            return zeros_or_bias

        return Output(f"{module}.bias", dtype, (d_out,), tensor, merge)

    def _biased(self) -> set[str]:
        """Return the parents, such as ``mlp``, whose Linears all get a bias from a shift."""
        shifted = [node.name for node in self._scales.graph if node.beta]
        family = self._found.config["model_type"]
        if family in BIAS_FLAGS:
            return {name.split(".")[-2] for name in shifted}
        for name in shifted:
            if f"{name}.bias" not in self._scales.stored:
                raise InputError(
                    f"a stock {family} cannot hold the biases that a shift merges into: {name} has "
                    "none"
                )
        return set()

    def merged_config(self, dtype: str) -> dict[str, Any]:
        """Return the base's config with what the merge changes; dtype as torch spells it."""
        dropped = ("_name_or_path", "torch_dtype", "transformers_version")
        own = read_json(self._found.folder / "config.json")
        config = {key: value for key, value in own.items() if key not in dropped}
        config["dtype"] = dtype
        if self._rows != self._found.config["vocab_size"]:
            config["vocab_size"] = self._rows
        for flag, parent in BIAS_FLAGS.get(config["model_type"], {}).items():
            if parent in self._biased():
                config[flag] = True
        if self.untied:
            config["tie_word_embeddings"] = False
        return config
