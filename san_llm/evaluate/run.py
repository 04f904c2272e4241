"""Tasks under the protocol: read, prompt, generate, judge, and keep every row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from san_llm.data.encode import evaluation_text
from san_llm.data.prompts import PromptStyle
from san_llm.data.rows import Row, read_task, sha256_of, test_file
from san_llm.data.tasks import Task
from san_llm.errors import InputError
from san_llm.evaluate.generate import NEW_TOKENS, generate
from san_llm.evaluate.report import EvalResult
from san_llm.evaluate.score import Judged, parse_answer, score
from san_llm.progress import bar
from san_llm.record import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Questions:
    """The test rows of several tasks, read and checked before any model is loaded."""

    rows: dict[Task, list[Row]]
    sha256: dict[str, str]


def read_questions(tasks: Sequence[Task], data: str, limit: int | None) -> Questions:
    """Read the test rows of each task; :func:`read_task` says what is refused."""
    files = {task: test_file(data, task) for task in tasks}
    return Questions(
        {task: read_task(file, task, limit) for task, file in files.items()},
        {str(file): sha256_of(file) for file in files.values()},
    )


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Questions,
    style: PromptStyle,
    folder: Path,
    about: Mapping[str, object],
    batch_size: int | None = None,
    output: Path | None = None,
) -> EvalResult:
    """Answer all questions and write ``rows.jsonl`` and ``results.json``.

    Args:
        model: Base, adapted or merged, in eval mode.
        tokenizer: Its tokenizer.
        questions: What is asked.
        style: The prompt style.
        folder: Where to write, there already.
        about: What was evaluated, for the record.
        batch_size: Prompts at once; None: chosen by memory. It does not change the answers.
        output: What the record calls the folder, when it is to be renamed.

    Returns:
        The scores, in the order of the tasks.

    Raises:
        InputError: when a prompt and its answer are longer than the model's context.
    """
    flat = [
        (task, number, row)
        for task, rows in questions.rows.items()
        for number, row in enumerate(rows)
    ]
    prompts = [evaluation_text(style, row, tokenizer) for _, _, row in flat]
    context = getattr(model.config, "max_position_embeddings", None)
    for (_, _, row), (_, tokens) in zip(flat, prompts, strict=True):
        if context is not None and len(tokens) + NEW_TOKENS > context:
            raise InputError(
                f"{row.where}: its prompt has {len(tokens):,} tokens; with {NEW_TOKENS} new ones "
                f"that is more than the model's context of {context:,}"
            )
    judged: dict[int, Judged] = {}
    with (
        bar("Evaluating", len(flat), "rows") as progress,
        (folder / "rows.jsonl").open("w", encoding="utf-8") as file,
    ):

        def keep(answers: list[tuple[int, str]]) -> None:
            for index, text in answers:
                task, number, row = flat[index]
                parsed = parse_answer(task, text)
                judged[index] = Judged(
                    task.name,
                    number,
                    prompts[index][0],
                    text,
                    parsed,
                    row.answer,
                    parsed == row.answer,
                )
                file.write(json.dumps(asdict(judged[index]), ensure_ascii=False) + "\n")
            file.flush()
            right = sum(row.correct for row in judged.values())
            progress.advance(len(answers), f"{right} right")

        generate(model, tokenizer, [tokens for _, tokens in prompts], batch_size, keep)
    by_task: dict[str, list[Judged]] = {}
    for index in sorted(judged):
        by_task.setdefault(judged[index].task, []).append(judged[index])
    result = EvalResult(
        scores=tuple(score(task, by_task[task.name]) for task in questions.rows),
        prompt=style,
        output=str(output or folder),
        about=about,
    )
    write_json(folder / "results.json", {**result.to_json(), "sha256": questions.sha256})
    return result
