"""Write the pocket commonsense set, or with ``--check`` say whether the files are up to date.

The facts in ``scripts/pocket`` have two sides, over all eight tasks together: sections marked
"test" are for the test rows, all others for training. A row is made of the facts of one side, its
wrong choices included. All choices come from a fixed seed, so the files never change by themselves.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from operator import eq
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import yaml

from san_llm.protocol.row_text import LEADS
from san_llm.protocol.tasks import TASKS

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "san_llm" / "data" / "pocket"
SEED = 2024
COUNTS = {"train": 250, "test": 60}
# Every value is read as text.
DATA = {path.stem: yaml.load(path.read_text("utf-8"), yaml.BaseLoader)
        for path in (HERE / "pocket").glob("*.yaml")}  # fmt: skip
WORDS = DATA["wording"]
NAMES = WORDS["women"]["names"] + WORDS["men"]["names"]
YES = ("true", "false")


class Fact(NamedTuple):
    """What rows can ask about."""

    id: str
    fields: tuple[str, ...]


class Draft(NamedTuple):
    """A row without places for its choices, the right one first, and all facts behind these."""

    task: str
    stem: str
    choices: Sequence[str]
    facts: Sequence[Fact]
    turn: int = 0  # later ones are for when the first are too few


Facts = dict[str, dict[str, list[Fact]]]  # by file and section
Rows = list[tuple[dict[str, str], Draft]]  # with the drafts behind them


def texts(value: Any) -> list[str]:
    """Return the texts of a value in order; keys are only labels."""
    if isinstance(value, str):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [text for inner in values for text in texts(inner)]


def split() -> dict[str, Facts]:
    """Return the facts of training and of test; each must be on the side where it has to stay."""
    sides: dict[str, Facts] = {side: {file: {} for file, _ in MAKERS} for side in COUNTS}
    ids: dict[str, set[str]] = {side: set() for side in COUNTS}
    for file in dict(MAKERS):
        for header, rows in DATA[file].items():
            section = header.removesuffix(", test")
            side = "train" if section == header else "test"
            name, _, mark = section.partition(", ")
            if file == "class":
                lines = [[animal, name, mark] for animal in rows]
            elif file == "sort":  # a member, what is said of it, and of the opposite group
                lines = [[member, *dict.fromkeys((phrase, *rows))]
                         for phrase, members in rows.items() for member in members]  # fmt: skip
            elif isinstance(rows, dict):
                lines = [[key, *texts(value)] for key, value in rows.items()]
            else:
                lines = [texts(value) for value in rows]
            # Wrong choices come from the same section, but from all classes and a task's sorts.
            section = {"class": "", "sort": mark}.get(file, section)
            for line in lines:
                fact = Fact(f"{file}/{name}/{line[0]}", tuple(line))
                sides[side][file].setdefault(section, []).append(fact)
                ids[side] |= {f"{file}/{name}", fact.id}
    for side, places in DATA["stay"].items():
        missing = {f"{place}/{name}" for place in places for name in places[place]} - ids[side]
        if missing:
            raise ValueError(f"{side} has no such units: {', '.join(sorted(missing))}")
    return sides


def fill(text: str, names: dict[str, str]) -> str:
    """Replace every ``$name``, and every ``$Name`` by the same with a capital."""
    capitals = {name.capitalize(): value[:1].upper() + value[1:] for name, value in names.items()}
    return Template(text).substitute(capitals | names)


def offer(rng: random.Random, right: Fact, pool: list[Fact], column: int, count: int) -> list[Fact]:
    """Return ``right`` and facts whose ``column`` is wrong for it."""
    offered = [right]
    for fact in rng.sample(pool, len(pool)):
        # A wrong key must not share the asked value, nor a wrong value the asked key; a third field
        # of family.yaml says what is too alike.
        shared = any(map(eq, fact.fields, right.fields))
        taken = fact.fields[column] in [choice.fields[column] for choice in offered]
        if not shared and not taken:
            offered.append(fact)
        if len(offered) == count:
            return offered
    raise ValueError(f"{right.id}: fewer than {count - 1} wrong choices on its side")


def people(rng: random.Random, task: str) -> Iterator[dict[str, str]]:
    """Yield names and pronouns for the rows about a fact."""
    if task == "hellaswag":
        for person, group in rng.sample(list(WORDS["persons"].items()), 2):
            yield {"S": person, **WORDS[group]["pronouns"]}
    while task == "social_i_qa":
        same, other = ("women", "men") if rng.random() < 0.5 else ("men", "women")
        a, b = rng.sample(WORDS[same]["names"], 2)
        b = rng.choice(WORDS[other]["names"]) if rng.random() < 0.5 else b
        yield {"A": a, "B": b, **WORDS[same]["pronouns"]}
    while True:
        yield {}


def fields(rng: random.Random, file: str, facts: Facts) -> Iterator[Draft]:
    """Questions for a field of a fact, with that of other facts as wrong choices."""
    for section, pool in facts[file].items():
        ways: dict[str, Any] = {}
        for name in ("all", *section.split(", ")):
            ways |= WORDS["asks"][file].get(name, {})
        order = list(product(ways.items(), enumerate(pool)))
        if file == "term":  # fact by fact, where the others go way by way
            order.sort(key=lambda item: item[1][0])
        for (way, words), (number, fact) in order:
            task, field, *later = way.split()
            column, wording = ("key", "value", "example").index(field), texts(words)
            # Where there are two ways, facts take turns in which comes first.
            late = bool(later) or (len(ways) == 2 and (column + number) % 2 == 0)
            # A second row about the same fact only where there are words for it.
            for turn, names in zip(range(2)[: len(wording)], people(rng, task), strict=False):
                offered = offer(rng, fact, pool, column, 3 if task == "social_i_qa" else 4)
                filled = [[fill(text, names) for text in choice.fields] for choice in offered]
                names |= dict(zip("kvx", filled[0], strict=False), section=section)
                stem = fill(wording[(number + turn) % len(wording)], names)
                yield Draft(task, stem, [row[column] for row in filled], offered, turn + late)


def written(rng: random.Random, file: str, facts: Facts) -> Iterator[Draft]:
    """Rows that need no other fact."""
    words = WORDS["written"][file]
    for fact, row in product(facts[file]["all"], words["rows"]):
        names = dict(zip(words["fields"], fact.fields, strict=True), name=rng.choice(NAMES))
        stem, *choices = (fill(text, names) for text in (row["ask"], *row["answers"]))
        yield Draft(row["task"], stem, choices, [fact])


def goals(rng: random.Random, file: str, facts: Facts) -> Iterator[Draft]:
    """How to do things, and what to do them with."""
    asks, tool_asks = WORDS["goal"], WORDS["tool"]
    for pair in facts[file].values():
        start = rng.randrange(len(asks)) + 1
        for number, both in enumerate((pair, pair[::-1]) * 2):
            stem = fill(asks[(start + number) % len(asks)], {"goal": both[0].fields[0]})
            yield Draft("piqa", stem, [fact.fields[1] for fact in both], both, number // 2)
    for pool in (pool for section, pool in facts["family"].items() if section.endswith(", thing")):
        for number, fact in enumerate(pool):
            stem = fill(tool_asks[number % len(tool_asks)], {"goal": fact.fields[1]})
            both = offer(rng, fact, pool, 0, 2)
            yield Draft("piqa", stem, [f"Use {tool.fields[0]}." for tool in both], both)


def twins(rng: random.Random, file: str, facts: Facts) -> Iterator[Draft]:
    """Sentences with a blank, each in two versions."""
    for section, pool in facts[file].items():
        for fact, turn in product(pool, range(3 if section == "names" else 1)):
            pair = rng.sample(NAMES, 2) if section == "names" else fact.fields[0].split("/")
            head, ends, tail = re.split(r"[][]", fact.fields[-1])
            for end, choices in zip(ends.split("|"), (pair, pair[::-1]), strict=True):
                stem = fill(head + end + tail, {"A": pair[0], "B": pair[1]})
                yield Draft("winogrande", stem, choices, [fact], turn)


def yes_no(item: str, phrase: str) -> str:
    """Turn what is said of an item into a question; empty where it would need a ``not``."""
    verb, _, rest = phrase.partition(" ")
    if rest.startswith(("not ", "no ", "only ")) or verb == "cannot":
        return ""
    if verb in ("is", "would", "can"):
        return f"{verb} {item} {rest}?"
    return f"does {item} {'have' if verb == 'has' else verb.removesuffix('s')} {rest}?"


def questions(rng: random.Random, file: str, facts: Facts) -> Iterator[Draft]:
    """Yes-no questions made of facts that have other rows, too."""
    for place, words in WORDS["boolq"].items():
        source, *marks = place.split()
        for section, pool in facts[source].items():
            for number, fact in enumerate(pool if {*marks} <= {*section.split(", ")} else []):
                item, *phrases = fact.fields
                if source == "sort":
                    pairs = [(fact, yes_no(item, phrase)) for phrase in phrases]
                else:
                    ask = texts(words)[number % len(texts(words))]
                    pairs = [(other, fill(ask, {"k": item, "v": other.fields[1]}))
                             for other in offer(rng, fact, pool, 1, 2)]  # fmt: skip
                for choices, (other, stem) in zip((YES, YES[::-1]), pairs, strict=True):
                    if stem:
                        yield Draft("boolq", stem, choices, [fact, other], 1)


def sorts(rng: random.Random, file: str, facts: Facts) -> Iterator[Draft]:
    """Which of four belongs to a group; the other three belong to the opposite one."""
    for task, pool in facts[file].items():
        for number, fact in enumerate(pool):
            stem = f"Which {'one of' if rng.random() < 0.3 else 'of'} these {fact.fields[1]}?"
            opposite = [other for other in pool if other.fields[1] == fact.fields[2]]
            four = [fact, *rng.sample(opposite, 3)]
            # Every second member comes late, so that no list fills the rows of its task.
            yield Draft(task, stem, [choice.fields[0] for choice in four], four, number % 2)


def classes(rng: random.Random, file: str, facts: Facts) -> Iterator[Draft]:
    """Groups of animals: naming one, and finding a second member of it."""
    which, whose, kindred = WORDS["class"]
    for number, fact in enumerate(pool := facts[file][""]):
        ask, column = (which, 0) if number % 2 else (whose, 2)
        animal, group, _ = fact.fields
        four = offer(rng, fact, pool, 0, 4)
        if column:  # the draw before stays, or all later ones would be others
            four = offer(rng, fact, pool, column, 4)
        stem = fill(ask, {"k": animal, "v": group})
        yield Draft("ARC-Easy", stem, [choice.fields[column] for choice in four], four)
        four = offer(rng, fact, pool, 0, 4)
        kin = rng.choice([other for other in pool if other.fields[1] == group and other != fact])
        stem = fill(kindred, {"k": kin.fields[0]})
        yield Draft("ARC-Challenge", stem, [choice.fields[0] for choice in four], [*four, kin])


# What makes rows of which file; the order is part of what the seed decides.
MAKERS = (
    ("social", fields), ("routine", fields), ("goal", goals), ("twin", twins),
    ("question", written), ("question", questions), ("family", fields), ("term", fields),
    ("effect", fields), ("sort", sorts), ("class", classes), ("need", fields),
    ("experiment", written), ("chain", written), ("number", written),
)  # fmt: skip


def task_rows(side: str, task: str, drafts: list[Draft]) -> Rows:
    """Pick and write out a task's rows, the right answers evenly over the places."""
    rng, count = random.Random(f"{SEED}:{side}:rows:{task}"), COUNTS[side]
    labels, pools = TASKS[task].answers[: len(drafts[0].choices)], [drafts]
    if task == "boolq":
        pools = [[draft for draft in drafts if draft.choices[0] == label] for label in labels]
    chosen: list[Draft] = []
    for pool in pools:
        picked: dict[Any, Draft] = {}
        for draft in sorted(rng.sample(pool, len(pool)), key=lambda draft: draft.turn):
            # A question comes again only with other facts among its choices.
            picked.setdefault((draft.stem, task != "boolq" and frozenset(draft.facts)), draft)
        chosen += list(picked.values())[: count // len(pools)]
    if len(chosen) < count:
        raise ValueError(f"{task}: {len(chosen)} drafts, {count} wanted")
    places = [number % len(labels) for number in range(count)]
    rng.shuffle(places)
    between, end = "\n\n" if task == "piqa" else " ", " " if task == "winogrande" else "\n\n"
    rows: Rows = []
    for draft, place in zip(chosen, places, strict=True):
        right, *wrong = draft.choices
        answer, listed = right, ""
        if task != "boolq":
            rng.shuffle(wrong)
            answer = labels[place]
            pairs = zip(labels, (*wrong[:place], right, *wrong[place:]), strict=True)
            listed = between.join(f"{name.capitalize()}: {text}" for name, text in pairs) + end
        text = f"{LEADS[task]}{draft.stem}\n\n{listed}Answer format: {'/'.join(labels)}"
        output = f"the correct answer is {answer}"
        rows.append(({"instruction": text, "input": "", "output": output, "answer": answer}, draft))
    rng.shuffle(rows)
    return rows


def make_rows() -> dict[str, dict[str, Rows]]:
    """Return side -> task -> rows; no fact of a test row may be behind a training row, too."""
    sides: dict[str, dict[str, Rows]] = {}
    for side, facts in split().items():
        drafts: dict[str, list[Draft]] = {task: [] for task in LEADS}
        for file, maker in MAKERS:
            for draft in maker(random.Random(f"{SEED}:{side}:{file}"), file, facts):
                drafts[draft.task].append(draft)
        sides[side] = {task: task_rows(side, task, drafts[task]) for task in drafts}
    train, test = (
        {fact.id for rows in tasks.values() for _, draft in rows for fact in draft.facts}
        for tasks in sides.values()
    )
    if shared := sorted(train & test):
        raise ValueError(f"facts on both sides: {', '.join(shared[:5])}")
    return sides


def make_files() -> dict[str, str]:
    """Return the text of every file, by its path inside the pocket folder."""
    sides = make_rows()
    train = [row for rows in sides["train"].values() for row, _ in rows]
    random.Random(f"{SEED}:mix").shuffle(train)
    files = {"train.json": train}
    files |= {f"{task}/test.json": [row for row, _ in rows] for task, rows in sides["test"].items()}
    return {name: "[\n" + ",\n".join(map(json.dumps, files[name])) + "\n]\n" for name in files}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the files; return the exit status."""
    parser = argparse.ArgumentParser(description="Write the pocket commonsense set.")
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    check = parser.parse_args(arguments).check
    stale = []
    for name, text in make_files().items():
        path = OUT / name
        if path.is_file() and path.read_bytes() == text.encode("ascii"):
            continue
        stale.append(name)
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode("ascii"))
    if stale:
        print("out of date:" if check else "wrote", ", ".join(stale), file=sys.stderr)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
