"""Questions posed to a model, and its answers judged: units of work that are kept as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from san_llm.ask.answers import NEW_TOKENS, answers
from san_llm.ask.likelihood import ChoiceQuestion, ChoiceScore, encode_question, score_choices
from san_llm.data.batches import pad_id
from san_llm.data.encode import evaluation_text
from san_llm.data.rows import Row
from san_llm.errors import InputError
from san_llm.evaluate.harness import score_with_lm_eval
from san_llm.evaluate.questions import Questions, Settings
from san_llm.evaluate.score import (
    ANSWER_TEXT,
    Choice,
    Judged,
    judge_choices,
    judge_text,
    offered,
    parse_answer,
)
from san_llm.launch.processes import world_size
from san_llm.models.agree import refuse_past_embedding
from san_llm.models.rotary import alike_to
from san_llm.protocol.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


SCORED_AT_ONCE = 16  # rows of a unit by likelihood
HARNESS_AT_ONCE = 256  # lm_eval takes a second to start


@dataclass(frozen=True)
class Item:
    """One row as it is asked.

    Attributes:
        task: The row's task.
        number: The row's number in the task's file, from 0.
        row: The row.
        prompt: The exact text that the model is given.
        tokens: The prompt's tokens.
        answers: By likelihood: the answers that are compared.
    """

    task: Task
    number: int
    row: Row
    prompt: str
    tokens: list[int]
    answers: tuple[str, ...] = ()

    @property
    def question(self) -> ChoiceQuestion:
        """The prompt and the text of each answer."""
        return ChoiceQuestion(self.prompt, tuple(map(ANSWER_TEXT.format, self.answers)))


def pose(
    questions: Questions,
    settings: Settings,
    tokenizer: PreTrainedTokenizerFast,
    config: Any,
) -> list[Item]:
    """Return every row with its prompt, checked to leave room for an answer.

    Args:
        questions: The rows.
        settings: How to ask.
        tokenizer: The model's tokenizer.
        config: The model's config.

    Raises:
        InputError: naming the row whose prompt and answer are too long, or cannot be written, or
            hold a token that the model does not know.
    """
    context = getattr(config, "max_position_embeddings", None)
    if settings.protocol == "generate":
        pad_id(tokenizer)
    items = []
    for task, rows in questions.rows.items():
        for number, row in enumerate(rows):
            text, tokens = evaluation_text(settings.prompt, row, tokenizer)
            refuse_past_embedding(tokens, config.vocab_size, row.where, tokenizer)
            choices: tuple[str, ...] = ()
            if settings.protocol != "generate":
                choices = offered(task, row.instruction, row.answer)
            item = Item(task, number, row, text, tokens, choices)
            if context is not None:
                _check_length(item, tokenizer, context)
            items.append(item)
    return items


def _check_length(item: Item, tokenizer: PreTrainedTokenizerFast, context: int) -> None:
    if not item.answers:
        if len(item.tokens) + NEW_TOKENS > context:
            raise InputError(
                f"{item.row.where}: its prompt has {len(item.tokens):,} tokens; with {NEW_TOKENS} "
                f"new ones that is more than the model's context of {context:,}"
            )
        return
    # A token has a character at least: only where that may not do, tokens are counted.
    if len(item.tokens) + max(map(len, item.question.choices)) + 1 > context:
        prompt, choices = encode_question(item.question, tokenizer)
        longest = len(prompt) + max(map(len, choices))
        if longest > context:
            raise InputError(
                f"{item.row.where}: with an answer it has {longest:,} tokens, more than the "
                f"model's context of {context:,}"
            )


def units(items: Sequence[Item], settings: Settings) -> list[list[int]]:
    """Return the item numbers that are answered together, the longest prompts first."""
    order = sorted(range(len(items)), key=lambda i: (-len(items[i].tokens), i))
    if settings.protocol == "generate" or settings.strict:
        size = 1  # generate makes its own batches, and an answer does not depend on them
    elif settings.protocol == "lm-eval":
        size = min(HARNESS_AT_ONCE, -(-len(items) // world_size()))
    else:
        size = settings.batch_size or SCORED_AT_ONCE
    return [order[start : start + size] for start in range(0, len(order), size)]


def judged_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[Item],
    settings: Settings,
    todo: Sequence[Sequence[int]],
) -> Iterator[dict[int, Judged]]:
    """Give a loaded model's answers to items, judged, as they come.

    Args:
        model: Base, adapted or merged, in eval mode.
        tokenizer: The model's tokenizer.
        items: All items.
        settings: How to ask.
        todo: Units of item numbers that are to be answered.

    Yields:
        Judged rows by item number.
    """
    with _strictly(settings.strict):
        if settings.protocol == "generate":
            numbers = [number for unit in todo for number in unit]
            yield from _generated(model, tokenizer, items, settings, numbers)
            return
        for unit in todo:
            in_unit = [items[number] for number in unit]
            scored = _scores(model, tokenizer, in_unit, settings)
            yield {
                number: _judge(item, scores)
                for number, item, scores in zip(unit, in_unit, scored, strict=True)
            }


def _generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[Item],
    settings: Settings,
    numbers: Sequence[int],
) -> Iterator[dict[int, Judged]]:
    def first_match(place: int, text: str) -> str | None:
        return parse_answer(items[numbers[place]].task, text)

    prompts = [items[number].tokens for number in numbers]
    size = 1 if settings.strict else settings.batch_size
    read = first_match if settings.answers_only else None
    for texts in answers(model, tokenizer, prompts, size, read):
        judged = {}
        for place, text in texts:
            item = items[numbers[place]]
            judged[numbers[place]] = judge_text(
                item.task, item.number, item.prompt, text, item.row.answer
            )
        yield judged


def _scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[Item],
    settings: Settings,
) -> Iterable[list[ChoiceScore]]:
    questions = [item.question for item in items]
    if settings.protocol == "loglik":
        return score_choices(model, tokenizer, questions)
    right = [item.answers.index(item.row.answer) for item in items]
    # The harness pads to the longest: of rows that their length rotates otherwise, each is alone.
    longest = max(len(item.tokens) + max(map(len, item.question.choices)) for item in items)
    alone = settings.strict or longest > alike_to(model.config)
    at_once = 1 if alone else settings.batch_size or SCORED_AT_ONCE
    return score_with_lm_eval(model, tokenizer, questions, right, at_once)


def _judge(item: Item, scores: Sequence[ChoiceScore]) -> Judged:
    choices = [
        Choice(name, text, score.logprob, score.greedy, score.length)
        for name, text, score in zip(item.answers, item.question.choices, scores, strict=True)
    ]
    return judge_choices(item.task, item.number, item.prompt, choices, item.row.answer)


@contextmanager
def _strictly(strict: bool) -> Iterator[None]:
    """Compute the same whatever else runs: one CPU thread, and no shortened sums on a GPU."""
    if not strict:
        yield
        return
    threads = torch.get_num_threads()
    matmul: Any = torch.backends.cuda.matmul
    names = (
        *("allow_tf32", "allow_bf16_reduced_precision_reduction"),
        "allow_fp16_reduced_precision_reduction",
    )
    before = {name: getattr(matmul, name) for name in names}
    torch.set_num_threads(1)
    for name in names:
        setattr(matmul, name, False)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for name, value in before.items():
            setattr(matmul, name, value)
