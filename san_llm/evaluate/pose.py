"""Questions posed to a model, and its answers judged: units of work that are kept as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from san_llm.ask.answers import NEW_TOKENS, answers
from san_llm.ask.harness import ask_harness, score_with_lm_eval
from san_llm.ask.likelihood import ChoiceQuestion, ChoiceScore, encode_question, score_choices
from san_llm.ask.losses import score_losses
from san_llm.data.batches import pad_id
from san_llm.data.encode import (
    IGNORE,
    Encoding,
    check_tokenizer,
    evaluation_text,
    label_rows,
)
from san_llm.data.rows import Row
from san_llm.errors import InputError
from san_llm.evaluate.harness import Asked, HarnessTask
from san_llm.evaluate.questions import Protocol, Questions, Settings
from san_llm.evaluate.score import (
    ANSWER_TEXT,
    Choice,
    Judged,
    judge_choices,
    judge_sample,
    judge_text,
    offered,
    parse_answer,
)
from san_llm.launch.processes import world_size
from san_llm.models.agree import refuse_past_embedding
from san_llm.models.rotary import alike_to
from san_llm.protocol.prompts import Frame, training_prompt
from san_llm.protocol.tasks import Task
from san_llm.recipe.schema import MOST
from san_llm.recipe.task_file import FORGETTING, TEXT, Judge, OwnTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


SCORED_AT_ONCE = 16  # rows of a unit by likelihood
HARNESS_AT_ONCE = 256  # lm_eval takes a second to start

Way = Literal["generate", "choice", "loss", "lm-eval", "harness"]
# How a protocol asks the eight, and what of a task of one's own is not generated.
WAYS: dict[Protocol, Way] = {"generate": "generate", "loglik": "choice", "lm-eval": "lm-eval"}
SCORED: dict[Judge, Way] = {"choice": "choice", "loss": "loss"}


@dataclass(frozen=True)
class Item:
    """One row as it is asked.

    Attributes:
        task: The row's task.
        way: How the model is asked.
        number: The row's number in the task's file, from 0.
        row: The row.
        prompt: The exact text that the model is given; of lm_eval's own tasks it alone knows it.
        tokens: The prompt's tokens; by loss: those of the answer, too.
        answers: By likelihood: the answers that are compared.
        labels: By loss: the tokens where they count, elsewhere -100.
    """

    task: Asked
    way: Way
    number: int
    row: Row
    prompt: str
    tokens: list[int]
    answers: tuple[str, ...] = ()
    labels: list[int] = field(default_factory=list)

    @property
    def question(self) -> ChoiceQuestion:
        """The prompt and the text of each answer."""
        own = isinstance(self.task, OwnTask)
        texts = self.answers if own else map(ANSWER_TEXT.format, self.answers)
        return ChoiceQuestion(self.prompt, tuple(texts))

    @property
    def source(self) -> str:
        """The task as lm_eval knows it, which may have several metrics."""
        return self.task.source if isinstance(self.task, HarnessTask) else self.task.name

    @property
    def new_tokens(self) -> int:
        """The most tokens of a generated answer."""
        own = self.task.says.new_tokens if isinstance(self.task, OwnTask) else None
        return own or NEW_TOKENS


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
    items = []
    for task, rows in questions.rows.items():
        for item in _posed(task, rows, settings, tokenizer):
            refuse_past_embedding(item.tokens, config.vocab_size, item.row.where, tokenizer)
            if context is not None:
                _check_length(item, tokenizer, context)
            items.append(item)
    if any(item.way == "generate" for item in items):
        pad_id(tokenizer)
    return items


def _posed(
    task: Asked, rows: Sequence[Row], settings: Settings, tokenizer: PreTrainedTokenizerFast
) -> Iterator[Item]:
    """Give a task's rows as they are asked: the eight by the protocol, one's own by its judge."""
    if isinstance(task, HarnessTask):
        if settings.prompt == "chat":
            check_tokenizer(tokenizer, "chat")
        yield from (Item(task, "harness", number, row, "", []) for number, row in enumerate(rows))
        return
    if not isinstance(task, OwnTask):
        way = WAYS[settings.protocol]
        for number, row in enumerate(rows):
            text, tokens = evaluation_text(settings.prompt, row, tokenizer)
            answers = offered(task, row.instruction, row.answer) if way != "generate" else ()
            yield Item(task, way, number, row, text, tokens, answers)
        return
    frame, way = _frame(task, settings), SCORED.get(task.says.judge, "generate")
    if way == "loss":
        yield from _with_labels(task, rows, frame, tokenizer)
        return
    for number, row in enumerate(rows):
        text, tokens = evaluation_text(frame, row, tokenizer)
        if way == "choice" and frame == "none":
            text = training_prompt(frame, row.instruction, row.context)  # a space, then the choice
        yield Item(task, way, number, row, text, tokens, row.choices)


def _frame(task: Asked, settings: Settings) -> Frame:
    """Return what stands around a task's questions."""
    if not isinstance(task, OwnTask):
        return settings.prompt
    usual: Frame = "none" if task.rows.suffix.lower() == TEXT else settings.prompt
    return task.says.prompt or usual


def _with_labels(
    task: OwnTask, rows: Sequence[Row], frame: Frame, tokenizer: PreTrainedTokenizerFast
) -> Iterator[Item]:
    """Give rows as training reads them, the answer and its end learned, none of it cut away.

    A text that answers nothing has no end: of it all counts that follows the start token.
    """
    check_tokenizer(tokenizer, frame)
    if frame == "none" and not any(row.instruction or row.messages for row in rows):
        for number, row in enumerate(rows):
            (start,), (text,) = encode_question(ChoiceQuestion("", (row.output,)), tokenizer)
            labels = [IGNORE, *text]
            yield Item(task, "loss", number, row, "", [start, *text], (), labels)
        return
    encoding = Encoding(tokenizer, frame, "response", MOST)
    for number, (row, labelled) in enumerate(zip(rows, label_rows(rows, encoding), strict=True)):
        begin = next(place for place, label in enumerate(labelled.labels) if label != IGNORE)
        prompt = str(tokenizer.decode(labelled.tokens[:begin]))
        yield Item(task, "loss", number, row, prompt, labelled.tokens, (), labelled.labels)


def _check_length(item: Item, tokenizer: PreTrainedTokenizerFast, context: int) -> None:
    where, count = item.row.where, len(item.tokens)
    if item.way == "generate" and count + item.new_tokens > context:
        raise InputError(
            f"{where}: its prompt has {count:,} tokens; with {item.new_tokens} new ones that is "
            f"more than the model's context of {context:,}"
        )
    if item.way == "loss":
        longest = count
    # A token has a character at least: only where that may not do, tokens are counted.
    elif item.answers and count + max(map(len, item.question.choices)) + 1 > context:
        prompt, choices = encode_question(item.question, tokenizer)
        longest = len(prompt) + max(map(len, choices))
    else:
        return
    if longest > context:
        raise InputError(
            f"{where}: with an answer it has {longest:,} tokens, more than the model's context of "
            f"{context:,}"
        )


def units(items: Sequence[Item], settings: Settings) -> list[list[int]]:
    """Return the item numbers that are answered together, the longest prompts first."""
    order = sorted(range(len(items)), key=lambda i: (-len(items[i].tokens), i))
    by_way: dict[tuple[Way, str], list[int]] = {}
    for number in order:
        way = items[number].way
        source = items[number].source if way == "harness" else ""
        by_way.setdefault((way, source), []).append(number)
    found = []
    for (way, _), numbers in by_way.items():
        size = _unit_size(way, len(numbers), settings)
        found += [numbers[start : start + size] for start in range(0, len(numbers), size)]
    return found


def _unit_size(way: Way, count: int, settings: Settings) -> int:
    if way == "harness":
        return count  # which reads a task's examples once
    if way == "generate" or settings.strict:
        return 1  # generate makes its own batches, and an answer does not depend on them
    if way == "lm-eval":
        return min(HARNESS_AT_ONCE, -(-count // world_size()))
    return settings.batch_size or SCORED_AT_ONCE


def judged_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[Item],
    settings: Settings,
    todo: Sequence[Sequence[int]],
    base_losses: Mapping[int, float] | None = None,
) -> Iterator[dict[int, Judged]]:
    """Give a loaded model's answers to items, judged, as they come.

    Args:
        model: Base, adapted or merged, in eval mode.
        tokenizer: The model's tokenizer.
        items: All items.
        settings: How to ask.
        todo: Units of item numbers that are to be answered.
        base_losses: Of the neutral text: the base's losses by item number; an adapted model is its
            own base, without the adapter.

    Yields:
        Judged rows by item number.
    """
    generated: dict[tuple[bool, int], list[int]] = {}
    with _strictly(settings.strict):
        for unit in todo:
            in_unit = [items[number] for number in unit]
            first = in_unit[0]
            if first.way == "generate":
                alike = isinstance(first.task, OwnTask), first.new_tokens
                generated.setdefault(alike, []).extend(unit)
            elif first.way == "harness":
                yield dict(zip(unit, _by_harness(model, tokenizer, in_unit, settings), strict=True))
            elif first.way == "loss":
                losses = zip(unit, in_unit, _losses(model, in_unit), strict=True)
                judged = {number: _with_loss(item, loss) for number, item, loss in losses}
                yield judged | _with_base(model, items, judged, base_losses or {})
            else:
                scored = _scores(model, tokenizer, in_unit, settings)
                yield {
                    number: _judge(item, scores)
                    for number, item, scores in zip(unit, in_unit, scored, strict=True)
                }
        for numbers in generated.values():
            yield from _generated(model, tokenizer, items, settings, numbers)


def _generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[Item],
    settings: Settings,
    numbers: Sequence[int],
) -> Iterator[dict[int, Judged]]:
    """Give the answers to items of the eight, or of tasks of one's own with as many new tokens."""

    def first_match(place: int, text: str) -> str | None:
        task = items[numbers[place]].task
        assert isinstance(task, Task)
        return parse_answer(task, text)

    first = items[numbers[0]]
    prompts = [items[number].tokens for number in numbers]
    size = 1 if settings.strict else settings.batch_size
    # More text may change what the judge of a task of one's own reads.
    certain = settings.answers_only and not isinstance(first.task, OwnTask)
    read = first_match if certain else None
    chat = any(_frame(items[number].task, settings) == "chat" for number in numbers)
    for texts in answers(model, tokenizer, prompts, size, read, first.new_tokens, chat):
        judged = {}
        for place, text in texts:
            item = items[numbers[place]]
            judged[numbers[place]] = judge_text(
                item.task, item.number, item.prompt, text, item.row.answer
            )
        yield judged


def _by_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[Item],
    settings: Settings,
) -> Iterator[Judged]:
    """Give the rows of one of lm_eval's own tasks, for each of its metrics."""
    size = 1 if settings.strict else settings.batch_size or SCORED_AT_ONCE
    rows = 1 + max(item.number for item in items)
    tasks = [item.task for item in items if isinstance(item.task, HarnessTask)]
    samples = ask_harness(model, tokenizer, tasks[0].made, rows, settings.prompt, size)
    for task, item in zip(tasks, items, strict=True):
        yield judge_sample(task, item.number, samples[task.filter][item.number])


def _losses(model: PreTrainedModel, items: Sequence[Item]) -> list[float]:
    return list(score_losses(model, [(item.tokens, item.labels) for item in items]))


def neutral_losses(
    model: PreTrainedModel, items: Sequence[Item], todo: Sequence[Sequence[int]]
) -> dict[int, float]:
    """Return a model's losses of the neutral text's chunks, by item number."""
    found: dict[int, float] = {}
    for unit in todo:
        numbers = [number for number in unit if items[number].task.name == FORGETTING]
        found |= zip(numbers, _losses(model, [items[n] for n in numbers]), strict=True)
    return found


def _with_base(
    model: PreTrainedModel,
    items: Sequence[Item],
    judged: Mapping[int, Judged],
    base_losses: Mapping[int, float],
) -> dict[int, Judged]:
    """Return the rows of the neutral text with the base's losses, where a base is known."""
    bare: Any = model
    if hasattr(model, "peft_config"):
        with bare.disable_adapter():
            base_losses = neutral_losses(model, items, [list(judged)])
    return {
        number: replace(row, base_loss=base_losses[number])
        for number, row in judged.items()
        if number in base_losses
    }


def _with_loss(item: Item, loss: float) -> Judged:
    count = sum(label != IGNORE for label in item.labels)
    return Judged(
        *(item.task.name, item.number, item.prompt, "", None, item.row.answer, False),
        loss=loss,
        tokens=count,
    )


def _scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[Item],
    settings: Settings,
) -> Iterable[list[ChoiceScore]]:
    questions = [item.question for item in items]
    if items[0].way == "choice":
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
