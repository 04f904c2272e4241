"""What an evaluation was asked, and all of it checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from san_llm.errors import InputError
from san_llm.evaluate.harness import (
    Asked,
    HarnessTask,
    check_installed,
    find_harness,
    of_the_harness,
)
from san_llm.evaluate.questions import Questions, Settings, find_protocol, read_questions
from san_llm.files import refuse_files
from san_llm.launch.processes import is_first
from san_llm.models.subject import Subject, checked_date, find_subject
from san_llm.protocol.prompts import Frame, prompt_style
from san_llm.recipe.schema import Evaluation
from san_llm.recipe.task_file import FORGETTING, OwnTask, find_any, neutral_task
from san_llm.runs.folder import new_eval_folder


@dataclass(frozen=True)
class EvalRequest:
    """What ``san-llm eval`` was asked; None stands for the recipe's word, or the default.

    Attributes:
        tasks: Names of tasks, and files of one's own.
        model: A model, by folder or hub id.
        adapter: An adapter's folder, or its run's.
        run: A run's folder, or an adapter's.
        base_only: Leave the adapter of the run out.
        data: ``pocket``, or a folder with ``<task>/test.json``.
        protocol: ``generate``, ``loglik`` or ``lm-eval``.
        prompt: The prompt style.
        date: What a chat template writes as today's date.
        limit: Only the first rows of each task.
        batch_size: Rows at once.
        dtype: The dtype to load weights in, instead of the base's.
        strict: Compute each row alone.
        answers_only: Generate no further than an answer is certain.
        processes: How many processes, on this machine.
        fresh: Answer every row, whatever was stored.
        output: The folder to make.
        overwrite: Replace what is there.
        forgetting: Take the loss of the neutral text, too.
    """

    tasks: Sequence[str] | None = None
    model: str | None = None
    adapter: Path | None = None
    run: Path | None = None
    base_only: bool = False
    data: str | None = None
    protocol: str = "generate"
    prompt: str | None = None
    date: str | None = None
    limit: int | None = None
    batch_size: int | None = None
    dtype: str | None = None
    strict: bool = False
    answers_only: bool = False
    processes: int | None = None
    fresh: bool = False
    output: Path | None = None
    overwrite: bool = False
    forgetting: bool | None = None


@dataclass(frozen=True)
class EvalTask:
    """An evaluation that can be made.

    Attributes:
        subject: What is evaluated.
        questions: The rows that are asked.
        settings: How they are asked.
        about: What the record calls the model and the data.
        output: The folder; it appears when all rows are in it. Only the first process writes it.
        overwrite: Replace what is there.
        fresh: Answer every row, whatever was stored, and hash every file.
    """

    subject: Subject
    questions: Questions
    settings: Settings
    about: dict[str, object]
    output: Path
    overwrite: bool = False
    fresh: bool = False


def _style(name: str | None, theirs: bool) -> Frame | None:
    """Return the prompt style that is named; ``none`` is one of lm_eval's own tasks alone."""
    if name is None or (theirs and name == "none"):
        return "none" if name else None
    return prompt_style(name)


def check_request(request: EvalRequest) -> EvalTask:
    """Return the evaluation that a request asks for, with what it names looked up and read.

    Raises:
        InputError: when an option, the adapter or a row cannot be right.
    """
    protocol = find_protocol(request.protocol)
    theirs = of_the_harness(request.tasks or ()) if protocol == "lm-eval" else []
    named = None if request.tasks is None or theirs else find_any(request.tasks)
    style = _style(request.prompt, bool(theirs))
    if theirs:
        check_installed()
    date = request.date and checked_date(request.date)
    if request.answers_only and protocol != "generate":
        raise InputError(f"--answers-only: protocol {protocol} generates nothing")
    subject = find_subject(
        request.model, request.adapter, request.base_only, request.dtype, request.run
    )
    defaults = subject.recipe.evaluation if subject.recipe else Evaluation()
    data, limit = request.data or defaults.data, request.limit or defaults.limit
    style = style or defaults.prompt or subject.prompt or ("none" if theirs else "llm-adapters")
    output = request.output
    if is_first():
        alone = "trained" if subject.whole else "base" if subject.run else "model"
        output = output or new_eval_folder(subject.run, "adapter" if subject.adapter else alone)
        refuse_files(output, request.overwrite)
    tasks: list[Asked] = (
        [*find_harness(theirs)] if theirs else [*(named or find_any(defaults.tasks))]
    )
    told = defaults.forgetting if request.forgetting is None else request.forgetting
    if told:
        tasks = list(dict.fromkeys([*tasks, neutral_task()]))
    own = [task for task in tasks if isinstance(task, OwnTask) and task.name != FORGETTING]
    neutral = ["the neutral text"] if neutral_task() in tasks else []
    if own and protocol == "lm-eval":
        raise InputError(
            f"--protocol lm-eval: it asks the eight and its own tasks, not {own[0].file}; "
            "--protocol generate and loglik ask that"
        )
    of_the_eight = [data] if len(own) + len(neutral) < len(tasks) and not theirs else []
    asked = ", ".join([*of_the_eight, *theirs, *(str(task.file) for task in own), *neutral])
    files = {task.name: str(task.file) for task in own}
    files |= {task.name: task.asked for task in tasks if isinstance(task, HarnessTask)}
    chat = "chat" in (style, *(task.says.prompt for task in own))
    return EvalTask(
        subject=subject,
        questions=read_questions(tasks, data, limit),
        settings=Settings(
            *(protocol, style, request.batch_size, request.strict, request.answers_only),
            date=date or subject.date if chat else None,
        ),
        about={
            "title": f"{subject} on {asked}",
            "model": subject.base.model,
            "adapter": str(subject.adapter) if subject.adapter else None,
            "data": data if of_the_eight else asked,
            "limit": limit,
            **({"task_files": files} if files else {}),
        },
        output=output or Path(),
        overwrite=request.overwrite,
        fresh=request.fresh,
    )
