"""Held-out rows beside a run's answers, and what one does next with a finished run.

Scores of the eight tasks say nothing of a run that learned other rows: what these ask is asked.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from san_llm.data.conversation import turns_of
from san_llm.data.rows import Row
from san_llm.data.shapes import read_asked
from san_llm.data.values import stream_values
from san_llm.errors import InputError
from san_llm.protocol.tasks import is_task_file
from san_llm.recipe.schema import Recipe
from san_llm.runs.folder import ANSWER_KEYS, HELD_OUT, HELD_OUT_ANSWERS
from san_llm.runs.record import RowKind

SHOWN = 10  # rows on the page; the file may have more


@dataclass(frozen=True)
class Answered:
    """A held-out row with its answers.

    Attributes:
        question: What was asked; of a conversation its last turn.
        expected: The row's own answer.
        answers: Those that were generated, by who gave them.
    """

    question: str
    expected: str
    answers: tuple[tuple[str, str], ...]


def read_answered(run: Path) -> tuple[Answered, ...]:
    """Return the first held-out rows that a run has answered; none where it was not asked.

    Raises:
        InputError: when the file is damaged.
    """
    file = run / HELD_OUT_ANSWERS
    if not file.is_file():
        return ()
    found: list[Answered] = []
    for where, value in stream_values(file):
        row = read_asked(file, where, value, None)
        answers = tuple((by, value[key]) for by, key in ANSWER_KEYS.items() if key in value)
        if not answers or not all(isinstance(text, str) for _, text in answers):
            raise InputError(f"{file}: {where}: not an answered row of `san-llm generate --rows`")
        found.append(Answered(_question(row), row.output, answers))
        if len(found) == SHOWN:
            break
    return tuple(found)


def _question(row: Row) -> str:
    asked = turns_of(row) if row.messages else turns_of(row)[:1]
    return str(asked[-1]["content"])


def answering(recipe: Recipe, run: Path | None = None) -> str:
    """Return the command that answers ten held-out rows of a run, or of the last one."""
    named = [] if run is None else ["--run", str(run)]
    words = ["san-llm", "generate", *named, "--rows", HELD_OUT, "--limit", str(SHOWN)]
    return shlex.join([*words, *_beside(recipe)])


def _beside(recipe: Recipe) -> list[str]:
    """Return what has the base answer, too; it is not there beside a model that is whole."""
    return [] if recipe.method.name == "full" else ["--compare"]


def next_steps(recipe: Recipe, kind: RowKind, held_out: bool) -> Sequence[str]:
    """Return what one does next with the last run, a command each.

    Args:
        recipe: The run's recipe.
        kind: What its rows are.
        held_out: Whether it holds rows out.
    """
    ask = " ".join(['san-llm generate "..."', *_beside(recipe)])
    if kind == "tasks":
        return [ask, "eval", "merge --verify", "report"]
    asked = [answering(recipe)] if held_out and kind == "own" else []
    chat = ["chat"] if recipe.data.prompt == "chat" else []
    judged = ["eval"] if any(map(is_task_file, recipe.evaluation.tasks)) else []
    return [*asked, ask, *chat, *judged, "merge --verify", "report"]
