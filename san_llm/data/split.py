"""The rows of a recipe: those that are learned from, and those that are held out."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from san_llm.data.rows import Row
from san_llm.data.sources import file_of, source_sha256, stream_source
from san_llm.errors import InputError
from san_llm.files import sha256_of
from san_llm.recipe.schema import Data, Recipe, Source

HELD_OUT, OF = 120, 10  # held out where a recipe does not say how many; of fewer rows, one in OF


@dataclass(frozen=True)
class Taken:
    """What a source gives.

    Attributes:
        source: What messages call it.
        there: Rows that it has, up to its limit.
        taken: Rows of it in the mix.
        shapes: How many of its rows were read as what.
        unread: How many rows have each key that is not read.
    """

    source: str
    there: int
    taken: int
    shapes: dict[str, int]
    unread: dict[str, int] = field(default_factory=dict)


def unread_of(taken: Iterable[Taken]) -> dict[str, int]:
    """Return how many rows of all sources have each key that is not read, the most common first."""
    return dict(sum((Counter(source.unread) for source in taken), Counter()).most_common())


@dataclass(frozen=True)
class Split:
    """The rows of a recipe.

    Attributes:
        train: Those that are learned from.
        held_out: Those that judge.
        parts: How many of these are of each file, by name, in order; empty where they were taken
            out of the training rows.
        sha256: The sha256 of each file that rows came from.
        taken: What each source gives.
        duplicates: Training rows that say the same as one before.
        twins: Held-out rows that a training row says, too.
    """

    train: list[Row]
    held_out: list[Row]
    sha256: dict[str, str]
    parts: dict[str, int] = field(default_factory=dict)
    taken: tuple[Taken, ...] = ()
    duplicates: int = 0
    twins: int = 0

    def part_of(self, row: Row) -> str:
        """Return what a held-out row is judged apart by: its file, or what it was taken out of.

        Empty where all have one.
        """
        names = list(self.parts) or [taken.source for taken in self.taken]
        own = [name for name in names if len(names) > 1 and row.where.startswith(f"{name}: ")]
        return max(own, key=len, default="")

    @property
    def system(self) -> str | None:
        """The system prompt that every training row begins with; None where it is not one."""
        first = {row.messages[0] if row.messages else None for row in self.train}
        turn = first.pop() if len(first) == 1 else None
        said = turn is not None and turn.role == "system" and turn.content.strip()
        return turn.content if turn is not None and said else None


def held_out_count(data: Data, rows: int) -> int:
    """Return how many of the training rows are held out.

    Raises:
        InputError: when none would be left to train on.
    """
    if data.held_out_files:
        return 0
    wanted = data.held_out
    if wanted is None:
        wanted = min(HELD_OUT, rows // OF)
    elif isinstance(wanted, float):
        wanted = max(1, round(wanted * rows))
    assert isinstance(wanted, int)
    if wanted >= rows:
        raise InputError(
            f"data.held_out: {wanted} of {rows} rows leave none to train on; "
            f"expected 0 to {rows - 1}, a share, or a file"
        )
    return wanted


def refuse_no_rows(data: Data) -> None:
    """Refuse training rows that are not there or do not begin with one, and wrong held-out rows.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    for source in data.sources:
        next(stream_source(source))
    _refuse_no_held_out(data)


def missing_file(data: Data) -> Path | None:
    """Return the first file of training rows that is not here; None where all are."""
    files = (file_of(source) for source in data.sources)
    return next((file for file in files if file is not None and not file.exists()), None)


def count_rows(data: Data, seed: int = 0) -> tuple[int | None, str | None]:
    """Return the rows that are trained on, or the file of them that is not here to be counted.

    Raises:
        InputError: when a row is wrong, or the rows that are here cannot be held out as asked.
    """
    missing = missing_file(data)
    if missing is not None:
        return None, str(missing)
    rows = sum(1 for _ in stream_training(data, seed))
    _refuse_no_held_out(data)
    return rows - held_out_count(data, rows), None


def stream_training(data: Data, seed: int, taken: list[Taken] | None = None) -> Iterator[Row]:
    """Give the training rows, source after source, the mix as ``weight`` says.

    Args:
        data: The recipe's.
        seed: Draws the rows of a source that is not taken whole.
        taken: Gets what each source gives, as it ends.

    Raises:
        InputError: for a row that is wrong.
    """
    counts = _counts(data)
    given, seen = 0, set[int]()
    for number, source in enumerate(data.sources):
        chosen = None
        if counts is not None:
            there, wanted = counts[number]
            chosen = set(random.Random(f"{seed} {number}").sample(range(there), wanted))
        rows = took = 0
        shapes, unread = Counter[str](), Counter[str]()
        for place, row in enumerate(stream_source(source)):
            rows += 1
            if row.messages and data.prompt != "chat":
                raise InputError(
                    f"{row.where}: {row.shape}: a conversation, which cannot be written in the "
                    f"style {data.prompt!r}; set data.prompt to chat"
                )
            if chosen is not None and place not in chosen:
                continue
            if data.drop_duplicates:
                if hash(row) in seen:
                    continue
                seen.add(hash(row))
            if given == data.limit:
                break
            given += 1
            took += 1
            shapes[row.shape] += 1
            unread.update(row.unread)
            yield row
        if taken is not None:
            taken.append(Taken(source.label, rows, took, dict(shapes), dict(unread)))


def _counts(data: Data) -> list[tuple[int, int]] | None:
    """Return for each source how many rows it has and how many are drawn; None: all of them.

    The source that has the fewest rows for its weight is taken whole, the others in proportion.
    """
    weights = [source.weight for source in data.sources]
    if None in weights:
        return None
    there = [sum(1 for _ in stream_source(source)) for source in data.sources]
    scale = min(rows / weight for rows, weight in zip(there, weights, strict=True) if weight)
    return [
        (rows, min(rows, round(scale * (weight or 0))))
        for rows, weight in zip(there, weights, strict=True)
    ]


def _refuse_no_held_out(data: Data) -> None:
    for source in _held_out_sources(data):
        try:
            for _ in stream_source(source):
                pass
        except InputError as error:
            raise InputError(f"data.held_out: {error}") from None


def _held_out_sources(data: Data) -> list[Source]:
    return [Source(path=file, columns=data.columns) for file in data.held_out_files]


def held_out_rows(data: Data) -> dict[str, Iterator[Row]]:
    """Return the held-out rows of each file; none where they are taken of the training rows."""
    return {source.label: stream_source(source) for source in _held_out_sources(data)}


def split_held_out(recipe: Recipe) -> Split:
    """Return a recipe's training rows and its held-out rows, and where they came from.

    Raises:
        InputError: when a file is wrong, or has no rows left to train on.
    """
    data, seed = recipe.data, recipe.training.seed
    taken: list[Taken] = []
    rows = list(stream_training(data, seed, taken))
    parts = {}
    if data.held_out_files:
        held_out = []
        for name, part in held_out_rows(data).items():
            here = list(part)
            parts[name] = len(here)
            held_out += here
    else:
        count = held_out_count(data, len(rows))
        chosen = set(random.Random(seed).sample(range(len(rows)), count))
        held_out = [row for number, row in enumerate(rows) if number in chosen]
        rows = [row for number, row in enumerate(rows) if number not in chosen]
    different = set(rows)
    twins = sum(row in different for row in held_out)
    duplicates = len(rows) - len(different)
    return Split(rows, held_out, rows_sha256(data), parts, tuple(taken), duplicates, twins)


def row_files(data: Data) -> list[Path]:
    """Return the files of a recipe's rows that are here: those learned from, then the held-out."""
    files = [file for source in data.sources if (file := file_of(source)) is not None]
    return files + [Path(file) for file in data.held_out_files]


def rows_sha256(data: Data) -> dict[str, str]:
    """Return the sha256 of each file that rows come from, by its name."""
    made: dict[str, str] = {}
    for source in data.sources:
        made |= source_sha256(source)
    return made | {file: sha256_of(Path(file)) for file in data.held_out_files}
