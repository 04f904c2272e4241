"""SanModel: the tuner that PEFT drives. It wraps the targets, then joins them to each other."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import register_peft_method
from torch import nn

from san_llm.errors import InputError, did_you_mean
from san_llm.san.config import SanConfig
from san_llm.san.graph import (
    EMBEDDING,
    FAMILIES,
    TARGETS,
    Link,
    check_family,
    linear_shapes,
    trains_gamma,
    wire,
)
from san_llm.san.layer import Feed, SanEmbedding, SanLayer, SanLinear

# Families whose stock config can hold a bias on all seven projections, so that a shift can merge.
BIAS_FLAGS = {"llama": {"attention_bias": "self_attn", "mlp_bias": "mlp"}}


class SanModel(BaseTuner):
    """A Llama, Mistral or Qwen2 model with SAN adapters (arXiv:2409.06706).

    Made by ``get_peft_model(model, SanConfig(...))`` or ``PeftModel.from_pretrained``.
    """

    prefix = "san_"
    tuner_layer_cls = SanLayer
    target_module_mapping: ClassVar = {family: list(TARGETS) for family in FAMILIES}

    def _prepare_adapter_config(
        self, peft_config: SanConfig, model_config: dict[str, Any]
    ) -> SanConfig:
        check_family(model_config.get("model_type"))
        if peft_config.shift and model_config["model_type"] not in BIAS_FLAGS:
            import warnings

            warnings.warn(
                f"shift=True: a stock {model_config['model_type']} cannot hold the merged biases, "
                f"so this adapter will never merge (only {', '.join(BIAS_FLAGS)} can)",
                stacklevel=2,
            )
        return peft_config

    def _prepare_model(self, peft_config: SanConfig, model: nn.Module) -> None:
        keep_4bit_layout(model)

    @staticmethod
    def _check_target_module_exists(peft_config: SanConfig, key: str) -> bool:
        if peft_config.adapt_embedding and (key == EMBEDDING or key.endswith(f".{EMBEDDING}")):
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
        names = [
            name
            for name, module in model.named_modules()
            if name
            and not isinstance(module, nn.ParameterDict)
            and self._check_target_module_exists(config, name)
        ]
        self._check_every_target_matched(config, names)
        links, anteriors = wire(names, tuple(config.links), config.mode)
        self._anteriors = anteriors
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        self._join(model, adapter_name, links)

    def _check_every_target_matched(self, config: SanConfig, names: list[str]) -> None:
        if isinstance(config.target_modules, str):
            stray = [name for name in names if name.rsplit(".", 1)[-1] not in (*TARGETS, EMBEDDING)]
            if stray:
                raise InputError(
                    f"target_modules {config.target_modules!r} also matches {stray[0]!r}, which is "
                    f"none of {', '.join(TARGETS)}"
                )
            if not names:
                raise InputError(f"target_modules {config.target_modules!r} matches no module")
            return
        for target in config.target_modules or []:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise InputError(
                    f"target module {target!r} matches nothing in this model"
                    f"{did_you_mean(target, names)}"
                )

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
        layer = target if isinstance(target, SanLayer) else self._wrap(target, current_key)
        linear = isinstance(layer, SanLinear)
        layer.update_layer(
            adapter_name,
            mode=peft_config.mode,
            gamma=trains_gamma(current_key, peft_config.mode, self._anteriors),
            beta=peft_config.shift and linear,
        )
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    @staticmethod
    def _wrap(target: nn.Module, name: str) -> SanLayer:
        if isinstance(target, nn.Embedding):
            return SanEmbedding(target)
        if isinstance(target, nn.Linear):  # bitsandbytes' layers are Linears too
            return SanLinear(target)
        raise InputError(f"{name} is a {type(target).__name__}: SAN adapts Linear layers")

    def _join(
        self, model: nn.Module, adapter_name: str, links: dict[str, tuple[str, Link]]
    ) -> None:
        config = self.get_model_config(model)
        shapes, heads = linear_shapes(config), config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        for name, (anterior_name, link) in links.items():
            posterior: Any = model.get_submodule(name)
            anterior: Any = model.get_submodule(anterior_name)
            repeat = link.how == "repeat kv heads"
            groups = shapes["q_proj"][0] // shapes["v_proj"][0] if repeat else 1
            posterior.san_feed[adapter_name] = Feed(anterior, groups, head_dim)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        names = adapter_names or self.active_adapters
        shifted = merge and any(self.peft_config[name].shift for name in names)
        if shifted:
            family = self.get_model_config(self.model)["model_type"]
            if family not in BIAS_FLAGS:
                raise InputError(
                    f"a stock {family} cannot hold the biases that a shift merges into"
                )
        model: nn.Module = super()._unload_and_optionally_merge(
            merge, progressbar, safe_merge, adapter_names
        )
        if shifted:
            hold_biases(model)
        return model


def hold_biases(model: Any) -> None:
    """Let a stock config load the merged biases: set its flags, fill absent biases with zeros."""
    for flag, parent in BIAS_FLAGS[model.config.model_type].items():
        linears = [
            module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and f".{parent}." in f".{name}"
        ]
        if any(linear.bias is not None for linear in linears):
            setattr(model.config, flag, True)
            for linear in linears:
                if linear.bias is None:
                    zeros = torch.zeros(linear.out_features, device=linear.weight.device)
                    like = linear.weight.dtype if linear.weight.is_floating_point() else zeros.dtype
                    linear.bias = nn.Parameter(zeros.to(like), requires_grad=False)


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
