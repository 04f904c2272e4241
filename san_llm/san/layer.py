"""One adapted module, in the plain form ``y = gamma * (W @ (s * x) + b) + beta``.

A layer owns its gamma. Its synapse scale is not a parameter: the layer keeps the *module* that
feeds it and reads that module's gamma at forward time. It never keeps the Parameter, which PEFT
replaces when it casts adapters or loads them on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn

from san_llm.errors import SanError
from san_llm.san.carriers import merged_bias, merged_weight


def scaled(features: Tensor, scale: Tensor) -> Tensor:
    """Return ``features * scale`` in the features' dtype, multiplied in fp32 or wider.

    Args:
        features: (..., d), in any floating dtype.
        scale: (d,). In bf16 a scale near 1 has steps of 1/128: casting it first would lose what was
            learned, so the product is rounded instead.
    """
    return (features * scale.to(features.device)).to(features.dtype)


def _bias_dtype(base: nn.Module, weight: Tensor) -> torch.dtype:
    """Return the dtype a merged bias is kept in: the old bias's, else that of the arithmetic."""
    if isinstance(base.bias, Tensor):
        return base.bias.dtype
    if weight.is_floating_point():
        return weight.dtype
    computed = getattr(base, "compute_dtype", None)  # bitsandbytes' 4-bit layers have one
    return computed if isinstance(computed, torch.dtype) else torch.float32


class Feed(NamedTuple):
    """Where a synapse scale comes from.

    Attributes:
        anterior: The layer that owns gamma.
        groups: Query heads per kv head where gamma passes through attention, else 1.
        head_dim: Channels of one head; a kv head's channels are repeated together.
    """

    anterior: SanLayer
    groups: int
    head_dim: int

    def scale(self, adapter: str) -> Tensor:
        """Return s (d_in,) of the posterior: the anterior's gamma, repeated where heads share."""
        gamma: Tensor = self.anterior.san_gamma[adapter]
        if self.groups == 1:
            return gamma
        heads = gamma.view(-1, self.head_dim)  # (kv_heads, head_dim)
        return heads.repeat_interleave(self.groups, dim=0).flatten()


class SanLayer(nn.Module, BaseTunerLayer):
    """What an adapted Linear and an adapted embedding share: vectors, links, merging.

    Shapes: ``san_gamma[adapter]`` and ``san_beta[adapter]`` are (d_out,).
    """

    adapter_layer_names = ("san_gamma", "san_beta")
    # Plain dicts: a module held in one is hidden from nn.Module, so that a shared gamma is
    # registered, saved and counted once, by the layer that owns it.
    other_param_names = ("san_mode", "san_feed")

    # PEFT is untyped; this is what is used of its layer.
    get_base_layer: Callable[[], Any]
    get_base_weight: Callable[[], Tensor]
    set_base_weight: Callable[[Tensor], None]
    active_adapters: list[str]

    def __init__(self, base_layer: nn.Module, d_out: int) -> None:
        """Wrap the frozen ``base_layer``; adapters join through ``update_layer``."""
        super().__init__()
        self.base_layer = base_layer
        self.d_out = d_out
        self.san_gamma = nn.ParameterDict()
        self.san_beta = nn.ParameterDict()
        self.san_mode: dict[str, str] = {}
        self.san_feed: dict[str, Feed] = {}
        self.merged_adapters: list[str] = []
        self.quantization_backend = resolve_quantization_backend(base_layer)
        self._unmerged: dict[str, Any] | None = None

    def update_layer(self, adapter_name: str, mode: str, gamma: bool, beta: bool) -> None:
        """Give this layer the vectors of one more adapter, at their start values.

        Args:
            adapter_name: The adapter.
            mode: ``both``, ``neuron`` or ``synapse``.
            gamma: Train a neuron scale here (it starts at 1).
            beta: Train a neuron shift here (it starts at 0).
        """
        weight = self.get_base_layer().weight
        # fp32 whatever the base's dtype: bf16 cannot hold small steps around 1.
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.san_mode[adapter_name] = mode
        if gamma:
            ones = torch.ones(self.d_out, dtype=dtype, device=weight.device)
            self.san_gamma[adapter_name] = nn.Parameter(ones)
        if beta:
            zeros = torch.zeros(self.d_out, dtype=dtype, device=weight.device)
            self.san_beta[adapter_name] = nn.Parameter(zeros)

    def neuron_scale(self, adapter: str) -> Tensor | None:
        """Return the gamma (d_out,) that scales this layer's own features, or None for 1."""
        if adapter not in self.san_gamma or self.san_mode[adapter] == "synapse":
            return None
        gamma: Tensor = self.san_gamma[adapter]
        return gamma

    def neuron_shift(self, adapter: str) -> Tensor | None:
        """Return beta (d_out,), or None for 0."""
        beta: Tensor | None = self.san_beta.get(adapter)
        return beta

    def synapse_scale(self, adapter: str) -> Tensor | None:
        """Return s (d_in,), read from the layer that feeds this one, or None for 1."""
        return self.san_feed[adapter].scale(adapter) if adapter in self.san_feed else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the adapted features (..., d_out) of x (..., d_in), or of token ids.

        With several active adapters the scales multiply, in the order of activation.
        """
        if self.disable_adapters or self.merged:
            y: Tensor = self.base_layer(x, *args, **kwargs)
            return y
        active = [adapter for adapter in self.active_adapters if adapter in self.san_mode]
        for adapter in active:
            s = self.synapse_scale(adapter)
            if s is not None:
                x = scaled(x, s)
        y = self.base_layer(x, *args, **kwargs)
        for adapter in active:
            gamma, beta = self.neuron_scale(adapter), self.neuron_shift(adapter)
            if gamma is not None:
                y = scaled(y, gamma)
            if beta is not None:
                y = (y + beta.to(y.device)).to(y.dtype)
        return y

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off; switching a merged layer off restores its base weight."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    def merged_tensors(self, adapters: list[str]) -> tuple[Tensor, Tensor | None]:
        """Return ``(W*, b*)`` of the base layer with these adapters, in fp32 or wider.

        A quantized base is dequantized first. ``W*`` has the weight's shape.
        """
        base = self.get_base_layer()
        weight = self.get_base_weight().detach()
        weight = weight if weight.dtype == torch.float64 else weight.float()
        bias = getattr(base, "bias", None)
        bias = None if bias is None else bias.detach().to(weight.dtype)
        for adapter in adapters:
            gamma, s = self.neuron_scale(adapter), self.synapse_scale(adapter)
            beta = self.neuron_shift(adapter)
            gamma, s, beta = (
                None if vector is None else vector.detach().to(weight.device)
                for vector in (gamma, s, beta)
            )
            weight = self._merge_weight(weight, gamma, s)
            bias = merged_bias(bias, gamma, beta)
        return weight, bias

    def _merge_weight(self, weight: Tensor, gamma: Tensor | None, s: Tensor | None) -> Tensor:
        return merged_weight(weight, gamma, s)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the adapters into the base layer; a quantized weight is quantized again.

        Args:
            safe_merge: Refuse a result that is not finite, before anything is changed.
            adapter_names: The adapters, default: the active ones.

        Raises:
            SanError: with ``safe_merge`` when a merged number is not finite.
        """
        self._fold(safe_merge, adapter_names, keep=True)

    def _fold(self, safe_merge: bool, adapter_names: list[str] | None, keep: bool) -> None:
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names or [] if name in self.san_mode]
        if not names:
            return
        base = self.get_base_layer()
        weight, bias = self.merged_tensors(names)
        if safe_merge and not (
            torch.isfinite(weight).all() and (bias is None or torch.isfinite(bias).all())
        ):
            raise SanError(f"merging {', '.join(names)} gives numbers that are not finite")
        old = base.weight
        if keep and self._unmerged is None:
            state = getattr(base, "state", None)  # bitsandbytes keeps int8 scales here
            self._unmerged = {
                "weight": old,
                "attributes": dict(vars(old)),
                "bias": getattr(base, "bias", None),
                "state": None if state is None else (state.CB, state.SCB),
            }
        # A new Parameter, never the old one's data: unmerging puts the old one back, bit for bit,
        # and a weight that another module is tied to stays as it is.
        if self.quantization_backend is None:
            base.weight = nn.Parameter(weight.to(old.dtype), requires_grad=False)
        else:
            self.set_base_weight(weight)
        if bias is not None:
            base.bias = nn.Parameter(bias.to(_bias_dtype(base, old)), requires_grad=False)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the base layer back as it was before the first merge, bit for bit."""
        if self._unmerged is None:
            return
        base = self.get_base_layer()
        weight = self._unmerged["weight"]
        # Requantizing marks the old Parameter as not yet quantized: undo that as well.
        vars(weight).clear()
        vars(weight).update(self._unmerged["attributes"])
        base.weight = weight
        if hasattr(base, "bias"):
            base.bias = self._unmerged["bias"]
        if self._unmerged["state"] is not None:
            base.state.CB, base.state.SCB = self._unmerged["state"]
        self._unmerged = None
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the base layer, with the adapters folded in if ``merge``; nothing is kept."""
        if merge:
            self._fold(safe_merge, adapter_names, keep=False)
        elif self.merged:
            self.unmerge()
        self._unmerged = None
        base: nn.Module = self.get_base_layer()
        return base

    def __repr__(self) -> str:
        """Show the wrapped layer under a name that says what wraps it."""
        return "san." + super().__repr__()


class SanLinear(SanLayer):
    """A target Linear, full-precision or quantized by bitsandbytes: W is (d_out, d_in)."""

    def __init__(self, base_layer: nn.Linear) -> None:
        """Wrap a Linear."""
        super().__init__(base_layer, d_out=base_layer.out_features)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features


class SanEmbedding(SanLayer):
    """The token embedding with a scale on its features: W is (vocabulary, hidden)."""

    def __init__(self, base_layer: nn.Embedding) -> None:
        """Wrap an Embedding."""
        super().__init__(base_layer, d_out=base_layer.embedding_dim)

    def _merge_weight(self, weight: Tensor, gamma: Tensor | None, s: Tensor | None) -> Tensor:
        # Features are the columns of an embedding matrix, not its rows.
        return merged_weight(weight, None, gamma)
