"""Many sequences in one forward, packed without padding; each token attends to its own past only.

A transformer's layers but for attention work on single tokens. So the tokens of many prompts, beams
and choices stand in one row, (1, tokens), and an attention function of our own, which transformers
calls for every block, knows what each of them may look at: a :class:`Past`. What all prompts begin
with is computed once, and nothing is computed for padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from san_llm.architectures.lookup import is_known
from san_llm.models.rotary import alike_to
from san_llm.ops.causal import Segments, causal

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ATTENTION = "san_llm_packed"


class Past(Protocol):
    """What packed tokens attend to."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Return the attention's output, (tokens, heads, head_dim).

        Args:
            layer: Number of the block.
            query: (tokens, heads, head_dim), positions applied.
            key: (tokens, kv_heads, head_dim), positions applied.
            value: (tokens, kv_heads, head_dim).
            scale: What the products of queries and keys are multiplied by.
        """


class Prefix:
    """Keys and values of the tokens that all sequences begin with; as a past, it fills itself."""

    def __init__(self) -> None:
        """Begin empty: the forward that has it as its past fills it."""
        self.length = 0
        self.keys: list[Tensor] = []  # a block each, (kv_heads, length, head_dim)
        self.values: list[Tensor] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend from each token to those before it, and keep the keys and values."""
        self.keys.append(key.transpose(0, 1).contiguous())
        self.values.append(value.transpose(0, 1).contiguous())
        self.length = len(key)
        return causal(query, key, value, Segments.of_last(len(key), len(key)), scale)


def _packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    scaling: float | None = None,
    past: Past | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks: query (1, heads, tokens, head_dim), likewise keys and values."""
    assert past is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return past.attend(module.layer_idx, query, key, value, scale)[None], None


def can_pack(model: PreTrainedModel, longest: int) -> bool:
    """Return whether sequences of at most ``longest`` tokens can be packed.

    Only in the families that are known; and not where attention is more than every earlier token's:
    a window that slides within that length, capped scores, or rotary positions that depend on how
    long a sequence is.
    """
    from transformers import DynamicCache

    config = model.config.get_text_config()
    if not is_known(config.model_type):
        return False
    plain = all(
        getattr(layer, "sliding_window", longest) >= longest
        for layer in DynamicCache(config=config).layers
    )
    return (
        plain
        and bool(getattr(inner(model), "_supports_attention_backend", False))
        and getattr(config, "attn_logit_softcapping", None) is None
        and longest <= alike_to(config)
    )


def inner(model: Any) -> Any:
    """Return transformers' own model, without what an adapter wraps around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def packing(model: PreTrainedModel) -> Iterator[None]:
    """Let the model attend by :func:`packed_forward`'s past, and as before afterwards."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _packed_attention)
    config: Any = inner(model).config
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        with torch.inference_mode():
            yield
    finally:
        config._attn_implementation = before


def packed_forward(
    model: PreTrainedModel,
    tokens: Sequence[int],
    positions: Sequence[int],
    wanted: Sequence[int],
    past: Past,
) -> Tensor:
    """Return the log-probabilities of what follows some of the tokens, fp32 (wanted, vocabulary).

    Args:
        model: Inside :func:`packing`.
        tokens: The tokens of all sequences, one after another.
        positions: The position of each token in its own sequence.
        wanted: The numbers of the tokens that are asked for.
        past: What each token attends to.
    """
    device = model.device
    rows = torch.tensor(wanted, dtype=torch.long, device=device)
    with _last_mlp_of(model, rows, len(tokens)):
        out = model(
            input_ids=torch.tensor([tokens], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            logits_to_keep=rows,
            past=past,
        )
    logprobs: Tensor = out.logits[0].float().log_softmax(-1)
    return logprobs


@contextmanager
def _last_mlp_of(model: PreTrainedModel, wanted: Tensor, tokens: int) -> Iterator[None]:
    """Run the last block's MLP on the wanted tokens alone: of the others nobody asks for more."""

    def before(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][:, wanted], *inputs[1:])

    def after(_: Any, _inputs: object, out: Tensor) -> Tensor:
        whole = out.new_zeros(1, tokens, out.shape[-1])
        whole[:, wanted] = out
        return whole

    mlp = inner(model).model.layers[-1].mlp
    hooks = [mlp.register_forward_pre_hook(before), mlp.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def shared_prefix(model: PreTrainedModel, sequences: Sequence[list[int]]) -> Prefix:
    """Return what several sequences begin with, computed; at least one token of each is left."""
    prefix = Prefix()
    if len(sequences) < 2:
        return prefix
    # All lie between the first and the last in order, and so what these two share is in all.
    first, last = min(sequences), max(sequences)
    length = min(map(len, sequences)) - 1
    while first[:length] != last[:length]:
        length -= 1
    if length:
        packed_forward(model, first[:length], range(length), [length - 1], prefix)
    return prefix
