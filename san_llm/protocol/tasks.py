"""The eight commonsense tasks as data: what a task asks, how its answer reads, how many rows.

Source: LLM-Adapters (Hu et al. 2023, arXiv:2304.01933), used by DoRA (arXiv:2402.09353) and SAN.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from san_llm.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Task:
    """One task of the protocol.

    Attributes:
        name: Its name, and the name of its folder.
        answers: Every answer it can have; the first one to occur in a generated text counts.
        test_rows: Rows of the published test split.
        train_rows: Rows that the published training mix has of it.
        aliases: Other spellings in use.
        offered: Answers that a row offers, a few of ARC's 3 or 5; None: all that it can have.
    """

    name: str
    answers: tuple[str, ...]
    test_rows: int
    train_rows: int
    aliases: tuple[str, ...] = ()
    offered: int | None = None

    @property
    def guessing(self) -> float:
        """The accuracy of guessing, from 0 to 1."""
        return 1 / (self.offered or len(self.answers))

    @property
    def pattern(self) -> re.Pattern[str]:
        """The protocol's regular expression: the answers, case-sensitive."""
        return re.compile("|".join(self.answers))


def _numbered(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{number}" for number in range(1, count + 1))


_ALL = (
    Task("boolq", ("true", "false"), 3270, 9427),
    Task("piqa", _numbered("solution", 2), 1838, 16113),
    Task("social_i_qa", _numbered("answer", 5), 1954, 33410, ("social_iqa", "siqa"), 3),
    Task("hellaswag", _numbered("ending", 4), 10042, 39905),
    Task("winogrande", _numbered("option", 2), 1267, 63238),
    Task("ARC-Easy", _numbered("answer", 5), 2376, 2251, ("arc_easy", "arc-e"), 4),
    Task("ARC-Challenge", _numbered("answer", 5), 1172, 1119, ("arc_challenge", "arc-c"), 4),
    Task("openbookqa", _numbered("answer", 5), 500, 4957, ("obqa",), 4),
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
