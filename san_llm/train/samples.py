"""What a model says to chosen prompts while it learns.

The answers are the likeliest tokens, so nothing is drawn at random and the training goes on as if
nobody had asked. All processes answer together: where the base is sharded, each holds a part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from san_llm.ask.respond import Sampling, question, respond, room
from san_llm.errors import InputError
from san_llm.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Samples:
    """The prompts of a recipe, and when they are asked."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> None:
        """Write ``training.sample_prompts`` in the prompt style of the evaluation.

        Raises:
            InputError: when the style is ``chat`` and there is no chat template.
        """
        training = recipe.training
        style = recipe.evaluation.prompt or recipe.data.prompt
        self._tokenizer = tokenizer
        self._prompts = [question(text, style, tokenizer)[1] for text in training.sample_prompts]
        self._every = training.sample_every or training.evaluate_every
        self._sampling = Sampling(new_tokens=training.sample_tokens)

    def check(self, config: Any) -> None:
        """Refuse a prompt that leaves no room for an answer in a model of this config.

        Raises:
            InputError: naming it by its number.
        """
        for number, tokens in enumerate(self._prompts):
            try:
                room(tokens, config, self._tokenizer)
            except InputError as error:
                raise InputError(f"training.sample_prompts[{number}]: {error}") from None

    def due(self, step: int, last: int) -> bool:
        """Whether to ask after a step."""
        return bool(self._prompts) and step > 0 and (step % self._every == 0 or step >= last)

    def answers(self, model: Any) -> Iterator[tuple[str, str]]:
        """Give each answer as it comes: ``sample_1`` and its text.

        Args:
            model: In eval mode.
        """
        for number, tokens in enumerate(self._prompts, start=1):
            answer = respond(model, self._tokenizer, tokens, self._sampling, on_text=lambda _: None)
            yield f"sample_{number}", answer.text
