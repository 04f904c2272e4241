"""What a model will see of training rows: lengths, cuts, doubles, answers, overlap with test rows.

Rows stream through once. Of each only two hashes of 64 bits are kept, 16 bytes a row, so that ten
million fit into a gigabyte; two different rows of these share a hash once in some 300,000 times.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, tee
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table
from rich.text import Text

from san_llm.data.encode import IGNORE, Encoding, check_tokenizer, encoding_of, label_rows
from san_llm.data.rows import Row
from san_llm.data.shapes import unread_line
from san_llm.data.split import Taken, held_out_rows, stream_training, unread_of
from san_llm.data.task_rows import read_own_rows, read_task, test_file
from san_llm.errors import InputError
from san_llm.models.locate import find_base
from san_llm.models.tokenizer import training_tokenizer
from san_llm.progress import say
from san_llm.protocol.row_text import LEADS
from san_llm.protocol.tasks import TASKS
from san_llm.recipe.schema import Recipe
from san_llm.recipe.task_file import OwnTask, find_any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


GRAM = 13  # words in a row that two texts share: the measure of GPT-3 (Brown et al. 2020, app. C)
FEW = 5  # places that are named of those where something is wrong
BARS = 12  # of the histogram
MOST_ANSWERS = 20  # different answers beyond which a balance says nothing


@dataclass(frozen=True)
class Overlap:
    """How much of one task's test rows is in the training rows.

    Attributes:
        test_rows: Rows of the test file.
        exact: Test rows whose instruction and input are those of a training row.
        grams: Test rows that share 13 words in a row with a training row, the task's own words
            before the question and the answer format left out.
    """

    test_rows: int
    exact: int
    grams: int


@dataclass(frozen=True)
class Inspection:
    """What was found; counts are of rows unless they are named otherwise.

    Attributes:
        about: Files, tokenizer and settings.
        rows: All of them.
        lengths: Tokens a row before the cutoff: mean, and at the shares that the keys name.
        histogram: Rows with ``from`` to ``to`` tokens.
        cut: Lost the end of their response to the cutoff, or its end token alone.
        dropped: Have a prompt that leaves no room for a response.
        cut_at: Where the first rows that were cut stand.
        dropped_at: Where the first rows that were dropped stand.
        context: Tokens that the model can hold; None: any number.
        longer: Are longer than that after the cutoff; a training refuses them.
        longer_at: Where the first of these stand.
        tokens: Tokens that are trained on, of rows that are kept.
        supervised: Tokens that are learned.
        duplicates: Rows that are the same as one before.
        disputed: Rows with the question of one before and another response.
        answers: Each task's answers and how often they are right.
        overlap: For each task with test rows.
        shapes: Rows that were read as what.
        sources: What each source has and gives, where there are several.
        turns: Turns of a conversation, and how many have so many.
        controls: Have a control token in their own words.
        controls_at: Where the first of these stand, and what they say.
        thoughts: Turns whose thinking the chat template leaves out.
        held_out: Held-out rows of each file.
        twins: Held-out rows that are training rows, too.
        unread: How many rows have each key that is not read.
        examples: Of each shape the first row's text, in pieces, and whether each is learned.
    """

    about: dict[str, Any]
    rows: int
    lengths: dict[str, float]
    histogram: list[dict[str, int]]
    cut: int
    dropped: int
    cut_at: list[str]
    dropped_at: list[str]
    context: int | None
    longer: int
    longer_at: list[str]
    tokens: int
    supervised: int
    duplicates: int
    disputed: int
    answers: dict[str, dict[str, int]]
    overlap: dict[str, Overlap]
    shapes: dict[str, int]
    sources: list[dict[str, Any]]
    turns: dict[int, int]
    controls: int
    controls_at: list[str]
    thoughts: int
    held_out: dict[str, int]
    twins: int
    examples: dict[str, list[tuple[str, bool]]]
    unread: dict[str, int] = field(default_factory=dict)


@dataclass
class _Tests:
    """Hashes of the test rows, to look training rows up in."""

    tasks: list[str] = field(default_factory=list)  # of each test row
    questions: dict[int, list[int]] = field(default_factory=dict)

    def fill(self, tests: Mapping[str, Sequence[Row]]) -> None:
        hashes, owners = array("q"), array("i")
        for task, rows in tests.items():
            for row in rows:
                number = len(self.tasks)
                self.tasks.append(task)
                self.questions.setdefault(hash((row.instruction, row.context)), []).append(number)
                grams = set(_grams(row))
                hashes.extend(grams)
                owners.extend([number] * len(grams))
        order = np.argsort(np.asarray(hashes), kind="stable")
        self.grams, self.owners = np.asarray(hashes)[order], np.asarray(owners)[order]
        self.exact = np.zeros(len(self.tasks), dtype=bool)
        self.shared = np.zeros(len(self.tasks), dtype=bool)

    def look_up(self, row: Row) -> None:
        for number in self.questions.get(hash((row.instruction, row.context)), ()):
            self.exact[number] = True
        grams = np.fromiter(_grams(row), dtype=np.int64)
        if not len(self.grams):
            return
        first = np.searchsorted(self.grams, grams)
        matches = self.grams[np.minimum(first, len(self.grams) - 1)] == grams
        for gram, start in zip(grams[matches], first[matches], strict=True):
            end = np.searchsorted(self.grams, gram, side="right")
            self.shared[self.owners[start:end]] = True

    def result(self) -> dict[str, Overlap]:
        count, exact, shared = Counter(self.tasks), Counter[str](), Counter[str]()
        for task, is_exact, is_shared in zip(self.tasks, self.exact, self.shared, strict=True):
            exact[task] += bool(is_exact)
            shared[task] += bool(is_shared)
        return {task: Overlap(count[task], exact[task], shared[task]) for task in count}


def inspect_recipe(recipe: Recipe) -> Inspection:
    """Return what there is in a recipe's training rows.

    Test rows that are not here are left out with a warning.

    Raises:
        InputError: for a row that is wrong, or a tokenizer that cannot serve.
    """
    tests = {}
    for name in recipe.evaluation.tasks:
        try:
            (task,) = find_any([name])
            tests[task.name] = (
                read_own_rows(task)
                if isinstance(task, OwnTask)
                else read_task(test_file(recipe.evaluation.data, task), task)
            )
        except InputError as error:
            say(f"not compared with test rows: {error}")
    data = recipe.data
    about = {
        "files": ", ".join(source.label for source in data.sources),
        "tokenizer": recipe.base.model,
        "prompt": data.prompt,
        "loss": data.loss,
        "cutoff": data.cutoff,
        "test rows": recipe.evaluation.data,
    }
    taken: list[Taken] = []
    rows = stream_training(data, recipe.training.seed, taken)
    found = find_base(recipe.base)
    tokenizer = training_tokenizer(recipe, found)
    encoding = encoding_of(data, tokenizer, found.vocabulary)
    inspection = inspect(rows, tests, encoding, about, found.context, held_out_rows(data))
    sources = [asdict(source) for source in taken] if len(taken) > 1 else []
    return replace(inspection, sources=sources, unread=unread_of(taken))


def inspect(
    rows: Iterable[Row],
    tests: Mapping[str, Sequence[Row]],
    encoding: Encoding,
    about: dict[str, Any],
    context: int | None = None,
    held_out: Mapping[str, Iterable[Row]] | None = None,
) -> Inspection:
    """Return what there is in rows, encoded as ``data.tokenized`` would encode them.

    Args:
        rows: Read once.
        tests: Test rows of each task, which should not be among them.
        encoding: How they become tokens.
        about: What the result says of itself.
        context: Tokens that the model can hold; None: any number.
        held_out: The held-out rows of each file.

    Raises:
        InputError: as from ``data.tokenized``, for the first row that is wrong.
    """
    check_tokenizer(encoding.tokenizer, encoding.style)
    looked_up = _Tests()
    looked_up.fill(tests)
    lengths: Counter[int] = Counter()
    fates: Counter[str] = Counter()
    places: dict[str, list[str]] = {"cut": [], "dropped": [], "longer": []}
    longer = 0
    tokens = supervised = 0
    answers: dict[str, Counter[str]] = {}
    whole, questions = array("q"), array("q")
    shapes, turns = Counter[str](), Counter[int]()
    controls_at: list[str] = []
    controls = thoughts = 0
    examples: dict[str, list[tuple[str, bool]]] = {}
    for_labels, for_hashes = tee(rows)
    labelled = label_rows(for_labels, encoding)
    for row, seen in zip(for_hashes, labelled, strict=True):
        if row.shape not in examples:
            examples[row.shape] = _pieces(encoding.tokenizer, seen.tokens, seen.labels)
        shapes[row.shape] += 1
        if row.messages:
            turns[len(row.messages)] += 1
        thoughts += seen.thoughts
        if seen.controls:
            controls += 1
            controls_at += [f"{row.where}: {seen.controls[0]}"] if controls <= FEW else []
        lengths[seen.length] += 1
        fates[seen.fate] += 1
        if seen.fate != "whole" and len(places[seen.fate]) < FEW:
            places[seen.fate].append(row.where)
        if context is not None and len(seen.tokens) > context and seen.fate != "dropped":
            longer += 1
            places["longer"] += [row.where] if longer <= FEW else []
        if seen.fate != "dropped":
            tokens += len(seen.tokens)
            supervised += seen.supervised
        # Of a conversation the last turn is the response.
        questions.append(hash((row.instruction, row.context, row.messages[:-1], row.text)))
        whole.append(hash(row))
        if row.answer:
            counter = answers.setdefault(_group(row), Counter())
            if row.answer in counter or len(counter) <= MOST_ANSWERS:
                counter[row.answer] += 1
        if tests:
            looked_up.look_up(row)
    if not whole:
        raise InputError("no rows to look at")
    kept = np.asarray(whole)
    parts, twins = {}, 0
    for name, part in (held_out or {}).items():
        hashes = np.fromiter(map(hash, part), dtype=np.int64)
        parts[name], twins = len(hashes), twins + int(np.isin(hashes, kept).sum())
    different = _different(whole)
    return Inspection(
        about=about,
        rows=len(whole),
        lengths=_shares(lengths),
        histogram=_histogram(lengths),
        cut=fates["cut"],
        dropped=fates["dropped"],
        cut_at=places["cut"],
        dropped_at=places["dropped"],
        context=context,
        longer=longer,
        longer_at=places["longer"],
        tokens=tokens,
        supervised=supervised,
        duplicates=len(whole) - different,
        disputed=different - _different(questions),
        answers={
            name: dict(sorted(counter.items()))
            for name, counter in sorted(answers.items())
            if len(counter) <= MOST_ANSWERS
        },
        overlap=looked_up.result() if tests else {},
        shapes=dict(shapes),
        sources=[],
        turns=dict(sorted(turns.items())),
        controls=controls,
        controls_at=controls_at,
        thoughts=thoughts,
        held_out=parts,
        twins=twins,
        examples=examples,
    )


def _different(hashes: array[int]) -> int:
    values = np.asarray(hashes)
    values.sort()  # in place: no copy of 80 MB
    return int(np.count_nonzero(values[1:] != values[:-1])) + 1


def _grams(row: Row) -> Iterator[int]:
    """Give the hashes of 13 words in a row, of what is the row's own."""
    text = row.instruction
    for lead in set(LEADS.values()):
        text = text.removeprefix(lead)
    text = text.rpartition("Answer format: ")[0] or text
    text = " ".join([text, row.context, *(turn.content for turn in row.messages), row.text])
    words = re.findall(r"\w+", text.lower())
    return map(hash, zip(*(words[start:] for start in range(GRAM)), strict=False))


def _group(row: Row) -> str:
    """Return the task of a row: its folder's, else by its text, where one may be of several."""
    folder = Path(row.where.rpartition(": ")[0]).parent.name
    if folder in TASKS:
        return folder
    lead = next((lead for lead in LEADS.values() if row.instruction.startswith(lead)), None)
    tasks = [name for name, known in LEADS.items() if known == lead]
    if len(tasks) > 1:
        choices = row.instruction.rpartition("Answer format: ")[2].count("/") + 1
        tasks = [name for name in tasks if (name == "social_i_qa") == (choices == 3)]
    return ", ".join(tasks) or "other"


def _pieces(
    tokenizer: PreTrainedTokenizerFast, tokens: list[int], labels: list[int]
) -> list[tuple[str, bool]]:
    pairs = zip(tokens, (label != IGNORE for label in labels), strict=True)
    return [
        (tokenizer.decode([token for token, _ in run]), learned)
        for learned, run in groupby(pairs, key=lambda pair: pair[1])
    ]


def _shares(lengths: Counter[int]) -> dict[str, float]:
    values = np.array(sorted(lengths))
    ends = np.cumsum([lengths[value] for value in values.tolist()])
    shares = {"min": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "99 %": 0.99, "max": 1.0}
    quantiles = {
        name: int(values[np.searchsorted(ends, share * ends[-1])]) for name, share in shares.items()
    }
    mean = sum(value * count for value, count in lengths.items()) / int(ends[-1])
    return quantiles | {"mean": round(mean, 2)}


def _histogram(lengths: Counter[int]) -> list[dict[str, int]]:
    low, high = min(lengths), max(lengths)
    # The longest hundredth shares the last bar, however long one row is.
    usual = int(_shares(lengths)["99 %"])
    width = max(1, -(-(usual - low + 1) // (BARS - 1)))
    bars = Counter[int]()
    for value, count in lengths.items():
        bars[min((value - low) // width, BARS - 1)] += count
    last = max(bars)
    return [
        {
            "from": low + number * width,
            "to": high if number == last else low + (number + 1) * width - 1,
            "rows": bars[number],
        }
        for number in range(last + 1)
    ]


def report(inspection: Inspection, colour: bool) -> Iterator[Table | Text]:
    """Give what was found as tables, and the example with its learned part marked."""
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(style="bold")
    per_cent = 100 * inspection.supervised / inspection.tokens if inspection.tokens else 0
    lengths = ", ".join(f"{name} {value:,}" for name, value in inspection.lengths.items())
    for name, value in inspection.about.items():
        facts.add_row(name, Text(str(value)))
    facts.add_row("rows", f"{inspection.rows:,}")
    for source in inspection.sources:
        given = f"{source['taken']:,} of {source['there']:,} rows"
        facts.add_row("", Text(f"{source['source']}: {given}"))
    if any(inspection.shapes):
        kinds = [f"{shape} {count:,}" for shape, count in inspection.shapes.items()]
        facts.add_row("read as", ", ".join(kinds))
    if inspection.unread:
        facts.add_row("not read", Text(unread_line(inspection.unread)))
    if inspection.turns:
        many = [f"{turns} in {count:,}" for turns, count in list(inspection.turns.items())[:FEW]]
        more = ", ..." if len(inspection.turns) > FEW else ""
        facts.add_row("turns", f"{', '.join(many)}{more}")
    facts.add_row("tokens a row", lengths)
    facts.add_row(
        "learned", f"{inspection.supervised:,} of {inspection.tokens:,} tokens ({per_cent:.1f} %)"
    )
    files = inspection.about["files"]
    why = "the cutoff takes their response's end"
    facts.add_row("cut", _counted(inspection.cut, why, inspection.cut_at, files))
    why = "their prompt fills the cutoff, nothing of the response is left"
    facts.add_row("dropped", _counted(inspection.dropped, why, inspection.dropped_at, files))
    if inspection.longer:
        why = f"more tokens than the model's context of {inspection.context:,}; train refuses them"
        facts.add_row("too long", _counted(inspection.longer, why, inspection.longer_at, files))
    if inspection.thoughts:
        facts.add_row(
            "thinking", f"{inspection.thoughts:,} turns lose it: the chat template leaves it out"
        )
    for name, count in inspection.held_out.items():
        facts.add_row("held out", Text(f"{count:,} rows of {name}"))
    if inspection.twins:
        facts.add_row("twins", f"{inspection.twins:,} held-out rows are training rows, too")
    facts.add_row("duplicates", f"{inspection.duplicates:,}")
    facts.add_row(
        "disputed", f"{inspection.disputed:,} with the question of another, answered otherwise"
    )
    yield facts

    bars = Table(box=None, pad_edge=False)
    for column in ("tokens", "rows", ""):
        bars.add_column(column, justify="right" if column else "left")
    most = max(bar["rows"] for bar in inspection.histogram)
    for bar in inspection.histogram:
        drawn = "█" * round(40 * bar["rows"] / most) or ("▏" if bar["rows"] else "")
        bars.add_row(f"{bar['from']:,} - {bar['to']:,}", f"{bar['rows']:,}", drawn)
    yield bars

    if inspection.answers:
        balance = Table(box=None, pad_edge=False)
        for column in ("answers", "rows", "most frequent", "share of each"):
            balance.add_column(column, justify="left" if column[0] in "as" else "right")
        for task, counts in inspection.answers.items():
            total = sum(counts.values())
            shares = ", ".join(f"{name} {100 * n / total:.1f}" for name, n in counts.items())
            frequent = f"{100 * max(counts.values()) / total:.1f} %"
            balance.add_row(task, f"{total:,}", frequent, Text(shares))
        yield balance

    if inspection.overlap:
        overlap = Table(box=None, pad_edge=False)
        for column in ("test rows in training", "test rows", "exact", f"{GRAM} words alike"):
            overlap.add_column(column, justify="left" if column[-1] == "g" else "right")
        own = inspection.overlap.keys() - TASKS.keys()
        for task in (*(name for name in TASKS if name in inspection.overlap), *sorted(own)):
            shared = inspection.overlap[task]
            overlap.add_row(task, f"{shared.test_rows:,}", f"{shared.exact:,}", f"{shared.grams:,}")
        yield overlap

    yield from _examples(inspection, colour)
    if inspection.controls:
        why = "their own words have a control token; data.special_tokens says what becomes of it"
        told = _counted(inspection.controls, why, inspection.controls_at, files)
        yield Text.assemble("control tokens: ", told)


def _examples(inspection: Inspection, colour: bool) -> Iterator[Text]:
    """Give the first row of each shape, with what is learned of it marked."""
    for shape, example in inspection.examples.items():
        which = f"The first row of {shape}" if len(inspection.examples) > 1 else "The first row"
        text = Text(f"{which}; what is learned is {'green' if colour else 'between » and «'}:\n")
        for piece, learned in example:
            marked = piece if colour or not learned else f"»{piece}«"
            text.append(marked, style="bold green" if learned else "dim")
        yield text


def _counted(count: int, why: str, places: list[str], files: str) -> Text:
    if not count:
        return Text("0")
    named = ", ".join(place.removeprefix(f"{files}: ") for place in places)  # of one file: rows
    return Text(f"{count:,}: {why}: {named}{', ...' if count > len(places) else ''}")
