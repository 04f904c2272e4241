"""The evaluations of a study's runs: what is asked, which are there, what each row came to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from san_llm.errors import InputError
from san_llm.evaluate.questions import read_questions, rows_asked
from san_llm.evaluate.store import read_evaluation
from san_llm.protocol.prompts import PromptStyle
from san_llm.protocol.tasks import Task
from san_llm.recipe.task_file import FORGETTING, AnyTask, OwnTask, find_any
from san_llm.runs.folder import is_its_model
from san_llm.runs.record import (
    TaskRows,
    evaluations_of,
    read_evaluation_manifest,
    read_results,
)
from san_llm.study.record import Measure
from san_llm.study.schema import Study, recipe_of

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Asked:
    """What every run of a study is asked, alike.

    Attributes:
        tasks: The tasks.
        names: What names them on the command line.
        data: Where the rows of the eight are.
        prompt: The prompt style.
        limit: Only so many rows of each task; None: all.
        protocol: How the eight are asked.
        rows: The rows of each task, as an evaluation's identity tells them.
    """

    tasks: tuple[AnyTask, ...]
    names: tuple[str, ...]
    data: str
    prompt: PromptStyle
    limit: int | None
    protocol: str
    rows: dict[str, TaskRows]

    @property
    def arguments(self) -> list[str]:
        """The options of ``san-llm eval`` that ask this."""
        options = ["--tasks", ",".join(self.names), "--data", self.data, "--prompt", self.prompt]
        # A run that was made elsewhere may have a recipe that asks for more, or for fewer rows.
        limit = self.limit or max(told.rows for told in self.rows.values())
        return [
            *options,
            *("--protocol", self.protocol, "--no-forgetting", "--limit", str(limit)),
        ]


def asked_of(study: Study) -> Asked:
    """Return what the baseline's recipe says is asked; it is asked of all variants.

    Raises:
        InputError: when a task or one of its rows is wrong.
    """
    recipe = recipe_of(study, study.baseline)
    evaluation, prompt = recipe.evaluation, recipe.evaluation.prompt or recipe.data.prompt
    names = (*evaluation.tasks, *([FORGETTING] if evaluation.forgetting else []))
    tasks = tuple(find_any(names))
    questions = read_questions(tasks, evaluation.data, evaluation.limit)
    return Asked(
        tasks=tasks,
        names=names,
        data=evaluation.data,
        prompt=prompt,
        limit=evaluation.limit,
        protocol=study.protocol,
        rows={name: TaskRows(**told) for name, told in rows_asked(questions).items()},
    )


def find_evaluation(run: Path, asked: Asked, of_base: bool = False) -> Path | None:
    """Return the folder of a run's evaluation that asked this, of its adapter or of the base."""
    for folder in reversed(evaluations_of(run)):
        try:
            told, results = read_evaluation_manifest(folder).identity, read_results(folder)
        except InputError:  # another version's, or damaged: asked anew
            continue
        same = told.protocol.name == asked.protocol and told.protocol.prompt == asked.prompt
        tuned = told.adapter is not None or is_its_model(results.model, run)
        if same and tuned != of_base and told.data == asked.rows:
            return folder
    return None


def row_values(folder: Path) -> dict[str, np.ndarray]:
    """Return each task's numbers by row, whose mean is the task's score.

    Of a loss each row counts by its tokens, so that the mean is the loss a token. Forgetting is the
    rise of the loss over the base's, which the same evaluation has; the base alone has none.
    """
    import numpy as np

    by_task: dict[str, list[tuple[float, int | None]]] = {}
    for row in sorted(read_evaluation(folder).rows, key=lambda row: row.row):
        if row.task == FORGETTING and row.loss is not None:
            if row.base_loss is not None:
                by_task.setdefault(row.task, []).append((row.loss - row.base_loss, row.tokens))
        elif row.loss is not None:
            by_task.setdefault(row.task, []).append((row.loss, row.tokens))
        else:
            by_task.setdefault(row.task, []).append((row.value, None))
    values = {}
    for task, pairs in by_task.items():
        numbers = np.array([number for number, _ in pairs])
        if pairs[0][1] is not None:
            numbers = numbers * len(pairs) / sum(tokens or 0 for _, tokens in pairs)
        values[task] = numbers
    return values


def measures_of(asked: Asked) -> list[Measure]:
    """Return what the tasks measure, without the base's values; forgetting is the last."""
    measures = []
    for task in asked.tasks:
        own = task.says if isinstance(task, OwnTask) else None
        by_loss = own is not None and own.judge == "loss"
        guessing = task.guessing if isinstance(task, Task) else task.says.guessing
        measures.append(
            Measure(
                name=task.name,
                unit="nats" if by_loss else "share",
                lower_is_better=by_loss,
                rows=asked.rows[task.name].rows,
                guessing=guessing,
            )
        )
    return measures
