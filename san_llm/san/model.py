"""SanModel: the tuner that PEFT drives. It wraps the targets, then joins them to each other."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import register_peft_method
from torch import nn
from transformers.pytorch_utils import Conv1D

from san_llm.architectures.decoders import BIAS_FLAGS, EMBEDDING, FAMILIES
from san_llm.architectures.entry import Carry, Link
from san_llm.architectures.lookup import (
    carry,
    family_of,
    family_targets,
    is_known,
    table_of,
)
from san_llm.errors import InputError
from san_llm.measure.experts import expert_sizes, is_experts
from san_llm.measure.graph import read_graph
from san_llm.measure.probe import channels_out
from san_llm.san.config import SanConfig
from san_llm.san.experts import SanExperts
from san_llm.san.graph import check_matched, wire
from san_llm.san.layer import (
    Feed,
    SanConvolution,
    SanEmbedding,
    SanLayer,
    SanLinear,
    SanTransposed,
)
from san_llm.san.lean import fold, folds_of, unfold
from san_llm.san.measured import measured_graph, nodes, pattern
from san_llm.san.merging import hold_biases
from san_llm.san.node import Node, trains_gamma
from san_llm.san.norms import SanNorm, norms_of
from san_llm.san.options import check_wiring, options_of

# By the name of a target that something feeds: its anterior, the table's row, which channels.
_Links = dict[str, tuple[str, Link, Carry]]


class SanModel(BaseTuner):
    """A model of one of ``FAMILIES`` with SAN adapters (arXiv:2409.06706).

    Made by ``get_peft_model(model, SanConfig(...))`` or ``PeftModel.from_pretrained``.
    """

    prefix = "san_"
    tuner_layer_cls = SanLayer
    target_module_mapping: ClassVar = {
        model_type: list(family.targets) for model_type, family in FAMILIES.items()
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Adapt a model; the arguments are PEFT's."""
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_pre_hook(_check_vectors)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT drops this argument in silence where a tuner does not look at it.
        if kwargs.get("adapter_names") is not None:
            raise InputError(
                "adapter_names: SAN runs one choice of adapters on a whole batch; choose it with "
                "set_adapter and run the rows of each adapter as a batch of their own"
            )
        yield

    def _prepare_adapter_config(
        self, peft_config: SanConfig, model_config: dict[str, Any]
    ) -> SanConfig:
        return peft_config

    def _prepare_model(self, peft_config: SanConfig, model: nn.Module) -> None:
        keep_4bit_layout(model)

    @staticmethod
    def _check_target_module_exists(peft_config: SanConfig, key: str) -> bool:
        return key in peft_config.norms or SanModel._is_target(peft_config, key)

    @staticmethod
    def _is_target(peft_config: SanConfig, key: str) -> bool:
        if (
            peft_config.graph is None
            and peft_config.adapt_embedding
            and (key == EMBEDDING or key.endswith(f".{EMBEDDING}"))
        ):
            return True
        return bool(check_target_module_exists(peft_config, key))

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Wrap the targets of ``adapter_name`` and link them.

        Runs for the first adapter, for ``add_adapter`` and for ``inject_adapter_in_model`` alike.
        ``state_dict`` is not needed: a SanConfig names its targets, and a module that only reads a
        neighbour's gamma has no key of its own.

        Raises:
            InputError: when a target matches no module of the model.
        """
        config = self.peft_config[adapter_name]
        sizes = self.get_model_config(model)
        model_type = sizes.get("model_type")
        check_wiring(options_of(config), model_type)
        if config.graph is None and is_known(model_type):
            names, links = self._by_table(model, config, model_type)
        else:
            names, links = self._by_measurement(model, config)
        if config.train_norms:
            config.norms = frozenset(norm.name for norm in norms_of(model, names))
            _check_norms(config)
        kinds = options_of(config).kinds
        anteriors = {anterior for anterior, _, _ in links.values()}
        if config.mode == "synapse" and not anteriors and not config.shift:
            raise InputError(
                f"mode 'synapse' trains nothing here: none of the links {', '.join(kinds)} "
                "joins two targets"
            )
        self._anteriors = anteriors
        # PEFT copies modules to save: with a fold on one, the layers it reads would come along.
        unfold(model)
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
            if model_type not in BIAS_FLAGS and (name := _without_bias(model, [adapter_name])):
                warnings.warn(
                    f"shift=True: {name} has no bias, and a stock {model_type} cannot hold the one "
                    "that its shift merges into, so this adapter will never merge; leave what has "
                    "none out of target_modules",
                    stacklevel=2,
                )
            for name, (anterior_name, _, carried) in links.items():
                posterior: Any = model.get_submodule(name)
                anterior: Any = model.get_submodule(anterior_name)
                posterior.san_feed[adapter_name] = Feed(anterior, carried)
        finally:
            # Of a model for pictures with text the blocks are its language model's.
            blocks = (sizes.get("text_config") or sizes).get("model_type")
            if is_known(blocks):
                fold(model, folds_of(model, FAMILIES[blocks]))
            elif config.graph is not None:
                fold(model, read_graph(config.graph, "graph").folds)

    def _by_table(
        self, model: nn.Module, config: SanConfig, model_type: str
    ) -> tuple[list[str], _Links]:
        """Return the targets and what feeds them, in a family that the table knows."""
        config.target_modules = family_targets(config.target_modules, model_type)
        inside = tuple(
            f"{name}." for name, module in model.named_modules() if isinstance(module, SanLayer)
        )
        names = [
            name
            for name, _ in model.named_modules()
            if name and not name.startswith(inside) and self._is_target(config, name)
        ]
        self._check_every_target_matched(config, names, FAMILIES[model_type].targets)
        family = family_of(model_type, config.table)
        config.table = table_of(family)
        links, _ = wire(names, options_of(config).kinds, config.mode, family)
        sizes = self.get_model_config(model)
        return names, {name: (*link, carry(link[1], sizes, family)) for name, link in links.items()}

    def _by_measurement(self, model: nn.Module, config: SanConfig) -> tuple[list[str], _Links]:
        """Return the targets and what feeds them, in any model; the config gets the graph."""
        options = options_of(config)
        graph = measured_graph(model, options)
        self._nodes = {node.name: node for node in nodes(graph, options)}
        _check_modules(model, self._nodes.values())
        config.graph = graph.as_json()
        config.target_modules = pattern(self._nodes, dict(model.named_modules()))
        return list(self._nodes), {
            node.name: (node.anterior, node.link, node.carry)
            for node in self._nodes.values()
            if node.anterior and node.link and node.carry
        }

    def _check_every_target_matched(
        self, config: SanConfig, names: list[str], targets: tuple[str, ...]
    ) -> None:
        known = (*targets, EMBEDDING) if config.adapt_embedding else targets
        stray = [name for name in names if name.rsplit(".", 1)[-1] not in known]
        if stray:
            raise InputError(
                f"target_modules {config.target_modules!r} also matches {stray[0]!r}, which is "
                f"none of {', '.join(targets)}"
            )
        check_matched(config.target_modules, names)

    def _create_and_replace(
        self,
        peft_config: SanConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, SanLayer):
            layer = target
        elif current_key in peft_config.norms:
            layer = SanNorm(target)
        else:
            layer = self._wrap(target, current_key)
        reads = isinstance(layer, SanLinear)
        options = options_of(peft_config)
        node = self._nodes.get(current_key) if peft_config.graph is not None else None
        if (
            not layer.takes_matrices
        ):  # no product to adapt, or none with matrices: a vector in any carrier
            options = replace(options, carrier="scale")
        layer.update_layer(
            adapter_name,
            options,
            gamma=trains_gamma(current_key, peft_config.mode, self._anteriors),
            beta=node.beta if node else options.shift and reads,
            sigma=node.sigma if node else options.free and reads,
        )
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's own moves vectors still on the meta device over an 8-bit base and fails; ours are
        # already where the base is. And it asks a weight of what has none: experts, a connector.
        setattr(parent, child_name, new_module)

    @staticmethod
    def _wrap(target: nn.Module, name: str) -> SanLayer:
        if isinstance(target, nn.Embedding):
            return SanEmbedding(target)
        if isinstance(target, nn.Linear):  # bitsandbytes' layers are Linears too
            return SanLinear(target)
        if isinstance(target, Conv1D):
            return SanTransposed(target)
        if isinstance(target, (nn.Conv1d, nn.Conv2d)):
            return SanConvolution(target)
        if is_experts(target):
            return SanExperts(target)
        raise InputError(f"{name} is a {type(target).__name__}: SAN adapts Linear layers")

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        names = adapter_names or self.active_adapters
        shifted = merge and any(self.peft_config[name].shift for name in names)
        family = self.get_model_config(self.model).get("model_type")
        flagged = family in BIAS_FLAGS
        if shifted and not flagged and (bare := _without_bias(self.model, names)):
            raise InputError(
                f"a stock {family} cannot hold the biases that a shift merges into: {bare} has none"
            )
        model: nn.Module = super()._unload_and_optionally_merge(
            merge, progressbar, safe_merge, adapter_names
        )
        unfold(model)
        if shifted and flagged:
            hold_biases(model)
        return model


def _check_norms(config: SanConfig) -> None:
    """Refuse to save a norm whole whose change is saved."""
    for norm in sorted(config.norms):
        for name in config.modules_to_save or ():
            if norm.endswith(name):  # as PEFT reads it
                raise InputError(
                    f"modules_to_save: {name!r} names {norm}, which train_norms trains, too: "
                    "leave one of them out"
                )


def _without_bias(model: nn.Module, adapters: Iterable[str]) -> str | None:
    """Return the first module that an adapter shifts and that has no bias to merge that into."""
    bare = (
        name
        for name, layer in model.named_modules()
        if isinstance(layer, SanLayer)
        and any(adapter in layer.san_beta for adapter in adapters)
        and getattr(layer.get_base_layer(), "bias", None) is None
    )
    return next(bare, None)


def _check_modules(model: nn.Module, graph: Iterable[Node]) -> None:
    """Refuse a graph that is another model's, as an adapter can bring it along.

    Raises:
        InputError: naming the first module that is not there, or has another size.
    """
    modules = dict(model.named_modules())
    for node in graph:
        if node.name not in modules:
            raise InputError(
                f"the adapter was made for another model: its graph has a {node.name}, this "
                f"{type(model).__name__} has none"
            )
        module = modules[node.name]
        base: Any = module.get_base_layer() if isinstance(module, SanLayer) else module
        written = expert_sizes(base)[0] if is_experts(base) else channels_out(base)
        if written != node.d_out:
            raise InputError(
                f"the adapter was made for another model: {node.name} has {node.d_out} channels in "
                f"its graph, {written} here"
            )


def _check_vectors(
    model: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_unused: Any
) -> None:
    """Refuse the vectors of an adapter that was trained on another base, before they are loaded.

    PEFT drops those of blocks that a smaller base does not have in silence, and leaves those that
    a larger base needs besides at their start.

    Raises:
        InputError: naming the first vector that is left over, of another size, or not there.
    """
    mark = f".{SanModel.prefix}"
    vectors = {key: tensor for key, tensor in state.items() if mark in key}
    needed = {prefix + name: tensor for name, tensor in model.named_parameters() if mark in name}
    adapters = {key.rsplit(".", 1)[-1] for key in vectors}
    for key, tensor in vectors.items():
        if key not in needed:
            raise InputError(f"the adapter was trained on another base: nothing here takes {key}")
        if tensor.shape != needed[key].shape:
            raise InputError(
                f"the adapter was trained on another base: {key} has shape {list(tensor.shape)}, "
                f"this base needs {list(needed[key].shape)}"
            )
    for key in needed:
        if key.rsplit(".", 1)[-1] in adapters and key not in vectors:
            raise InputError(f"the adapter was trained on another base: it has no {key}")


def keep_4bit_layout(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for fast CPU inference.

    On CPUs with AVX512-BF16 one forward without gradient repacks every Linear4bit in place; after
    it the backward pass and ``dequantize_4bit`` read garbage without an error.

    Raises:
        InputError: when a weight is already repacked, naming it.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        state = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise InputError(
                f"the 4-bit weight of {name} was repacked for CPU inference by an earlier forward; "
                "gradients through it would be wrong. Load the model again and adapt it before "
                "the first forward"
            )
        module.support_avx512bf16_for_cpu = False


def _register() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if "SAN" not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name="san", config_cls=SanConfig, model_cls=SanModel)


_register()
