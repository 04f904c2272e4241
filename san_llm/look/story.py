"""What the page says of one run: its story in three sentences, tables, and what is not there."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from san_llm.errors import InputError
from san_llm.evaluate.compare_tables import label, p_value, points
from san_llm.evaluate.differences import LEVEL, Difference
from san_llm.evaluate.grids import Grid
from san_llm.look.evaluations import Evaluated, Judgement, evenly, judge, overview
from san_llm.look.facts import Facts, Missing
from san_llm.look.figures import Drawing, check_matplotlib, drawing
from san_llm.look.held_out import Answered, answering, read_answered
from san_llm.look.numbers import numbers_of
from san_llm.look.plots import figures
from san_llm.look.repeat import Step, steps
from san_llm.recipe.schema import leaves
from san_llm.runs.record import MANIFEST, TaskAccuracy, held_out_parts
from san_llm.shown import duration, nats, percent, shown, with_error

LOSSES = 12  # rows of the table beside the curves


@dataclass(frozen=True)
class Part:
    """What the page says of one run.

    Attributes:
        label: ``A``, ``B``, ... where there are several.
        facts: What the run's files tell.
        story: What was done, in three sentences.
        drawings: The drawings that the run's data allow, by name.
        losses: Losses of some steps, per token; None where nothing was logged.
        costs: Time and memory.
        scales: What happened to the neuron scales, by module; None where they are not known.
        evaluations: Every evaluation, in a table; None where there is none.
        judgements: The adapter's evaluations, beside the base's.
        held_out: Held-out rows with the run's answers.
        manifest: The whole manifest, by dotted keys; None where training has not begun.
        repeat: The steps that make the run, its evaluations and the page again.
        missing: What is not there.
    """

    label: str
    facts: Facts
    story: tuple[str, ...]
    drawings: Mapping[str, Drawing]
    losses: Grid | None
    costs: Grid
    scales: Grid | None
    evaluations: Grid | None
    judgements: tuple[Judgement, ...]
    held_out: tuple[Answered, ...]
    manifest: Grid | None
    repeat: tuple[Step, ...]
    missing: tuple[Missing, ...]


def tell(
    number: int,
    facts: Facts,
    own: Sequence[Evaluated],
    others: Sequence[Evaluated],
    wrong: Sequence[Missing],
) -> Part:
    """Return what the page says of a run.

    Args:
        number: The run's place among the runs, from 0.
        facts: What the run's files tell.
        own: The run's evaluations.
        others: Those of other runs over the same base.
        wrong: What is wrong with evaluations that are left out.
    """
    judgements = judge(own, others)
    drawn, undrawn = drawings(facts)
    answered, unanswered = _answered(facts, bool(judgements))
    return Part(
        label=label(number),
        facts=facts,
        story=(_done(facts), _came_to(facts), *_last(judgements)),
        drawings=drawn,
        losses=_losses(facts),
        costs=_costs(facts),
        scales=_scales(facts),
        evaluations=overview(own) if own else None,
        judgements=tuple(judgements),
        held_out=answered,
        manifest=_manifest(facts),
        repeat=tuple(steps(facts, own)),
        missing=(
            *facts.missing,
            *wrong,
            *_not_judged(facts, judgements),
            *unanswered,
            *undrawn,
        ),
    )


def _last(judgements: Sequence[Judgement]) -> list[str]:
    return _scored(judgements[-1]) if judgements else []


def _not_judged(facts: Facts, judgements: Sequence[Judgement]) -> list[Missing]:
    whole = facts.recipe.method.name == "full"
    if not judgements and facts.run.status == "finished" and facts.asks_tasks:
        sentence = f"Its {'model' if whole else 'adapter'} was not evaluated."
        adapter = ["--adapter", str(facts.folder / "adapter")]
        subject = [str(facts.folder)] if whole else adapter
        return [Missing(sentence, shlex.join(["san-llm", "eval", *subject]))]
    missing = []
    for judgement in judgements:
        if judgement.base is not None:
            continue
        base_only = f"san-llm eval {shlex.quote(str(facts.folder))} --base-only"
        command = judgement.adapter.command.replace("san-llm eval", base_only, 1)
        name = judgement.adapter.stored.folder.name
        unasked = f"The base was not asked the questions of the evaluation {name}"
        missing.append(Missing(f"{unasked}, so nothing tells what training gained.", command))
    return missing


def _answered(facts: Facts, judged: bool) -> tuple[tuple[Answered, ...], list[Missing]]:
    """Return held-out rows with their answers, and what a run of one's own rows lacks of them."""
    try:
        answered = read_answered(facts.folder)
    except InputError as error:
        return (), [Missing(f"Answers to held-out rows are left out: {error}.")]
    metrics = facts.metrics
    asks = metrics is not None and metrics.row_kind == "own" and metrics.held_out_loss is not None
    if answered or judged or not asks or facts.run.status != "finished":
        return answered, []
    command = answering(facts.recipe, facts.folder)
    return (), [Missing("It was not asked its held-out rows.", command)]


def _done(facts: Facts) -> str:
    recipe, metrics = facts.recipe, facts.metrics
    training = recipe.training
    begun = f"{facts.method} over {recipe.base.model}"
    if recipe.base.quantization is not None:
        begun += f" in {recipe.base.quantization}"
    if metrics is None:
        return f"{begun}, to be trained on {facts.data} in steps of {training.batch_size:,} rows."
    return (
        f"{begun}: {metrics.trained_numbers:,} numbers trained in {metrics.steps:,} steps of "
        f"{training.batch_size:,} rows, on {metrics.rows:,} rows of {facts.data}."
    )


def _came_to(facts: Facts) -> str:
    metrics, manifest = facts.metrics, facts.manifest
    if metrics is None or facts.run.status != "finished":
        return f"Training is not finished: {facts.run.status} after step {facts.run.steps:,}."
    count = manifest.processes
    steps = f"The steps from {metrics.resumed_at + 1:,} on" if metrics.resumed_at else "It"
    took = f"{steps} took {duration(metrics.seconds)} on {manifest.device or 'an unknown device'}, "
    took += "1 process" if count == 1 else f"{count} processes ({manifest.engine})"
    if metrics.held_out_loss is None:
        return f"{took}; the mean training loss was {metrics.train_loss:.4f} a token."
    return (
        f"{took}; the loss on held-out rows came to {metrics.held_out_loss:.4f} a token, at step "
        f"{metrics.best_step:,}, whose weights were kept."
    )


def _scored(judgement: Judgement) -> list[str]:
    """Return what an evaluation came to: accuracy, and whatever else it measured."""
    results = judgement.adapter.stored.results
    counted = [task for task in results.tasks if not task.graded]
    lines = [_accuracy(judgement, counted)] if counted else []
    runs = judgement.comparisons[0].runs if judgement.comparisons else ()
    changes = {
        change.task: change for run in runs for change in (*run.differences, *run.loss_differences)
    }
    for task in (task for task in results.tasks if task.graded):
        values = [_percent(*run.accuracies[task.task]) for run in runs]
        values = values or [_percent(task.accuracy, task.standard_error)]
        apart = changes.get(task.task)
        lines.append(
            _measured(f"{task.judge} on {task.task} ({task.n:,} rows)", values)
            + (f"; {points(apart.difference)} points {_sure(apart, points)}." if apart else ".")
        )
    for loss in results.losses:
        values = [nats(*run.losses[loss.task]) for run in runs]
        values = values or [nats(loss.loss, loss.standard_error)]
        apart = changes.get(loss.task)
        lines.append(
            _measured(f"Loss on {loss.task} ({loss.n:,} rows)", values)
            + " nats a token"
            + (f"; {apart.difference:+.4f} {_sure(apart, '{:+.4f}'.format)}." if apart else ".")
        )
    if results.forgetting is not None:
        lines.append(f"Forgetting: {results.forgetting} of a neutral text.")
    return lines


def _measured(what: str, values: Sequence[str]) -> str:
    """Return a value of the adapter, or those before and after."""
    return f"{what}: " + (values[0] if len(values) == 1 else "{} before, {} after".format(*values))


def _sure(change: Difference, shown: Callable[[float], str]) -> str:
    interval = f"{LEVEL:.0%} interval {shown(change.low)} to {shown(change.high)}"
    return f"({interval}; p by permutation {p_value(change.p)})"


def _accuracy(judgement: Judgement, counted: Sequence[TaskAccuracy]) -> str:
    results = judgement.adapter.stored.results
    count, tasks = sum(task.n for task in counted), len(counted)
    questions = f"over {tasks} tasks" if tasks > 1 else f"on {counted[0].task}"
    questions += f" ({count:,} rows of {Path(results.data).name})"
    if not judgement.comparisons and results.average is not None:
        average = results.average
        return f"Accuracy {questions}: {_percent(average.accuracy, average.standard_error)}."
    base, adapted = judgement.comparisons[0].runs
    change = next(change for change in adapted.differences if change.task == "average")
    interval = f"{LEVEL:.0%} interval {points(change.low)} to {points(change.high)}"
    return (
        f"Accuracy {questions}: {_percent(*base.accuracies['average'])} before, "
        f"{_percent(*adapted.accuracies['average'])} after; {points(change.difference)} points "
        f"({interval}; McNemar's p over all rows {p_value(change.p)})."
    )


def _percent(accuracy: float, error: float | None) -> str:
    return f"{with_error(accuracy, error)} %"


def _losses(facts: Facts) -> Grid | None:
    """Return the losses of some steps: of those with a held-out loss, if there are any."""
    trained = {entry["step"]: entry for entry in facts.log if "loss" in entry}
    judged = {entry["step"]: entry for entry in facts.log if "eval_loss" in entry}
    chosen = evenly(sorted(judged or trained), LOSSES)
    parts = {step: held_out_parts(entry) for step, entry in judged.items()}
    names = sorted({name for losses in parts.values() for name in losses})
    rows = tuple(
        (
            f"{step:,}",
            _number(trained.get(step, {}), "loss", ".4f"),
            _number(judged.get(step, {}), "eval_loss", ".4f"),
            *(_number(parts.get(step, {}), name, ".4f") for name in names),
            _number(trained.get(step, {}), "learning_rate", ".2e"),
        )
        for step in chosen
    )
    header = ("step", "training loss", "held-out loss", *names, "learning rate")
    return Grid("Losses, a token", header, rows) if rows else None


def _number(entry: Mapping[str, Any], key: str, form: str) -> str:
    value = entry.get(key)
    return format(value, form) if isinstance(value, (int, float)) else "-"


def _manifest(facts: Facts) -> Grid | None:
    rows = tuple((key, shown(value)) for key, value in leaves(facts.manifest.written).items())
    return Grid(MANIFEST, ("key", "value"), rows) if rows else None


def _costs(facts: Facts) -> Grid:
    metrics, run = facts.metrics, facts.run
    rows = [("optimizer steps", f"{run.steps:,}")]
    if metrics is not None:
        done = metrics.steps - metrics.resumed_at
        peak = metrics.peak_memory
        rows += [
            ("of them timed", f"{done:,} (a resume times its own)"),
            ("training time", f"{duration(metrics.seconds)}, held-out losses included"),
            ("a step", f"{metrics.seconds / done:.2f} s" if done else "-"),
            ("peak memory of a process", "not recorded" if peak is None else decimal(peak)),
            ("rows dropped", f"{metrics.dropped_rows:,} (the cutoff took the whole response)"),
            ("rows cut", f"{metrics.cut_rows:,} (the cutoff took the response's end)"),
            ("batches skipped", f"{metrics.skipped_batches:,}"),
        ]
    for name in ("adapter", "model"):
        files = list((facts.folder / name).glob("*.safetensors"))
        if files:
            rows.append((name, decimal(sum(file.stat().st_size for file in files))))
    rows.append(("the run's folder", decimal(run.bytes)))
    return Grid("Time and memory", ("what", "how much"), tuple(rows))


def _scales(facts: Facts) -> Grid | None:
    if facts.scales is None:
        return None
    rows = tuple(
        (
            *(change.module, f"{change.channels:,}"),
            *(percent(change.potentiated), percent(change.depressed)),
            "-" if change.mean_change is None else f"{change.mean_change:.4f}",
        )
        for change in [*facts.scales.modules, facts.scales.total]
    )
    header = ("module", "channels", "potentiated, %", "depressed, %", "mean |gamma - 1|")
    return Grid("Neuron scales over all blocks", header, rows)


def drawings(facts: Facts) -> tuple[dict[str, Drawing], list[Missing]]:
    """Return what can be drawn of a run, by name, and what hinders it."""
    try:
        check_matplotlib()
    except InputError as error:
        return {}, [Missing(f"It has no drawings: {error}.")]
    drawn = {}
    for name, figure in figures(numbers_of(facts.folder)).items():
        drawn[name] = drawing(figure)
    return drawn, []
