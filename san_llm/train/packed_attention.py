"""Attention of packed rows: each token sees the tokens of its own row that stand before it.

It takes the place of transformers' SDPA attention; all else in the model works on single tokens and
needs to know nothing of rows.
https://huggingface.co/docs/transformers/attention_interface
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from san_llm.architectures.decoders import FAMILIES
from san_llm.ops.causal import Segments, causal

NAME = "sdpa_packed"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    layout: Segments | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Return the attention output (1, N, heads, head_dim) of N packed tokens.

    Args:
        module: The attention module.
        query: (1, heads, N, head_dim), rotated; key and value likewise with their own heads.
        key: See query.
        value: See query.
        attention_mask: Not used with a layout.
        layout: How the rows lie; without one this is SDPA attention.
        **keywords: What the model tells every attention function.
    """
    if layout is None:
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **keywords
        )
        return out
    query, key, value = (heads[0].transpose(0, 1) for heads in (query, key, value))
    window, scale = keywords.get("sliding_window"), keywords["scaling"]
    return causal(query, key, value, layout, scale, window, keywords["dropout"])[None], None


def can_pack(model: Any) -> bool:
    """Whether a model's blocks can take packed rows: a family of the table, with SDPA attention."""
    config = model.config
    capped = getattr(config, "attn_logit_softcapping", None) is not None  # SDPA's scores are not
    known = config.model_type in FAMILIES and not capped
    return known and config._attn_implementation in ("sdpa", NAME)


def has_dropout(model: Any) -> bool:
    """Whether a model in training draws at random what it drops, each row for itself."""
    return bool(getattr(model.config, "attention_dropout", 0)) or any(
        isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()
    )


def use_packed_attention(model: Any) -> None:
    """Let a model's attention take packed rows; without a layout it stays what it was."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
