"""Merged weights against the method's formula, worked out a second time in fp64 from the files.

Nothing of the merge's own arithmetic is used: row norms are those of the dense matrix, scales are
repeated head by head, and every tensor of the merged model is looked at, touched or not. Some rows
at a time, without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from san_llm.architectures.decoders import EMBEDDING
from san_llm.errors import InputError, SanError
from san_llm.files import read_json
from san_llm.models.adapter import Adapter
from san_llm.models.scales import changes, files_of, module_kinds
from san_llm.models.weights import (
    SIZES,
    SPELLED,
    Numbers,
    Stored,
    read_rows,
    read_weights,
    row_blocks,
)
from san_llm.san.formulas import inner_scale
from san_llm.san.graph import propagation_graph
from san_llm.san.node import Node
from san_llm.san.options import saved_options

if TYPE_CHECKING:
    from san_llm.measure.in_files import Changes

# Half a step of the last place, relative; and the smallest number with all its places.
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
SMALLEST = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-14}
ARITHMETIC = 1e-5  # what products and norms in fp32 add to that

# The rows from one number to another of a tensor of the base, in fp32; None where it has none.
BaseRows = Callable[[str, int, int], Numbers | None]


def stored_rows(base: Path) -> BaseRows:
    """Return the reader of the rows of full-precision weights in a folder."""
    stored = {tensor.name: tensor for tensor in read_weights(base)}

    def rows(name: str, first: int, last: int) -> Numbers | None:
        return read_rows(stored[name], first, last) if name in stored else None

    return rows


class Expected:
    """The neuron scales of an adapter and the rows of the merged model, in fp64."""

    def __init__(self, base: BaseRows, config: Mapping[str, Any], adapter: Adapter) -> None:
        """Open a SAN adapter; the arguments are those of :func:`weight_errors`."""
        self._base, self._options = base, adapter.options
        graph = propagation_graph(config, adapter.options)
        self._nodes = {node.name: node for node in graph}
        self._norms = {norm.name for norm in graph.norms}
        self._vectors = adapter.tensors
        self._wide: dict[str, Numbers | None] = {}
        self._known: dict[str, tuple[Numbers | float, Numbers | float]] = {}

    def _vector(self, name: str) -> Numbers | None:
        if name not in self._wide:
            tensor = self._vectors.get(name)
            self._wide[name] = None if tensor is None else read_rows(tensor).astype(np.float64)
        return self._wide[name]

    def _adapted(self, node: Node, first: int, last: int) -> tuple[Numbers, Numbers]:
        """Return rows of W and of W + (alpha / r) B A."""
        rows = self._base(f"{node.name}.weight", first, last)
        if rows is None:
            raise InputError(f"the base has no {node.name}.weight")
        weight = rows.astype(np.float64)
        if not node.rank:
            return weight, weight
        a, b = self._vector(f"{node.name}.san_lora_A"), self._vector(f"{node.name}.san_lora_B")
        if a is None or b is None:
            raise InputError(f"the adapter has no low-rank matrices for {node.name}")
        factor = self._options["lora_alpha"] / self._options["r"]
        product = b.reshape(len(b), -1)[first:last] @ a.reshape(len(a), -1)
        return weight, weight + factor * product.reshape(weight.shape)

    def _scales(self, node: Node) -> tuple[Numbers | float, Numbers | float]:
        """Return ``(what rows are multiplied by, gamma)`` of a node, (d_out,) or 1."""
        if node.name not in self._known:
            self._known[node.name] = self._computed(node)
        return self._known[node.name]

    def _computed(self, node: Node) -> tuple[Numbers | float, Numbers | float]:
        synapse = self._options.get("mode") == "synapse"
        if node.carrier == "scale":
            gamma = self._vector(f"{node.name}.san_gamma")
            given = 1.0 if gamma is None else gamma
            return (1.0 if synapse else given), given
        norms: list[Numbers] = []
        shape = Stored("", "F32", (node.d_out, node.d_in), Path(), 0, 0)
        for first, last in row_blocks(shape):
            both = self._adapted(node, first, last)
            norms.append(
                np.stack([np.linalg.norm(rows.reshape(len(rows), -1), axis=1) for rows in both])
            )
        norm, adapted = np.concatenate(norms, axis=1)
        adapted[norm == 0] = norm[norm == 0] = 1  # a row of zeros has none to compare with
        if node.carrier == "lora":
            return (norm / adapted if synapse else 1.0), adapted / norm
        magnitude = self._vector(f"{node.name}.san_magnitude")
        if magnitude is None:
            return norm / adapted, 1.0
        return (norm if synapse else magnitude) / adapted, magnitude / norm

    def _columns(self, node: Node) -> Numbers | float:
        if node.sigma:
            own = self._vector(f"{node.name}.san_sigma")
            return 1.0 if own is None else own
        if node.anterior is None or node.carry is None:
            return 1.0
        gamma = self._scales(self._nodes[node.anterior])[1]
        if isinstance(gamma, float):
            return gamma
        start, stop, groups, head, parts, tile = node.carry
        part = len(gamma) // parts
        rows = [at + row for at in range(0, parts * part, part) for row in range(start, stop)]
        length = head if groups > 1 else len(rows)
        heads = [rows[at : at + length] for at in range(0, len(rows), length)]
        return gamma[[row for stretch in heads for _ in range(groups) for row in stretch] * tile]

    def changes(self, name: str) -> bool:
        """Whether the adapter makes another tensor of the base's."""
        return name.rpartition(".")[0] in self._nodes.keys() | self._norms

    def rows(self, name: str, first: int, last: int) -> Numbers:
        """Return rows of a merged tensor."""
        module, _, kind = name.rpartition(".")
        node = self._nodes.get(module)
        if name in self._vectors:  # a module that was trained whole
            return read_rows(self._vectors[name], first, last).astype(np.float64)
        if node is None or (kind == "weight" and not node.d_in):
            # An output head that the base ties to its embedding keeps the embedding as it was.
            source = self._base(name, first, last)
            if source is None and name == "lm_head.weight":
                source = self._base(f"model.{EMBEDDING}.weight", first, last)
            plain = np.zeros(last - first) if source is None else source.astype(np.float64)
            change = self._vector(f"{module}.san_{kind}") if module in self._norms else None
            if change is not None:
                return plain + change[first:last]
            return plain if node is None else plain * self._scales(node)[0]
        if kind == "weight":
            scale = self._scales(node)[0]
            column = scale if isinstance(scale, float) else scale[first:last, None]
            return column * self._adapted(node, first, last)[1] * self._columns(node)
        bias = self._base(name, first, last)
        beta = self._vector(f"{module}.san_beta")
        scale = 1.0 if node.rank else self._scales(node)[0]
        row_scale = scale if isinstance(scale, float) else scale[first:last]
        whole = np.zeros(last - first) if bias is None else row_scale * bias.astype(np.float64)
        return whole if beta is None else whole + beta[first:last]


class ExpectedMeasured(Expected):
    """The same for a model that no table knows, by the names that its files have."""

    def __init__(
        self, base: BaseRows, config: Mapping[str, Any], adapter: Adapter, merged: Path
    ) -> None:
        """Open a SAN adapter; the arguments are those of :func:`weight_errors`."""
        own = read_json(merged / "config.json")
        self._files = files_of(adapter, own, read_weights(merged))
        self._named, self._kinds = self._files.names, module_kinds(adapter)
        super().__init__(self._by_parameter, config, adapter)
        self._stored = base
        self._san = saved_options(adapter.options)

    def _by_parameter(self, name: str, first: int, last: int) -> Numbers | None:
        rows = self._stored(self._named.get(name, name), first, last)
        if rows is None and self._files.tied is None:
            # A head that the base ties to its embedding keeps the embedding as it was.
            table = next((n for n, kind in self._kinds.items() if kind == "Embedding"), None)
            return self._stored(self._named[f"{table}.weight"], first, last)
        return rows

    def changes(self, name: str) -> bool:
        """Whether the adapter makes another tensor of the base's."""
        piece = self._files.pieces.get(name)
        names = piece.parameters if piece is not None else ()
        return any(super(ExpectedMeasured, self).changes(own) for own in names)

    def _of(self, parameter: str) -> Changes:
        module, _, kind = parameter.rpartition(".")
        node = self._nodes.get(module)
        if node is None:
            trained = module in self._norms
            return None, None, self._vector(f"{module}.san_{kind}") if trained else None
        gamma = self._vector(f"{module}.san_gamma") if node.experts else None
        rows, columns = self._scales(node)[0], self._columns(node)
        return changes(
            *(node, kind, len(self._files.shapes[parameter]), self._kinds[module]),
            None if isinstance(rows, float) else rows,
            None if isinstance(columns, float) else columns,
            inner_scale(gamma, node.d_in, self._san.mode, self._san.kinds),
            self._vector(f"{module}.san_beta"),
        )

    def rows(self, name: str, first: int, last: int) -> Numbers:
        """Return rows of a merged tensor."""
        piece = self._files.pieces.get(name)
        plain = piece.parameters[0] if piece is not None and not piece.steps else name
        if plain in self._vectors:  # a module that was trained whole
            return read_rows(self._vectors[plain], first, last).astype(np.float64)
        node = self._nodes.get(plain.rpartition(".")[0])
        if node is not None and node.rank and plain.endswith(".weight"):
            whole = self._adapted(node, first, last)[1]
        else:
            source = self._by_parameter(plain, first, last)
            if source is None:
                raise InputError(f"the base has no {name}")
            whole = source.astype(np.float64)
        if piece is None:
            return whole
        *factors, shift = (
            change if change is None or len(change) == 1 else change[first:last]
            for change in self._files.changes(piece, self._of)[name]
        )
        for factor in factors:
            whole = whole if factor is None else whole * factor
        return whole if shift is None else whole + shift


def weight_errors(
    base: BaseRows,
    config: Mapping[str, Any],
    adapter: Adapter,
    merged: Path,
    dtype: str,
    *,
    blocks: Callable[[Stored], Iterable[tuple[int, int]]] = row_blocks,
    most: int | None = None,
) -> dict[str, float]:
    """Return the largest error of each merged tensor, relative to the largest number of its row.

    Args:
        base: The base's numbers.
        config: The base's ``config.json``.
        adapter: A SAN adapter.
        merged: The merged model's folder.
        dtype: The dtype of its weights; those of a measured model may have their own.
        blocks: Gives the ``(first, last)`` rows that are looked at of a tensor; default: all.
        most: Of how many tensors that the adapter changes, spread over the model; default: of all.
    """
    expected = (
        ExpectedMeasured(base, config, adapter, merged)
        if adapter.measured
        else Expected(base, config, adapter)
    )
    # What has no rows or no numbers, or is no weight, is copied.
    tensors = [t for t in read_weights(merged) if t.dtype in SIZES and t.shape and 0 not in t.shape]
    if most is not None:
        changed = [tensor for tensor in tensors if expected.changes(tensor.name)]
        passed = set(changed) - set(changed[:: max(1, len(changed) // most)])
        tensors = [tensor for tensor in tensors if tensor not in passed]
    errors = {}
    for tensor in tensors:
        largest = 0.0
        for first, last in blocks(tensor):
            wanted = expected.rows(tensor.name, first, last)
            off = np.abs(read_rows(tensor, first, last) - wanted)
            smallest = SMALLEST[SPELLED.get(tensor.dtype, dtype)]
            size = np.maximum(np.abs(wanted).max(-1, keepdims=True), smallest)
            # Not max(): a NaN is to be kept, not passed over.
            largest = float(np.maximum(largest, (off / size).max()))
        errors[tensor.name] = largest
    return errors


def check_errors(merged: Path, errors: Mapping[str, float], dtype: str) -> None:
    """Refuse a merged model with a weight that rounding to its dtype does not explain.

    Raises:
        SanError: naming the worst weight.
    """
    own = {tensor.name: SPELLED.get(tensor.dtype, dtype) for tensor in read_weights(merged)}
    wrong = [
        name for name, error in errors.items() if not error <= ROUNDING[own[name]] + ARITHMETIC
    ]
    if wrong:
        worst = max(wrong, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
        dtype, allowed = own[worst], ROUNDING[own[worst]] + ARITHMETIC
        raise SanError(
            f"{merged}: {worst} is {errors[worst]:.3g} of its row's largest number away from the "
            f"formula where {dtype} allows {allowed:.3g} ({len(wrong)} of {len(errors)} tensors)"
        )
