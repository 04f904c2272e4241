"""A mixture's experts, adapted: a gamma for each of them, which the router knows nothing of.

Every expert computes ``down(act(gate x) * (up x))``. Its gamma of up is the synapse scale of its
down, exactly, since the product is linear in up; what feeds them all scales their common input.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from san_llm.architectures.decoders import DOWN, GATE_UP
from san_llm.measure.experts import GATES, expert_sizes, gate_of
from san_llm.ops.experts import experts
from san_llm.san.formulas import expert_factors, inner_scale
from san_llm.san.layer import SanLayer
from san_llm.san.options import Options


class SanExperts(SanLayer):
    """Experts held as one: the weights of gate and up are (E, 2 i, d), those of down (E, d, i).

    ``san_gamma[adapter]`` is (E, 2 i + d): in each row an expert's gate, up and down.
    """

    def __init__(self, base_layer: Any) -> None:
        """Wrap a module of experts."""
        d_out, d_in, self.experts = expert_sizes(base_layer)
        super().__init__(base_layer, d_out, d_in)
        self.inside = (d_out - d_in) // 2
        gate = gate_of(base_layer.act_fn)
        self.gelu = GATES[gate] if gate else None  # None: an activation that has no lean form

    def get_base_weight(self) -> Tensor:
        """Return one of the weights, whose device is that of the other."""
        weight: Tensor = getattr(self.get_base_layer(), DOWN).data
        return weight

    def update_layer(
        self, adapter_name: str, options: Options, gamma: bool, beta: bool, sigma: bool
    ) -> None:
        """Give the experts the gammas of one more adapter, which start at 1.

        Args:
            adapter_name: The adapter.
            options: What kind of adapter it is.
            gamma: Whether there are any: in mode ``synapse`` the experts only read.
            beta: Experts have no shift.
            sigma: Nor column scales of their own.
        """
        weight = self.get_base_weight()
        self.san_options[adapter_name] = options
        if gamma:
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            start = torch.ones(self.experts, self.d_out, dtype=dtype, device=weight.device)
            self.san_gamma[adapter_name] = nn.Parameter(start)

    def inner_scale(self, adapter: str) -> Tensor | None:
        """Return s of each expert's down, (E, i), which is the gamma of its up; or None for 1."""
        options, gamma = self.san_options[adapter], self.san_gamma.get(adapter)
        own: Tensor | None = inner_scale(gamma, self.d_in, options.mode, options.kinds)
        return own

    def _of(self, adapters: list[str]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return what the columns, the rows and down's columns are multiplied by."""
        kinds = (self.synapse_scale, self.row_scale, self.inner_scale)
        vectors = [[v for v in map(kind, adapters) if v is not None] for kind in kinds]
        columns, rows, inner = (prod(some[1:], start=some[0]) if some else None for some in vectors)
        return columns, rows, inner

    def gelu_of(self, adapters: list[str]) -> bool | None:
        """Return which activation these adapters' lean form computes; None in the plain form."""
        return self.gelu if len(adapters) == 1 and self.san_options[adapters[0]].lean else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what a router's choice makes of x (tokens, d); see ``ops.experts``."""
        active = self.working_adapters()
        if not active:
            y: Tensor = self.base_layer(x, *args, **kwargs)
            return y
        index, weights = (*args, *kwargs.values())
        columns, rows, inner = self._of(active)
        base = self.get_base_layer()
        wide, narrow = getattr(base, GATE_UP), getattr(base, DOWN)
        gelu = self.gelu_of(active)
        return experts(
            *(wide, narrow, base.act_fn, x, index, weights, columns, rows, inner), gelu=gelu
        )

    def merged_tensors(self, adapters: list[str]) -> tuple[Tensor, Tensor]:
        """Return the weights of gate and up, and those of down, with these adapters, in fp32.

        In fp64 where they are; each expert's by its own gamma.
        """
        base = self.get_base_layer()
        columns, rows, inner = (None if v is None else v.detach() for v in self._of(adapters))
        scales = expert_factors(rows, columns, inner, self.d_in)
        merged = []
        for name, factors in scales.items():
            weight = getattr(base, name).detach()
            weight = weight if weight.dtype == torch.float64 else weight.float()
            for factor in factors:
                weight = weight if factor is None else weight * factor
            merged.append(weight)
        return merged[0], merged[1]

    def put_merged(self, weight: Tensor, bias: Tensor | None, keep: bool) -> None:
        """Put the weights of gate and up, and those of down, into the experts."""
        base = self.get_base_layer()
        old = {name: getattr(base, name) for name in (GATE_UP, DOWN)}
        if keep:
            self._unmerged = old
        for (name, before), tensor in zip(old.items(), (weight, bias), strict=True):
            assert tensor is not None
            setattr(base, name, nn.Parameter(tensor.to(before.dtype), requires_grad=False))

    def unmerge(self) -> None:
        """Put the experts back as they were before the first merge, bit for bit."""
        for name, weight in (self._unmerged or {}).items():
            setattr(self.get_base_layer(), name, weight)
        self._unmerged = None
        self._merged_gamma.clear()
        self.merged_adapters.clear()
