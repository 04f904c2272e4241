"""The lean form: SAN in about the memory of backpropagating through the frozen base.

The plain form keeps the input and the output of every scale for the backward pass. Identities move
scales to where their factors are kept anyway, or where none is needed:

- ``s * (w * n + b) = (s * w) * n + s * b``: readers of one norm that share s leave it to the norm's
  weight and bias (``NormFold``), whose backward pass recomputes n from the residual stream.
- Attention mixes tokens, never channels: v's row scale and o's synapse scale become one factor on
  the attention output (``ValueFold``), which attention keeps itself.
- Queries and keys are scaled as they are rotated (``RotaryFold``), which neither makes a copy of
  them nor keeps more than their Linear made. Without a rotation, of their row scales only the
  product acts: q takes both (``ProductFold``).
- SwiGLU and GeGLU are linear in up: gate's and up's row scales and down's column scale go into
  the activation (``GatedFold``), whose backward pass recomputes what the base's own would keep.
- So do fc1's row scale and fc2's column scale around an activation between the two
  (``ActivationFold``), whatever activation it is.

Where a model allows which is data: its family's table says it, or it was measured beside its graph
(``measure.folds``). A fold decides at every forward, by ``stands``, whether it applies: exactly one
adapter computes in all of its members, none of them is merged, and the scales are of a kind that
can move. Otherwise its members compute the plain form: so do readers of a norm, v and o under
``links: free``, where column scales are the targets' own. With a fold, a member's output alone is
not the plain layer's output; the block's is. Forward values and gradients are the plain form's up
to rounding, at gamma = 0 too: nothing is divided by gamma.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from san_llm.architectures.decoders import DOWN, GATE, UP, K, O, Q, V
from san_llm.architectures.entry import Family
from san_llm.measure.graph import MeasuredFold
from san_llm.measure.norms import LAYER, epsilon, scaled_norm
from san_llm.measure.rotation import rotates_halves, with_rotation
from san_llm.ops.scale import ScaledActivation, ScaledRotary, ScaledSwiGLU
from san_llm.san.formulas import carried
from san_llm.san.layer import SanLayer, SanLinear, SanTransposed

_SILU = (nn.SiLU, type(ACT2FN["silu"]))
_GELU = type(ACT2FN["gelu_pytorch_tanh"])
GELU_TANH = "gelu tanh"


def _together(members: tuple[SanLayer, ...]) -> str | None:
    """Return the one adapter, of lean form, that all members compute with now, or None."""
    adapter: str | None = None
    for member in members:
        working = member.working_adapters()
        if len(working) != 1 or working[0] != (adapter or working[0]):
            return None
        adapter = working[0]
        if not member.san_options[adapter].lean:
            return None
    return adapter


class _Fold:
    """Scales of some layers that are applied elsewhere; see ``layer.Fold``."""

    def adapter(self) -> str | None:
        """Return the adapter that it stands for in this forward, or None."""
        raise NotImplementedError

    def stands(self) -> bool:
        """Whether it takes its layers' scales over in this forward."""
        return self.adapter() is not None

    def columns_left(self) -> Tensor | None:
        """Return None: nothing is left for a reader."""
        return None

    def rows_left(self, _layer: SanLayer) -> Tensor | None:
        """Return None: nothing is left for a writer."""
        return None


class NormFold(_Fold):
    """Readers of one norm that share a synapse scale: it goes into the norm's weight and bias."""

    def __init__(self, norm: Any, readers: tuple[SanLayer, ...], how: str) -> None:
        """Hold a norm, which computes ``how`` (``measure.norms``), and all Linears that read it."""
        self.norm, self.readers, self.how = norm, readers, how

    def adapter(self) -> str | None:
        """Return the adapter that it stands for in this forward, or None."""
        adapter = _together(self.readers)
        if adapter is None or (self.how != LAYER and _drops_to_float32(self.norm)):
            return None
        feeds = [reader.san_feed.get(adapter) for reader in self.readers]
        return adapter if feeds[0] is not None and all(f == feeds[0] for f in feeds) else None

    def forward(self, x: Tensor) -> Tensor | None:
        """Return the normalized and scaled x (..., hidden), or None where the fold is off."""
        adapter = self.adapter()
        s = None if adapter is None else self.readers[0].synapse_scale(adapter)
        return None if s is None else scaled_norm(self.norm, self.how, x, s)


class ValueFold(_Fold):
    """v's row scale and o's synapse scale as one factor on the attention output."""

    def __init__(self, v: SanLayer, o: SanLayer) -> None:
        """Hold the two ends of an attention link."""
        self.v, self.o = v, o

    def adapter(self) -> str | None:
        """Return the adapter whose v's row scale o applies in this forward, or None."""
        adapter = _together((self.v, self.o))
        feed = None if adapter is None else self.o.san_feed.get(adapter)
        if adapter is None or feed is None or feed.anterior is not self.v:
            return None
        return adapter if _row_scale_moves(self.v, adapter) else None

    def columns_left(self) -> Tensor | None:
        """Return v's row scale times its gamma, repeated over heads that share them: (d_in,)."""
        adapter = self.o.working_adapters()[0]
        both = _product(*self.v.scales(adapter))
        return None if both is None else carried(both, self.o.san_feed[adapter].carry)


class _QueryKeyFold(_Fold):
    """q's and k's row scales."""

    def __init__(self, q: SanLayer, k: SanLayer) -> None:
        """Hold two Linears whose outputs meet in the attention's scores."""
        self.q, self.k = q, k

    def adapter(self) -> str | None:
        """Return the adapter that it stands for in this forward, or None."""
        adapter = _together((self.q, self.k))
        if adapter is None:
            return None
        return adapter if all(_row_scale_moves(x, adapter) for x in (self.q, self.k)) else None


class RotaryFold(_QueryKeyFold):
    """q's and k's row scales, in the rotary embedding that reads their outputs as they are."""

    def adapter(self) -> str | None:
        """Return the adapter that it stands for in this forward, or None."""
        return None if torch.compiler.is_compiling() else super().adapter()

    def rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys, scaled and rotated (batch, heads, tokens, head_dim)."""
        adapter = self.adapter()
        assert adapter is not None
        q, k = (
            ScaledRotary.apply(features, layer.row_scale(adapter), cos, sin)
            for features, layer in ((query, self.q), (key, self.k))
        )
        return q, k


class ProductFold(_QueryKeyFold):
    """q's and k's row scales, where nothing stands between them and their product: q has both."""

    def rows_left(self, layer: SanLayer) -> Tensor | None:
        """Return both row scales for q, and None for k."""
        adapter = self.adapter()
        if adapter is None or layer is self.k:
            return None
        return _product(self.q.row_scale(adapter), self.k.row_scale(adapter))


class GatedFold(_Fold):
    """The scales around SwiGLU or GeGLU, inside it."""

    def __init__(self, gate: SanLayer, up: SanLayer, down: SanLayer, gelu: bool) -> None:
        """Hold the projections of an MLP; gate and up may be the halves of one Linear."""
        self.gate, self.up, self.down, self.gelu = gate, up, down, gelu

    def adapter(self) -> str | None:
        """Return the adapter that it stands for in this forward, or None."""
        return _inside((self.gate, self.up), self.down)

    def forward(self, x: Tensor) -> Tensor | None:
        """Return the MLP of x (..., hidden), or None where the fold is off."""
        adapter = self.adapter()
        if adapter is None:
            return None
        if self.gate is self.up:
            gate, up = self.up(x).chunk(2, dim=-1)
            (g, row_scale), (_, gamma) = map(_halves, self.up.scales(adapter))
        else:
            gate, up = self.gate(x), self.up(x)
            g = self.gate.row_scale(adapter)
            row_scale, gamma = self.up.scales(adapter)
        s = gamma if adapter in self.down.san_feed else self.down.synapse_scale(adapter)
        c = _product(row_scale, s)
        out: Tensor = self.down(ScaledSwiGLU.apply(gate, up, g, c, self.gelu))
        return out


class ActivationFold(_Fold):
    """fc1's row scale and fc2's column scale, around the activation between the two."""

    def __init__(self, act: Any, first: SanLayer, second: SanLayer) -> None:
        """Hold an activation, the Linear that it reads and the one that reads it."""
        self.act, self.first, self.second = act, first, second

    def adapter(self) -> str | None:
        """Return the adapter that it stands for in this forward, or None."""
        return None if torch.compiler.is_compiling() else _inside((self.first,), self.second)

    def forward(self, x: Tensor) -> Tensor | None:
        """Return the activation of x (..., inner), scaled, or None where the fold is off."""
        adapter = self.adapter()
        if adapter is None:
            return None
        g, c = self.first.row_scale(adapter), self.second.synapse_scale(adapter)
        g, c = (None if scale is None else scale.to(x.device) for scale in (g, c))
        out: Tensor = ScaledActivation.apply(x, g, c, partial(type(self.act).forward, self.act))
        return out


def _product(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one * other


def _halves(scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if scale is None:
        return None, None
    gate, up = scale.chunk(2)
    return gate, up


def _inside(writers: tuple[SanLayer, ...], reader: SanLayer) -> str | None:
    """Return the adapter whose scales on an MLP's inner features can meet there, or None."""
    adapter = _together((*writers, reader))
    if adapter is None or not all(_row_scale_moves(layer, adapter) for layer in writers):
        return None
    feed = reader.san_feed.get(adapter)
    return adapter if feed is None or feed.anterior is writers[-1] else None


def _row_scale_moves(layer: SanLayer, adapter: str) -> bool:
    """Whether a reader may apply a layer's row scale to all that the layer puts out."""
    if layer.neuron_shift(adapter) is not None:
        return False  # it stands behind the row scale
    # A low-rank row scale does not reach the bias.
    has_bias = getattr(layer.get_base_layer(), "bias", None) is not None
    return layer.san_options[adapter].carrier == "scale" or not has_bias


def _drops_to_float32(norm: Any) -> bool:
    """Return whether a norm computes in less than its weight's dtype, which ``ScaledNorm`` cannot.

    transformers' norms compute in float32 in a float64 model, too.
    """
    stock = type(getattr(norm, "base_layer", norm)).__module__.startswith("transformers.")
    return stock and norm.weight.dtype == torch.float64


def _scaled_forward(module: Any, x: Tensor) -> Tensor:
    out: Tensor | None = module.san_fold.forward(x)
    return out if out is not None else type(module).forward(module, x)


def _attention_forward(attention: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the model's own forward, with ``RotaryFold.rotate`` for its rotation."""
    forward = type(attention).forward
    if attention.san_fold.stands():
        forward = with_rotation(attention, attention.san_fold.rotate)
    return forward(attention, *args, **kwargs)


def _take_over(module: Any, forward: Any, fold: Any) -> bool:
    """Let a fold compute a module's forward; return False where another patch stands there."""
    if "forward" in vars(module) and not hasattr(module, "san_fold"):
        return False
    module.san_fold = fold
    module.forward = partial(forward, module)  # copies and pickles with its module
    return True


def fold(model: nn.Module, folds: Iterable[MeasuredFold]) -> None:
    """Install the lean form in a wired model; adapters that cannot use it do not.

    Args:
        model: The model.
        folds: Where its scales can move.
    """
    modules = dict(model.named_modules())
    for found in folds:
        layers: Any = [modules.get(name) for name in found.members]
        if all(isinstance(layer, (SanLinear, SanTransposed)) for layer in layers):
            _INSTALL[found.kind](modules.get(found.at), layers, found.how)


def _on_norm(norm: Any, readers: list[SanLayer], how: str) -> None:
    norm_fold = NormFold(norm, tuple(readers), how)
    if _take_over(norm, _scaled_forward, norm_fold):
        for layer in readers:
            layer.columns_fold = norm_fold


def _on_values(_: Any, layers: list[SanLayer], _how: str) -> None:
    v, o = layers
    v.rows_fold = o.columns_fold = ValueFold(v, o)


def _on_rotation(attention: Any, layers: list[SanLayer], _how: str) -> None:
    q, k = layers
    rotary = RotaryFold(q, k)
    if _take_over(attention, _attention_forward, rotary):
        q.rows_fold = k.rows_fold = rotary


def _on_product(_: Any, layers: list[SanLayer], _how: str) -> None:
    q, k = layers
    q.rows_fold = k.rows_fold = ProductFold(q, k)


def _on_mlp(mlp: Any, layers: list[SanLayer], how: str) -> None:
    gate, up, down = layers
    gated = GatedFold(gate, up, down, how == GELU_TANH)
    if _take_over(mlp, _scaled_forward, gated):
        gate.rows_fold = up.rows_fold = down.columns_fold = gated


def _on_activation(act: Any, layers: list[SanLayer], _how: str) -> None:
    first, second = layers
    activated = ActivationFold(act, first, second)
    if _take_over(act, _scaled_forward, activated):
        first.rows_fold = second.columns_fold = activated


_INSTALL = {
    "norm": _on_norm,
    "attention": _on_values,
    "rotation": _on_rotation,
    "product": _on_product,
    "gated": _on_mlp,
    "activation": _on_activation,
}


def folds_of(model: nn.Module, family: Family) -> Iterator[MeasuredFold]:
    """Yield where scales can move in a model of a family, by its table."""
    for name, block in model.named_modules():
        attention, mlp = getattr(block, "self_attn", None), getattr(block, "mlp", None)
        if isinstance(attention, nn.Module) and isinstance(mlp, nn.Module):
            yield from _of_block(f"{name}.", attention, mlp, block, family)


def _of_block(
    path: str, attention: Any, mlp: Any, block: Any, family: Family
) -> Iterator[MeasuredFold]:
    def inside(*projections: str) -> tuple[str, ...]:
        linears = map(family.linear_of, projections)
        return tuple(f"{path}{'mlp' if hasattr(mlp, n) else 'self_attn'}.{n}" for n in linears)

    for name, readers in family.norms.items():
        # Gemma's norm is the one with an offset, and rounds only once.
        how = "1 + rms" if family.norm_offset else "rms"
        norm = getattr(block, name, None)
        made = hasattr(norm, "_norm") if family.norm_offset else hasattr(norm, "variance_epsilon")
        if made and epsilon(norm) is not None:  # else of another make
            yield MeasuredFold("norm", inside(*readers), f"{path}{name}", how)
    if Q in family.targets:  # else one Linear computes q, k and v
        if getattr(attention, "q_norm", None) is None and rotates_halves(attention):
            yield MeasuredFold("rotation", inside(Q, K), f"{path}self_attn")
        yield MeasuredFold("attention", inside(V, O))
    act = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    gelu = isinstance(act, _GELU) and isinstance(act.act, partial)  # else it is in Python
    if gelu or isinstance(act, _SILU):
        how = GELU_TANH if gelu else "silu"
        yield MeasuredFold("gated", inside(GATE, UP, DOWN), f"{path}mlp", how)


def unfold(model: nn.Module) -> None:
    """Give every module its own forward back."""
    for module in model.modules():
        if isinstance(module, SanLayer):
            module.columns_fold = module.rows_fold = None
        if "san_fold" in vars(module):
            del module.san_fold, module.forward
