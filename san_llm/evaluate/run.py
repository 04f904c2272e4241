"""Tasks under a protocol: read, prompt, answer, judge, and keep every row.

Rows are sorted by length and answered in units, which are dealt to the processes in turn. Units do
not depend on the number of processes or on what was answered before, so that neither does an
answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from san_llm.evaluate.forgetting import forgotten, merged_over
from san_llm.evaluate.harness import check_installed
from san_llm.evaluate.identity import identity
from san_llm.evaluate.pose import Item, judged_answers, neutral_losses, pose, units
from san_llm.evaluate.questions import Settings
from san_llm.evaluate.request import EvalTask
from san_llm.evaluate.score import Judged, loss_score, score
from san_llm.evaluate.store import Part, Progress, progress_of, write_evaluation
from san_llm.evaluate.table import EvalResult
from san_llm.files import whole_folder
from san_llm.launch.processes import agree, gather, is_first, rank, told_once, world_size
from san_llm.models.load import load_config, load_model
from san_llm.models.locate import find_base
from san_llm.models.tokenizer import load_tokenizer
from san_llm.progress import bar, say
from san_llm.recipe.task_file import FORGETTING
from san_llm.runs.record import manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def evaluate(task: EvalTask) -> EvalResult | None:
    """Answer all questions, going on where the same evaluation stopped, and write its folder.

    Returns:
        The scores, in the order of the tasks; None in all processes but the first.

    Raises:
        InputError: when the model, the tokenizer or a row cannot serve.
        SanError: when the evaluation fails.
    """
    with told_once(), ExitStack() as stack:
        output = agree(task.output)
        if task.settings.protocol == "lm-eval":
            check_installed()
        found = find_base(task.subject.base)
        about, date = task.subject, task.settings.date
        tokenizer = load_tokenizer(found, about.adapter, date, bases_template=about.bases_template)
        config = load_config(found, task.subject.adapter)
        items = pose(task.questions, task.settings, tokenizer, config)
        neutral = any(asked.name == FORGETTING for asked in task.questions.rows)
        over = merged_over(task.subject) if neutral else None
        progress: Progress | None = None
        rows: dict[int, Judged] = {}
        whole = False
        facts: dict[str, Any] = {}
        if is_first():
            facts = identity(task, found, over)
            progress = stack.enter_context(progress_of(facts))
            rows, whole = _stored(progress, len(items), task.fresh)
        folder, done, whole = agree((progress.folder if progress else Path(), set(rows), whole))
        if not whole:
            todo = [u for u in units(items, task.settings) if not done.issuperset(u)]
            mine = todo[rank() :: world_size()]
            new: dict[int, Judged] = {}
            if mine:
                base_losses = neutral_losses(load_model(over, None), items, mine) if over else {}
                model = load_model(found, task.subject.adapter)
                file = stack.enter_context(closing(Progress(folder).part()))
                new = _answer(model, tokenizer, items, task.settings, mine, file, base_losses)
            rows |= dict(gather(list(new.items())))
        if progress is None:
            return None
        return _keep(task, output, progress, facts, [rows[n] for n in range(len(items))], len(done))


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[Item],
    settings: Settings,
    mine: Sequence[Sequence[int]],
    file: Part,
    base_losses: Mapping[int, float],
) -> dict[int, Judged]:
    """Return the answers to this process's units, each kept as soon as it is judged."""
    new: dict[int, Judged] = {}
    total = sum(len(unit) for unit in mine)
    with bar("Evaluating", total, "rows", quiet=not is_first()) as shown:
        for judged in judged_answers(model, tokenizer, items, settings, mine, base_losses):
            file.append(judged)
            new |= judged
            answered = [row.correct for row in new.values() if row.loss is None]
            shown.advance(len(judged), f"{sum(answered)} right" if answered else "")
    return new


def _keep(
    task: EvalTask,
    output: Path,
    progress: Progress,
    facts: dict[str, Any],
    judged: Sequence[Judged],
    answered_before: int,
) -> EvalResult:
    """Write the evaluation's folder, remember where it is, and return what it came to."""
    result = _result(task, output, judged)
    about = manifest(
        **task.about,
        key=progress.folder.name,
        identity=facts,
        batch_size=task.settings.batch_size,
        processes=world_size(),
        answered_before=answered_before,
    )
    with whole_folder(output, task.overwrite) as temporary:
        results = result.results.model_copy(update={"sha256": task.questions.sha256})
        digest = write_evaluation(temporary, judged, results, about)
    progress.finish(output, digest)
    return result


def _stored(progress: Progress, count: int, fresh: bool) -> tuple[dict[int, Judged], bool]:
    """Return the rows that were answered before, and whether they are all of a finished one."""
    if fresh:
        progress.forget()
        return {}, False
    finished = progress.finished()
    if finished is not None and len(finished.rows) == count:
        say(
            f"all {count:,} rows were answered before, with the same model, data and settings: "
            f"{finished.folder} (--fresh answers them anew)"
        )
        return dict(enumerate(finished.rows)), True
    rows = progress.rows()
    if rows:
        say(f"going on: {len(rows):,} of {count:,} rows were answered before")
    return rows, False


def _result(task: EvalTask, output: Path, judged: Sequence[Judged]) -> EvalResult:
    by_task: dict[str, list[Judged]] = {}
    for row in judged:
        by_task.setdefault(row.task, []).append(row)
    answered = {t: by_task[t.name] for t in task.questions.rows if by_task[t.name][0].loss is None}
    return EvalResult(
        scores=tuple(score(asked, rows) for asked, rows in answered.items()),
        losses=tuple(
            loss_score(asked, by_task[asked.name])
            for asked in task.questions.rows
            if asked not in answered
        ),
        settings=task.settings,
        output=str(output),
        about=task.about,
        unparseable=tuple(row for row in judged if row.unanswered),
        notes=task.questions.notes,
        forgetting=forgotten(judged),
    )
