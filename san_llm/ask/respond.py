"""What a model answers to one prompt, shown as it comes: the base, the adapted or a merged model.

One sequence, one token after another, greedily or sampled at a temperature. The protocol's beams
and batches are those of ``ask.answers``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, TextStreamer, set_seed

from san_llm.ask.answers import end_tokens, without_habits
from san_llm.ask.conversations import with_system
from san_llm.data.batches import pad_id
from san_llm.data.conversation import turns_of
from san_llm.data.encode import chat_prompt, evaluation_text, prompt_tokens
from san_llm.data.rows import Row
from san_llm.errors import InputError
from san_llm.launch.processes import world_size
from san_llm.models.agree import refuse_past_embedding
from san_llm.models.load import load_config
from san_llm.models.locate import FoundBase, find_base
from san_llm.models.subject import Subject, checked_date
from san_llm.models.tokenizer import begins_texts, load_tokenizer
from san_llm.protocol.prompts import Frame, PromptStyle, prompt_style
from san_llm.protocol.template_date import ASKS
from san_llm.protocol.templates import template

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


NO_STYLE = "none"  # the prompt as it stands, for a base to go on with


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        new_tokens: How many there are at most.
        temperature: 0 takes the likeliest, 1 samples the model's own distribution.
        seed: The random generator's start; None: another one each time.
    """

    new_tokens: int
    temperature: float = 0.0
    seed: int | None = None


@dataclass(frozen=True)
class Answer:
    """What one model said.

    Attributes:
        by: ``base``, ``adapted``, or ``model`` for one that is evaluated as it is.
        text: The new text, without special tokens.
        tokens: How many were generated.
        ended: Whether the model came to its end; else the tokens were used up.
        seconds: How long it took.
        full: The model's context is full, which has ended it.
    """

    by: str
    text: str
    tokens: int
    ended: bool
    seconds: float
    full: bool = False


def usual_style(subject: Subject, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the prompt style a model was trained in, else its chat template, else ``none``."""
    return subject.prompt or ("chat" if tokenizer.chat_template else NO_STYLE)


def question(
    prompt: str, style: PromptStyle | None, tokenizer: PreTrainedTokenizerFast, context: str = ""
) -> tuple[str, list[int]]:
    """Return the text that a model goes on from, and its tokens.

    Args:
        prompt: What is asked.
        style: The prompt style, as in evaluation; None: the prompt as it stands.
        tokenizer: The model's tokenizer.
        context: What a training row has as ``input``; for styles with a place for it.

    Raises:
        InputError: when the style is ``chat`` and there is no chat template.
    """
    if style is None:
        return prompt, prompt_tokens(tokenizer, prompt)
    if style == "chat":
        refuse_no_template(tokenizer)
    return evaluation_text(
        style, Row(instruction=prompt, context=context, where="the prompt"), tokenizer
    )


@dataclass(frozen=True)
class Way:
    """How prompts are put to a model.

    Attributes:
        found: The base, whose weights are not loaded yet.
        tokenizer: The base's tokenizer.
        config: The model's config.
        style: The prompt style, or ``none``.
        date: What the chat template writes as today's; None where it writes none.
        system: The system prompt that is said; None: the template's own, if it has one.
    """

    found: FoundBase
    tokenizer: PreTrainedTokenizerFast
    config: Any
    style: str
    date: str | None
    system: str | None = None

    @property
    def frame(self) -> Frame:
        """The style as what stands around a row."""
        return "none" if self.style == NO_STYLE else prompt_style(self.style)


def words_of(
    found: FoundBase, subject: Subject, date: str | None
) -> tuple[PreTrainedTokenizerFast, str | None]:
    """Return the tokenizer to ask a model with, and the date in its chat template, if it has one.

    Args:
        found: The base.
        subject: The model.
        date: What is told as today's; default: the training's, else today's.
    """
    told = (date and checked_date(date)) or subject.date or f"{datetime.now():%Y-%m-%d}"
    tokenizer = load_tokenizer(found, subject.adapter, told, bases_template=subject.bases_template)
    return tokenizer, told if ASKS in str(tokenizer.chat_template) else None


def way_of(
    subject: Subject, style: str | None, date: str | None = None, system: str | None = None
) -> Way:
    """Return how a model is asked, in the style it was trained in; its weights are not loaded.

    Args:
        subject: The model, with its adapter if any.
        style: The prompt style, instead of the usual one.
        date: What a chat template writes as today's date; see :func:`words_of`.
        system: The system prompt, instead of the one that the chat template begins with if any.

    Raises:
        InputError: when the style is ``chat`` and there is no chat template, or another and there
            is a system prompt.
    """
    found = find_base(subject.base)
    tokenizer, told = words_of(found, subject, date)
    style = style or usual_style(subject, tokenizer)
    if style == "chat":
        refuse_no_template(tokenizer)
    config = load_config(found, subject.adapter)
    if system is not None and style != "chat":
        raise InputError(f"--system: prompt style {style} has no place for one")
    return Way(found, tokenizer, config, style, told if style == "chat" else None, system)


def posed(way: Way, words: str, context: str = "") -> tuple[str, list[int]]:
    """Return the text that a model goes on from, and its tokens.

    Args:
        way: How it is asked.
        words: What is asked.
        context: What a training row has as ``input``.

    Raises:
        InputError: when the style has no place for the context, or the prompt leaves no room for
            an answer.
    """
    if context and way.style == NO_STYLE:
        raise InputError("--input: prompt style none has no place for one; put it in the prompt")
    named = None if way.style == NO_STYLE else prompt_style(way.style)
    if way.system is None:
        text, tokens = question(words, named, way.tokenizer, context)
    else:
        asked = turns_of(Row(instruction=words, context=context))[:1]
        text, tokens = talk(with_system(asked, way.system), way.tokenizer)
    room(tokens, way.config, way.tokenizer)
    return text, tokens


def talk(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> tuple[str, list[int]]:
    """Return a conversation's text in the chat template, and its tokens."""
    return chat_prompt(turns, tokenizer, "the conversation")


def in_frame(style: str, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether the chat template writes the text of a prompt style."""
    if style in ("chat", NO_STYLE):
        return True
    return bool(tokenizer.chat_template == template(prompt_style(style), begins_texts(tokenizer)))


def refuse_no_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a tokenizer that cannot write a conversation.

    Raises:
        InputError: naming what asks without one.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template; "
            "`san-llm generate --prompt-style alpaca` asks without one"
        )


def room(tokens: list[int], config: Any, tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Return how many tokens fit behind a prompt; None: any number.

    Args:
        tokens: The prompt's tokens.
        config: The model's config.
        tokenizer: The model's tokenizer.

    Raises:
        InputError: when there is no place for one, or the model does not know one of them.
    """
    refuse_past_embedding(tokens, config.vocab_size, "the prompt", tokenizer)
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and len(tokens) >= context:
        raise InputError(
            f"the prompt has {len(tokens):,} tokens, the model's context is {context:,}"
        )
    return None if context is None else context - len(tokens)


class _TextStream(TextStreamer):
    """Hands new text on as soon as whole words of it are there."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_text(text)


def respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tokens: list[int],
    sampling: Sampling,
    on_text: Callable[[str], None],
    by: str = "model",
) -> Answer:
    """Return the answer to one prompt.

    Args:
        model: Base, adapted or merged, in eval mode.
        tokenizer: The model's tokenizer.
        tokens: The prompt's tokens.
        sampling: How the next token is chosen; never past the model's context.
        on_text: Called with each piece of new text.
        by: ``base`` leaves the adapter out.

    Raises:
        InputError: when the prompt fills the model's context.
    """
    fitting = room(tokens, model.config, tokenizer)
    limit, ends = sampling.new_tokens, end_tokens(model, tokenizer, chat=True)
    settings = GenerationConfig(
        max_new_tokens=limit if fitting is None else min(limit, fitting),
        do_sample=sampling.temperature > 0,
        eos_token_id=ends or None,
        pad_token_id=pad_id(tokenizer),
        # Where sampled, from all tokens: the library's own default would be the likeliest 50.
        **(
            {"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
            if sampling.temperature
            else {}
        ),
    )
    if sampling.seed is not None:
        set_seed(sampling.seed)
    given = torch.tensor([tokens], device=model.device)
    began = time.perf_counter()
    # Not inference mode: where the model is in training, its next step needs what is made here.
    with torch.no_grad(), without_habits(model), voice_of(model, by):
        out = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            generation_config=settings,
            streamer=_TextStream(tokenizer, on_text),
            synced_gpus=world_size() > 1,  # a shard is needed until the last process is done
        )
    new = out[0, len(tokens) :].tolist()
    ended = bool(new) and new[-1] in ends
    text = str(tokenizer.decode(new, skip_special_tokens=True))
    full = not ended and fitting is not None and len(new) >= fitting
    return Answer(by, text, len(new), ended, round(time.perf_counter() - began, 3), full)


def voice_of(model: Any, by: str) -> AbstractContextManager[Any]:
    """Return where a model answers as itself, or as its ``base``: without its adapter."""
    leaves = by == "base" and hasattr(model, "peft_config")
    return model.disable_adapter() if leaves else nullcontext()
