"""Tasks of lm-evaluation-harness, found by name or file and loaded before any model is.

Of a task's metrics those are taken that are means over rows, so that evaluations can be compared
row by row. The first of them counts as right or wrong; others stand apart, out of the average.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from san_llm.errors import InputError, SanError, did_you_mean, first_line
from san_llm.progress import silenced
from san_llm.protocol.tasks import TASKS, is_task_file
from san_llm.recipe.task_file import APART, FORGETTING, AnyTask

_RIGHT_OR_WRONG = re.compile(r"acc|match")  # of a metric's name; in part right are f1, bleu, ...


@dataclass(frozen=True)
class HarnessTask:
    """One metric of a task of lm_eval's.

    Attributes:
        name: What scores call it.
        source: What lm_eval calls the task.
        asked: The name or file that it was asked by: its own, or a group's.
        metric: The metric, a mean over rows.
        filter: What lm_eval calls the way in which an answer is read from the text.
        apart: Whether it stands apart, since another is the task's first or it is right in part.
        says: What of the task answers depend on.
        made: The task, as lm_eval has made it.
    """

    name: str
    source: str
    asked: str
    metric: str
    filter: str
    apart: bool
    says: str = field(repr=False)
    made: Any = field(compare=False, repr=False)

    @property
    def judge(self) -> str:
        """How its answers are judged, in words."""
        return APART if self.apart else self.metric

    def rows(self, limit: int | None) -> list[Any]:
        """Return what lm_eval asks."""
        return list(self.made.eval_docs)[:limit]

    def sha256(self) -> str:
        """Return the sha256 of what lm_eval asks."""
        text = json.dumps(self.rows(None), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


Asked = AnyTask | HarnessTask


def check_installed() -> None:
    """Refuse where the package is absent.

    Raises:
        InputError: saying how to get it.
    """
    if find_spec("lm_eval") is None:
        raise InputError(
            "--protocol lm-eval needs the package lm_eval: pip install 'san-llm[lm-eval]'"
        )


def of_the_harness(names: Sequence[str]) -> list[str]:
    """Return the tasks that are neither of the eight nor files of one's own, in their order.

    Raises:
        InputError: when there are both: what one average is over is asked in one way.
    """
    names = [name.strip() for name in names]
    theirs = [name for name in names if not _ours(name)]
    if theirs and len(theirs) < len(names):
        ours = next(name for name in names if name not in theirs)
        raise InputError(f"--tasks: {theirs[0]} is lm_eval's, {ours} is not: evaluate them apart")
    return theirs


def _ours(name: str) -> bool:
    if not is_task_file(name):
        known = {alias for task in TASKS.values() for alias in (task.name.lower(), *task.aliases)}
        return name.lower() in known | {FORGETTING}
    file = Path(os.path.expanduser(name))
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return True  # and it is told what is wrong with it
    keys = {key.value for key, _ in node.value} if isinstance(node, yaml.MappingNode) else set()
    return not keys & {"task", "group"}


def find_harness(names: Sequence[str]) -> list[HarnessTask]:
    """Return the tasks of lm_eval's that names and files stand for, groups spelled out.

    Raises:
        InputError: when one is not known, or has no rows that are right or wrong.
        SanError: when its data cannot be had.
    """
    found: dict[str, HarnessTask] = {}
    with silenced("lm_eval"):
        manager = task_manager(defaults=not all(map(is_task_file, names)))
        for name in names:
            if not is_task_file(name) and name not in manager.all_tasks:
                near = did_you_mean(name, manager.all_tasks, 0.6)
                raise InputError(f"task {name!r} is none of the eight, and none of lm_eval's{near}")
        for name in names:
            try:
                loaded = manager.load([os.path.expanduser(name)])["tasks"]
            except Exception as error:  # of YAML, of its templates, of whatever fetches its data
                line = f"{name}: lm_eval cannot load it: {first_line(error)}"
                raise (InputError if is_task_file(name) else SanError)(line) from None
            for source, made in loaded.items():
                found |= {task.name: task for task in _measured(source, name, made)}
    return list(found.values())


def task_manager(defaults: bool) -> Any:
    """Return what knows lm_eval's tasks; reading all that come with it takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults)


def _measured(source: str, asked: str, made: Any) -> list[HarnessTask]:
    """Return a task once for each way to read its answers, and each metric."""
    from lm_eval.api.metrics import mean

    if made.OUTPUT_TYPE == "loglikelihood_rolling":
        raise InputError(
            f"{source}: is a text, without answers; a task file of judge loss takes it"
        )
    if getattr(made, "UNSAFE_CODE", False) or made.config.unsafe_code:
        raise InputError(
            f"{source}: runs what the model writes as a program, which is not done here"
        )
    if getattr(made, "MULTIMODAL", False):
        raise InputError(f"{source}: asks about pictures or sounds, which the model is not shown")
    metrics = [metric for metric, how in made.aggregation().items() if how is mean]
    if made.OUTPUT_TYPE == "multiple_choice" and "acc" in metrics:
        metrics = ["acc"]  # and with its rows acc_norm
    if not metrics:
        raise InputError(f"{source}: has no metric of single rows: {', '.join(made.aggregation())}")
    filters = [each["name"] for each in made.config.filter_list or ()] or ["none"]
    says = json.dumps(made.dump_config(), sort_keys=True, default=str)
    tasks: list[HarnessTask] = []
    for metric in metrics:
        for kind in filters:
            parts = [kind] * (len(filters) > 1) + [metric] * (len(metrics) > 1)
            apart = bool(tasks) or not _RIGHT_OR_WRONG.search(metric)
            name = "/".join([source, *parts])
            tasks.append(HarnessTask(name, source, asked, metric, kind, apart, says, made))
    return tasks
