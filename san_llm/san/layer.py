"""One adapted module, in the plain form ``y = gamma * (W @ (s * x) + b) + beta``.

A layer owns its gamma. Its synapse scale is not a parameter: the layer keeps the *module* that
feeds it and reads that module's gamma at forward time. It never keeps the Parameter, which PEFT
replaces when it casts adapters or loads them on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.func import functional_call

from san_llm.architectures.entry import Carry
from san_llm.errors import SanError
from san_llm.ops.scale import Scaled, scaled
from san_llm.san.formulas import (
    carried,
    merged_bias,
    merged_weight,
    row_norms,
    scales,
    squared_row_norms,
)
from san_llm.san.merging import bias_dtype
from san_llm.san.options import Options
from san_llm.san.rows import Projected, wide_rows


class Fold(Protocol):
    """Scaling that a neighbour takes over from a layer, where it can; see ``san.lean``."""

    def stands(self) -> bool:
        """Whether the neighbour does so in this forward."""

    def columns_left(self) -> Tensor | None:
        """Return what the posterior still multiplies its input by, (d_in,), or None for 1."""

    def rows_left(self, layer: SanLayer, /) -> Tensor | None:
        """Return what a layer still multiplies its output by, (d_out,), or None for 1."""


class Feed(NamedTuple):
    """Where a synapse scale comes from.

    Attributes:
        anterior: The layer that owns gamma.
        carry: Which of its channels go where; a kv head's are repeated together.
    """

    anterior: SanLayer
    carry: Carry

    def scale(self, adapter: str) -> Tensor | None:
        """Return s (d_in,) of the posterior: the anterior's gamma, repeated where heads share."""
        gamma = self.anterior.gamma(adapter)
        return None if gamma is None else carried(gamma, self.carry)


class SanLayer(nn.Module, BaseTunerLayer):
    """What an adapted Linear, convolution and embedding share: vectors, links, merging.

    Attributes:
        axes: Where the weight has its rows and its columns.
        channels: The axis of the channels, in what the layer reads and writes.
        takes_matrices: Whether the low-rank carriers have their matrices here.

    Shapes: ``san_gamma[adapter]`` and ``san_beta[adapter]`` are (d_out,), ``san_sigma[adapter]``,
    a column scale of its own, is (d_in,). A, ``san_lora_A[adapter]``, has the shape of the weight
    with rank for d_out, and B is (d_out, rank), or (d_out, rank, 1, 1), as in PEFT's LoRA.
    """

    adapter_layer_names: tuple[str, ...] = (
        *("san_gamma", "san_sigma", "san_beta"),
        *("san_lora_A", "san_lora_B", "san_magnitude"),
    )
    # Plain dicts: a module held in one is hidden from nn.Module, so that a shared gamma is
    # registered, saved and counted once, by the layer that owns it.
    other_param_names = ("san_options", "san_feed")

    # PEFT is untyped; this is what is used of its layer.
    get_base_layer: Callable[[], Any]
    get_base_weight: Callable[[], Tensor]
    set_base_weight: Callable[[Tensor], None]
    active_adapters: list[str]

    axes: tuple[int, int] = (0, 1)
    channels: int = -1
    takes_matrices: bool = False

    def __init__(self, base_layer: nn.Module, d_out: int, d_in: int = 0) -> None:
        """Wrap the frozen ``base_layer``; adapters join through ``update_layer``."""
        super().__init__()
        self.base_layer = base_layer
        self.d_out, self.d_in = d_out, d_in
        self.san_gamma = nn.ParameterDict()
        self.san_sigma = nn.ParameterDict()
        self.san_beta = nn.ParameterDict()
        self.san_lora_A = nn.ParameterDict()
        self.san_lora_B = nn.ParameterDict()
        self.san_magnitude = nn.ParameterDict()
        self.san_options: dict[str, Options] = {}
        self.san_feed: dict[str, Feed] = {}
        # Who takes over a part of this layer's scaling in the lean form; see san.lean.
        self.columns_fold: Fold | None = None
        self.rows_fold: Fold | None = None
        self.merged_adapters: list[str] = []
        self.quantization_backend = resolve_quantization_backend(base_layer)
        self._unmerged: dict[str, Any] | None = None
        self._merged_gamma: dict[str, Tensor | None] = {}
        self._squared_norms: Tensor | None = None

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move an adapter to where the base is, at PEFT's request.

        PEFT's own also casts to the base's dtype: bf16 would round what was saved in fp32.
        """
        place = device or self.get_base_weight().device
        for name in self.adapter_layer_names:
            numbers = getattr(self, name)
            if adapter_name in numbers and "meta" not in (
                numbers[adapter_name].device.type,
                place.type,
            ):
                numbers[adapter_name] = numbers[adapter_name].to(place)

    def update_layer(
        self, adapter_name: str, options: Options, gamma: bool, beta: bool, sigma: bool
    ) -> None:
        """Give this layer the parameters of one more adapter, at their start values.

        Args:
            adapter_name: The adapter.
            options: What kind of adapter it is.
            gamma: Train a neuron scale here (it starts at 1; a magnitude at norm(W)).
            beta: Train a neuron shift here (it starts at 0).
            sigma: Train a column scale here (it starts at 1).
        """
        weight = self.get_base_layer().weight
        # fp32 whatever the base's dtype: bf16 cannot hold small steps around 1.
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        like: Any = {"dtype": dtype, "device": weight.device}
        self.san_options[adapter_name] = options
        if options.carrier == "scale":
            if gamma:
                self.san_gamma[adapter_name] = nn.Parameter(torch.ones(self.d_out, **like))
        else:
            places = self._places()
            a = torch.empty(options.rank, self.d_in, *places, **like)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # as nn.Linear, and so PEFT's LoRA
            b = torch.zeros(self.d_out, options.rank, *(1 for _ in places), **like)
            self.san_lora_A[adapter_name] = nn.Parameter(a)
            self.san_lora_B[adapter_name] = nn.Parameter(b)
            if options.carrier == "dora" and gamma:
                squares = self.squared_norms()
                self.san_magnitude[adapter_name] = nn.Parameter(row_norms(squares, squares)[0])
        if beta:
            self.san_beta[adapter_name] = nn.Parameter(torch.zeros(self.d_out, **like))
        if sigma:
            self.san_sigma[adapter_name] = nn.Parameter(torch.ones(self.d_in, **like))

    def _places(self) -> tuple[int, ...]:
        """Return the axes that the weight has behind its rows and columns: a kernel's."""
        return ()

    def _matrices(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return A (rank, d_in times the kernel's places) and B (d_out, rank)."""
        return self.san_lora_A[adapter].flatten(1), self.san_lora_B[adapter].flatten(1)

    def squared_norms(self) -> Tensor:
        """Return |W_i|^2 of each row of the base weight, (d_out,); computed once."""
        weight = self.get_base_layer().weight
        known = self._squared_norms
        if known is None or known.device != weight.device:
            # Normal tensors even when evaluated first: a later backward pass needs them.
            with torch.inference_mode(False), torch.no_grad():
                base = self.get_base_layer()
                squares = [(rows * rows).sum(-1) for rows in wide_rows(base, base.weight)]
                known = self._squared_norms = torch.cat(squares)
        return known

    def _wide_weight(self) -> Tensor:
        """Return W in fp32 or wider; a quantized one is dequantized."""
        weight: Tensor = self.get_base_weight().detach()
        return weight if weight.dtype == torch.float64 else weight.float()

    def norms(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return norm(W) and norm(W + c B A) of each row, (d_out,); A and B get its gradient."""
        a, b = self._matrices(adapter)
        base = self.get_base_layer()
        projected = Projected.apply(a, base, base.weight)
        c = self.san_options[adapter].scaling
        squares = self.squared_norms()
        pair: tuple[Tensor, Tensor] = row_norms(
            squares, squared_row_norms(squares, projected, a, b, c)
        )
        return pair

    def scales(self, adapter: str) -> tuple[Tensor | None, Tensor | None]:
        """Return ``(row scale, gamma)`` of an adapter, each (d_out,) or None for 1.

        The features are multiplied by the row scale; gamma is what the layer's readers propagate.
        See ``san.formulas`` for the table.
        """
        options = self.san_options[adapter]
        own = (self.san_magnitude if options.carrier == "dora" else self.san_gamma).get(adapter)
        # The norm is a constant in dora's backward pass (arXiv:2402.09353, section 4.3).
        constant = torch.no_grad if options.carrier == "dora" else nullcontext

        def norms() -> tuple[Tensor, Tensor]:
            with constant():
                return self.norms(adapter)

        pair: tuple[Tensor | None, Tensor | None] = scales(
            options.carrier, options.mode, own, norms
        )
        return pair

    def row_scale(self, adapter: str) -> Tensor | None:
        """Return what the features are multiplied by, (d_out,), or None for 1."""
        return self.scales(adapter)[0]

    def gamma(self, adapter: str) -> Tensor | None:
        """Return the neuron scale that is propagated, (d_out,), or None for 1."""
        if adapter in self._merged_gamma:  # W, which it may be a ratio to, is not here any more
            return self._merged_gamma[adapter]
        return self.scales(adapter)[1]

    def neuron_shift(self, adapter: str) -> Tensor | None:
        """Return beta (d_out,), or None for 0."""
        beta: Tensor | None = self.san_beta.get(adapter)
        return beta

    def synapse_scale(self, adapter: str) -> Tensor | None:
        """Return s (d_in,), its own or read from the layer that feeds this one, or None for 1."""
        own: Tensor | None = self.san_sigma.get(adapter)
        return self.san_feed[adapter].scale(adapter) if adapter in self.san_feed else own

    def working_adapters(self) -> list[str]:
        """Return the adapters that the next forward computes with, in order."""
        if self.disable_adapters or self.merged:
            return []
        return [adapter for adapter in self.active_adapters if adapter in self.san_options]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the adapted features (..., d_out) of x (..., d_in), or of token ids.

        With several active adapters the scales multiply, in the order of activation.
        """
        active = self.working_adapters()
        if not active:
            y: Tensor = self.base_layer(x, *args, **kwargs)
            return y
        if self.columns_fold is not None and self.columns_fold.stands():
            c = self.columns_fold.columns_left()
            x = x if c is None else Scaled.apply(x, c)
        else:
            for adapter in active:
                x = self._times(x, self.synapse_scale(adapter), adapter)
        y = self.base_layer(x, *args, **kwargs)
        rows = self.rows_fold if self.rows_fold is not None and self.rows_fold.stands() else None
        bias = getattr(self.base_layer, "bias", None)
        for adapter in active:
            beta = self.neuron_shift(adapter)
            row_scale = rows.rows_left(self) if rows else self.row_scale(adapter)
            if self.san_options[adapter].carrier == "scale":
                y = self._times(y, row_scale, adapter)
                bias = merged_bias(bias, row_scale, None)
            else:
                y = (y + self._low_rank(adapter, x)).to(y.dtype)
                if row_scale is not None:
                    # The row scale of a weight leaves the bias alone.
                    b = None if bias is None else self._by_channel(bias.to(y.dtype))
                    y = scaled(y if b is None else y - b, self._by_channel(row_scale))
                    y = y if b is None else y + b
            if beta is not None:
                y = (y + self._by_channel(beta.to(y.device))).to(y.dtype)
                bias = merged_bias(bias, None, beta)
        return y

    def _by_channel(self, vector: Tensor) -> Tensor:
        """Return a vector (d,) so that it stands along the channels of features."""
        return vector.reshape(-1, *(1,) * (-1 - self.channels))

    def _times(self, features: Tensor, scale: Tensor | None, adapter: str) -> Tensor:
        """Return features (..., d) times a scale (d,), or None for 1, in the adapter's form."""
        if scale is None or not self.san_options[adapter].lean:
            return scaled(features, scale)
        product: Tensor = Scaled.apply(features, scale.to(features.device))
        return product

    def _low_rank(self, adapter: str, x: Tensor) -> Tensor:
        """Return ``c B A x``, (..., d_out)."""
        options = self.san_options[adapter]
        a, b = self.san_lora_A[adapter], self.san_lora_B[adapter]
        dropped = F.dropout(x, options.dropout, self.training) if options.dropout else x
        return self._product(dropped.to(a.dtype), a, b) * options.scaling

    def _product(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return ``B A x`` for x (..., d_in)."""
        return F.linear(F.linear(x, a), b)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off; switching a merged layer off restores its base weight."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    def merged_tensors(self, adapters: list[str]) -> tuple[Tensor, Tensor | None]:
        """Return ``(W*, b*)`` of the base layer with these adapters, in fp32 or wider.

        A quantized base is dequantized first. ``W*`` has the weight's shape.
        """
        weight = self._wide_weight()
        bias = getattr(self.get_base_layer(), "bias", None)
        bias = None if bias is None else bias.detach().to(weight.dtype)
        columns: list[Tensor] = []
        for adapter in adapters:
            row_scale, beta = self.row_scale(adapter), self.neuron_shift(adapter)
            delta = None
            if adapter in self.san_lora_A:
                a, b = self._matrices(adapter)
                delta = (b @ a * self.san_options[adapter].scaling).detach().to(weight.device)
                delta = delta.view(weight.shape)
            s = self.synapse_scale(adapter)
            row_scale, beta, s = (
                None if vector is None else vector.detach().to(weight.device)
                for vector in (row_scale, beta, s)
            )
            weight = merged_weight(weight, row_scale, delta, None, axes=self.axes)
            bias = merged_bias(bias, row_scale if delta is None else None, beta)
            if s is not None:
                columns.append(s)
        for s in columns:  # last, so that every adapter's rows have seen the same weight
            weight = merged_weight(weight, None, None, s, axes=self.axes)
        return weight, bias

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge the adapters into the base layer; a quantized weight is quantized again.

        Args:
            safe_merge: Refuse a result that is not finite, before anything is changed.
            adapter_names: The adapters, default: the active ones.

        Raises:
            SanError: with ``safe_merge`` when a merged number is not finite.
        """
        self._merge_in(safe_merge, adapter_names, keep=True)

    def _merge_in(self, safe_merge: bool, adapter_names: list[str] | None, keep: bool) -> None:
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names or [] if name in self.san_options]
        if not names:
            return
        if self.merged:
            # All of them from W again: a low-rank scale is a ratio of norms to those of W.
            names = [*self.merged_adapters, *names]
            self.unmerge()
        merged = self.merged_tensors(names)
        if safe_merge and not all(t is None or torch.isfinite(t).all() for t in merged):
            raise SanError(f"merging {', '.join(names)} gives numbers that are not finite")
        for name in names:
            gamma = self.gamma(name)
            self._merged_gamma[name] = None if gamma is None else gamma.detach().clone()
        self.put_merged(*merged, keep)
        self.merged_adapters.extend(names)

    def put_merged(self, weight: Tensor, bias: Tensor | None, keep: bool) -> None:
        """Put what :meth:`merged_tensors` has made into the base layer.

        Args:
            weight: The first of both.
            bias: The second.
            keep: Keep what was there, so that :meth:`unmerge` can put it back.
        """
        base = self.get_base_layer()
        old = base.weight
        if self.takes_matrices:
            self.squared_norms()  # of W, for a later low-rank adapter: W* is here from now on
        if keep:
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
            base.bias = nn.Parameter(bias.to(bias_dtype(base, old)), requires_grad=False)

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
        self._merged_gamma.clear()
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the base layer, with the adapters merged in if ``merge``; nothing is kept."""
        if merge:
            self._merge_in(safe_merge, adapter_names, keep=False)
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

    takes_matrices = True

    def __init__(self, base_layer: nn.Linear) -> None:
        """Wrap a Linear."""
        super().__init__(base_layer, base_layer.out_features, base_layer.in_features)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features


class SanEmbedding(SanLayer):
    """The token embedding with a scale on its features: W is (vocabulary, hidden)."""

    axes = (1, 0)

    def __init__(self, base_layer: nn.Embedding) -> None:
        """Wrap an Embedding."""
        super().__init__(base_layer, d_out=base_layer.embedding_dim)


class SanTransposed(SanLayer):
    """GPT-2's ``Conv1D``, a Linear that keeps its weight the other way round: (d_in, d_out)."""

    axes = (1, 0)

    def __init__(self, base_layer: Any) -> None:
        """Wrap a ``Conv1D`` of transformers."""
        d_in, d_out = base_layer.weight.shape
        super().__init__(base_layer, d_out, d_in)


class SanConvolution(SanLayer):
    r"""A convolution over one or two axes: W is (d_out, d_in of a group, \*kernel).

    With several groups, as a depthwise one has, it has no columns to scale, and takes no matrices.
    """

    def __init__(self, base_layer: nn.Conv1d | nn.Conv2d) -> None:
        """Wrap a convolution."""
        super().__init__(base_layer, base_layer.out_channels, base_layer.in_channels)
        self.channels = -1 - len(base_layer.kernel_size)
        self.takes_matrices = base_layer.groups == 1

    def _places(self) -> tuple[int, ...]:
        return tuple(self.get_base_layer().kernel_size)

    def _product(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return ``B A x`` for x (..., d_in, *pixels): A is a kernel as the base's, B is 1 x 1."""
        base = self.get_base_layer()
        kernel = {"weight": a}
        if base.bias is not None:
            kernel["bias"] = a.new_zeros(len(a))
        z = functional_call(base, kernel, (x,))  # with its stride, padding and dilation
        return F.linear(z.movedim(self.channels, -1), b.flatten(1)).movedim(-1, self.channels)

    def _times(self, features: Tensor, scale: Tensor | None, adapter: str) -> Tensor:
        """Return features (..., d, *pixels) times a scale (d,), or None for 1."""
        product = super()._times(features.movedim(self.channels, -1), scale, adapter)
        return product.movedim(-1, self.channels)
