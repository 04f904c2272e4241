"""Write the pocket commonsense set, or with ``--check`` say whether the files are up to date.

The facts of ``pocket_facts``, ``pocket_howto`` and ``pocket_stories`` are split into training and
test first, over all eight tasks together; every row is then made from the facts of one side only,
its wrong choices included. All choices come from a fixed seed, so the files never change by
themselves.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pocket_facts
import pocket_howto
import pocket_stories
from pocket_drafts import DIVIDED, MAKERS, SEED, Draft, Side
from pocket_text import (
    Unit,
    capital,
    read_clusters,
    read_columns,
    read_pairs,
    read_sorts,
    read_twins,
)

OUT = Path(__file__).resolve().parent.parent / "san_llm" / "data" / "pocket"
TRAIN_ROWS = 250
TEST_ROWS = 60


@dataclass(frozen=True)
class Form:
    """How a task's rows look.

    Attributes:
        lead: What comes before the stem.
        word: What a choice is called, as in ``solution1``; empty for true and false.
        choices: How many there are.
        between: What stands between two choices.
        before_format: What stands between the last choice and the answer format.
    """

    lead: str
    word: str
    choices: int
    between: str = " "
    before_format: str = "\n\n"


_QUESTION = "Please choose the correct answer to the question: "
FORMS: dict[str, Form] = {
    "boolq": Form("Please answer the following question with true or false, question: ", "", 2),
    "piqa": Form("Please choose the correct solution to the question: ", "solution", 2, "\n\n"),
    "social_i_qa": Form(_QUESTION, "answer", 3),
    "hellaswag": Form(
        "Please choose the correct ending to complete the given sentence: ", "ending", 4
    ),
    "winogrande": Form(
        "Please choose the correct answer to fill in the blank to complete the given sentence: ",
        "option",
        2,
        before_format=" ",
    ),
    "ARC-Easy": Form(_QUESTION, "answer", 4),
    "ARC-Challenge": Form(_QUESTION, "answer", 4),
    "openbookqa": Form(_QUESTION, "answer", 4),
}


def all_pools() -> dict[str, tuple[int, list[Unit]]]:
    """Return each pool with the number of its units that go to the test side."""
    pools: dict[str, tuple[int, list[Unit]]] = {
        "social": (15, read_clusters("social", pocket_stories.SOCIAL)),
        "routine": (15, read_clusters("routine", pocket_stories.ROUTINES)),
        "goal": (24, read_clusters("goal", pocket_howto.GOALS)),
        "term": (5, read_columns("term", pocket_facts.TERMS)),
        "effect": (6, read_columns("effect", pocket_facts.EFFECTS)),
        "need": (3, read_columns("need", pocket_facts.NEEDS)),
        "question": (15, read_pairs("question", pocket_howto.QUESTIONS)),
        "experiment": (3, read_pairs("experiment", pocket_facts.EXPERIMENTS)),
        "chain": (3, read_pairs("chain", pocket_facts.CHAINS)),
    }
    twins = read_twins("twin", pocket_howto.TWINS)
    pools["twin-names"] = (17, [u for u in twins if u.facts[0].fields[0] == "names"])
    pools["twin-nouns"] = (13, [u for u in twins if u.facts[0].fields[0] != "names"])
    for task in ("ARC-Easy", "ARC-Challenge", "openbookqa"):
        sorts = [u for u in read_sorts("sort", pocket_facts.SORTS) if u.kind == task]
        pools[f"sort-{task}"] = (1, sorts)
    for unit in read_columns("thing", pocket_facts.THINGS):
        pools[f"thing-{unit.name}"] = (5, unit.apart())
    whole: list[Unit] = []
    for unit in read_columns("family", pocket_facts.FAMILIES):
        if unit.name == "class":
            for kind in sorted({fact.fields[1] for fact in unit.facts}):
                members = [one for one in unit.apart() if one.facts[0].fields[1] == kind]
                pools[f"class-{kind}"] = (2, members)
        elif unit.name in DIVIDED:
            pools[f"family-{unit.name}"] = (4, unit.apart())
        else:
            whole.append(unit)
    pools["family-whole"] = (1, whole)
    return pools


def split() -> tuple[Side, Side]:
    """Divide every pool's units into training and test.

    Raises:
        ValueError: when two units or facts share an id, or a fixed place names no unit.
    """
    train, test = Side("train"), Side("test")
    pools = all_pools()
    ids = [unit.id for _, units in pools.values() for unit in units]
    facts = [fact.id for _, units in pools.values() for unit in units for fact in unit.facts]
    for name, names in (("unit", ids), ("fact", facts)):
        if len(set(names)) < len(names):
            raise ValueError(f"two {name}s are called {max(names, key=names.count)}")
    only_train = set(pocket_facts.ONLY_TRAIN.split())
    only_test = set(pocket_facts.ONLY_TEST.split())
    unknown = sorted((only_train | only_test) - set(ids))
    if unknown:
        raise ValueError(f"no such units: {', '.join(unknown)}")
    for pool, (wanted, units) in pools.items():
        fixed = [unit.id for unit in units if unit.id in only_test]
        free = [u for u in units if u.id not in only_train and u.id not in fixed]
        rng = random.Random(f"{SEED}:split:{pool}")
        chosen, groups = set(fixed), set[str]()
        for unit in rng.sample(free, len(free)):
            # Two alike facts would leave a small test side short of wrong choices.
            alike = {fact.group for fact in unit.facts if fact.group and len(unit.facts) == 1}
            if len(chosen) < wanted and not alike & groups:
                chosen.add(unit.id)
                groups |= alike
        train.pools[pool] = [unit for unit in units if unit.id not in chosen]
        test.pools[pool] = [unit for unit in units if unit.id in chosen]
    return train, test


def choose(drafts: Sequence[Draft], count: int, rng: random.Random) -> list[Draft]:
    """Pick ``count`` drafts, first turns first and no stem twice.

    Raises:
        ValueError: when there are too few.
    """
    order = sorted(rng.sample(list(drafts), len(drafts)), key=lambda draft: draft.turn)
    picked: dict[tuple[str, frozenset[str]], Draft] = {}
    for draft in order:
        # The same question may come again only with other facts among its choices.
        picked.setdefault((draft.stem, draft.facts if len(draft.choices) > 1 else frozenset()),
                          draft)  # fmt: skip
        if len(picked) == count:
            return list(picked.values())
    raise ValueError(f"{drafts[0].task}: {len(picked)} drafts, {count} wanted")


def render(draft: Draft, place: int, rng: random.Random) -> dict[str, str]:
    """Write a draft out as a row, its right choice at ``place`` (counted from 0)."""
    form = FORMS[draft.task]
    if not form.word:
        answer = draft.choices[0]
        text = f"{form.lead}{draft.stem}\n\nAnswer format: true/false"
    else:
        right, *rest = draft.choices
        rng.shuffle(rest)
        rest.insert(place, right)
        labels = [f"{form.word}{number}" for number in range(1, form.choices + 1)]
        answer = labels[place]
        listed = form.between.join(
            f"{capital(label)}: {choice}" for label, choice in zip(labels, rest, strict=True)
        )
        text = (
            f"{form.lead}{draft.stem}\n\n{listed}{form.before_format}"
            f"Answer format: {'/'.join(labels)}"
        )
    return {
        "instruction": text,
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def task_rows(side: Side, task: str, drafts: Sequence[Draft], count: int) -> list[
    tuple[dict[str, str], Draft]
]:  # fmt: skip
    """Pick and render a task's rows, the right answers evenly over the places."""
    rng = side.rng(f"rows:{task}")
    form = FORMS[task]
    if form.word:
        chosen = choose(drafts, count, rng)
    else:
        chosen = [
            draft
            for answer in ("true", "false")
            for draft in choose([d for d in drafts if d.choices == (answer,)], count // 2, rng)
        ]
    places = [number % form.choices for number in range(count)]
    rng.shuffle(places)
    rows = [(render(d, place, rng), d) for d, place in zip(chosen, places, strict=True)]
    rng.shuffle(rows)
    return rows


def make_rows() -> dict[str, dict[str, list[tuple[dict[str, str], Draft]]]]:
    """Return side -> task -> rows with the drafts behind them.

    Raises:
        ValueError: when a fact of a test row is also behind a training row.
    """
    made: dict[str, dict[str, list[tuple[dict[str, str], Draft]]]] = {}
    for side, count in zip(split(), (TRAIN_ROWS, TEST_ROWS), strict=True):
        drafts = [draft for maker in MAKERS for draft in maker(side)]
        made[side.name] = {
            task: task_rows(side, task, [d for d in drafts if d.task == task], count)
            for task in FORMS
        }
    used = {
        name: {fact for rows in tasks.values() for _, draft in rows for fact in draft.facts}
        for name, tasks in made.items()
    }
    shared = sorted(used["train"] & used["test"])
    if shared:
        raise ValueError(f"facts on both sides: {', '.join(shared[:5])}")
    return made


def as_text(rows: Sequence[dict[str, str]]) -> str:
    """Write rows as a JSON list with one row per line, in ASCII."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def make_files() -> dict[str, str]:
    """Return the text of every file, by its path inside the pocket folder."""
    made = make_rows()
    train = [row for rows in made["train"].values() for row, _ in rows]
    random.Random(f"{SEED}:mix").shuffle(train)
    files = {"train.json": as_text(train)}
    for task, rows in made["test"].items():
        files[f"{task}/test.json"] = as_text([row for row, _ in rows])
    return files


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
        if check:
            stale.append(name)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode("ascii"))
            print(f"wrote {path}")
    if stale:
        print(f"out of date: {', '.join(stale)}; run python scripts/make_pocket.py",
              file=sys.stderr)  # fmt: skip
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
