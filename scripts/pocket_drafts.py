"""Turn the facts of one side of the pocket set into drafts of rows, one function per kind of fact.

A draft knows its right and wrong choices and every fact it rests on, but not yet the places of
the choices, which are handed out later so that they come out even.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pocket_facts
from pocket_text import Fact, Unit, capital

SEED = 2024

WOMEN = ("Alice", "Carla", "Emma", "Grace", "Hannah", "Irene", "Laura", "Maria", "Nina", "Olivia",
         "Rachel", "Sophie", "Tina", "Vera", "Wendy", "Zoe")  # fmt: skip
MEN = ("Adam", "Ben", "Carlos", "David", "Eric", "Felix", "George", "Henry", "Ivan", "Jack",
       "Leo", "Martin", "Oscar", "Paul", "Simon", "Tom")  # fmt: skip
PERSONS = (
    ("A woman", "She", "her", "her"),
    ("A man", "He", "him", "his"),
    ("A young woman", "She", "her", "her"),
    ("An old man", "He", "him", "his"),
    ("A woman with glasses", "She", "her", "her"),
    ("A man in a cap", "He", "him", "his"),
    ("A tall woman", "She", "her", "her"),
    ("A man with a beard", "He", "him", "his"),
    ("A woman in a blue shirt", "She", "her", "her"),
    ("A young man", "He", "him", "his"),
)

SOCIAL_ASKS: dict[str, tuple[str, ...]] = {
    "feel": ("How would {A} feel?", "How does {A} most likely feel?"),
    "other": ("How would {B} feel as a result?", "How would {B} feel afterwards?"),
    "why": ("Why did {A} do this?", "What was the reason for this?"),
    "next": ("What will {A} want to do next?", "What will {A} most likely do next?"),
    "need": ("What does {A} need to do before this?", "What did {A} have to do first?"),
    "describe": ("How would you describe {A}?", "What kind of person is {A}?"),
}
GOAL_ASKS = (
    "How do you {goal}?",
    "What is a good way to {goal}?",
    "{Goal}.",
    "How can you {goal}?",
    "What should you do to {goal}?",
)
TOOL_ASKS = ("How do you {goal}?", "What is an easy way to {goal}?", "{Goal}.")
EFFECT_ASKS = (
    "If {cause}, then",
    "What will most likely happen when {cause}?",
    "When {cause}, the most likely result is that",
)

# Family: (task, whether the key or the value is asked for, wording). Two wordings of the same
# direction are alternatives; a row takes them in turn.
FAMILY_ASKS: dict[str, tuple[tuple[str, str, tuple[str, ...]], ...]] = {
    "organ": (
        ("ARC-Easy", "key", ("Which part of the body has the job of {v}?",)),
        ("ARC-Easy", "value", ("What is the main job of {k}?", "What does the body need {k} for?")),
        ("boolq", "is", ("is {v} a job of {k}",)),
    ),
    "plantpart": (
        ("ARC-Easy", "key", ("Which part of a plant has the job of {v}?",)),
        ("ARC-Easy", "value", ("In a plant, what is the main job of {k}?",)),
        ("boolq", "is", ("in a plant, is {v} a job of {k}",)),
    ),
    "instrument": (
        ("ARC-Easy", "key", ("Which tool should a student use to measure {v}?",)),
        ("ARC-Easy", "value", ("What can be measured with {k}?",)),
        ("boolq", "is", ("is {k} made to measure {v}",)),
    ),
    "scientist": (
        ("ARC-Easy", "key", ("Which expert mainly studies {v}?",)),
        ("ARC-Easy", "value", ("What does {k} mainly study?",)),
        ("boolq", "is", ("does {k} mainly study {v}",)),
    ),
    "planet": (
        ("ARC-Easy", "key", ("Which planet is known for {v}?",)),
        ("ARC-Easy", "value", ("What is the planet {k} known for?",)),
    ),
    "baby": (
        ("ARC-Easy", "value", ("What will {k} grow up to be?", "{K} grows into which animal?")),
        ("ARC-Easy", "key", ("What is the young of {v} called?",)),
        ("boolq", "is", ("does {k} grow up to be {v}",)),
    ),
    "device": (
        ("ARC-Challenge", "value", ("Which change of energy is {k} made for?",)),
        ("ARC-Challenge", "key", ("Which device is made to change energy {v}?",)),
    ),
    "unit": (
        ("ARC-Easy", "key", ("Which unit would be used for {v}?",)),
        ("ARC-Easy", "value", ("Which of these would be given in {k}?",)),
        ("boolq", "is", ("is {v} given in {k}",)),
    ),
    "landform": (
        ("ARC-Easy", "key", ("Which landform is {v}?",)),
        ("ARC-Easy", "value", ("What is {k}?",)),
        ("boolq", "is", ("is {k} {v}",)),
    ),
    "home": (
        ("openbookqa", "value", ("{K} would most likely be found", "A good place to find {k} is")),
        ("openbookqa", "key", ("Which animal would most likely be found {v}?",)),
        ("boolq", "is", ("would you look for {k} {v}",)),
    ),
    "diet": (
        ("openbookqa", "value", ("A good meal for {k} would be", "{K} that is hungry looks for")),
        ("openbookqa", "key", ("Which animal would be happy to eat {v}?",)),
        ("boolq", "is", ("would {k} normally eat {v}",)),
    ),
    "thing": (
        ("openbookqa", "key", ("Someone who wants to {v} would most likely use",
                               "In order to {v}, a person would look for",
                               "Which of these is made to {v}?")),
        ("openbookqa", "value", ("The purpose of {k} is to", "{K} is mostly used to")),
        ("boolq", "is", ("is {k} normally used to {v}", "would you use {k} to {v}",
                         "to {v}, do you need {k}")),
    ),
}  # fmt: skip
NEED_ASKS = {
    "material": "Which material is best for {k}?",
    "fabric": "Which material is best for {k}?",
    "beak": "Which beak would be best for {k}?",
    "feet": "Which feet would be best for {k}?",
    "climate": "Which feature would best help {k} to survive?",
    "defense": "Which feature would best protect {k}?",
    "separate": "What is the best way to separate {k}?",
    "tools": "What would be most useful for {k}?",
    "rescue": "What would be the best help for {k}?",
    "vehicle": "What is best suited for {k}?",
}
# Families of which some facts go to the test side and the rest to training; the others move whole.
DIVIDED = ("organ", "instrument", "scientist", "baby", "device", "home", "diet")


@dataclass(frozen=True)
class Draft:
    """A row before its choices have places.

    Attributes:
        task: The task it belongs to.
        stem: What is asked.
        choices: The right one first; for boolq only ``true`` or ``false``.
        facts: The ids of all facts it rests on, those behind wrong choices included.
        turn: 0 for the first row about something, 1 for the second in other words, and so on.
    """

    task: str
    stem: str
    choices: tuple[str, ...]
    facts: frozenset[str]
    turn: int = 0


@dataclass
class Side:
    """The units of training or of test, by pool."""

    name: str
    pools: dict[str, list[Unit]] = field(default_factory=dict)

    def facts(self, pool: str) -> list[Fact]:
        """Return all facts of a pool on this side."""
        return [fact for unit in self.pools.get(pool, []) for fact in unit.facts]

    def rng(self, purpose: str) -> random.Random:
        """Return a generator of its own for a purpose, so that one pool never moves another."""
        return random.Random(f"{SEED}:{self.name}:{purpose}")


def _others(rng: random.Random, right: Fact, pool: Sequence[Fact], column: int, count: int,
            ) -> list[Fact]:  # fmt: skip
    """Pick facts whose ``column`` is wrong for ``right``: no equal values and no shared group."""
    found: list[Fact] = []
    for fact in rng.sample(list(pool), len(pool)):
        taken = [right, *found]
        if right.group and fact.group == right.group:
            continue
        if any(fact.fields[column] == other.fields[column] for other in taken):
            continue
        # A wrong key must not share the asked value, nor a wrong value the asked key.
        if any(fact.fields[at] == right.fields[at] for at in (0, 1)):
            continue
        found.append(fact)
        if len(found) == count:
            return found
    raise ValueError(f"{right.id}: fewer than {count} wrong choices on its side")


def _row(task: str, stem: str, right: Fact, wrong: Sequence[Fact], column: int, turn: int,
         form: str = "{}") -> Draft:  # fmt: skip
    """Make a draft whose choices are one column of the facts."""
    facts = [right, *wrong]
    choices = tuple(form.format(fact.fields[column]) for fact in facts)
    return Draft(task, stem, choices, frozenset(fact.id for fact in facts), turn)


def social(side: Side) -> Iterator[Draft]:
    """Situations between people."""
    rng = side.rng("social")
    for unit in side.pools["social"]:
        asks = SOCIAL_ASKS[unit.kind]
        for number, fact in enumerate(unit.facts):
            for turn in range(2):
                women = rng.random() < 0.5
                a, b = rng.sample(WOMEN if women else MEN, 2)
                if rng.random() < 0.5:
                    b = rng.choice(MEN if women else WOMEN)
                he, him, his = ("she", "her", "her") if women else ("he", "him", "his")
                stem = f"{fact.fields[0]} {asks[(number + turn) % len(asks)]}"
                stem = stem.format(A=a, B=b, he=he, him=him, his=his)
                wrong = _others(rng, fact, unit.facts, 1, 2)
                form = "to {}" if unit.kind == "why" else "{}"
                yield _row("social_i_qa", stem, fact, wrong, 1, turn, form)


def routines(side: Side) -> Iterator[Draft]:
    """What happens next in an everyday routine."""
    rng = side.rng("routine")
    for unit in side.pools["routine"]:
        for fact in unit.facts:
            persons = rng.sample(PERSONS, 2)
            for turn, (person, he, him, his) in enumerate(persons):
                names = {"S": person, "He": he, "he": he.lower(), "him": him, "his": his}
                stem = f"{unit.name}: {fact.fields[0]}".format(**names)
                wrong = _others(rng, fact, unit.facts, 1, 3)
                draft = _row("hellaswag", stem, fact, wrong, 1, turn)
                choices = tuple(choice.format(**names) for choice in draft.choices)
                yield Draft(draft.task, stem, choices, draft.facts, turn)


def goals(side: Side) -> Iterator[Draft]:
    """How to do things, and what to do them with."""
    rng = side.rng("goal")
    for unit in side.pools["goal"]:
        first, second = unit.facts
        start = rng.randrange(len(GOAL_ASKS))
        for turn in range(2):
            for fact, wrong in ((first, second), (second, first)):
                start += 1
                goal = fact.fields[0]
                stem = GOAL_ASKS[start % len(GOAL_ASKS)].format(goal=goal, Goal=capital(goal))
                yield _row("piqa", stem, fact, [wrong], 1, turn)
    for pool in (name for name in side.pools if name.startswith("thing-")):
        facts = side.facts(pool)
        for number, fact in enumerate(facts):
            goal = fact.fields[1]
            stem = TOOL_ASKS[number % len(TOOL_ASKS)].format(goal=goal, Goal=capital(goal))
            yield _row("piqa", stem, fact, _others(rng, fact, facts, 0, 1), 0, 0, "Use {}.")


def twins(side: Side) -> Iterator[Draft]:
    """Sentences with a blank, each in two versions."""
    rng = side.rng("twin")
    for pool, turns in (("twin-names", 3), ("twin-nouns", 1)):
        for unit in side.pools[pool]:
            (fact,) = unit.facts
            kind, text = fact.fields
            head, _, rest = text.partition("[")
            ends, _, tail = rest.partition("]")
            for turn in range(turns):
                pair = rng.sample(WOMEN + MEN, 2) if kind == "names" else kind.split("/")
                for place, end in enumerate(ends.split("|")):
                    stem = (head + end + tail).format(A=pair[0], B=pair[1])
                    choices = (pair[place], pair[1 - place])
                    yield Draft("winogrande", stem, choices, frozenset({fact.id}), turn)


def questions(side: Side) -> Iterator[Draft]:
    """Yes-no questions: the written pairs, then those made from other facts."""
    rng = side.rng("question")
    for fact in side.facts("question"):
        for answer, text in zip(("true", "false"), fact.fields, strict=True):
            yield Draft("boolq", f"{text}?", (answer,), frozenset({fact.id}))
    for name, asks in sorted(FAMILY_ASKS.items()):
        for facts in _families(side, name):
            for _, wording in ((way, words) for task, way, words in asks if task == "boolq"):
                for number, fact in enumerate(facts):
                    text = wording[number % len(wording)] + "?"
                    (other,) = _others(rng, fact, facts, 1, 1)
                    key = fact.fields[0]
                    ids = frozenset({fact.id, other.id})
                    yield Draft("boolq", text.format(k=key, v=fact.fields[1]), ("true",),
                                frozenset({fact.id}), 1)  # fmt: skip
                    yield Draft("boolq", text.format(k=key, v=other.fields[1]), ("false",), ids, 1)
    for unit in side.pools["term"]:
        for fact in unit.facts:
            (other,) = _others(rng, fact, unit.facts, 1, 1)
            for answer, one in (("true", fact), ("false", other)):
                text = f'does "{one.fields[1]}" describe {fact.fields[0]}?'
                yield Draft("boolq", text, (answer,), frozenset({fact.id, one.id}), 1)
    for pool in (name for name in side.pools if name.startswith("sort-")):
        for fact in side.facts(pool):
            item, holds, opposite = fact.fields
            for answer, phrase in (("true", holds), ("false", opposite)):
                text = yes_no(item, phrase)
                if text:
                    yield Draft("boolq", text, (answer,), frozenset({fact.id}), 1)
    classes = [fact for pool in _class_pools(side) for fact in side.facts(pool)]
    for fact in classes:
        (other,) = _others(rng, fact, classes, 1, 1)
        for answer, one in (("true", fact), ("false", other)):
            kind = one.fields[1]
            text = f"is {fact.fields[0]} {'an' if kind[0] in 'aeiou' else 'a'} {kind}?"
            if kind != "fish" or answer == "true" or "fish" not in fact.fields[0]:
                yield Draft("boolq", text, (answer,), frozenset({fact.id, one.id}), 1)


def yes_no(item: str, phrase: str) -> str:
    """Turn what is said of an item into a question; empty where it would need a ``not``."""
    verb, _, rest = phrase.partition(" ")
    if rest.startswith(("not ", "no ", "only ")) or verb == "cannot":
        return ""
    if verb in ("is", "would", "can"):
        return f"{verb} {item} {rest}?"
    plain = {"has": "have"}.get(verb, verb.removesuffix("s"))
    return f"does {item} {plain} {rest}?"


def _plural(kind: str) -> str:
    return "fish" if kind == "fish" else f"{kind}s"


def _class_pools(side: Side) -> list[str]:
    return [name for name in side.pools if name.startswith("class-")]


def _families(side: Side, name: str) -> list[list[Fact]]:
    """Return the groups of facts within which a family's wrong choices are looked for."""
    if name == "thing":
        return [side.facts(pool) for pool in side.pools if pool.startswith("thing-")]
    if name in DIVIDED:
        return [side.facts(f"family-{name}")]
    return [list(unit.facts) for unit in side.pools["family-whole"] if unit.name == name]


def families(side: Side) -> Iterator[Draft]:
    """Questions from key to value and from value to key."""
    rng = side.rng("family")
    for name, asks in FAMILY_ASKS.items():
        for facts in _families(side, name):
            for task, way, wording in asks:
                if way == "is":
                    continue
                column = 0 if way == "key" else 1
                for number, fact in enumerate(facts):
                    key, value = fact.fields[:2]
                    # A second row about the same fact only where there are words for it.
                    for turn in range(min(2, len(wording))):
                        text = wording[(number + turn) % len(wording)]
                        stem = text.format(k=key, K=capital(key), v=value)
                        wrong = _others(rng, fact, facts, column, 3)
                        # Which way a thing is asked first alternates; the other way comes later.
                        late = turn if (column + number) % 2 else turn + 1
                        yield _row(task, stem, fact, wrong, column, late)


def terms(side: Side) -> Iterator[Draft]:
    """Terms of school science: their meaning, and which one an example shows."""
    rng = side.rng("term")
    for unit in side.pools["term"]:
        for fact in unit.facts:
            term, meaning, example = fact.fields
            rows = (
                ("ARC-Easy", f"Which term fits this description: {meaning}?", 0, 0),
                ("ARC-Easy", f"Which of these best describes {term}?", 1, 0),
                ("ARC-Challenge", f"{example} Which of these is shown here?", 0, 0),
                ("ARC-Challenge", f"A card says: {example} Which term belongs on its back?", 0, 1),
                ("openbookqa", f"A good example of {term} is:", 2, 0),
            )
            for task, stem, column, turn in rows:
                # A sentence in quotes is a student's note, which "A good example" cannot precede.
                if column != 2 or unit.name in pocket_facts.EXAMPLES_STAND_ALONE:
                    wrong = _others(rng, fact, unit.facts, column, 3)
                    yield _row(task, stem, fact, wrong, column, turn)


def effects(side: Side) -> Iterator[Draft]:
    """What follows from what."""
    rng = side.rng("effect")
    for unit in side.pools["effect"]:
        for number, fact in enumerate(unit.facts):
            for turn in range(2):
                text = EFFECT_ASKS[(number + turn) % len(EFFECT_ASKS)]
                wrong = _others(rng, fact, unit.facts, 1, 3)
                yield _row("openbookqa", text.format(cause=fact.fields[0]), fact, wrong, 1, turn)


def sorts(side: Side) -> Iterator[Draft]:
    """Which of four belongs to a group; the other three belong to the opposite one."""
    rng = side.rng("sort")
    for task in ("ARC-Easy", "ARC-Challenge", "openbookqa"):
        facts = side.facts(f"sort-{task}")
        for number, fact in enumerate(facts):
            wrong = [other for other in facts if other.fields[1] == fact.fields[2]]
            ask = "one of these" if rng.random() < 0.3 else "of these"
            stem = f"Which {ask} {fact.fields[1]}?"
            # Every second member comes late, so that no list fills the rows of its task.
            yield _row(task, stem, fact, rng.sample(wrong, 3), 0, number % 2)


def classes(side: Side) -> Iterator[Draft]:
    """Groups of animals: naming one, and finding a second member of it."""
    rng = side.rng("class")
    facts = [fact for pool in _class_pools(side) for fact in side.facts(pool)]
    for number, fact in enumerate(facts):
        animal, kind = fact.fields[:2]
        a = "an" if kind[0] in "aeiou" else "a"
        wrong = _others(rng, fact, facts, 0, 3)
        if number % 2:
            yield _row("ARC-Easy", f"Which of these animals is {a} {kind}?", fact, wrong, 0, 0)
        else:
            wrong = _others(rng, fact, facts, 1, 3)
            choices = tuple(_plural(one.fields[1]) for one in (fact, *wrong))
            ids = frozenset({fact.id, *(one.id for one in wrong)})
            yield Draft("ARC-Easy", f"To which group does {animal} belong?", choices, ids)
        wrong = _others(rng, fact, facts, 0, 3)
        kin = rng.choice([f for f in facts if f.fields[1] == kind and f is not fact])
        stem = f"Which animal belongs to the same group of animals as {kin.fields[0]}?"
        ids = frozenset({fact.id, kin.id, *(one.id for one in wrong)})
        choices = (animal, *(one.fields[0] for one in wrong))
        yield Draft("ARC-Challenge", stem, choices, ids)


def needs(side: Side) -> Iterator[Draft]:
    """A need, and the property that meets it."""
    rng = side.rng("need")
    for unit in side.pools["need"]:
        for fact in unit.facts:
            stem = NEED_ASKS[unit.name].format(k=fact.fields[0])
            yield _row("ARC-Challenge", stem, fact, _others(rng, fact, unit.facts, 1, 3), 1, 0)


def experiments(side: Side) -> Iterator[Draft]:
    """Fair tests: what to change, to measure, to keep and to ignore."""
    rng = side.rng("experiment")
    for fact in side.facts("experiment"):
        question, *parts = fact.fields
        asks = (
            "What should be changed on purpose?",
            "What should be measured?",
            "What must be kept the same to make the test fair?",
            "What has no effect on the test?",
        )
        for ask, right in zip(asks, parts, strict=True):
            name = rng.choice(WOMEN + MEN)
            stem = f"{name} wants to find out {question}. {ask}"
            choices = (right, *(part for part in parts if part != right))
            yield Draft("ARC-Challenge", stem, choices, frozenset({fact.id}))


def chains(side: Side) -> Iterator[Draft]:
    """Food chains: what a loss in the middle does to the neighbors."""
    more, less = "an increase in {}", "a decrease in {}"
    for fact in side.facts("chain"):
        place, a, b, c, d = fact.fields
        head = f"{place.capitalize()}, {a} {{}} eaten by {b}, {b} by {c}, and {c} by {d}."
        head = head.format("is" if a in pocket_facts.UNCOUNTED else "are")
        loss = "If a disease kills nearly all the {},"
        first, later = "what comes first?", "what is a likely result?"
        rows = (
            (c, first, (more.format(b), less.format(b), more.format(a), more.format(d))),
            (b, first, (less.format(c), more.format(c), less.format(a), more.format(d))),
            (b, later, (more.format(a), less.format(a), more.format(c), more.format(d))),
            (c, later, (less.format(d), more.format(d), less.format(b), more.format(a))),
        )
        for lost, ask, choices in rows:
            stem = f"{head} {loss.format(lost)} {ask}"
            yield Draft("ARC-Challenge", stem, choices, frozenset({fact.id}))


def numbers(side: Side) -> Iterator[Draft]:
    """Small sums of school science; test and training never share their numbers."""
    rng = random.Random(f"{SEED}:numbers")
    drafts: list[Draft] = []
    hours = [(hour, speed) for hour in (2, 3, 4, 5) for speed in range(15, 95, 5)]
    for hour, speed in rng.sample(hours, 18):
        way = hour * speed
        ids = frozenset({f"number/speed/{hour}x{speed}"})
        who = rng.choice(("A bus", "A train", "A car"))
        if rng.random() < 0.5:
            stem = f"{who} travels {way} kilometers in {hour} hours. What is its average speed?"
            values = (speed, speed + 10, way - hour, way + hour)
            unit = "kilometers per hour"
        else:
            stem = f"{who} travels {hour} hours at {speed} kilometers per hour. How far is that?"
            values = (way, speed + hour, way + 10, speed - hour)
            unit = "kilometers"
        drafts.append(Draft("ARC-Challenge", stem, tuple(f"{v} {unit}" for v in values), ids))
    degrees = [(low, up, down) for low in range(4, 16) for up in range(6, 13) for down in (3, 4, 5)]
    for low, up, down in rng.sample(degrees, 18):
        stem = (
            f"At dawn it is {low} degrees Celsius. By noon it is {up} degrees warmer, "
            f"and then it cools by {down} degrees until night. How warm is it at night?"
        )
        values = (low + up - down, low + up, low + up + down, low - down if low > down else low)
        ids = frozenset({f"number/degrees/{low}+{up}-{down}"})
        choices = tuple(f"{v} degrees Celsius" for v in values)
        drafts.append(Draft("ARC-Challenge", stem, choices, ids))
    blocks = [(mass, size) for mass in range(20, 100, 10) for size in range(20, 100, 10)]
    for mass, size in rng.sample([pair for pair in blocks if pair[0] != pair[1]], 18):
        stem = (
            f"A block with a mass of {mass} grams takes up {size} cubic centimeters. "
            "What will it do in fresh water, and why?"
        )
        floats = ("float, as it is less dense", "sink, as it is denser")
        odd = ("float, as it is denser", "sink, as it is less dense")
        pair = floats if mass < size else floats[::-1]
        choices = (pair[0], pair[1], *odd)
        ids = frozenset({f"number/block/{mass}/{size}"})
        drafts.append(Draft("ARC-Challenge", stem, choices, ids))
    for number, draft in enumerate(drafts):
        if (number % 4 == 0) == (side.name == "test"):
            yield draft


MAKERS = (social, routines, goals, twins, questions, families, terms, effects, sorts, classes,
          needs, experiments, chains, numbers)  # fmt: skip
