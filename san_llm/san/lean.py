"""The lean form: SAN in about the memory of backpropagating through the frozen base.

The plain form keeps the input and the output of every scale for the backward pass. Four
identities move scales to where their factors are kept anyway, or where none is needed:

- ``s * (w * n) = (s * w) * n``: readers of one RMSNorm that share s leave it to the norm's weight
  (``NormFold``), whose backward pass recomputes n from the residual stream and one number a token.
- Attention mixes tokens, never channels: v's row scale and o's synapse scale become one factor on
  the attention output (``ValueFold``), which attention keeps itself.
- Queries and keys are scaled as they are rotated (``RotaryFold``), which neither makes a copy of
  them nor keeps more than their Linear made.
- SwiGLU and GeGLU are linear in up: gate's and up's row scales and down's column scale go into
  the activation (``GatedFold``), whose backward pass recomputes what the base's own would keep.

A fold decides at every forward, by ``stands``, whether it applies: exactly one adapter computes in
all of its members, none of them is merged, and the scales are of a kind that can move. Otherwise
its members compute the plain form: so do readers of a norm, v and o under ``links: free``, where
column scales are the targets' own. With a fold, a member's output alone is not the plain layer's
output; the block's is. Forward values and gradients are the plain form's up to rounding, at
gamma = 0 too: nothing is divided by gamma.
"""

from __future__ import annotations

from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from san_llm.architectures.decoders import DOWN, GATE, UP, K, O, Q, V
from san_llm.architectures.entry import Family
from san_llm.ops.scale import ScaledNorm, ScaledRotary, ScaledSwiGLU
from san_llm.san.formulas import carried
from san_llm.san.layer import SanLayer, SanLinear

ROTARY = "apply_rotary_pos_emb"  # transformers' name of it, in every family's module
RENAMES = "transformers.utils.deprecation"  # its decorator stands before what it wraps
_SILU = (nn.SiLU, type(ACT2FN["silu"]))
_GELU = type(ACT2FN["gelu_pytorch_tanh"])


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


class NormFold:
    """Readers of one RMSNorm that share a synapse scale: it goes into the norm's weight."""

    def __init__(self, norm: Any, readers: tuple[SanLayer, ...], offset: int) -> None:
        """Hold a norm, which multiplies by ``offset + weight``, and all Linears that read it."""
        self.norm, self.readers, self.offset = norm, readers, offset

    def adapter(self) -> str | None:
        """Return the adapter that it stands for in this forward, or None."""
        adapter = _together(self.readers)
        if adapter is None or _drops_to_float32(self.norm):
            return None
        feeds = [reader.san_feed.get(adapter) for reader in self.readers]
        return adapter if feeds[0] is not None and all(f == feeds[0] for f in feeds) else None

    def stands(self) -> bool:
        """Whether the norm applies the readers' synapse scale in this forward."""
        return self.adapter() is not None

    def columns_left(self) -> Tensor | None:
        """Return None: nothing is left for the readers."""
        return None

    def forward(self, x: Tensor) -> Tensor | None:
        """Return the normalized and scaled x (..., hidden), or None where the fold is off."""
        adapter = self.adapter()
        if adapter is None:
            return None
        s = self.readers[0].synapse_scale(adapter)
        if s is None:
            return None
        weight = self.norm.weight
        wide = weight if weight.dtype == torch.float64 else weight.float()
        wide = self.offset + wide if self.offset else wide
        # Gemma's norm is the one with an offset, and rounds only once.
        out: Tensor = ScaledNorm.apply(
            x, wide * s.to(wide.device), _epsilon(self.norm, self.offset), self.offset != 0
        )
        return out


class ValueFold:
    """v's row scale and o's synapse scale as one factor on the attention output."""

    def __init__(self, v: SanLayer, o: SanLayer) -> None:
        """Hold the two ends of an attention link."""
        self.v, self.o = v, o

    def stands(self) -> bool:
        """Whether o applies v's row scale in this forward."""
        adapter = _together((self.v, self.o))
        return (
            adapter is not None
            and adapter in self.o.san_feed
            and self.o.san_feed[adapter].anterior is self.v
            and _row_scale_moves(self.v, adapter)
        )

    def columns_left(self) -> Tensor | None:
        """Return v's row scale times its gamma, repeated over heads that share them: (d_in,)."""
        adapter = self.o.working_adapters()[0]
        row_scale, gamma = self.v.scales(adapter)
        both = row_scale if gamma is None else gamma if row_scale is None else gamma * row_scale
        return None if both is None else carried(both, self.o.san_feed[adapter].carry)


class RotaryFold:
    """q's and k's row scales, in the rotary embedding that reads them."""

    def __init__(self, q: SanLayer, k: SanLayer) -> None:
        """Hold two Linears whose outputs go into the rotary embedding as they are."""
        self.q, self.k = q, k

    def adapter(self) -> str | None:
        """Return the adapter that it stands for in this forward, or None."""
        adapter = _together((self.q, self.k))
        if adapter is None or torch.compiler.is_compiling():
            return None
        return adapter if all(_row_scale_moves(x, adapter) for x in (self.q, self.k)) else None

    def stands(self) -> bool:
        """Whether the attention applies q's and k's row scales in this forward."""
        return self.adapter() is not None

    def columns_left(self) -> Tensor | None:
        """Return None: it takes over nothing of the columns."""
        return None

    def rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys, scaled and rotated (batch, heads, tokens, head_dim)."""
        adapter = self.adapter()
        assert adapter is not None
        q, k = (
            ScaledRotary.apply(features, layer.row_scale(adapter), cos, sin)
            for features, layer in ((query, self.q), (key, self.k))
        )
        return q, k


class GatedFold:
    """The scales around SwiGLU or GeGLU, inside it."""

    def __init__(self, gate: SanLayer, up: SanLayer, down: SanLayer, gelu: bool) -> None:
        """Hold the projections of an MLP; gate and up may be the halves of one Linear."""
        self.gate, self.up, self.down, self.gelu = gate, up, down, gelu

    def adapter(self) -> str | None:
        """Return the adapter that it stands for in this forward, or None."""
        adapter = _together((self.gate, self.up, self.down))
        if adapter is None:
            return None
        if not all(_row_scale_moves(layer, adapter) for layer in (self.gate, self.up)):
            return None
        feed = self.down.san_feed.get(adapter)
        return adapter if feed is None or feed.anterior is self.up else None

    def stands(self) -> bool:
        """Whether the MLP applies its projections' scales in this forward."""
        return self.adapter() is not None

    def columns_left(self) -> Tensor | None:
        """Return None: nothing is left for down."""
        return None

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
        c = row_scale if s is None else s if row_scale is None else s * row_scale
        out: Tensor = self.down(ScaledSwiGLU.apply(gate, up, g, c, self.gelu))
        return out


def _halves(scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if scale is None:
        return None, None
    gate, up = scale.chunk(2)
    return gate, up


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


def _norm_forward(norm: Any, x: Tensor) -> Tensor:
    out: Tensor | None = norm.san_fold.forward(x)
    return out if out is not None else type(norm).forward(norm, x)


def _mlp_forward(mlp: Any, x: Tensor) -> Tensor:
    out: Tensor | None = mlp.san_fold.forward(x)
    return out if out is not None else type(mlp).forward(mlp, x)


def _attention_forward(attention: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the model's own forward, with ``RotaryFold.rotate`` for its function of that name."""
    forward = type(attention).forward
    if attention.san_fold.stands():
        own = _own_forward(attention)
        names = {**own.__globals__, ROTARY: attention.san_fold.rotate}
        forward = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
        forward.__kwdefaults__ = own.__kwdefaults__
    return forward(attention, *args, **kwargs)


def _own_forward(attention: nn.Module) -> Any:
    """Return its forward without what renames outdated arguments, which its block does not pass."""
    forward: Any = type(attention).forward
    while getattr(forward, "__globals__", {}).get("__name__") == RENAMES:
        forward = forward.__wrapped__
    return forward


def _rotates_halves(attention: nn.Module) -> bool:
    """Return whether its forward calls a function of that name that rotates as LLaMA's does."""
    forward = _own_forward(attention)
    rotary = getattr(forward, "__globals__", {}).get(ROTARY)
    return rotary is not None and ROTARY in forward.__code__.co_names and _same_rotary(rotary)


@cache
def _same_rotary(rotary: Any) -> bool:
    """Return whether a function gives the numbers of ``ScaledRotary`` on a few made up."""
    features = torch.arange(1.0, 25.0, dtype=torch.float64).view(1, 2, 3, 4) / 7
    cos, sin = (
        tensor.repeat(1, 1, 2)
        for tensor in (features[:, 0, :, :2].cos(), features[:, 1, :, :2].sin())
    )
    try:
        rotated = rotary(features, -features, cos, sin)
        wanted = (ScaledRotary.apply(tensor, None, cos, sin) for tensor in (features, -features))
        return all(map(torch.equal, rotated, wanted))
    except (TypeError, RuntimeError, IndexError):
        return False


def _take_over(module: Any, forward: Any, fold: Any) -> bool:
    """Let a fold compute a module's forward; return False where another patch stands there."""
    if "forward" in vars(module) and not hasattr(module, "san_fold"):
        return False
    module.san_fold = fold
    module.forward = partial(forward, module)  # copies and pickles with its module
    return True


def _epsilon(norm: Any, offset: int) -> float | None:
    """Return the epsilon of an RMSNorm of LLaMA's make, or Gemma's (offset 1), else None."""
    if offset:
        return getattr(norm, "eps", None) if hasattr(norm, "_norm") else None
    return getattr(norm, "variance_epsilon", None)


def fold(model: nn.Module, family: Family) -> None:
    """Install the lean form in every block of a wired model; adapters that cannot use it do not."""
    for block in list(model.modules()):
        attention, mlp = getattr(block, "self_attn", None), getattr(block, "mlp", None)
        if attention is None or mlp is None:
            continue
        for name, readers in family.norms.items():
            norm = getattr(block, name, None)
            modules = [getattr(attention, r, None) or getattr(mlp, r, None) for r in readers]
            layers = tuple(layer for layer in modules if isinstance(layer, SanLinear))
            if _epsilon(norm, family.norm_offset) is None or len(layers) < len(readers):
                continue
            norm_fold = NormFold(norm, layers, family.norm_offset)
            if _take_over(norm, _norm_forward, norm_fold):
                for layer in layers:
                    layer.columns_fold = norm_fold
        q, k = getattr(attention, Q, None), getattr(attention, K, None)
        if (
            isinstance(q, SanLinear)
            and isinstance(k, SanLinear)
            and getattr(attention, "q_norm", None) is None
            and _rotates_halves(attention)
        ):
            rotary = RotaryFold(q, k)
            if _take_over(attention, _attention_forward, rotary):
                q.rows_fold = k.rows_fold = rotary
        v, o = getattr(attention, V, None), getattr(attention, O, None)
        if isinstance(v, SanLinear) and isinstance(o, SanLinear):
            v.rows_fold = o.columns_fold = ValueFold(v, o)
        gate, up, down = (getattr(mlp, family.linear_of(name), None) for name in (GATE, UP, DOWN))
        act = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
        gelu = isinstance(act, _GELU) and isinstance(act.act, partial)  # else it is in Python
        if (
            isinstance(gate, SanLinear)
            and isinstance(up, SanLinear)
            and isinstance(down, SanLinear)
            and (gelu or isinstance(act, _SILU))
        ):
            gated = GatedFold(gate, up, down, gelu)
            if _take_over(mlp, _mlp_forward, gated):
                gate.rows_fold = up.rows_fold = down.columns_fold = gated


def unfold(model: nn.Module) -> None:
    """Give every module its own forward back."""
    for module in model.modules():
        if isinstance(module, SanLayer):
            module.columns_fold = module.rows_fold = None
        if "san_fold" in vars(module):
            del module.san_fold, module.forward
