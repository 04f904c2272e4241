"""The loss of a batch: a mean over all that its step learns, whichever process holds a token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from san_llm.data.encode import IGNORE
from san_llm.measure.behaviour import taken
from san_llm.ops.causal import Segments
from san_llm.ops.head_loss import Head, HeadLoss, as_logits, from_head


def share_of_loss(
    model: Any, inputs: dict[str, Any], learned: Tensor | int, processes: int
) -> Tensor:
    """Return a micro-batch's share of the loss per token of its global batch, of shape ().

    DDP averages gradients over processes, so the share is multiplied by their number.

    Args:
        model: See :func:`token_losses`.
        inputs: The micro-batch; see :func:`token_losses`.
        learned: Tokens that the global batch learns, in all its micro-batches and processes.
        processes: How many work together.
    """
    share: Tensor = token_losses(model, inputs) / learned
    return share * processes


def token_losses(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Return the summed cross entropy of a batch's supervised tokens, in fp32 or wider.

    Args:
        model: A causal LM of transformers; adapted, or wrapped for several processes, or not.
        inputs: ``input_ids``, ``attention_mask`` and ``labels``, each (batch, tokens), where label
            -100 is not learned; or a packed batch of ``data.batches.Pack``.
    """
    bare = model.module if hasattr(model, "module") else model
    if "layout" in inputs:
        positions = inputs["position_ids"]
        # What has four dimensions is handed through as it is, and no mask is made of N x N tokens:
        # attention makes its own by the layout.
        keywords = {
            "position_ids": positions,
            "attention_mask": positions[None, None],
            "layout": Segments(inputs["layout"]),
        }
        sources, targets = inputs["sources"], inputs["labels"]
    else:
        mask = inputs["attention_mask"]
        # Padding stands where its row's last token does: a row's length may decide its rotation.
        keywords = taken(bare, attention_mask=mask, position_ids=mask.cumsum(-1) - 1)
        following = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE).flatten()
        sources = (following != IGNORE).nonzero()[:, 0]
        targets = following[sources]
    head = bare.get_output_embeddings()

    def summed(hidden: Tensor, plain: Head, cap: float | None) -> Tensor:
        chosen = hidden.flatten(0, -2).index_select(0, sources)  # (n, hidden)
        # FSDP2 makes a Linear a subclass, of the same forward; a quantized one has its own.
        frozen = isinstance(head, nn.Linear) and not head.weight.requires_grad
        if plain is not as_logits and frozen and type(head).forward is nn.Linear.forward:
            out: Tensor = HeadLoss.apply(chosen, head.weight, head.bias, targets, cap)
            return out
        logits = plain(chosen).float()
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return F.cross_entropy(logits, targets, reduction="sum")

    return from_head(
        model, bare.config, summed, input_ids=inputs["input_ids"], use_cache=False, **keywords
    )


def learned_tokens(inputs: dict[str, Any]) -> Tensor:
    """Return how many tokens of a batch ``token_losses`` adds up, as a number of shape ()."""
    labels: Tensor = inputs["labels"] if "layout" in inputs else inputs["labels"][:, 1:]
    return (labels != IGNORE).sum()
