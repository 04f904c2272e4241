"""Generation as in the published evaluation: 4 beams, at most 32 new tokens, no sampling.

The published script pads without a mask, so that an answer depends on the batch it was in. Ours
does not: no token sees padding. As many prompts are worked at as memory allows, the longest first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil
import torch

from san_llm.architectures.lookup import is_known
from san_llm.ask.beam_search import BeamSearch
from san_llm.ask.packed import can_pack, inner
from san_llm.data.batches import pad_id
from san_llm.data.ends import turn_end
from san_llm.measure.behaviour import sees_padding
from san_llm.models.rotary import alike_to

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


BEAMS = 4
NEW_TOKENS = 32
LARGEST_BATCH = 32


def fitting_batch_size(
    config: Any, longest: int, free: int, new_tokens: int = NEW_TOKENS, beams: int = BEAMS
) -> int:
    """Return how many prompts to answer at once.

    Args:
        config: The model's config.
        longest: Tokens of the longest prompt.
        free: Bytes of memory that may be used.
        new_tokens: Tokens of an answer at most.
        beams: Running hypotheses a prompt.
    """
    heads = getattr(config, "num_attention_heads", 1)  # what Mamba keeps is less than one's
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    blocks, vocabulary = config.num_hidden_layers, config.vocab_size
    tokens = longest + beams * new_tokens
    # Keys and values in fp32, and a few fp32 copies of each beam's last logits.
    cache = 2 * 4 * blocks * kv_heads * head_dim * tokens
    row = cache + beams * 8 * 4 * vocabulary
    return max(1, min(LARGEST_BATCH, int(free // (2 * row))))


def free_memory(device: torch.device) -> int:
    """Return the bytes that can be had on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    batch_size: int | None,
    answer: Callable[[int, str], str | None] | None = None,
    new_tokens: int = NEW_TOKENS,
    chat: bool = False,
) -> Iterator[list[tuple[int, str]]]:
    """Give the answers to prompts as they are done, by the protocol's search.

    Args:
        model: A causal LM, in eval mode.
        tokenizer: The model's tokenizer.
        prompts: The tokens of each prompt.
        batch_size: Prompts at once, see :func:`continuations`.
        answer: Reads the answer of a prompt from its text, None while there is none, by a first
            match that more text cannot change. Given, texts may be cut short, and only the answers
            in them are the same as without.
        new_tokens: Tokens of an answer at most.
        chat: Whether the prompts are conversations, which end as their template ends a turn.

    Yields:
        ``(prompt number, new text)`` of some prompts, of each once.
    """

    def text(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    ends = end_tokens(model, tokenizer, chat)
    read = None if answer is None else lambda number, tokens: answer(number, text(tokens))
    search = BeamSearch(BEAMS, new_tokens, ends, read)
    for ended in continuations(model, pad_id(tokenizer), prompts, search, batch_size):
        yield [(number, text(tokens)) for number, tokens in ended]


def continuations(
    model: PreTrainedModel,
    padding: int,
    prompts: Sequence[list[int]],
    search: BeamSearch,
    batch_size: int | None = None,
) -> Iterator[list[tuple[int, list[int]]]]:
    """Give what is found behind prompts as it is done, the longest prompt first.

    Args:
        model: A causal LM, in eval mode.
        padding: The token that is put where there is none.
        prompts: The tokens of each prompt.
        search: How to search; with one beam the likeliest token follows, each time.
        batch_size: Prompts at once; None: chosen by memory, and halved when it runs out. With 1
            each prompt is computed alone, whatever the others are.

    Yields:
        ``(prompt number, new tokens)`` of some prompts, of each once.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    if not order:
        return
    longest, new_tokens = len(prompts[order[0]]), search.new_tokens
    free = free_memory(model.device)
    size = batch_size or fitting_batch_size(model.config, longest, free, new_tokens, search.beams)
    # A prompt that may come to where its length decides how it is rotated is answered alone.
    alike = 0 if batch_size == 1 else alike_to(inner(model).config) - new_tokens
    alone = [[number] for number in order if len(prompts[number]) > alike]
    together = order[len(alone) :]
    for group in alone + ([together] if together else []):
        left = set(group)
        packs = can_pack(model, len(prompts[group[0]]) + new_tokens)
        while left:
            waiting = [(number, prompts[number]) for number in group if number in left]
            if packs:
                steps = search.run(model, waiting, size)
            else:
                steps = _stock(model, waiting, size, padding, search)
            try:
                for ended in steps:
                    left.difference_update(number for number, _ in ended)
                    yield ended
            except torch.OutOfMemoryError:
                if size == 1 or batch_size is not None:
                    raise
                size //= 2
                torch.cuda.empty_cache()


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, chat: bool) -> list[int]:
    """Return the tokens that end an answer: the model's own, and those that training teaches."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    if chat and tokenizer.chat_template:
        ends.append(turn_end(tokenizer).token)
    return sorted({end for end in ends if end is not None})


@contextmanager
def without_habits(model: PreTrainedModel, ends: list[int] | None = None) -> Iterator[None]:
    """Keep a model's own settings out, which ``generate`` takes where the protocol has none.

    A repetition penalty from ``generation_config.json``, say, would change the answers.

    Args:
        model: The model.
        ends: The tokens that end an answer, where ``generate`` is not told them.
    """
    from transformers import GenerationConfig

    bare = inner(model)
    habits = bare.generation_config
    bare.generation_config = GenerationConfig(eos_token_id=ends)
    try:
        yield
    finally:
        bare.generation_config = habits


def _stock(
    model: PreTrainedModel,
    prompts: Sequence[tuple[int, list[int]]],
    batch_size: int,
    padding: int,
    search: BeamSearch,
) -> Iterator[list[tuple[int, list[int]]]]:
    """Give the answers of a model that cannot be packed, by transformers' own search.

    The beams of a prompt share its keys and values, which are computed once; in families that are
    not known ``generate`` keeps whatever it is that they keep of earlier tokens.
    """
    from transformers import GenerationConfig

    settings = GenerationConfig(
        num_beams=search.beams,
        max_new_tokens=search.new_tokens,
        do_sample=False,
        eos_token_id=list(search.ends) or None,
        pad_token_id=padding,
    )
    known = is_known(inner(model).config.model_type)
    if not known and batch_size > 1 and sees_padding(model):
        batch_size = 1
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        width = len(batch[0][1])
        tokens = torch.full((len(batch), width), padding)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for i, (_, prompt) in enumerate(batch):
            tokens[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        tokens, mask = tokens.to(model.device), mask.to(model.device)
        kept: dict[str, Any] = {}
        with torch.inference_mode(), without_habits(model):
            if known:
                kept["past_key_values"] = _kept_of(model, tokens, mask, search.beams)
            out: torch.Tensor = model.generate(
                input_ids=tokens, attention_mask=mask, generation_config=settings, **kept
            )
        new = out[:, width:].tolist()
        yield [(number, tokens) for (number, _), tokens in zip(batch, new, strict=True)]


def _kept_of(model: PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor, beams: int) -> Any:
    """Return the keys and values of prompts (batch, width) without the last, for each beam."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    width = tokens.shape[1]
    # One token before the length from which on it is rotated otherwise, so are all others.
    if width > 1 and width - 1 != alike_to(inner(model).config):
        model(
            input_ids=tokens[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, :-1],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.batch_repeat_interleave(beams)
    return cache
