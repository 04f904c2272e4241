"""Generation as in the published evaluation: 4 beams, at most 32 new tokens, no sampling.

The beams of a prompt share its keys and values, which are computed once and not four times.
Prompts are padded on the left and masked, so that an answer does not depend on the batch it was in
(the published script passes no mask). They are sorted by length, and a batch is as large as memory
allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil
import torch

from san_llm.data.encode import pad_id

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

BEAMS = 4
NEW_TOKENS = 32
LARGEST_BATCH = 32


def fitting_batch_size(config: Any, longest: int, free: int) -> int:
    """Return how many prompts to answer at once.

    Args:
        config: The model's config.
        longest: Tokens of the longest prompt.
        free: Bytes of memory that may be used.
    """
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    blocks, vocabulary = config.num_hidden_layers, config.vocab_size
    tokens = longest + NEW_TOKENS
    # Keys and values in fp32 and their reordered copy, and a few fp32 copies of the last logits.
    cache = 2 * 2 * 4 * blocks * kv_heads * head_dim * tokens
    row = BEAMS * (cache + 8 * 4 * vocabulary)
    return max(1, min(LARGEST_BATCH, int(free // (2 * row))))


def free_memory(device: torch.device) -> int:
    """Return the bytes that can be had on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    batch_size: int | None,
    done: Callable[[list[tuple[int, str]]], None],
) -> None:
    """Answer every prompt.

    Args:
        model: A causal LM, in eval mode.
        tokenizer: Its tokenizer.
        prompts: The tokens of each prompt.
        batch_size: Prompts at once; None: chosen by memory, and halved when it runs out.
        done: Called after each batch with ``(prompt number, new text)``, longest prompts first.
    """
    from transformers import GenerationConfig

    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    if not order:
        return
    padding = pad_id(tokenizer)
    settings = GenerationConfig(
        num_beams=BEAMS,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=_ends(model, tokenizer),
        pad_token_id=padding,
    )
    device = model.device
    size = batch_size or fitting_batch_size(
        model.config, len(prompts[order[0]]), free_memory(device)
    )
    start = 0
    while start < len(order):
        batch = order[start : start + size]
        width = len(prompts[batch[0]])
        tokens = torch.full((len(batch), width), padding)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for i, number in enumerate(batch):
            length = len(prompts[number])
            tokens[i, width - length :] = torch.tensor(prompts[number])
            mask[i, width - length :] = 1
        try:
            with torch.inference_mode(), _without_habits(model):
                out = _beam_search(model, tokens.to(device), mask.to(device), settings)
        except torch.OutOfMemoryError:
            if size == 1 or batch_size is not None:
                raise
            size //= 2
            torch.cuda.empty_cache()
            continue
        texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        done(list(zip(batch, texts, strict=True)))
        start += len(batch)


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[int] | None:
    """Return the tokens that end an answer: the model's own, and the one that training teaches."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = own if isinstance(own, list) else [own]
    return sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None}) or None


@contextmanager
def _without_habits(model: PreTrainedModel) -> Iterator[None]:
    """Keep a model's own settings out, which ``generate`` takes where the protocol has none.

    A repetition penalty from ``generation_config.json``, say, would change the answers.
    """
    from transformers import GenerationConfig

    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    habits, inner.generation_config = inner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = habits


def _beam_search(
    model: PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor, settings: GenerationConfig
) -> torch.Tensor:
    """Return prompt and new tokens of the best beams; tokens and mask are (batch, width)."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    if tokens.shape[1] > 1:
        model(
            input_ids=tokens[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, :-1],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.batch_repeat_interleave(settings.num_beams)
    out: torch.Tensor = model.generate(
        input_ids=tokens, attention_mask=mask, past_key_values=cache, generation_config=settings
    )
    return out
