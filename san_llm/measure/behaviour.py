"""What a causal LM does that no config says, seen on the model itself: one forward of a few tokens.

The families of the table are known. Of any other, a class for causal LMs may still be one that
looks ahead (BERT's), or multiply what its head gives (Granite's, Cohere's).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from san_llm.errors import InputError
from san_llm.ops.head_loss import GIVES_LOGITS

TOKENS = 8
NOISE = 1e-3  # of the logits' spread: what the arithmetic of one batch adds in any dtype


@torch.no_grad()
def look_at(model: Any, name: str) -> None:
    """Refuse a model that looks ahead, and mark its head by whether that gives the logits.

    Args:
        model: A causal LM as transformers loads it.
        name: What messages call it.

    Raises:
        InputError: when a later token changes what is predicted before it, or there is no head.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise InputError(f"{name}: a {type(model).__name__} has no output head to learn text with")
    tokens = torch.arange(TOKENS).repeat(2, 1) % model.config.vocab_size
    tokens[1, -1] = (TOKENS + 1) % model.config.vocab_size
    given: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda _, __, out: given.append(out))
    try:
        logits = model(input_ids=tokens.to(model.device), use_cache=False).logits
    finally:
        hook.remove()
    before = logits[:, :-1].float()
    if not (before[0] - before[1]).abs().max() <= NOISE * before.std():
        raise InputError(
            f"{name}: a {type(model).__name__} looks ahead: its last token changes what is said "
            "of those before, so that it would be taught to copy"
        )
    setattr(head, GIVES_LOGITS, len(given) == 1 and torch.equal(given[0], logits))


@torch.no_grad()
def sees_padding(model: Any) -> bool:
    """Return whether tokens before a text, that its mask leaves out, change what is said of it.

    They do in a model with a state that knows no mask (RWKV), or half of it (RecurrentGemma).
    """
    count = min(TOKENS, model.config.vocab_size)
    alone = torch.arange(count, device=model.device)[None]
    padded = torch.cat([alone.flip(1), alone], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :count] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    hidden = taken(model, attention_mask=mask, position_ids=places)
    found = model(input_ids=padded, use_cache=False, **hidden).logits[:, count:].float()
    wanted = model(input_ids=alone, use_cache=False).logits.float()
    noise = max(NOISE, 32 * torch.finfo(model.dtype).eps)  # of other shapes of the same products
    return not bool((found - wanted).abs().max() <= noise * wanted.std())


def taken(model: Any, **keywords: Any) -> dict[str, Any]:
    """Return those keywords that the forward of a model names; models differ in what they know."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(type(bare).forward).parameters
    return {key: value for key, value in keywords.items() if key in known}
