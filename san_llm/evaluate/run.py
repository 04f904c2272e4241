"""Tasks under a protocol: read, prompt, answer, judge, and keep every row.

Rows are sorted by length and answered in units, which are dealt to the processes in turn. Units do
not depend on the number of processes or on what was answered before, so that neither does an
answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from san_llm.data.encode import evaluation_text, pad_id
from san_llm.data.rows import Row
from san_llm.data.tasks import Task
from san_llm.errors import InputError
from san_llm.evaluate.fingerprint import code_sha256, folder_sha256
from san_llm.evaluate.generate import BEAMS, NEW_TOKENS, generate
from san_llm.evaluate.harness import check_installed, score_with_lm_eval
from san_llm.evaluate.loglik import ChoiceQuestion, ChoiceScore, encode_question, score_choices
from san_llm.evaluate.protocol import Settings
from san_llm.evaluate.questions import Questions
from san_llm.evaluate.report import EvalResult
from san_llm.evaluate.score import (
    ANSWER_TEXT,
    Choice,
    Judged,
    judge_choices,
    judge_text,
    offered,
    parse_answer,
    score,
)
from san_llm.evaluate.store import Part, Progress, progress_of, write_evaluation
from san_llm.locate import base_folder
from san_llm.model import load_config, load_subject, load_tokenizer
from san_llm.processes import agree, gather, is_first, rank, told_once, world_size
from san_llm.progress import bar, stderr
from san_llm.record import manifest, versions, whole_folder
from san_llm.subject import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

FORMAT = 1  # part of the key: raise it when the same inputs give other rows
SCORED_AT_ONCE = 16  # rows of a unit by likelihood
HARNESS_AT_ONCE = 256  # lm_eval takes a second to start


@dataclass(frozen=True)
class Item:
    """One row as it is asked.

    Attributes:
        task: Its task.
        number: Its number in the task's file, from 0.
        row: The row.
        prompt: The exact text.
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
    context: int | None,
) -> list[Item]:
    """Write every row's prompt, and check that it can be answered.

    Args:
        questions: The rows.
        settings: How to ask.
        tokenizer: The model's.
        context: Tokens that the model can hold; None: any number.

    Raises:
        InputError: naming the row whose prompt and answer are too long, or cannot be written.
    """
    if settings.protocol == "generate":
        pad_id(tokenizer)
    items = []
    for task, rows in questions.rows.items():
        for number, row in enumerate(rows):
            text, tokens = evaluation_text(settings.prompt, row, tokenizer)
            answers: tuple[str, ...] = ()
            if settings.protocol != "generate":
                answers = offered(task, row.instruction, row.answer)
            item = Item(task, number, row, text, tokens, answers)
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


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[Item],
    settings: Settings,
    todo: Sequence[Sequence[int]],
    keep: Callable[[dict[int, Judged]], None],
) -> None:
    """Answer items with a loaded model.

    Args:
        model: Base, adapted or merged, in eval mode.
        tokenizer: Its tokenizer.
        items: All items.
        settings: How.
        todo: Units of item numbers.
        keep: Called with answered rows by item number, as they come.
    """
    with _strictly(settings.strict):
        if settings.protocol == "generate":
            _generate(model, tokenizer, items, settings, [n for unit in todo for n in unit], keep)
            return
        for unit in todo:
            asked = [items[number] for number in unit]
            found = _scores(model, tokenizer, asked, settings)
            keep(
                {
                    number: _judge(item, scores)
                    for number, item, scores in zip(unit, asked, found, strict=True)
                }
            )


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[Item],
    settings: Settings,
    numbers: Sequence[int],
    keep: Callable[[dict[int, Judged]], None],
) -> None:
    def done(answers: list[tuple[int, str]]) -> None:
        judged = {}
        for place, text in answers:
            item = items[numbers[place]]
            judged[numbers[place]] = judge_text(
                item.task, item.number, item.prompt, text, item.row.answer
            )
        keep(judged)

    def first_match(place: int, text: str) -> str | None:
        return parse_answer(items[numbers[place]].task, text)

    prompts = [items[number].tokens for number in numbers]
    size = 1 if settings.strict else settings.batch_size
    how = {"answer": first_match} if settings.answers_only else {}
    generate(model, tokenizer, prompts, size, done, **how)


def _scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    asked: Sequence[Item],
    settings: Settings,
) -> list[list[ChoiceScore]]:
    questions = [item.question for item in asked]
    if settings.protocol == "loglik":
        return score_choices(model, tokenizer, questions)
    right = [item.answers.index(item.row.answer) for item in asked]
    at_once = 1 if settings.strict else settings.batch_size or SCORED_AT_ONCE
    return score_with_lm_eval(model, tokenizer, questions, right, at_once)


def _judge(item: Item, scores: Sequence[ChoiceScore]) -> Judged:
    choices = [
        Choice(name, text, score.logprob, score.greedy, score.length)
        for name, text, score in zip(item.answers, item.question.choices, scores, strict=True)
    ]
    return judge_choices(item.task, item.number, item.prompt, choices, item.row.answer)


@contextmanager
def _strictly(strict: bool) -> Iterator[None]:
    """Leave nothing to what else runs: one CPU thread, and no shortened sums on a GPU."""
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


def evaluate(
    subject: Subject,
    questions: Questions,
    settings: Settings,
    about: Mapping[str, object],
    output: Path,
    overwrite: bool = False,
    fresh: bool = False,
) -> EvalResult | None:
    """Answer all questions, going on where the same evaluation stopped, and write its folder.

    Args:
        subject: What is evaluated.
        questions: What is asked.
        settings: How.
        about: What the record calls the model and the data.
        output: The folder; it appears when all rows are in it. Only the first process writes it.
        overwrite: Replace what is there.
        fresh: Answer every row, whatever was stored, and hash every file.

    Returns:
        The scores, in the order of the tasks; None in all processes but the first.

    Raises:
        InputError: when the model, the tokenizer or a row cannot serve.
        SanError: when the evaluation fails.
    """
    with told_once():
        if settings.protocol == "lm-eval":
            check_installed()
        tokenizer = load_tokenizer(subject.base)
        context = getattr(load_config(subject.base), "max_position_embeddings", None)
        items = pose(questions, settings, tokenizer, context)
        with ExitStack() as stack:
            progress: Progress | None = None
            rows: dict[int, Judged] = {}
            whole = False
            facts: dict[str, Any] = {}
            if is_first():
                facts = identity(subject, questions, settings, fresh)
                progress = stack.enter_context(progress_of(facts))
                rows, whole = _stored(progress, len(items), fresh)
            folder, done, whole = agree((progress.folder if progress else Path(), set(rows), whole))
            if not whole:
                todo = [u for u in units(items, settings) if not done.issuperset(u)]
                mine = todo[rank() :: world_size()]
                part = stack.enter_context(closing(Progress(folder).part()))
                new = _answer_mine(subject, items, settings, mine, part, len(rows))
                rows |= dict(gather(new))
            if progress is None:
                return None
            judged = [rows[number] for number in range(len(items))]
            result = _result(questions, settings, judged, about, output)
            facts = manifest(
                **about,
                key=progress.folder.name,
                identity=facts,
                batch_size=settings.batch_size,
                processes=world_size(),
                answered_before=len(done),
            )
            with whole_folder(output, overwrite) as temporary:
                digest = write_evaluation(
                    temporary, judged, result.to_json() | {"sha256": questions.sha256}, facts
                )
            progress.finish(output, digest)
            return result


def identity(
    subject: Subject, questions: Questions, settings: Settings, fresh: bool = False
) -> dict[str, Any]:
    """Return all that the answers depend on, by content: what makes it the same evaluation.

    Who shares a batch is among it where an answer's last bits may depend on that: not with
    ``strict``, nor in texts generated in fp32.
    """
    base = subject.base
    by_lm_eval, generated = (settings.protocol == name for name in ("lm-eval", "generate"))
    wide = base.dtype == "float32" and base.quantization != "8bit"
    exact = settings.strict or (wide and generated)
    shared: dict[str, Any] = {} if exact else {"batch_size": settings.batch_size}
    if not exact and settings.protocol != "loglik":
        shared["processes"] = world_size()
    how: dict[str, Any] = {"name": settings.protocol, "prompt": settings.prompt}
    if generated:
        how |= {"beams": BEAMS, "new_tokens": NEW_TOKENS, "answers_only": settings.answers_only}
    else:
        how["choices"] = ANSWER_TEXT
    return {
        "format": FORMAT,
        "model": folder_sha256(base_folder(base), fresh),
        "load": base.model_dump(mode="json", exclude={"model", "revision"}),
        "adapter": folder_sha256(subject.adapter, fresh) if subject.adapter else None,
        "data": {
            task.name: {"sha256": digest, "rows": len(rows)}
            for (task, rows), digest in zip(
                questions.rows.items(), questions.sha256.values(), strict=True
            )
        },
        "protocol": how | {"strict": settings.strict},
        **shared,
        "device": _device(),
        "versions": versions() | ({"lm_eval": version("lm_eval")} if by_lm_eval else {}),
        "code": code_sha256(),
    }


def _device() -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


def _stored(progress: Progress, count: int, fresh: bool) -> tuple[dict[int, Judged], bool]:
    """Return the rows that were answered before, and whether that is all of a finished one."""
    if fresh:
        progress.forget()
        return {}, False
    finished = progress.finished()
    if finished is not None and len(finished.rows) == count:
        stderr.print(
            f"all {count:,} rows were answered before, with the same model, data and settings: "
            f"{finished.folder} (--fresh answers them anew)",
            markup=False,
        )
        return dict(enumerate(finished.rows)), True
    rows = progress.rows()
    if rows:
        stderr.print(f"going on: {len(rows):,} of {count:,} rows were answered before")
    return rows, False


def _answer_mine(
    subject: Subject,
    items: Sequence[Item],
    settings: Settings,
    mine: Sequence[Sequence[int]],
    part: Part,
    before: int,
) -> list[tuple[int, Judged]]:
    """Answer this process's units."""
    new: dict[int, Judged] = {}
    if mine:
        model, tokenizer = load_subject(subject)
        total = sum(len(unit) for unit in mine)
        with bar("Evaluating", total, "rows", quiet=not is_first()) as shown:

            def keep(rows: dict[int, Judged]) -> None:
                part.append(rows)
                new.update(rows)
                shown.advance(len(rows), f"{sum(row.correct for row in new.values())} right")

            answer(model, tokenizer, items, settings, mine, keep)
    return list(new.items())


def _result(
    questions: Questions,
    settings: Settings,
    judged: Sequence[Judged],
    about: Mapping[str, object],
    output: Path,
) -> EvalResult:
    by_task: dict[str, list[Judged]] = {}
    for row in judged:
        by_task.setdefault(row.task, []).append(row)
    return EvalResult(
        scores=tuple(score(task, by_task[task.name]) for task in questions.rows),
        settings=settings,
        output=str(output),
        about=about,
        unparseable=tuple(row for row in judged if row.parsed is None),
        notes=questions.notes,
    )
