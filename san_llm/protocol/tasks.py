"""The eight commonsense tasks as data: what a task asks, how its answer reads, how many rows.

Source: LLM-Adapters (Hu et al. 2023, arXiv:2304.01933), used by DoRA (arXiv:2402.09353) and SAN.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from san_llm.errors import InputError, did_you_mean

_FILES = Path(__file__).with_name("commonsense")  # a file a task, in the form of one's own


@dataclass(frozen=True)
class Task:
    """One task of the protocol.

    Attributes:
        name: Its name, and the name of its folder.
        answers: Every answer it can have; the first one to occur in a generated text counts.
        guessing: The accuracy of guessing, from 0 to 1: of ARC's 5 answers a row offers about 4.
        test_rows: Rows of the published test split.
        train_rows: Rows that the published training mix has of it.
        aliases: Other spellings in use.
    """

    name: str
    answers: tuple[str, ...]
    guessing: float
    test_rows: int
    train_rows: int
    aliases: tuple[str, ...] = ()

    @property
    def pattern(self) -> re.Pattern[str]:
        """The protocol's regular expression: the answers, case-sensitive."""
        return re.compile("|".join(self.answers))


def _task(name: str, test_rows: int, train_rows: int, *aliases: str) -> Task:
    says = yaml.safe_load((_FILES / f"{name}.yaml").read_text(encoding="utf-8"))
    answers = tuple(says["pattern"].split("|"))
    return Task(name, answers, says["guessing"], test_rows, train_rows, aliases)


_ALL = (
    _task("boolq", 3270, 9427),
    _task("piqa", 1838, 16113),
    _task("social_i_qa", 1954, 33410, "social_iqa", "siqa"),
    _task("hellaswag", 10042, 39905),
    _task("winogrande", 1267, 63238),
    _task("ARC-Easy", 2376, 2251, "arc_easy", "arc-e"),
    _task("ARC-Challenge", 1172, 1119, "arc_challenge", "arc-c"),
    _task("openbookqa", 500, 4957, "obqa"),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
TASK_FILES = (".yaml", ".yml")  # what a task of one's own is named by, see ``recipe.task_file``


def guessing(names: Collection[str]) -> float | None:
    """Return the mean accuracy of guessing over tasks, from 0 to 1; None where one is not known."""
    known = [TASKS[name].guessing for name in names if name in TASKS]
    return sum(known) / len(known) if known and len(known) == len(names) else None


def is_task_file(name: str) -> bool:
    """Return whether a task's name is that of a file."""
    return name.strip().lower().endswith(TASK_FILES)


def find_tasks(names: Iterable[str]) -> list[Task]:
    """Return the tasks named, in the order given, each once; spellings in use are understood.

    Raises:
        InputError: listing the eight tasks and the nearest spelling.
    """
    known = {task.name.lower(): task for task in _ALL}
    known |= {alias: task for task in _ALL for alias in task.aliases}
    chosen: dict[str, Task] = {}
    for name in names:
        task = known.get(name.strip().lower())
        if task is None:
            hint = "; a task of your own is a .yaml file" if {"/", "."} & {*name} else ""
            raise InputError(
                f"task {name.strip()!r} is not one of {', '.join(TASKS)}"
                f"{did_you_mean(name.strip(), [*TASKS, *known])}{hint}"
            )
        chosen[task.name] = task
    if not chosen:
        raise InputError(f"no task named; known are {', '.join(TASKS)}")
    return list(chosen.values())
