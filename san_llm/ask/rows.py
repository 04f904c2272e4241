"""The rows of a file, each asked and answered: many at a time, by the likeliest token each time.

A row is whatever training reads. What is written is what stands in the file, with the answer beside
it, under a key that no row has.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from san_llm.ask.answers import continuations, end_tokens
from san_llm.ask.beam_search import BeamSearch
from san_llm.ask.respond import Way, room, voice_of
from san_llm.data.batches import pad_id
from san_llm.data.encode import evaluation_text
from san_llm.data.rows import Row
from san_llm.data.shapes import read_asked, value_of
from san_llm.data.sources import stream_asked
from san_llm.data.split import split_held_out
from san_llm.errors import InputError
from san_llm.files import write_text
from san_llm.models.subject import Subject
from san_llm.progress import bar
from san_llm.recipe.schema import Columns, Source
from san_llm.runs.folder import ANSWER_KEYS, HELD_OUT
from san_llm.runs.record import read_run_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Asked = tuple[dict[str, Any], Row]  # what stands in a file, and what of it is asked


@dataclass(frozen=True)
class PosedRows:
    """Rows as a model goes on from them.

    Attributes:
        way: How they are asked.
        values: What stands in the file, row after row.
        prompts: The tokens of each row's prompt.
        rooms: How many new tokens each may have.
    """

    way: Way
    values: list[dict[str, Any]]
    prompts: list[list[int]]
    rooms: list[int]


def answer_keys(voices: Sequence[str]) -> dict[str, str]:
    """Return the key of each voice's answer: that of a base beside its adapter says so."""
    beside = len(voices) > 1
    return {by: ANSWER_KEYS[by if beside else "adapted"] for by in voices}


def columns_of(subject: Subject) -> Columns | None:
    """Return which column is which in the run's training rows, if all of them say the same."""
    if subject.recipe is None:
        return None
    first, *others = (source.columns for source in subject.recipe.data.sources)
    return first if all(columns == first for columns in others) else None


def rows_of(file: str, subject: Subject, limit: int | None) -> Iterator[Asked]:
    """Give a file's rows as they are asked, read as those of the model's run are.

    Args:
        file: A file of rows, or ``held-out`` for those of the model's run.
        subject: The model.
        limit: Only the first rows.

    Raises:
        InputError: naming the file, the row and what is wrong with it.
    """
    if file != HELD_OUT:
        return stream_asked(Source(path=file, columns=columns_of(subject), limit=limit))
    return islice(_held_out(subject), limit)


def _held_out(subject: Subject) -> Iterator[Asked]:
    """Give the rows that a run has held out, those of its training.

    Raises:
        InputError: when it has none, or a file is another now.
    """
    run, recipe = subject.run, subject.recipe
    if run is None or recipe is None:
        raise InputError(
            f"--rows {HELD_OUT}: {subject} is not of a run, which would have such rows"
        )
    split = split_held_out(recipe)
    if not split.held_out:
        raise InputError(f"--rows {HELD_OUT}: {run} holds no rows out (data.held_out)")
    trained = read_run_manifest(run).sha256.data
    if trained and sorted(trained.values()) != sorted(split.sha256.values()):
        raise InputError(
            f"--rows {HELD_OUT}: the rows of {run} have changed since, so that which were held out "
            "is not known; --rows FILE answers a file's"
        )
    for row in split.held_out:
        value = value_of(row)
        yield value, read_asked(row.where, "held out", value, None)


def posed_rows(
    way: Way, rows: Iterable[Asked], new_tokens: int, keys: Collection[str]
) -> PosedRows:
    """Return rows as a model goes on from them, checked before its weights are loaded.

    Args:
        way: How they are asked.
        rows: Each as it stands in its file, and as it is asked.
        new_tokens: Tokens of an answer at most.
        keys: What the answers will be called.

    Raises:
        InputError: naming the row that has such a key already, cannot be written in the style, or
            leaves no room for an answer.
    """
    values, prompts, rooms = [], [], []
    for value, row in rows:
        for key in keys:
            if key in value:
                raise InputError(
                    f"{row.where}: has a key {key!r}, as its answer would be called: rename it"
                )
        _, tokens = evaluation_text(way.frame, row, way.tokenizer)
        try:
            fitting = room(tokens, way.config, way.tokenizer)
        except InputError as error:
            raise InputError(f"{row.where}: {error}") from None
        values.append(value)
        prompts.append(tokens)
        rooms.append(new_tokens if fitting is None else min(new_tokens, fitting))
    return PosedRows(way, values, prompts, rooms)


def answer_rows(
    model: PreTrainedModel, posed: PosedRows, keys: dict[str, str], output: Path
) -> int:
    """Write all rows with their answers, whole or not at all; return how many were cut short.

    Args:
        model: Base, adapted or merged, in eval mode.
        posed: The rows.
        keys: The key of each voice's answer.
        output: A JSONL file, a line a row in their order.
    """
    answered = [dict(value) for value in posed.values]
    cut = 0
    with bar("Answering", len(answered) * len(keys), "rows") as shown:
        for by, key in keys.items():
            for number, text, ended in _answers(model, posed, by):
                answered[number][key] = text
                cut += not ended
                shown.advance()
    # What no JSON has, a date of a table say, is written as its text.
    lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in answered)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, "".join(lines))
    return cut


def _answers(model: PreTrainedModel, posed: PosedRows, by: str) -> Iterator[tuple[int, str, bool]]:
    """Give each row's number, the answer, and whether the model came to its end."""
    tokenizer = posed.way.tokenizer
    ends = end_tokens(model, tokenizer, chat=True)
    alike: dict[int, list[int]] = {}
    for number, fitting in enumerate(posed.rooms):
        alike.setdefault(fitting, []).append(number)
    with voice_of(model, by):
        for fitting, numbers in alike.items():
            prompts = [posed.prompts[number] for number in numbers]
            search = BeamSearch(1, fitting, ends)
            for found in continuations(model, pad_id(tokenizer), prompts, search):
                for place, tokens in found:
                    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
                    yield numbers[place], text, not set(ends).isdisjoint(tokens)
