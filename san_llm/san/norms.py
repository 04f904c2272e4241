"""Norms that are trained beside the scales: a change of their weight and bias, saved as vectors.

A change is added to the base's own numbers and starts at 0, so that it is kept in fp32 whatever the
base's dtype: in bf16 a norm's weight near 1 has steps of 1/128, in which steps of 1e-3 are lost.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from san_llm.errors import InputError
from san_llm.measure.rooted import language_model, reads_pictures_with_text
from san_llm.measure.units import path_of
from san_llm.san.layer import SanLayer
from san_llm.san.node import Norm
from san_llm.san.options import Options

KINDS = ("weight", "bias")
# On a GPU these take features of their weight's dtype alone, on a CPU narrower ones with the bits
# of their own dtype; transformers' own widen what they read.
_ONE_DTYPE = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


class SanNorm(SanLayer):
    """A norm whose weight and bias, (d,) each, are the base's plus what an adapter adds.

    Several active adapters add up.
    """

    adapter_layer_names = ("san_weight", "san_bias")

    def __init__(self, base_layer: nn.Module) -> None:
        """Wrap a norm."""
        super().__init__(base_layer, base_layer.weight.numel())  # type: ignore[operator]
        self.san_weight = nn.ParameterDict()
        self.san_bias = nn.ParameterDict()

    def __getattr__(self, name: str) -> Any:
        """Return what a model's code reads of a norm, such as its epsilon."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def update_layer(
        self, adapter_name: str, options: Options, gamma: bool, beta: bool, sigma: bool
    ) -> None:
        """Give the norm the vectors of one more adapter, which start at 0.

        Args:
            adapter_name: The adapter.
            options: What kind of adapter it is.
            gamma: A norm has no scale of its own.
            beta: Nor a shift beside its bias.
            sigma: Nor columns.
        """
        self.san_options[adapter_name] = options
        for kind, changes in self._changes().items():
            own = getattr(self.base_layer, kind, None)
            if own is not None:
                dtype = torch.float64 if own.dtype == torch.float64 else torch.float32
                changes[adapter_name] = nn.Parameter(torch.zeros_like(own, dtype=dtype))

    def _changes(self) -> dict[str, nn.ParameterDict]:
        return {"weight": self.san_weight, "bias": self.san_bias}

    def _with(self, adapters: list[str]) -> dict[str, Tensor]:
        """Return the weight and bias, where there is one, with some adapters, in fp32 or wider."""
        base, made = self.get_base_layer(), {}
        for kind, changes in self._changes().items():
            own = getattr(base, kind, None)
            if own is not None:
                made[kind] = own if own.dtype == torch.float64 else own.float()
                for adapter in adapters:
                    made[kind] = made[kind] + changes[adapter].to(own.device)
        return made

    @property
    def weight(self) -> Tensor:
        """The weight that the next forward multiplies by."""
        active = self.working_adapters()
        own: Tensor = self.get_base_layer().weight
        return self._with(active)["weight"] if active else own

    @property
    def bias(self) -> Tensor | None:
        """The bias that the next forward adds."""
        active = self.working_adapters()
        own: Tensor | None = getattr(self.get_base_layer(), "bias", None)
        return self._with(active).get("bias") if active else own

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the normalized x in its dtype; its shape is any that the base reads."""
        active = self.working_adapters()
        if not active:
            y: Tensor = self.base_layer(x, *args, **kwargs)
            return y
        tensors = self._with(active)
        widened = isinstance(self.base_layer, _ONE_DTYPE) and x.device.type != "cpu"
        read = x.to(tensors["weight"].dtype) if widened else x
        y = functional_call(self.base_layer, tensors, (read, *args), kwargs)
        return y.to(x.dtype)

    def merged_tensors(self, adapters: list[str]) -> tuple[Tensor, Tensor | None]:
        """Return the weight and the bias with these adapters, in fp32 or wider."""
        made = {kind: tensor.detach() for kind, tensor in self._with(adapters).items()}
        return made["weight"], made.get("bias")


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm with a weight, and perhaps a bias, for each channel."""
    if isinstance(module, SanNorm):
        return True
    own = dict(module.named_parameters())
    vectors = (
        "weight" in own and own.keys() <= set(KINDS) and all(p.dim() == 1 for p in own.values())
    )
    return vectors and "norm" in type(module).__name__.lower()


def norms_of(model: Any, adapted: Iterable[str]) -> tuple[Norm, ...]:
    """Return the norms that are trained beside some adapted modules, in the model's order.

    Those of their blocks, and those outside of all blocks, but for what belongs to a head or to
    another part than the language model.

    Args:
        model: The model, with numbers or without, adapted or not.
        adapted: The full names of the adapted modules.

    Raises:
        InputError: when there is none.
    """
    blocks = {path_of(name) for name in adapted} - {""}
    config = getattr(model, "config", None)
    if config is not None and reads_pictures_with_text(config):
        root = language_model(model)
    else:
        root = getattr(model, "base_model_prefix", "")
        root = root if hasattr(model, root) else ""
    root = f"{root}." if root else ""
    found = tuple(
        Norm(name, sum(p.numel() for p in _base(module).parameters()))
        for name, module in model.named_modules()
        if not name.endswith(".base_layer")
        and is_norm(module)
        and (path_of(name) in blocks or (not path_of(name) and name.startswith(root)))
    )
    if not found:
        raise InputError(
            f"train_norms: {type(model).__name__} has no norm with a weight for each channel "
            "in the blocks that are adapted, nor behind them"
        )
    return found


def _base(module: nn.Module) -> nn.Module:
    base: nn.Module = module.get_base_layer() if isinstance(module, SanNorm) else module
    return base
