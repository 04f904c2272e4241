"""How likely a model finds each choice after a prompt, as lm-evaluation-harness defines it.

A choice's score is the sum of its tokens' log-probabilities. ``acc`` takes the choice with the
highest score, ``acc_norm`` the one with the highest score a character. Where a choice's tokens
begin is decided as ``lm_eval``'s ``HFLM`` does (version 0.4.13, ``_encode_pair``): white space at
the prompt's end belongs to the choice, and the choice is what the tokens of both have after as many
tokens as the prompt has alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from san_llm.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class ChoiceQuestion:
    """A prompt, and the texts that may follow it directly; a space between is the choice's."""

    prompt: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class ChoiceScore:
    """How likely a choice is.

    Attributes:
        logprob: The sum of its tokens' log-probabilities.
        greedy: Whether each of its tokens is the most likely one.
        length: Its characters, by which ``acc_norm`` divides.
    """

    logprob: float
    greedy: bool
    length: int


def score_choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[ChoiceQuestion],
    done: Callable[[int], None] = lambda count: None,
) -> list[list[ChoiceScore]]:
    """Score every choice of every question.

    Args:
        model: A causal LM, in eval mode.
        tokenizer: Its tokenizer.
        questions: What is asked.
        done: Called with the number of questions that a forward has answered.

    Returns:
        The scores of each question's choices, in their order.

    Raises:
        InputError: when a choice has no tokens, or does not fit into the model's context.
    """
    encoded = [encode_question(question, tokenizer) for question in questions]
    _check_lengths(model, questions, encoded)
    scores: list[list[ChoiceScore]] = [[] for _ in questions]
    for number, (prompt, choices) in enumerate(encoded):
        for text, choice in zip(questions[number].choices, choices, strict=True):
            tokens = torch.tensor([prompt + choice], device=model.device)
            with torch.inference_mode():
                logits = model(input_ids=tokens[:, :-1], logits_to_keep=len(choice)).logits[0]
            logprobs = logits.float().log_softmax(-1)
            wanted = tokens[0, len(prompt) :]
            scores[number].append(
                ChoiceScore(
                    logprob=logprobs.gather(1, wanted[:, None]).sum().item(),
                    greedy=bool((logprobs.argmax(-1) == wanted).all()),
                    length=len(text),
                )
            )
        done(1)
    return scores


def encode_question(
    question: ChoiceQuestion, tokenizer: PreTrainedTokenizerFast
) -> tuple[list[int], list[list[int]]]:
    """Return the tokens of the prompt, and of each choice after it."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def encode(text: str, bare: bool = False) -> list[int]:
        # A chat template writes the start token itself.
        if bare or text.startswith(str(tokenizer.decode(start))):
            return list(tokenizer.encode(text, add_special_tokens=False))
        return list(tokenizer.encode(text))

    prompt = question.prompt.rstrip()
    if not prompt:
        # Something must come before the first token: the start token does.
        alone = [encode(question.prompt + choice, bare=True) for choice in question.choices]
        return [start], [tokens[1:] if tokens[:1] == [start] else tokens for tokens in alone]
    before = encode(prompt)
    space = question.prompt[len(prompt) :]
    return before, [encode(prompt + space + choice)[len(before) :] for choice in question.choices]


def _check_lengths(
    model: PreTrainedModel,
    questions: Sequence[ChoiceQuestion],
    encoded: Sequence[tuple[list[int], list[list[int]]]],
) -> None:
    context = getattr(model.config, "max_position_embeddings", None)
    for number, (prompt, choices) in enumerate(encoded):
        for text, choice in zip(questions[number].choices, choices, strict=True):
            if not choice:
                raise InputError(f"question {number}: the choice {text!r} has no tokens")
            if context is not None and len(prompt) + len(choice) > context:
                raise InputError(
                    f"question {number}: with the choice {text!r} it has "
                    f"{len(prompt) + len(choice):,} tokens, more than the model's context of "
                    f"{context:,}"
                )
