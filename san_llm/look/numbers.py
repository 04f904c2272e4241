"""The numbers of a run that can be drawn: losses, neuron and synapse scales, scores.

Read from the run's files, and from the base's where it is on this machine: nothing is fetched, and
torch is not needed. What cannot be had is said in a line instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from san_llm.architectures.lookup import in_order, place_of
from san_llm.errors import InputError, SanError, did_you_mean
from san_llm.files import read_json
from san_llm.models.adapter import open_adapter
from san_llm.models.locate import config_here
from san_llm.models.scales import column_scales, neuron_scales
from san_llm.models.weights import Numbers
from san_llm.recipe.schema import Base
from san_llm.recipe.task_file import FORGETTING
from san_llm.runs.folder import MODEL, adapter_of, is_its_model, read_log, recipe_of
from san_llm.runs.record import (
    Accuracy,
    EvaluationResults,
    TaskAccuracy,
    by_chance,
    evaluations_of,
    read_made,
    read_results,
)
from san_llm.san.formulas import carried
from san_llm.san.graph import propagation_graph
from san_llm.san.node import Node
from san_llm.shown import nats, with_error


@dataclass(frozen=True)
class Curve:
    """One quantity over the optimizer steps, (points,) each."""

    steps: Numbers
    values: Numbers


@dataclass(frozen=True)
class SynapseScale:
    """What one weight matrix is multiplied by: ``gamma[:, None] * s[None, :]``.

    Attributes:
        module: ``model.layers.3.mlp.down_proj``.
        anterior: The module whose gamma is propagated into its columns; None where s is its own.
        gamma: What its rows are multiplied by (d_out,); ones where the mode leaves them.
        s: What its columns are multiplied by (d_in,).
    """

    module: str
    anterior: str | None
    gamma: Numbers
    s: Numbers


@dataclass(frozen=True)
class Score:
    """One task's accuracy, or the tasks' average, as fractions of 1.

    Attributes:
        task: The task, or ``average``.
        before: Accuracy and standard error of the base; None where it was not evaluated so.
        after: The same with the adapter.
        guessing: The accuracy of guessing; None where it is not known.
    """

    task: str
    before: tuple[float, float | None] | None
    after: tuple[float, float | None]
    guessing: float | None


@dataclass(frozen=True)
class Other:
    """What a task of one's own measures besides accuracy, as it is shown.

    Attributes:
        task: The task.
        measure: What is measured, and in what.
        before: The base's, with its standard error; a dash where it was not evaluated so.
        after: The same with the adapter.
    """

    task: str
    measure: str
    before: str
    after: str


@dataclass(frozen=True)
class Scores:
    """An evaluation of a run, beside that of its base on the same rows.

    Attributes:
        tasks: The tasks, and their average last if there are several; empty where only other
            things than accuracy were measured.
        rows: Rows of all tasks.
        data: The data's name.
        protocol: The protocol by which rows were asked.
        no_answer: Outputs without an answer: of the base, or None, and with the adapter.
        others: What else was measured.
    """

    tasks: tuple[Score, ...]
    rows: int
    data: str
    protocol: str
    no_answer: tuple[int | None, int]
    others: tuple[Other, ...] = ()


@dataclass(frozen=True)
class RunNumbers:
    """What a run has to be drawn; None for what it does not have.

    Attributes:
        title: The run's recipe, method and base, for a caption.
        train_loss: The training loss of each step, per token.
        held_out_loss: The held-out loss, per token, whenever it was taken.
        learning_rate: The learning rate of each step.
        gammas: Every neuron scale (d_out,), by module, in the model's order.
        synapse: The effective scale of one weight matrix.
        scores: The scores of the adapter's last evaluation.
        left_out: What is not there, and why: a line each.
    """

    title: str
    train_loss: Curve | None
    held_out_loss: Curve | None
    learning_rate: Curve | None
    gammas: Mapping[str, Numbers] | None
    synapse: SynapseScale | None
    scores: Scores | None
    left_out: tuple[str, ...]


def numbers_of(run: Path, weight: str | None = None) -> RunNumbers:
    """Return what a run, finished or not, has to be drawn.

    Args:
        run: The run's folder.
        weight: The matrix whose synapse scale is wanted: ``3.down_proj``; default: the one with a
            link that changed most.

    Raises:
        InputError: when the folder is not a run, or has no such weight.
    """
    recipe = recipe_of(run)
    left_out: list[str] = []
    log = list(read_log(run))
    curves = {key: _curve(log, key) for key in ("loss", "eval_loss", "learning_rate")}
    if curves["loss"] is None:
        left_out.append("losses: no step is in log.jsonl yet")
    gammas = synapse = None
    try:
        gammas, synapse = _scales(adapter_of(run), recipe.base, weight, left_out)
    except WeightError:
        raise
    except SanError as error:
        left_out.append(f"neuron scales: {error}")
    scores = _scores(run, left_out)
    return RunNumbers(
        f"{recipe.name}: {recipe.method.kind} over {Path(recipe.base.model).name}",
        curves["loss"],
        curves["eval_loss"],
        curves["learning_rate"],
        gammas,
        synapse,
        scores,
        tuple(left_out),
    )


class WeightError(InputError):
    """A weight that was asked for, and is not there or has no synapse scale."""


def _curve(log: Sequence[Mapping[str, Any]], key: str) -> Curve | None:
    """Return one quantity of the log; what is null or no number is not counted."""
    points = []
    for entry in log:
        with suppress(ValueError, KeyError, TypeError):
            points.append((entry["step"], float(entry[key])))
    finite = [point for point in points if np.isfinite(point[1])]
    if not finite:
        return None
    steps, values = zip(*finite, strict=True)
    return Curve(np.array(steps), np.array(values))


def _scales(
    adapter: Path, base: Base, weight: str | None, left_out: list[str]
) -> tuple[Mapping[str, Numbers], SynapseScale | None]:
    opened = open_adapter(adapter)
    options, config = opened.options, config_here(base)
    if options.get("train_norms"):
        left_out.append("what is added to its norms: `san-llm diff` has it")
    source = None if config is None else config.parent
    if source is None and (options.get("carrier") or "scale") != "scale":
        raise InputError(
            f"those of the {options['carrier']} carrier take the base's weights, and {base.model} "
            "is not on this machine"
        )
    if source is None:
        left_out.append(f"synapse scale: {base.model}, whose config it takes, is not here")
        return neuron_scales(opened, None), None
    gammas, sigmas = neuron_scales(opened, source), column_scales(opened)
    graph = propagation_graph(read_json(source / "config.json"), options)
    linked = {
        ".".join(map(str, place_of(node.name))): node
        for node in graph
        if node.anterior in gammas or node.name in sigmas
    }
    if weight is not None and weight not in linked:
        raise WeightError(
            f"--weight: {weight!r}: expected a weight with a synapse scale, such as "
            f"{next(iter(linked), 'none here')}{did_you_mean(weight, linked)}"
        )
    if not linked:
        left_out.append(f"synapse scale: nothing is propagated in the mode {options.get('mode')!r}")
        return gammas, None
    own = options.get("mode") != "synapse"
    scales = [
        _synapse(node, gammas, sigmas, own)
        for node in ([linked[weight]] if weight is not None else linked.values())
    ]
    return gammas, max(scales, key=_moved)


def _synapse(
    node: Node, gammas: Mapping[str, Numbers], sigmas: Mapping[str, Numbers], own: bool
) -> SynapseScale:
    """Return a node's scale; its rows are left alone where the mode says so."""
    s = sigmas.get(node.name)
    if s is None:
        assert node.anterior is not None
        assert node.carry is not None
        s = carried(gammas[node.anterior], node.carry)
    gamma = gammas[node.name] if own and node.name in gammas else np.ones(node.d_out)
    return SynapseScale(node.name, node.anterior, gamma, s)


def _moved(scale: SynapseScale) -> float:
    return float(np.abs(scale.gamma - 1).mean() + np.abs(scale.s - 1).mean())


def in_blocks(gammas: Mapping[str, Numbers]) -> tuple[list[str], list[int], dict[Any, Numbers]]:
    """Return the modules and the blocks that have scales, and the scales by block and module."""
    placed = {place_of(name): gamma for name, gamma in gammas.items()}
    modules = in_order(module for _, module in placed)
    blocks = sorted({block for block, _ in placed if block is not None})
    return modules, blocks, placed


def block_maps(
    gammas: Mapping[str, Numbers], *measures: Callable[[Numbers], Any]
) -> tuple[list[str], list[int], list[Numbers]]:
    """Return the modules and blocks of a map, and each measure of their gamma.

    A measure's map is (modules, blocks), nan where there is no scale. The embedding is in no block.
    """
    modules, blocks, placed = in_blocks(gammas)
    modules = [name for name in modules if any((block, name) in placed for block in blocks)]
    cells = [[placed.get((block, module)) for block in blocks] for module in modules]
    maps = [
        np.array([[np.nan if g is None else measure(g) for g in line] for line in cells])
        for measure in measures
    ]
    return modules, blocks, maps


def _scores(run: Path, left_out: list[str]) -> Scores | None:
    evaluated = []
    for folder in evaluations_of(run):
        try:
            evaluated.append((read_made(folder), read_results(folder)))
        except InputError as error:
            left_out.append(f"scores: {error}")
    evaluated.sort(key=lambda pair: pair[0])
    ours = [results for _, results in evaluated if _is_trained(results, run)]
    if not ours:
        subject = run if (run / MODEL).is_dir() else f"--adapter {run / 'adapter'}"
        left_out.append(f"scores: not evaluated yet: `san-llm eval {subject}`")
        return None
    after = ours[-1]
    base = after.model if after.adapter else recipe_of(run).base.model
    same = [
        results
        for _, results in evaluated
        if not _is_trained(results, run)
        and results.model == base
        and _measured(results) == _measured(after)
    ]
    before = same[-1] if same else None
    if before is None:
        left_out.append("scores of the base: not evaluated so: `san-llm eval --base-only`")
    return _side_by_side(before, after)


def _is_trained(results: EvaluationResults, run: Path) -> bool:
    """Whether they are of what a run has trained: its adapter, or its whole model."""
    return bool(results.adapter) or is_its_model(results.model, run)


def _measured(results: EvaluationResults) -> tuple[object, ...]:
    """Return what two evaluations must have in common for their scores to stand side by side.

    This rule is not that of their ``Question``. ``strict`` must be the same, as no note beside a
    drawing says what else differs. The data go by name and number of rows: no row is compared with
    another, so that the results are enough, whatever the manifest says.
    """
    asking = (results.data, results.limit, results.protocol, results.prompt, results.strict)
    return (
        *asking,
        *((task.task, task.n, task.judge) for task in results.tasks),
        *((task.task, task.n) for task in results.losses),
    )


def _side_by_side(before: EvaluationResults | None, after: EvaluationResults) -> Scores:
    def pair(score: Accuracy) -> tuple[float, float | None]:
        return score.accuracy, score.standard_error

    def counted(results: EvaluationResults) -> list[TaskAccuracy]:
        return [task for task in results.tasks if not task.graded]

    def lost(results: EvaluationResults) -> int:
        return sum(task.unparseable for task in counted(results))

    tasks = [
        Score(task.task, None if old is None else pair(old), pair(task), by_chance([task]))
        for old, task in _beside(None if before is None else counted(before), counted(after))
    ]
    if len(tasks) > 1 and after.average is not None:
        old_average = None if before is None else before.average
        of_base = None if old_average is None else pair(old_average)
        tasks.append(Score("average", of_base, pair(after.average), by_chance(counted(after))))
    return Scores(
        tuple(tasks),
        sum(task.n for task in counted(after)),
        after.data,
        after.protocol,
        (None if before is None else lost(before), lost(after)),
        tuple(_others(before, after)),
    )


_Kind = TypeVar("_Kind")


def _beside(
    before: Sequence[_Kind] | None, after: Sequence[_Kind]
) -> list[tuple[_Kind | None, _Kind]]:
    return [(None if before is None else before[n], value) for n, value in enumerate(after)]


def _others(before: EvaluationResults | None, after: EvaluationResults) -> Iterator[Other]:
    def graded(results: EvaluationResults) -> list[TaskAccuracy]:
        return [task for task in results.tasks if task.graded]

    for old, task in _beside(None if before is None else graded(before), graded(after)):
        shown = "-" if old is None else with_error(old.accuracy, old.standard_error)
        now = with_error(task.accuracy, task.standard_error)
        yield Other(task.task, f"{task.judge}, %", shown, now)
    for old_loss, loss in _beside(None if before is None else before.losses, after.losses):
        shown = "-" if old_loss is None else nats(old_loss.loss, old_loss.standard_error)
        yield Other(*(loss.task, "loss, nats a token", shown, nats(loss.loss, loss.standard_error)))
    if after.forgetting is not None:
        yield Other(FORGETTING, "rise of that, nats a token", "", str(after.forgetting))
