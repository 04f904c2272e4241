"""A SAN adapter merged into a full-precision base at the speed of the disk.

Every tensor goes from the base's files to the new ones once: copied as it is, or read some rows at
a time, merged in fp32 by the carriers' formula and rounded once. Neither torch nor a whole weight
is ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from san_llm.architectures.decoders import BIAS_FLAGS, EMBEDDING
from san_llm.errors import InputError
from san_llm.files import read_json
from san_llm.merge.whole import DROPPED
from san_llm.merge.write import Output
from san_llm.models.adapter import Adapter, embedding_rows
from san_llm.models.agree import EMBEDDED, HEAD
from san_llm.models.locate import FoundBase
from san_llm.models.scales import Scales, files_of
from san_llm.models.weights import SIZES, SPELLED, Numbers, Stored, read_bytes, stored_weights
from san_llm.san.formulas import merged_bias, merged_weight
from san_llm.san.measured import stock_config
from san_llm.san.node import Node

if TYPE_CHECKING:
    from san_llm.measure.in_files import Piece, Shape


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
        self.untied = tied and self._parts_head()

    def _parts_head(self) -> bool:
        """Return whether the head of a tied base is another than the embedding when merged.

        It is where the embedding's features are scaled, and where one of the two was trained whole
        without the other. An adapter with more tokens holds the embedding for both.
        """
        embedding = self._scales.nodes.get(f"model.{EMBEDDING}")
        if embedding is not None and self._scales.scales(embedding)[0] is not None:
            return True
        table, head = (self._tensors.get(name) for name in (EMBEDDED, HEAD))
        if table is not None and head is not None:
            pairs = zip(read_bytes(head), read_bytes(table), strict=True)
            return head.shape != table.shape or any(one != other for one, other in pairs)
        return head is not None or (
            table is not None and table.shape[0] == self._found.config["vocab_size"]
        )

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
        if self.untied and HEAD not in self._scales.stored:
            source = self._tensors.get(HEAD)
            if source is None:
                source = self._scales.stored[EMBEDDED]
            outputs.append(Output(HEAD, dtype, source.shape, source))
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
        own = read_json(self._found.folder / "config.json")
        config = {key: value for key, value in own.items() if key not in DROPPED}
        config["dtype"] = dtype
        if self._rows != self._found.config["vocab_size"]:
            config["vocab_size"] = self._rows
        for flag, parent in BIAS_FLAGS.get(config["model_type"], {}).items():
            if parent in self._biased():
                config[flag] = True
        if self.untied:
            config["tie_word_embeddings"] = False
        return config


class MergedMeasured:
    """The tensors of a merged model that no table knows, by the names that its base's files have.

    What an adapter does to a parameter is taken to the tensors that it is made of as transformers
    loads them, see ``measure.in_files``. Each keeps the dtype that it is stored in.
    """

    def __init__(self, adapter: Adapter, found: FoundBase) -> None:
        """Open a SAN adapter over a base in full precision.

        Raises:
            UntranslatedError: when it is not known what of a file a parameter is.
            InputError: when they do not fit together.
            SanError: when a number of the adapter is not finite.
        """
        self._scales = Scales(adapter, found.folder, found.config)
        assert self._scales.files is not None
        self._files, self._found, self._adapter = self._scales.files, found, adapter
        self._names = self._files.names
        self._whole = {name: t for name, t in adapter.tensors.items() if ".san_" not in name}
        self._changes = lru_cache(8)(partial(self._files.changes, of=self._scales.changes))
        for name in self._files.missing:
            if name not in self._whole:
                raise InputError(f"{found.base.model}: its weights have no {name}")
        for node in self._scales.graph:
            if node.beta and f"{node.name}.bias" not in self._files.shapes:
                family = found.config["model_type"]
                raise InputError(
                    f"a stock {family} cannot hold the biases that a shift merges into"
                )
        self.untied = self._is_untied()
        self._check_whole()

    def _is_untied(self) -> bool:
        """Return whether the head and the embedding are one in the base, and two when merged."""
        if self._files.tied is None:
            return False
        head, table = (self._whole.get(name) for name in self._files.tied)
        if head is not None and table is not None:
            pairs = zip(read_bytes(head), read_bytes(table), strict=True)
            return head.size != table.size or any(one != other for one, other in pairs)
        return head is not table or self._is_scaled(self._files.tied[1])

    def _check_whole(self) -> None:
        """Refuse whole modules that files have no place for."""
        from san_llm.measure.in_files import UntranslatedError

        made = {name for piece in self._files.pieces.values() for name in piece.parameters}
        for name in self._whole.keys() - self._names.keys():
            if name in made or name not in self._files.own:
                raise UntranslatedError(
                    f"the adapter holds {name}, which files have in parts or by another name"
                )
        if self.untied and self._files.tied and self._files.tied[1] not in self._names:
            raise UntranslatedError(f"the files have {self._files.tied[0]} for the embedding, too")

    def _is_scaled(self, parameter: str) -> bool:
        module = parameter.rpartition(".")[0]
        return module in self._scales.nodes or module in self._scales.norms

    def outputs(self, dtype: str | None) -> list[Output]:
        """Return the tensors of the merged model, in the base's order.

        Args:
            dtype: As which numbers all of them are stored; None: each as in the base.

        Raises:
            InputError: when a stock model of the merged config does not take them.
        """
        stored = stored_weights(self._found.folder)
        outputs = [self._output(tensor, dtype) for tensor in stored]
        for name in self._added():
            source = self._whole.get(name)
            if source is None:  # a head that is the embedding no more
                assert self._files.tied is not None
                own = self._names[self._files.tied[1]]
                source = next(tensor for tensor in stored if tensor.name == own)
            kind = _kind(source, dtype)
            outputs.append(Output(name, kind, source.shape, source, None, stored[-1].file))
        config, folder = self.merged_config(dtype), self._found.folder
        made = [Stored(o.name, o.dtype, o.shape, folder, 0, 0) for o in outputs]
        for name in files_of(self._adapter, config, made).missing:
            raise InputError(f"{self._adapter.folder}: merged, the model would have no {name}")
        return outputs

    def _added(self) -> list[str]:
        """Return the parameters that the merged model has and the base's files have not."""
        tied = self._files.tied or ()
        given = [*self._whole, *(tied if self.untied else ())]
        added = [name for name in given if name not in self._names]
        return [name for name in dict.fromkeys(added) if self.untied or name not in tied]

    def _output(self, tensor: Stored, dtype: str | None) -> Output:
        piece = self._files.pieces.get(tensor.name)
        if piece is None:  # loaded by nobody
            return Output(tensor.name, tensor.dtype, tensor.shape, tensor, None, tensor.file)
        kind, whole = _kind(tensor, dtype), self._whole.get(piece.parameters[0])
        if whole is not None:
            return Output(tensor.name, kind, whole.shape, whole, None, tensor.file)
        merge = None
        if any(map(self._is_scaled, piece.parameters)):
            merge = partial(self._merged, piece, tensor.name)
        return Output(tensor.name, kind, tensor.shape, tensor, merge, tensor.file)

    def _merged(self, piece: Piece, name: str, wide: Numbers, first: int, last: int) -> Numbers:
        module, _, kind = piece.parameters[0].rpartition(".")
        node = self._scales.nodes.get(module)
        if node is not None and kind == "weight" and not piece.steps:
            delta = self._scales.delta(node, first, last)
            if delta is not None:
                wide += delta
        *factors, shift = (
            change if change is None or len(change) == 1 else change[first:last]
            for change in self._changes(piece)[name]
        )
        for factor in factors:
            if factor is not None:
                wide *= factor
        if shift is not None:
            wide += shift
        return wide

    def merged_config(self, dtype: str | None) -> dict[str, Any]:
        """Return the base's config with what the merge changes.

        Args:
            dtype: As which numbers all tensors are stored; None: each as in the base.

        Raises:
            InputError: when a whole module has a size that no config of this model has a word for.
        """
        own = read_json(self._found.folder / "config.json")
        config = {key: value for key, value in own.items() if key not in DROPPED}
        if dtype is not None:
            config = _with_dtype(config, SPELLED[dtype]) | {"dtype": SPELLED[dtype]}
        elif "torch_dtype" in own:
            config["dtype"] = own["torch_dtype"]
        if self.untied:
            config["tie_word_embeddings"] = False
        if any(name in self._files.missing for name in self._whole):
            config["architectures"] = [self._adapter.options["graph"]["model_class"]]
        for name, tensor in self._whole.items():
            made = self._files.shapes[name]
            if tensor.shape != made:
                config |= self._resized(name, made, tensor.shape)
        return config

    def _resized(self, name: str, made: Shape, shape: Shape) -> dict[str, Any]:
        """Return what a config says of a whole module of other rows than the base's."""
        count, config = shape[0], stock_config(self._found.config)
        if shape[1:] == made[1:] and made[0] == getattr(config, "vocab_size", None):
            return {"vocab_size": count}
        if shape[1:] == made[1:] and made[0] == getattr(config, "num_labels", None):
            labels = {str(number): f"LABEL_{number}" for number in range(count)}
            return {"id2label": labels, "label2id": {v: int(k) for k, v in labels.items()}}
        raise InputError(
            f"{self._adapter.folder}: {name} has the shape {shape}, by the base's config.json it "
            f"is {made}"
        )


def _kind(tensor: Stored, dtype: str | None) -> str:
    """Return the dtype to store a tensor as; numbers that are no weights stay as they are."""
    if tensor.dtype not in SIZES:
        return tensor.dtype
    return dtype or ("F32" if tensor.dtype == "F64" else tensor.dtype)


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return a config whose sections, where they say a dtype, say this one."""
    return {
        key: _with_dtype(value, dtype)
        if isinstance(value, Mapping)
        else (dtype if key in ("dtype", "torch_dtype") else value)
        for key, value in config.items()
    }
